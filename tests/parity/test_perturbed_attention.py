"""Perturbed-attention guidance against diffusers' processors where these are right, and a plain formula elsewhere."""

import random
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import PAGCFGSanaLinearAttnProcessor2_0, PAGIdentitySanaLinearAttnProcessor2_0
from torch import Tensor, nn

from sana.config import TransformerConfig
from sana.engine.apart import Apart
from sana.engine.predictor import Captions, Predictor
from sana.errors import InvalidInput
from sana.flow.guidance import guided_velocity, pag_scales
from sana.flow.schedules import flow_dpm_grid
from sana.models.linear_dit import LinearDiT, pag_layers

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 24,
    "sample_size": 8,
}
GRID = flow_dpm_grid(4, 3.0)


def pair(seed: int, **changes: Any) -> tuple[nn.Module, LinearDiT]:
    """Return the reference's transformer and ours with the same random weights, norms and tables included."""
    torch.manual_seed(seed)
    oracle = diffusers.SanaTransformer2DModel(**{**SMALL, **changes}).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ours = LinearDiT(TransformerConfig(**{**SMALL, **changes})).eval()
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


def captions(rows: int, width: int = 24) -> Captions:
    mask = (torch.arange(6) < torch.arange(rows)[:, None] % 3 + 4).long()
    embeds = torch.randn(rows, 6, width, generator=torch.Generator().manual_seed(rows))
    return Captions(embeds=embeds, mask=mask, rows=tuple(range(rows)))


def latents(batch: int) -> Tensor:
    return torch.randn(batch, 4, 6, 4, generator=torch.Generator().manual_seed(5))


def reference_rows(oracle: Any, x: Tensor, i: int, text: Captions, layers: Any, guided: bool) -> Tensor:
    """Return the rows as the reference's pipeline gets them: two or three groups, with processors set per layer."""
    processor = PAGCFGSanaLinearAttnProcessor2_0() if guided else PAGIdentitySanaLinearAttnProcessor2_0()
    before = {layer: oracle.transformer_blocks[layer].attn1.processor for layer in layers}
    batch, groups = len(x), 3 if guided else 2
    rows = [*range(len(text.rows))][-batch * (groups - 1) :]
    rows += rows[-batch:]
    for layer in layers:
        oracle.transformer_blocks[layer].attn1.processor = processor
    try:
        with torch.no_grad():
            told = GRID.timesteps[i].expand(groups * batch)
            return oracle(
                torch.cat([x] * groups), text.embeds[rows], told, encoder_attention_mask=text.mask[rows]
            ).sample
    finally:
        for layer, own in before.items():
            oracle.transformer_blocks[layer].attn1.processor = own


def rms_rel(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def drawn(seed: int) -> tuple[dict[str, Any], tuple[int, ...], int, bool]:
    pick = random.Random(seed)
    changes = {
        "num_layers": pick.choice([1, 3, 5]),
        "patch_size": pick.choice([1, 2]),
        "interpolation_scale": pick.choice([None, 1.5]),
        "attention_bias": pick.random() < 0.3,
        "norm_elementwise_affine": pick.random() < 0.3,
    }
    count = pick.randint(1, changes["num_layers"])
    return changes, tuple(sorted(pick.sample(range(changes["num_layers"]), count))), pick.choice([1, 2]), seed % 2 == 0


@pytest.mark.parametrize("seed", range(10))
def test_rows_equal_the_references_without_qk_norm(seed: int) -> None:
    changes, layers, batch, guided = drawn(seed)
    oracle, ours = pair(seed, **changes)
    text, x = captions(2 * batch if guided else batch), latents(batch)
    predict = Predictor(ours, GRID.timesteps, text, perturbed_layers=layers)
    for i in (0, 3):
        expected = reference_rows(oracle, x, i, text, layers, guided)
        with torch.no_grad():
            found = predict(x, i, guided=guided, perturbed=True)
        assert found.shape == expected.shape
        assert rms_rel(found, expected) < 2e-6
        assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.std()))


def plain_rows(model: LinearDiT, x: Tensor, i: int, text: Captions, layers: Any) -> Tensor:
    """Return the perturbed rows by replacing the attention of some blocks by out(v(x)): no rows, no splitting."""
    before = {layer: model.transformer_blocks[layer].attn1 for layer in layers}

    class Identity(nn.Module):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.to_v, self.to_out = attention.to_v, attention.to_out[0]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.to_out(self.to_v(x))
            return out

    blocks: Any = model.transformer_blocks
    for layer, attention in before.items():
        blocks[layer].attn1 = Identity(attention)
    try:
        with torch.no_grad():
            out: Tensor = model(x, text.embeds, GRID.timesteps[i].expand(len(x)), encoder_attention_mask=text.mask)[0]
            return out
    finally:
        for layer, attention in before.items():
            blocks[layer].attn1 = attention


@pytest.mark.parametrize("qk_norm", ["rms_norm_across_heads", "layer_norm_across_heads", "l2", None])
def test_with_qk_norm_the_reference_forgets_it_and_we_do_not(qk_norm: str | None) -> None:
    """At scale 0 guidance must give the unperturbed prediction; the reference's attention drops the norms there."""
    oracle, ours = pair(0, qk_norm=qk_norm)
    text, x, layers = captions(2), latents(1), (1, 2)
    predict = Predictor(ours, GRID.timesteps, text, perturbed_layers=layers)
    with torch.no_grad():
        plain = predict(x, 0, guided=True)
        found = predict(x, 0, guided=True, perturbed=True)
    reference = reference_rows(oracle, x, 0, text, layers, guided=True)
    one = Captions(embeds=text.embeds[1:], mask=text.mask[1:], rows=(0,))
    assert rms_rel(found[:2], plain) < 1e-6
    assert rms_rel(found[2:], plain_rows(ours, x, 0, one, layers)) < 2e-6
    assert rms_rel(found[2:], plain[1:]) > 1e-3, "the perturbation is there"
    assert rms_rel(reference[2:], found[2:]) < 2e-6, "the perturbed rows have no queries, so no norm"
    if qk_norm is None:
        assert rms_rel(reference[:2], plain) < 2e-6
    else:
        assert rms_rel(reference[:2], plain) > 1e-3


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("scale", "adaptive"), [(3.0, 0.0), (3.0, 0.01)])
def test_the_combination_is_the_references(guided: bool, scale: float, adaptive: float) -> None:
    from diffusers.pipelines.pag.pag_utils import PAGMixin

    oracle, ours = pair(1)
    text, x, layers = captions(2 if guided else 1), latents(1), (2,)
    mixin = PAGMixin()
    mixin.set_pag_applied_layers("transformer_blocks.2")
    mixin._pag_scale, mixin._pag_adaptive_scale = scale, adaptive
    predict = Predictor(ours, GRID.timesteps, text, perturbed_layers=layers)
    strengths = pag_scales(GRID, scale, adaptive)
    velocity = guided_velocity(predict, 4.5 if guided else 1.0, None, strengths)
    assert strengths is not None
    assert (0.0 in strengths) == (adaptive > 0), "a step without any strength is among those with an adaptive scale"
    for i, timestep in enumerate(GRID.timesteps):
        rows = reference_rows(oracle, x, i, text, layers, guided)
        expected = mixin._apply_perturbed_attention_guidance(rows, guided, 4.5, timestep)
        with torch.no_grad():
            assert rms_rel(velocity(x, i), expected) < 5e-6


@pytest.mark.parametrize("layers", [(0,), (1, 3), (3,)])
@pytest.mark.parametrize("guided", [False, True])
def test_one_pass_equals_a_pass_for_each_branch(layers: tuple[int, ...], guided: bool) -> None:
    _, ours = pair(2, qk_norm="rms_norm_across_heads")
    text, x = captions(2 if guided else 1), latents(1)
    both = [kind(ours, GRID.timesteps, text, perturbed_layers=layers) for kind in (Predictor, Apart)]
    with torch.no_grad():
        one, apart = (predict(x, 1, guided=guided, perturbed=True) for predict in both)
        assert rms_rel(apart, one) < 1e-6
        one, apart = (predict(x, 1, guided=guided) for predict in both)
        assert rms_rel(apart, one) < 1e-6


def test_conditional_rows_of_guided_captions_alone() -> None:
    _, ours = pair(3)
    text, x = captions(4), latents(2)
    predict = Predictor(ours, GRID.timesteps, text, perturbed_layers=(1,))
    with torch.no_grad():
        whole, part = predict(x, 2, guided=True, perturbed=True), predict(x, 2, guided=False, perturbed=True)
    assert (len(whole), len(part)) == (6, 4)
    assert rms_rel(part, whole[2:]) < 1e-6
    alone = Captions(embeds=text.embeds[2:], mask=text.mask[2:], rows=(0, 1))
    predict.use(alone)
    with torch.no_grad():
        assert rms_rel(predict(x, 2, guided=False, perturbed=True), part) < 1e-6


LAYERS = {
    "transformer_blocks.1": (1,),
    "transformer_blocks.11": (11,),
    "blocks.0": (0,),
    r"blocks\.1": (1,),
    "blocks.(0|1)": (0, 1),
    "blocks.0.attn1": (0,),
    "blocks.0.attn": (0,),
    "1[0-9]": (10, 11),
    "attn1": tuple(range(12)),
    "transformer_blocks": tuple(range(12)),
    "0": (0,),
}


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(12))


@pytest.mark.parametrize("pattern", LAYERS)
def test_patterns_name_whole_numbers(pattern: str) -> None:
    assert pag_layers(_Blocks(), pattern) == LAYERS[pattern]


def test_the_reference_takes_one_for_ten_and_eleven() -> None:
    oracle, _ = pair(0, num_layers=12)
    mixin: Any = diffusers.pipelines.pag.pag_utils.PAGMixin()
    mixin.transformer = oracle
    mixin.set_pag_applied_layers("transformer_blocks.1", (PAGCFGSanaLinearAttnProcessor2_0(), None))
    mixin._set_pag_attn_processor(["transformer_blocks.1"], True)
    hit = [i for i, block in enumerate(oracle.transformer_blocks) if "PAG" in type(block.attn1.processor).__name__]
    assert hit == [1, 10, 11]
    assert pag_layers(oracle, "transformer_blocks.1") == (1,)


def test_lists_and_misfits() -> None:
    model = _Blocks()
    assert pag_layers(model, ["blocks.3", "blocks.1", "blocks.3"]) == (1, 3)
    assert pag_layers(model, []) == ()
    with pytest.raises(InvalidInput, match=r"Cannot find PAG layer to set attention processor for: blocks\.12"):
        pag_layers(model, ["blocks.1", "blocks.12"])
    with pytest.raises(InvalidInput, match="Expected either a string or a list of string but got type"):
        pag_layers(model, [1])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="no regular expression"):
        pag_layers(model, "blocks.(")


def test_what_cannot_be_perturbed_is_refused() -> None:
    _, ours = pair(0)
    text, x = captions(1), latents(1)
    with pytest.raises(InvalidInput, match="no block 4 to perturb"):
        Predictor(ours, GRID.timesteps, text, perturbed_layers=(4,))(x, 0, guided=False, perturbed=True)
    with pytest.raises(InvalidInput, match="No layer is perturbed"):
        Predictor(ours, GRID.timesteps, text)(x, 0, guided=False, perturbed=True)
