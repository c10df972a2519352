"""What of a transformer learns: what changes at the start, after a step, and nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.lora.files import read_lora
from sana.checkpoints.lora.writing import save_lora
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.errors import InvalidInput
from sana.models.lora import merged
from sana.training.batches import Batch, joined
from sana.training.trainables import (
    ControlSettings,
    ControlTrainable,
    FullTrainable,
    LoraSettings,
    LoraTrainable,
    Trainable,
    chosen_layers,
)

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 4,
    "qk_norm": "rms_norm_across_heads",
}
EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")


@pytest.fixture
def transformer() -> SanaTransformer2DModel:
    torch.manual_seed(3)
    return SanaTransformer2DModel(**CONFIG).train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        latents=torch.randn(3, 4, 4, 4, generator=generator),
        embeds=torch.randn(3, 5, 24, generator=generator),
        mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
        control=torch.randn(3, 4, 4, 4, generator=generator),
    )


TIMES = torch.tensor([900.0, 500.0, 20.0])


@torch.no_grad()  # training and inference go different ways, which are equal up to rounding
def seen(trainable: Trainable, batch: Batch) -> Tensor:
    return trainable.velocity(batch.latents, batch, TIMES)


def plain(transformer: SanaTransformer2DModel, batch: Batch) -> Tensor:
    return seen(FullTrainable(transformer), batch)


def learn(trainable: Trainable, batch: Batch, steps: int, lr: float = 0.05) -> None:
    """Take plain gradient steps towards velocity 0."""
    for _ in range(steps):
        learning = [p for p in trainable.module.parameters() if p.requires_grad]
        loss = trainable.velocity(batch.latents, batch, TIMES).square().mean()
        for parameter, gradient in zip(learning, torch.autograd.grad(loss, learning, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.data -= lr * gradient


@pytest.mark.parametrize("settings", [LoraSettings(), LoraSettings(rank=3, alpha=6.0, targets=EVERYTHING, dora=True)])
def test_a_new_adapter_changes_nothing(
    transformer: SanaTransformer2DModel, batch: Batch, settings: LoraSettings
) -> None:
    before = plain(copy.deepcopy(transformer), batch)
    after = seen(LoraTrainable(transformer, settings, 0), batch)
    # DoRA divides the rows by their own length and multiplies them by it again.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 if settings.dora else 0)


def test_only_the_adapter_learns_and_it_can_be_taken_off(transformer: SanaTransformer2DModel, batch: Batch) -> None:
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    bare = plain(copy.deepcopy(transformer), batch)
    trainable = LoraTrainable(transformer, LoraSettings(targets=EVERYTHING), 0)
    learn(trainable, batch, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())
    assert not torch.equal(seen(trainable, batch), bare)
    with trainable.absent():
        assert torch.equal(seen(trainable, batch), bare)
    assert not torch.equal(seen(trainable, batch), bare)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_of_peft(transformer: SanaTransformer2DModel, batch: Batch, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    theirs = copy.deepcopy(transformer).requires_grad_(False)
    settings = LoraSettings(rank=4, alpha=8.0, targets=EVERYTHING, dora=dora)
    ours = LoraTrainable(transformer, settings, 5)
    for update in ours.updates.values():
        update.up.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=sorted(ours.updates), use_dora=dora)
    wrapped = peft.inject_adapter_in_model(config, theirs)
    for name, update in ours.updates.items():
        layer = wrapped.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(update.down.data)
        layer.lora_B["default"].weight.data.copy_(update.up.data.view_as(layer.lora_B["default"].weight))
    ours.velocity(batch.latents, batch, TIMES).square().mean().backward()  # type: ignore[no-untyped-call]
    plain_loss = wrapped(batch.latents, batch.embeds, TIMES, encoder_attention_mask=batch.mask)[0].square().mean()
    plain_loss.backward()
    for name, update in ours.updates.items():
        layer = wrapped.get_submodule(name)
        for mine, other in ((update.down, layer.lora_A), (update.up, layer.lora_B)):
            expected = other["default"].weight.grad
            assert mine.grad is not None
            scale = float(expected.abs().max()) or 1.0
            torch.testing.assert_close(mine.grad.view_as(expected) / scale, expected / scale, rtol=0, atol=2e-5)


def test_what_was_learnt_survives_the_file_and_merging(
    transformer: SanaTransformer2DModel, batch: Batch, tmp_path: Path
) -> None:
    bare = copy.deepcopy(transformer)
    trainable = LoraTrainable(transformer, LoraSettings(targets=EVERYTHING), 0)
    learn(trainable, batch, 3)
    wanted = seen(trainable, batch)
    save_lora(tmp_path / "a.safetensors", trainable.updates)
    found = read_lora(tmp_path / "a.safetensors", chosen_layers(bare, EVERYTHING))
    for name, update in found.updates.items():
        for kind, tensor in merged(bare.get_submodule(name), [(update, 1.0)], name).items():
            getattr(bare.get_submodule(name), kind).data.copy_(tensor)
    torch.testing.assert_close(plain(bare, batch), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("to_qq",), r"No layer is called 'to_qq'. Did you mean '?to_q"),
        (("conv_depth",), "is a depthwise 3x3 convolution"),
    ],
)
def test_layers_that_cannot_have_an_adapter(
    transformer: SanaTransformer2DModel, targets: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        chosen_layers(transformer, targets)


@pytest.mark.parametrize("wiring", ["diffusers", "native"])
def test_a_new_control_branch_changes_nothing_and_learns_in_the_known_order(
    transformer: SanaTransformer2DModel, batch: Batch, wiring: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    bare = plain(copy.deepcopy(transformer), batch)
    network = SanaControlNetModel.from_transformer(transformer, 2)
    network.wiring = wiring
    trainable = ControlTrainable(transformer, network)
    assert torch.equal(seen(trainable, batch), bare)

    def moved(since: dict[str, Tensor]) -> set[str]:
        return {name.split(".")[0] for name, t in network.state_dict().items() if not torch.equal(t, since[name])}

    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    learn(trainable, batch, 1)
    assert moved(start) == {"controlnet_blocks"}  # what lies behind a zero projection has no gradient yet
    learn(trainable, batch, 1)
    assert moved(start) == {"controlnet_blocks", "transformer_blocks", "input_block"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())
    other = batch.control
    assert other is not None
    steered = seen(trainable, batch)
    assert not torch.equal(steered, bare)
    unsteered = Batch(latents=batch.latents, embeds=batch.embeds, mask=batch.mask, control=other.flip(0))
    assert not torch.equal(seen(trainable, unsteered), steered)


@pytest.mark.parametrize("wiring", ["", "diffusers", "native"])
def test_a_frozen_transformer_may_be_held_in_bfloat16(
    transformer: SanaTransformer2DModel, batch: Batch, wiring: Any
) -> None:
    def made(base: SanaTransformer2DModel) -> Trainable:
        if not wiring:
            return LoraTrainable(base, LoraSettings(targets=EVERYTHING), 0)
        torch.manual_seed(1)
        network = SanaControlNetModel.from_transformer(transformer, 2).float()
        network.wiring = wiring
        return ControlTrainable(base, network)

    wide, narrow = made(copy.deepcopy(transformer)), made(copy.deepcopy(transformer).to(torch.bfloat16))
    expected = wide.velocity(batch.latents, batch, TIMES)
    found = narrow.velocity(batch.latents, batch, TIMES)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()))
    found.float().square().mean().backward()  # type: ignore[no-untyped-call]
    learning = [p for p in narrow.module.parameters() if p.requires_grad and p.grad is not None]
    assert any(bool(p.grad.any()) for p in learning if p.grad is not None)
    assert all(p.dtype == torch.float32 for p in learning)


def test_a_branch_as_long_as_the_transformer_is_refused(transformer: SanaTransformer2DModel) -> None:
    network = SanaControlNetModel(
        **{k: v for k, v in CONFIG.items() if k not in ("out_channels", "num_layers")}, num_layers=4
    )
    with pytest.raises(InvalidInput, match="blocks is 4, but the transformer has only 4 blocks"):
        ControlTrainable(transformer, network)


def test_the_prior_with_the_same_samples_doubles_the_loss(transformer: SanaTransformer2DModel, batch: Batch) -> None:
    alone = Batch(latents=batch.latents, embeds=batch.embeds, mask=batch.mask)
    both = joined(alone, alone, 1.0)
    assert both.weights is not None
    errors = plain(transformer, alone).square().mean((1, 2, 3))
    doubled = (torch.cat([errors, errors]) * both.weights).mean()
    torch.testing.assert_close(doubled, 2 * errors.mean())
    assert both.embeds.shape == (6, 5, 24)


def test_a_prior_weighs_as_it_is_told_whatever_its_size(batch: Batch) -> None:
    few = Batch(latents=batch.latents[:1], embeds=batch.embeds[:1, :2], mask=batch.mask[:1, :2])
    both = joined(Batch(latents=batch.latents, embeds=batch.embeds, mask=batch.mask), few, 0.5)
    assert both.weights is not None
    errors = torch.tensor([1.0, 2.0, 6.0, 10.0])
    assert float((errors * both.weights).mean()) == pytest.approx(3.0 + 0.5 * 10.0)
    assert both.mask[3].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: LoraSettings(rank=0), "lora.rank must lie between 1 and 4096, but is 0"),
        (lambda: LoraSettings(alpha=-1.0), "lora.alpha must not be negative"),
        (lambda: LoraSettings(targets=()), "lora.targets is empty"),
        (lambda: LoraSettings(dialects=()), r"dialects must name each form .* once, and at least one, but is \[\]"),
        (lambda: LoraSettings(dialects=("peft", "peft")), r"but is \['peft', 'peft'\]"),
        (lambda: LoraSettings(dialects=("a1111",)), "knows peft, kohya and comfyui, but not 'a1111'"),
        (lambda: ControlSettings(wiring="other"), "wiring is diffusers or native, but not 'other'"),  # type: ignore[arg-type]
        (lambda: ControlSettings(blocks=0), "blocks must be at least 1, but is 0"),
        (lambda: ControlSettings(dropout=1.0), r"dropout must lie in \[0, 1\), but is 1.0"),
    ],
)
def test_settings_that_cannot_be(made: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        made()
