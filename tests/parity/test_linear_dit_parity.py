"""The transformer against diffusers' SanaTransformer2DModel with the same weights."""

import random
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sana.cards import CARDS
from sana.config import TransformerConfig
from sana.models.linear_dit import LinearDiT

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 10,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "sample_size": 8,
}
QK_NORMS = [None, "rms_norm_across_heads", "layer_norm_across_heads", "l2"]
NAMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"qk_norm": "rms_norm_across_heads"},
    "layer norm": {"qk_norm": "layer_norm_across_heads"},
    "l2": {"qk_norm": "l2"},
    "sprint": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    "teacher": {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001},
    "patch": {"patch_size": 2},
    "patch, positions": {"patch_size": 2, "interpolation_scale": 2.0, "grid": (12, 8)},
    "positions": {"interpolation_scale": 1.0},
    "positions, other square": {"interpolation_scale": 2.0, "grid": (6, 6)},
    "positions, wide": {"interpolation_scale": 1.5, "grid": (5, 9)},
    "no mask": {"masked": False},
    "one control sample": {"controls": 1},
    "all control samples": {"controls": 2},
    "more control samples than blocks": {"controls": 5},
    "bias": {"attention_bias": True},
    "affine": {"norm_elementwise_affine": True, "norm_eps": 1e-3},
    "twice the channels out": {"out_channels": 8},
    "channels out as in": {"out_channels": None},
    "mlp ratio": {"mlp_ratio": 1.7},
    "dropout is off in eval": {"dropout": 0.5},
}


def drawn(seed: int) -> dict[str, Any]:
    """Draw a configuration and a call from everything the model offers."""
    pick = random.Random(seed)
    head_dim, heads = pick.choice([8, 16, 32]), pick.choice([1, 2, 3])
    patch = pick.choice([1, 1, 2])
    return {
        "in_channels": pick.choice([3, 4, 32]),
        "out_channels": pick.choice([None, 4, 8]),
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "cross_attention_dim": head_dim * heads,
        "num_cross_attention_heads": pick.choice([1, 3]),
        "cross_attention_head_dim": pick.choice([6, 16]),
        "num_layers": pick.choice([1, 2, 4]),
        "caption_channels": pick.choice([5, 24]),
        "mlp_ratio": pick.choice([1.0, 2.5, 3.3]),
        "patch_size": patch,
        "attention_bias": pick.random() < 0.3,
        "norm_elementwise_affine": pick.random() < 0.3,
        "interpolation_scale": pick.choice([None, 0.5, 2.0]),
        "guidance_embeds": pick.random() < 0.3,
        "qk_norm": pick.choice(QK_NORMS),
        "grid": (patch * pick.randint(1, 9), patch * pick.randint(1, 9)),
        "masked": pick.random() < 0.7,
        "controls": pick.choice([0, 0, 3]),
    }


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value that keeps activations near unit size, norms and tables included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name and name.endswith("weight")) + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise if "table" in name else noise / parameter[0].numel() ** 0.5)


def pair(options: dict[str, Any]) -> tuple[nn.Module, LinearDiT]:
    oracle = diffusers.SanaTransformer2DModel(**options).eval()
    redraw(oracle)
    model = LinearDiT(TransformerConfig(**options)).eval()
    model.load_state_dict(oracle.state_dict())
    return oracle, model


def make(case: dict[str, Any]) -> tuple[nn.Module, LinearDiT, dict[str, Any]]:
    """Return the oracle, our model and the arguments of a call."""
    case = {"grid": (8, 8), "masked": True, "controls": 0, **SMALL, **case}
    grid, masked, controls = case.pop("grid"), case.pop("masked"), case.pop("controls")
    oracle, model = pair(case)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    tokens = grid[0] * grid[1] // config.patch_size**2
    call: dict[str, Any] = {
        "hidden_states": torch.randn(2, config.in_channels, *grid, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, config.caption_channels, generator=generator),
        "timestep": torch.tensor([3.0, 801.0]) * config.timestep_scale,
    }
    if config.guidance_embeds:
        call["guidance"] = torch.tensor([0.45, 0.1])
    if masked:
        call["encoder_attention_mask"] = (torch.arange(7) < torch.tensor([[7], [3]])).float()
    if controls:
        samples = [torch.randn(2, tokens, config.inner_dim, generator=generator) for _ in range(controls)]
        call["controlnet_block_samples"] = tuple(samples)
    return oracle, model, call


def rms_rel(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def check_forward(case: dict[str, Any]) -> None:
    oracle, model, call = make(case)
    with torch.no_grad():
        expected, found = oracle(**call).sample, model(**call).sample
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert rms_rel(found, expected) < 2e-6
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED)
def test_forward(case: dict[str, Any]) -> None:
    check_forward(case)


@pytest.mark.parametrize("seed", range(24))
def test_forward_of_drawn_configurations(seed: int) -> None:
    check_forward(drawn(seed))


def test_integer_timesteps() -> None:
    oracle, model, call = make({})
    call["timestep"] = torch.tensor([0, 999])
    with torch.no_grad():
        assert rms_rel(model(**call).sample, oracle(**call).sample) < 2e-6


def test_tuple_return() -> None:
    oracle, model, call = make({})
    with torch.no_grad():
        expected, found = oracle(**call, return_dict=False), model(**call, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(expected) == 1
    assert rms_rel(found[0], expected[0]) < 2e-6


@pytest.mark.parametrize(
    "case",
    [{}, {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True, "interpolation_scale": 1.0}, {"qk_norm": "l2"}],
    ids=["plain", "sprint with positions", "l2"],
)
def test_gradients_of_inputs_and_parameters(case: dict[str, Any]) -> None:
    # Heads of 32 as published: narrow random heads give normalisers near 0, whose gradients no float32 agrees on.
    wide = {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64}
    oracle, model, call = make({**wide, **case, "controls": 2})
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 4, 8, 8, generator=generator)
    gradients = []
    for network in (oracle, model):
        leaves = {name: call[name].clone().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
        leaves["control"] = call["controlnet_block_samples"][0].clone().requires_grad_()
        samples = (leaves["control"], *call["controlnet_block_samples"][1:])
        inputs = {name: leaf for name, leaf in leaves.items() if name != "control"}
        out = network(**{**call, **inputs, "controlnet_block_samples": samples}).sample
        (out * weight).sum().backward()
        gradients.append({**leaves, **dict(network.named_parameters())})
    assert gradients[0].keys() == gradients[1].keys()
    # Softmax ignores an offset of its scores: the bias of to_k has no gradient but rounding, hence the floor.
    floor = 1e-2 * max(float(leaf.grad.norm()) for leaf in gradients[0].values())
    for name, expected in gradients[0].items():
        error = (gradients[1][name].grad - expected.grad).norm()
        assert error < 1e-5 * max(float(expected.grad.norm()), floor), name


@pytest.mark.parametrize(("dtype", "gate"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("case", [{}, {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}])
def test_half_precision_is_no_worse_than_the_oracle(case: dict[str, Any], dtype: torch.dtype, gate: float) -> None:
    wide = {"num_attention_heads": 8, "attention_head_dim": 32, "cross_attention_dim": 256, "in_channels": 8}
    oracle, model, call = make({**wide, **case})
    with torch.no_grad():
        exact = oracle(**call).sample
        half = {name: value.to(dtype) if name != "timestep" else value for name, value in call.items()}
        expected, found = oracle.to(dtype)(**half).sample, model.to(dtype)(**half).sample
    assert found.dtype == dtype
    assert rms_rel(found, expected) < gate
    assert rms_rel(found, exact) < 1.2 * rms_rel(expected, exact)


def test_fp16_clips_where_the_oracle_clips() -> None:
    oracle, model, _ = make({})
    with torch.no_grad():
        for network in (oracle.half(), model.half()):
            network.transformer_blocks[1].attn1.to_out[0].bias.fill_(60000).mul_(1.05)
            network.transformer_blocks[1].attn1.to_out[0].weight.mul_(3e4)
        x = torch.randn(2, 64, 24).half()
        expected, found = oracle.transformer_blocks[1].attn1(x), model.transformer_blocks[1].attn1(x)
    assert expected.abs().max() == 65504
    assert torch.equal(found.abs() == 65504, expected.abs() == 65504)


def test_position_table_is_the_oracles() -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    from sana.nn.embeddings import position_table

    for grid, base, scale in (((8, 8), 8, 1.0), ((40, 96), 64, 1.0), ((128, 128), 128, 2.0), ((5, 9), 8, 1.5)):
        expected = get_2d_sincos_pos_embed(
            64, grid, base_size=base, interpolation_scale=scale, output_type="pt", device=torch.device("cpu")
        )
        assert torch.equal(position_table(*grid, 64, base, scale), expected.float())


def parameters_of(card: str, layers: int) -> dict[str, Any]:
    return {**CARDS[card].transformer.to_dict(), "num_layers": layers}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("card", "layers"), [("sana-0.6b-512", 28), ("sana1.5-1.6b-1024", 2), ("sana-sprint-1.6b-1024", 2)]
)
def test_full_width(card: str, layers: int) -> None:
    oracle, model = pair(parameters_of(card, layers))
    generator = torch.Generator().manual_seed(1)
    call = {
        "hidden_states": torch.randn(1, 32, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 300, 2304, generator=generator),
        "timestep": torch.tensor([500.0]),
        "guidance": torch.tensor([0.45]) if model.config.guidance_embeds else None,
        "encoder_attention_mask": (torch.arange(300) < 40)[None].float(),
    }
    with torch.no_grad():
        expected, found = oracle(**call).sample, model(**call).sample
    assert rms_rel(found, expected) < 2e-6
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.std()))
