"""Random adapters for random models: tensors under PEFT's names, as a training would leave them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.lora import targets

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "conv_inverted", "conv_point", "patch_embed.proj", "proj_out", "time_embed.linear")


def random_lora(
    model: nn.Module,
    *,
    rank: int = 4,
    seed: int = 0,
    ends: Sequence[str] = ATTENTION,
    dora: bool = False,
    bias: bool = False,
    prefix: str = "transformer.",
    std: float = 0.2,
) -> dict[str, Tensor]:
    """Return an adapter of every layer whose name ends so."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    for name, target in targets(model).items():
        if not any(name == end or name.endswith(f".{end}") for end in ends):
            continue
        ones = (1, 1) if target.kernel else ()
        made[f"{prefix}{name}.lora_A.weight"] = draw(rank, *target.down_shape[1:])
        made[f"{prefix}{name}.lora_B.weight"] = draw(target.outputs, rank, *ones)
        if bias:
            made[f"{prefix}{name}.lora_B.bias"] = draw(target.outputs)
        if dora:
            length = model.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
            vector = length * (1 + draw(target.outputs))
            made[f"{prefix}{name}.lora_magnitude_vector"] = vector.view(1, -1, 1, 1) if target.kernel else vector
    return made


def velocity(model: Any, seed: int = 0) -> Tensor:
    """Return what the transformer answers to drawn input, float32."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator).to(model.dtype)
    captions = torch.randn(2, 7, config.caption_channels, generator=generator).to(model.dtype)
    guidance = torch.tensor([0.45, 0.45]).to(model.dtype) if config.guidance_embeds else None
    with torch.no_grad():
        out: Tensor = model(
            latents,
            encoder_hidden_states=captions,
            timestep=torch.tensor([500.0, 20.0]),
            guidance=guidance,
            return_dict=False,
        )[0]
    return out.float()


def off(one: Tensor, other: Tensor) -> float:
    """Return the relative root-mean-square difference."""
    return float((one - other).norm() / other.norm())
