"""The control branch of SANA: a copy of a linear DiT's first blocks that turns a control latent into residuals.

Shapes: B batch, C latent channels, H W latent size, h w token grid, N = h * w tokens, D width, T text length, E
text width, L blocks.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sana.config import ControlNetConfig, TransformerConfig
from sana.models.linear_dit import LinearBlock
from sana.models.outputs import SanaControlNetOutput
from sana.nn.attention import text_bias
from sana.nn.embeddings import CaptionProjection, PatchEmbed, TimeEmbed, position_table
from sana.nn.norms import RMSNorm


class LinearControlNet(nn.Module):
    """Compute the residuals that `LinearDiT.denoise` adds after its blocks 1, 2, ...

    The state starts as the embedded latent plus the embedded control behind `input_block`; a projection of every
    block's output is one residual. These projections and `input_block` start at zero, so a new branch changes
    nothing. Parameter names are those of the published checkpoints. Source: ControlNet (Zhang et al. 2023, section
    3.1) on the blocks of arXiv 2410.10629.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
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
        nothing.
        """
        caption = self.caption_norm(self.caption_projection(encoder_hidden_states))
        modulation = self.time_embed(timestep, None, self.input_block.weight.dtype)[0]
        bias = None if encoder_attention_mask is None else text_bias(encoder_attention_mask, caption.dtype)
        height, width = hidden_states.shape[-2:]
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        x = self._embed(hidden_states, grid) + self.input_block(self._embed(controlnet_cond, grid))
        residuals = []
        for block, project in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x = block(x, grid, modulation, block.attn2.key_value(caption), bias)  # type: ignore[operator, union-attr]
            residuals.append(project(x) * conditioning_scale)
        output = tuple(residuals)
        return SanaControlNetOutput(controlnet_block_samples=output) if return_dict else (output,)

    def _embed(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        x: Tensor = self.patch_embed(latents)
        scale = self.config.interpolation_scale
        if scale is None:
            return x
        base = self.config.sample_size // self.config.patch_size
        return (x + position_table(*grid, self.config.inner_dim, base, scale).to(x.device)).to(x.dtype)
