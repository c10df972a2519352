"""The control branch: published names, the reference's numbers, and that a new one changes nothing."""

import hashlib

import diffusers
import pytest
import torch

from sana.config import ControlNetConfig, TransformerConfig
from sana.models.controlnet import LinearControlNet
from sana.models.linear_dit import LinearDiT

PUBLISHED = {
    "0.6B": ((36, 16, 72, 1152), 168_765_696, "33de893ef612fcda"),
    "1.6B": ((70, 20, 112, 2240), 631_576_960, "97e521c66e3a0d7d"),
}
SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 24,
    "sample_size": 8,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_are_the_published_ones(name: str) -> None:
    (heads, cross_heads, cross_width, width), parameters, manifest = PUBLISHED[name]
    config = ControlNetConfig(
        num_attention_heads=heads,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=cross_width,
        cross_attention_dim=width,
    )
    with torch.device("meta"):
        state = LinearControlNet(config).state_dict()
    lines = [f"{key}:{'x'.join(str(side) for side in tensor.shape)}" for key, tensor in sorted(state.items())]
    assert len(state) == 162
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == manifest


@pytest.mark.parametrize("changes", [{}, {"interpolation_scale": 1.5}, {"patch_size": 2}, {"attention_bias": True}])
def test_the_residuals_are_the_references(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    ours = LinearControlNet(ControlNetConfig.from_dict({**SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs = diffusers.SanaControlNetModel(**{**SMALL, **changes}).eval()
    theirs.load_state_dict(ours.state_dict())
    latents, control = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    text, mask = torch.randn(2, 5, 24), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    given = {"timestep": torch.tensor([3.0, 700.0]), "controlnet_cond": control, "conditioning_scale": 0.7}
    with torch.no_grad():
        mine = ours(latents, text, encoder_attention_mask=mask, **given).controlnet_block_samples
        other = theirs(latents, text, encoder_attention_mask=mask, **given).controlnet_block_samples
    assert len(mine) == len(other) == 3
    for a, b in zip(mine, other, strict=True):
        assert (a - b).square().mean().sqrt() <= 2e-6 * b.square().mean().sqrt()


def test_a_new_branch_changes_nothing() -> None:
    torch.manual_seed(0)
    branch, base = LinearControlNet(ControlNetConfig.from_dict(SMALL)), LinearDiT(TransformerConfig.from_dict(SMALL))
    latents, text, time = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.tensor([500.0])
    with torch.no_grad():
        residuals = branch(latents, text, time, latents, return_dict=False)[0]
        plain = base(latents, text, time)[0]
        controlled = base(latents, text, time, controlnet_block_samples=residuals)[0]
    assert torch.equal(plain, controlled)
