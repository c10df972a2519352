"""The control branch of SANA: a copy of a linear DiT's first blocks that turns a control latent into residuals.

Shapes: B batch, C latent channels, H W latent size, h w token grid, N = h * w tokens, D width, T text length, E
text width, L blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana.config import ControlNetConfig, TransformerConfig
from sana.errors import InvalidInput
from sana.models.linear_dit import LinearBlock
from sana.models.outputs import SanaControlNetOutput
from sana.nn.attention import KeyValue, text_bias
from sana.nn.embeddings import CaptionProjection, PatchEmbed, TimeEmbed, position_table
from sana.nn.norms import RMSNorm

WIRINGS = ("diffusers", "native")
"""Ways to join a control network: diffusers' own, and that of the original code (see `LinearDiT.denoise`)."""


class LinearControlNet(nn.Module):
    """Compute the residuals that a `LinearDiT` adds to its tokens.

    The state starts as tokens plus the embedded control behind `input_block`; a projection of every block's output is
    one residual. These projections and `input_block` start at zero, so a new branch changes nothing. Parameter names
    are those of the published checkpoints. Source: ControlNet (Zhang et al. 2023, section 3.1) on the blocks of
    arXiv 2410.10629.

    `forward` is the composition of the pieces for diffusers' wiring: the tokens are the embedded latent. In the
    original's wiring they are what the base's block 0 gives, and no positions are added (see `condition`).
    An engine computes `encode_caption`, `cross_attention_kv` and `condition` once per run, `modulation` once per
    timestep and only `residuals` per step.
    """

    wiring: str = "diffusers"
    """How it is joined to its transformer: one of `WIRINGS`. It is no part of the configuration, for the published
    files do not tell; whoever reads or trains a network knows."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.inner_dim
        block_config = TransformerConfig(**config.to_dict())
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time_embed = TimeEmbed(dim, False)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        self.caption_norm = RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(LinearBlock(block_config) for _ in range(config.num_layers))
        self.input_block = nn.Linear(dim, dim)
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(config.num_layers))
        for parameter in (*self.input_block.parameters(), *self.controlnet_blocks.parameters()):
            nn.init.zeros_(parameter)
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}

    def encode_caption(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project and normalise the text encoder's states: [B, T, E] -> [B, T, D]."""
        out: Tensor = self.caption_norm(self.caption_projection(encoder_hidden_states))
        return out

    def cross_attention_kv(self, caption_BTD: Tensor) -> tuple[KeyValue, ...]:
        """Project an encoded caption to keys and values of every block: [B, T, D] -> per block ([B, A, T, K], same)."""
        return tuple(block.attn2.key_value(caption_BTD) for block in self._blocks())

    def modulation(self, timestep_B: Tensor) -> Tensor:
        """Embed time: [B] -> [B, 6, D]. Errors: InvalidInput for a timestep that is not one-dimensional."""
        if timestep_B.ndim != 1:
            raise InvalidInput(f"timestep has shape {tuple(timestep_B.shape)}; give one value per latent, shape [B].")
        return cast(Tensor, self.time_embed(timestep_B, None, self.caption_norm.weight.dtype)[0])

    def embed(self, latents: Tensor, positions: bool = True) -> Tensor:
        """Turn latents into tokens, [B, C, H, W] -> [B, N, D], with positions where the model has any.

        Errors: InvalidInput for a latent size that the patches do not divide.
        """
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise InvalidInput(f"The latent is {height}x{width}; both sides must be multiples of the patch, {patch}.")
        x: Tensor = self.patch_embed(latents)
        if self.config.interpolation_scale is None or not positions:
            return x
        return (x + self._position_table((height // patch, width // patch), x.device)).to(x.dtype)

    def condition(self, control: Tensor, positions: bool = True) -> Tensor:
        """Embed a control latent, which is the same in all steps: [B, C, H, W] -> [B, N, D].

        The original code never hands its position table to the branch: `positions` is False there.
        """
        return cast(Tensor, self.input_block(self.embed(control, positions)))

    def residuals(
        self,
        tokens_BND: Tensor,
        grid: tuple[int, int],
        modulation_B6D: Tensor,
        kv: Sequence[KeyValue],
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return L residuals [B, N, D] of tokens with the condition added; `mask` [B, T] as in the base."""
        bias = None if mask is None else text_bias(mask, kv[0][1].dtype)
        x, found = tokens_BND, []
        for block, project, block_kv in zip(self._blocks(), self.controlnet_blocks, kv, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, modulation_B6D, block_kv, bias, use_reentrant=False)
            else:
                x = block(x, grid, modulation_B6D, block_kv, bias)
            found.append(project(x))
        return tuple(found)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SanaControlNetOutput | tuple[tuple[Tensor, ...]]:
        """Return L residuals [B, N, D] for latents and control latents [B, C, H, W] under text states [B, T, E].

        `timestep` is [B]. `attention_mask` and `attention_kwargs` belong to the documented signature and change
        nothing. Errors: those of the pieces.
        """
        kv = self.cross_attention_kv(self.encode_caption(encoder_hidden_states))
        tokens = self.embed(hidden_states) + self.condition(controlnet_cond)
        grid = self.grid(hidden_states)
        found = self.residuals(tokens, grid, self.modulation(timestep), kv, encoder_attention_mask)
        output = tuple(residual * conditioning_scale for residual in found)
        return SanaControlNetOutput(controlnet_block_samples=output) if return_dict else (output,)

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Return the token grid (h, w) of latents [B, C, H, W]."""
        height, width = latents.shape[-2:]
        return height // self.config.patch_size, width // self.config.patch_size

    def _blocks(self) -> Iterator[LinearBlock]:
        # One after the other: where memory is small, only the block at hand has weights.
        return iter(self.transformer_blocks)  # type: ignore[arg-type]

    def _position_table(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        key = (*grid, device)
        if key not in self._positions:
            base, scale = self.config.sample_size // self.config.patch_size, self.config.interpolation_scale
            assert scale is not None
            self._positions[key] = position_table(*grid, self.config.inner_dim, base, scale).to(device)
        return self._positions[key]
