"""What the transformer promises beyond parity: pieces, masks, shapes, training, errors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sana.models.linear_dit as linear_dit
from sana.config import TransformerConfig
from sana.errors import InvalidInput
from sana.models.linear_dit import LinearDiT

TINY = TransformerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=32,
    caption_channels=12,
    sample_size=8,
)
SPRINT = replace(TINY, guidance_embeds=True, qk_norm="rms_norm_across_heads", interpolation_scale=1.0)
LENGTHS = torch.tensor([7, 3])


def build(config: TransformerConfig = TINY, seed: int = 0) -> LinearDiT:
    model = LinearDiT(config).eval()
    model.init_weights(torch.Generator().manual_seed(seed), caption_norm_scale=1.0)
    return model


def arguments(config: TransformerConfig = TINY, grid: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(2, 4, *grid, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 12, generator=generator),
        "timestep": torch.tensor([30.0, 700.0]),
        "encoder_attention_mask": (torch.arange(7) < LENGTHS[:, None]).long(),
    }
    return {**call, "guidance": torch.tensor([0.45, 0.2])} if config.guidance_embeds else call


def close(value: Tensor, reference: Tensor, gate: float = 2e-6) -> bool:
    return float((value - reference).norm() / reference.norm()) < gate


@pytest.mark.parametrize("config", [TINY, SPRINT, replace(TINY, patch_size=2)], ids=["plain", "sprint", "patch"])
def test_the_pieces_compose_to_forward(config: TransformerConfig) -> None:
    model, call = build(config), arguments(config)
    controls = [torch.randn(2, 64 // config.patch_size**2, 32)]
    with torch.no_grad():
        whole = model(**call, controlnet_block_samples=controls).sample
        kv = model.cross_attention_kv(model.encode_caption(call["encoder_hidden_states"]))
        modulation = model.modulation(call["timestep"], call.get("guidance"))
        parts = model.denoise(call["hidden_states"], modulation, kv, call["encoder_attention_mask"], controls)
    assert len(kv) == config.num_layers
    assert kv[0][0].shape == kv[0][1].shape == (2, 2, 7, 8)
    assert modulation.mod_B6D.shape == (2, 6, 32)
    assert modulation.embedded_BD.shape == (2, 32)
    assert torch.equal(parts, whole)


def test_masked_padding_is_absent() -> None:
    model, call = build(), arguments()
    noisy = call["encoder_hidden_states"].clone()
    noisy[1, 3:] = 1e3
    with torch.no_grad():
        padded = model(**call).sample
        other_padding = model(**{**call, "encoder_hidden_states": noisy}).sample
        for row, length in enumerate(LENGTHS.tolist()):
            one = {name: value[row : row + 1] for name, value in call.items() if name != "encoder_attention_mask"}
            one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :length]
            assert close(padded[row : row + 1], model(**one).sample)
    assert torch.equal(padded, other_padding)


def test_mask_semantics() -> None:
    model, call = build(), arguments()
    del call["encoder_attention_mask"]
    with torch.no_grad():
        free = model(**call).sample
        for mask in (torch.ones(2, 7), torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7)):
            # All keys masked is read as none masked: -10000 on every score changes no softmax.
            assert close(model(**call, encoder_attention_mask=mask).sample, free)
        mask = arguments()["encoder_attention_mask"]
        bias = (1 - mask[:, None].float()) * -10000
        masked = model(**call, encoder_attention_mask=mask).sample
        assert close(model(**call, encoder_attention_mask=bias).sample, masked)
    assert not close(masked, free, 1e-3)


def test_control_samples_enter_after_blocks_one_and_two() -> None:
    model, call = build(), arguments()
    inputs: list[Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    samples = [torch.full((2, 64, 32), value) for value in (1.0, 10.0, 100.0)]
    with torch.no_grad():
        model(**call)
        model(**call, controlnet_block_samples=samples)
    plain, controlled = inputs[:3], inputs[3:]
    assert torch.equal(controlled[0], plain[0])
    assert torch.equal(controlled[1], plain[1])
    assert close(controlled[2], plain[2] + 1.0)


@pytest.mark.parametrize("grid", [(8, 8), (1, 1), (3, 10)])
@pytest.mark.parametrize("config", [TINY, replace(TINY, out_channels=6), replace(TINY, out_channels=None)])
def test_output_shape(config: TransformerConfig, grid: tuple[int, int]) -> None:
    with torch.no_grad():
        sample = build(config)(**arguments(grid=grid)).sample
    assert sample.shape == (2, config.out_channels or 4, *grid)
    assert sample.is_contiguous()
    assert torch.isfinite(sample).all()


def test_rows_of_a_batch_are_independent() -> None:
    model, call = build(SPRINT), arguments(SPRINT)
    with torch.no_grad():
        both = model(**call).sample
        alone = model(**{name: value[1:] for name, value in call.items()}).sample
    assert close(both[1:], alone)


def test_position_table_is_computed_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    original = linear_dit.position_table

    def counted(height: int, width: int, *rest: Any) -> Tensor:
        made.append((height, width))
        return original(height, width, *rest)

    monkeypatch.setattr(linear_dit, "position_table", counted)
    model = build(replace(TINY, interpolation_scale=2.0))
    with torch.no_grad():
        for grid in ((8, 8), (4, 12), (8, 8), (4, 12)):
            model(**arguments(grid=grid))
    assert made == [(8, 8), (4, 12)]
    assert all("pos" not in name for name in model.state_dict())


def test_positions_stay_float32_in_half_precision() -> None:
    model = build(replace(TINY, interpolation_scale=1.0)).bfloat16()
    call = arguments()
    with torch.no_grad():
        model(**{name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()})
    assert [table.dtype for table in model._positions.values()] == [torch.float32]


def test_feed_forward_sees_a_channels_last_view() -> None:
    model = build()
    seen: list[tuple[bool, int]] = []
    ff = model.transformer_blocks[0].ff
    ff.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].is_contiguous(memory_format=torch.channels_last), args[0].shape[1]))
    )
    ff.register_forward_hook(
        lambda _, args, out: seen.append((out.is_contiguous(memory_format=torch.channels_last), out.shape[1]))
    )
    with torch.no_grad():
        model(**arguments(grid=(5, 6)))
    assert seen == [(True, 32), (True, 32)]


def test_gradient_checkpointing_changes_no_number() -> None:
    results = []
    for flag in (False, True):
        model = build(SPRINT).train()
        model.gradient_checkpointing = flag
        model(**arguments(SPRINT)).sample.square().mean().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, results[1][name]), name


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    def saved(flag: bool) -> int:
        model = build().train()
        model.gradient_checkpointing = flag
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**arguments())
        return sum(sizes)

    assert saved(True) < 0.3 * saved(False)


def test_every_parameter_learns_under_autocast() -> None:
    model, call = build(SPRINT).train(), arguments(SPRINT)
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(**call).sample
        loss = (sample.float() - call["hidden_states"]).square().mean()
    loss.backward()
    assert sample.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # Softmax ignores an offset of its scores, so a bias of the keys without norm would be the only idle one.
        assert parameter.grad.abs().max() > 0, name


def test_autocast_is_close_to_float32() -> None:
    model, call = build(SPRINT), arguments(SPRINT)
    with torch.no_grad():
        exact = model(**call).sample
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**call).sample
    assert close(rounded.float(), exact, 2e-2)


def test_dropout_acts_in_training_only() -> None:
    model, call = build(replace(TINY, dropout=0.5)), arguments()
    with torch.no_grad():
        assert torch.equal(model(**call).sample, model(**call).sample)
        model.train()
        assert not torch.equal(model(**call).sample, model(**call).sample)


@pytest.mark.parametrize("config", [TINY, SPRINT], ids=["plain", "sprint"])
def test_no_graph_break_and_no_data_dependence(config: TransformerConfig) -> None:
    model, call = build(config), arguments(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(**call).sample, model(**call).sample)
    torch.compiler.reset()


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LinearDiT(SPRINT)
    call = {name: value.to("meta") for name, value in arguments(SPRINT).items()}
    assert model(**call).sample.shape == (2, 4, 8, 8)


def test_guidance_is_an_input_only_where_embedded() -> None:
    with torch.no_grad():
        model, call = build(SPRINT), arguments(SPRINT)
        stronger = {**call, "guidance": call["guidance"] * 2}
        assert not close(model(**stronger).sample, model(**call).sample, 1e-4)
        with pytest.raises(InvalidInput, match="needs an embedded guidance"):
            model(**{**call, "guidance": None})
        with pytest.raises(InvalidInput, match="takes no embedded guidance"):
            build()(**arguments(), guidance=torch.tensor([0.45, 0.2]))


@pytest.mark.parametrize("timestep", [torch.tensor(5.0), torch.zeros(2, 1)])
def test_timestep_is_a_vector(timestep: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"timestep has shape .* shape \[B\]"):
        build()(**{**arguments(), "timestep": timestep})


def test_latent_must_divide_into_patches() -> None:
    with pytest.raises(InvalidInput, match="7x8; both sides must be multiples of the patch, 2"):
        build(replace(TINY, patch_size=2))(**arguments(grid=(7, 8)))


def test_initial_weights() -> None:
    config = replace(
        TINY, num_attention_heads=16, cross_attention_dim=256, num_layers=2, qk_norm="layer_norm_across_heads"
    )
    model = LinearDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    block = model.transformer_blocks[1]
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    for linear in (block.attn1.to_q, block.attn2.to_v, model.proj_out):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    for linear in (model.time_embed.linear, model.caption_projection.linear_2):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert not module.bias.any()
    assert block.scale_shift_table.std().item() == pytest.approx(1 / 16, rel=0.1)
    assert model.scale_shift_table.std().item() == pytest.approx(1 / 16, rel=0.1)
    assert torch.equal(model.caption_norm.weight, torch.full((256,), 0.01))
    assert torch.equal(block.attn1.norm_q.weight, torch.ones(256))
    assert torch.equal(block.attn1.norm_q.bias, torch.zeros(256))


def test_initial_weights_follow_the_generator() -> None:
    first, again, other = build(seed=3), build(seed=3), build(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


def test_zero_output_predicts_zero() -> None:
    model = LinearDiT(TINY)
    model.init_weights(torch.Generator().manual_seed(0), zero_output=True)
    with torch.no_grad():
        assert not model(**arguments()).sample.any()
