"""`SanaControlNetModel`: folders both ways, a fresh branch from a base, gradient checkpointing."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana import SanaTransformer2DModel
from sana.checkpoints.controlnet import WIRING_KEY, SanaControlNetModel
from sana.checkpoints.layout import read_json
from sana.checkpoints.storage import write_json
from sana.errors import CheckpointError, InvalidInput
from tiny_model import lively, tiny_transformer

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "sample_size": 8,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branch(**changes: Any) -> SanaControlNetModel:
    """A branch whose projections are not zero."""
    torch.manual_seed(4)
    model: SanaControlNetModel = lively(SanaControlNetModel(**{**SMALL, **changes}), 4)
    with torch.no_grad():
        for layer in (model.input_block, *model.controlnet_blocks):
            layer.weight.copy_(0.2 * torch.randn(layer.weight.shape))  # type: ignore[union-attr]
    return model


def call() -> dict[str, Any]:
    return {
        "hidden_states": random(2, 4, 4, 6),
        "encoder_hidden_states": random(2, 5, 32, seed=1),
        "timestep": torch.tensor([3.0, 700.0]),
        "controlnet_cond": random(2, 4, 4, 6, seed=2),
    }


def test_the_reference_reads_what_we_save_and_we_read_what_it_saves(tmp_path: Path) -> None:
    ours = branch()
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.SanaControlNetModel.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = SanaControlNetModel.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected, other, mine = (model(**call()).controlnet_block_samples for model in (ours, theirs, again))
    for a, b, c in zip(expected, other, mine, strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(a, b, atol=1e-5)
    assert again.config["num_layers"] == 2
    assert "qk_norm" not in (tmp_path / "ours" / "config.json").read_text()
    assert dict(ours.config).keys() == {key for key in theirs.config if not key.startswith("_")}


def test_a_branch_with_norms_of_queries_and_keys_is_saved_too(tmp_path: Path) -> None:
    ours = branch(qk_norm="rms_norm_across_heads")
    ours.save_pretrained(tmp_path)
    again = SanaControlNetModel.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert again.config.qk_norm == "rms_norm_across_heads"
    assert again.state_dict().keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}, {"patch_size": 2, "interpolation_scale": 1.0}],
    ids=["plain", "sprint", "positions"],
)
def test_a_fresh_branch_is_a_copy_that_changes_nothing(changes: dict[str, Any]) -> None:
    base = tiny_transformer(num_layers=4, **changes)
    fresh = SanaControlNetModel.from_transformer(base, num_layers=3)
    assert fresh.config.num_layers == 3
    state, own = base.state_dict(), fresh.state_dict()
    for name, tensor in own.items():
        if name.startswith(("input_block.", "controlnet_blocks.")):
            assert not tensor.any(), name
        else:
            source = name if name in state else name.replace("time_embed.emb.", "time_embed.")
            assert torch.equal(tensor, state[source]), name
    assert not {p.data_ptr() for p in fresh.parameters()} & {p.data_ptr() for p in base.parameters()}
    given: dict[str, Any] = call()
    with torch.no_grad():
        samples = fresh(**given).controlnet_block_samples
        given.pop("controlnet_cond")
        guidance = torch.ones(2) if base.config.guidance_embeds else None
        assert torch.equal(
            base(**given, guidance=guidance, controlnet_block_samples=samples).sample,
            base(**given, guidance=guidance).sample,
        )


def test_a_fresh_branch_has_the_dtype_and_mode_of_its_base() -> None:
    base = tiny_transformer(num_layers=3).to(torch.bfloat16).train()
    fresh = SanaControlNetModel.from_transformer(base, num_layers=1)
    assert fresh.dtype == torch.bfloat16
    assert fresh.training
    assert not SanaControlNetModel.from_transformer(base.eval(), num_layers=1).training


@pytest.mark.parametrize("count", [0, 2, 7])
def test_more_blocks_than_the_base_can_be_steered_at_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match="takes residuals of 1 to 1"):
        SanaControlNetModel.from_transformer(tiny_transformer(), num_layers=count)


def test_checkpointed_gradients_are_the_plain_ones() -> None:
    model = branch()
    gradients = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        sum(sample.square().sum() for sample in model(**call()).controlnet_block_samples).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert model.is_gradient_checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-4), name


def test_checkpointing_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.models import controlnet

    calls: list[object] = []
    plain = controlnet.checkpoint
    monkeypatch.setattr(controlnet, "checkpoint", lambda *a, **k: calls.append(a) or plain(*a, **k))
    model = branch()
    model.enable_gradient_checkpointing()
    model(**call())
    assert len(calls) == 2
    with torch.no_grad():
        model(**call())
    assert len(calls) == 2


def test_misfits_are_refused() -> None:
    model = branch(patch_size=2)
    with pytest.raises(InvalidInput, match="multiples of the patch"):
        model(**{**call(), "hidden_states": random(2, 4, 3, 6)})
    with pytest.raises(InvalidInput, match="one value per latent"):
        model(**{**call(), "timestep": torch.tensor(3.0)})
    with pytest.raises(InvalidInput, match="no argument 'layers'"):
        SanaControlNetModel(layers=3)


def test_a_folder_of_the_transformer_is_not_taken(tmp_path: Path) -> None:
    SanaTransformer2DModel(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not of SanaControlNetModel"):
        SanaControlNetModel.from_pretrained(tmp_path)


def test_a_folder_notes_how_its_network_is_joined_and_other_readers_skip_the_note(tmp_path: Path) -> None:
    model = branch()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert WIRING_KEY not in read_json(file)
    assert SanaControlNetModel.from_pretrained(tmp_path).wiring == "diffusers"
    model.wiring = "native"
    model.save_pretrained(tmp_path)
    assert SanaControlNetModel.from_pretrained(tmp_path).wiring == "native"
    for reader in (SanaControlNetModel, diffusers.SanaControlNetModel):
        again = reader.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    write_json(file, {**read_json(file), WIRING_KEY: "crossed"})
    with pytest.raises(CheckpointError, match="is 'crossed'; it can be diffusers or native"):
        SanaControlNetModel.from_pretrained(tmp_path)
