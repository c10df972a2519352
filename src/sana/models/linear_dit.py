"""The linear diffusion transformer of SANA (arXiv 2410.10629).

Shapes: B batch, C latent channels, H W latent size, P patch side, h w token grid (H/P, W/P), N = h * w tokens, D width,
T text length, E text width.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana.config import TransformerConfig
from sana.errors import InvalidInput
from sana.models.outputs import Transformer2DModelOutput
from sana.nn.attention import CrossAttention, KeyValue, LinearSelfAttention, text_bias
from sana.nn.embeddings import CaptionProjection, PatchEmbed, TimeEmbed, position_table
from sana.nn.inference import unhooked
from sana.nn.mixffn import GLUMBConv
from sana.nn.norms import RMSNorm

OUTPUT_NORM_EPS = 1e-6
_NOT_INSIDE_A_NUMBER = "(?:(?<![0-9])|(?![0-9]))"

Branch = Callable[[Tensor], Sequence[Tensor]]
"""A control branch that reads the tokens after block 0, [B, N, D], and gives residuals, [B, N, D] each."""


class Modulation(NamedTuple):
    """What the network takes from time and guidance; it depends on nothing else."""

    mod_B6D: Tensor
    embedded_BD: Tensor


def modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Return x (1 + scale) + shift."""
    return torch.addcmul(shift_B1D, x_BND, 1 + scale_B1D)


def modulated_norm(norm: nn.LayerNorm, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Return norm(x) (1 + scale) + shift; one pass over x where all rows share the modulation."""
    plain = type(norm) is nn.LayerNorm and norm.weight is None and unhooked(norm)
    if plain and len(scale_B1D) == 1 and scale_B1D.dtype == x_BND.dtype:
        return F.layer_norm(x_BND, norm.normalized_shape, 1 + scale_B1D[0, 0], shift_B1D[0, 0], norm.eps)
    return modulate(norm(x_BND), shift_B1D, scale_B1D)


class LinearBlock(nn.Module):
    """Linear self-attention, cross-attention to the caption, convolutional feed-forward, [B, N, D] -> [B, N, D]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=config.norm_eps)
        self.attn1 = LinearSelfAttention(
            dim,
            config.num_attention_heads,
            config.attention_head_dim,
            config.attention_bias,
            config.dropout,
            config.qk_norm,
        )
        self.attn2 = CrossAttention(
            dim, config.num_cross_attention_heads, config.cross_attention_head_dim, config.dropout, config.qk_norm
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=config.norm_elementwise_affine, eps=config.norm_eps)
        self.ff = GLUMBConv(dim, dim, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / math.sqrt(dim))

    def forward(
        self,
        x_BND: Tensor,
        grid: tuple[int, int],
        mod_B6D: Tensor,
        kv: KeyValue,
        bias_B11T: Tensor | None,
        passing: int = 0,
        split: bool = False,
    ) -> Tensor:
        """Run the block; the last `passing` rows skip the self-attention (see there, also for `split`)."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.scale_shift_table + mod_B6D).chunk(6, dim=1)
        normed = modulated_norm(self.norm1, x_BND, shift_a, scale_a)
        attended = self.attn1(normed, passing, split) if passing else self.attn1(normed)
        x = torch.cat([x_BND, x_BND[-passing:]]) if split else x_BND
        x = torch.addcmul(x, gate_a, attended)
        x = x + self.attn2(x, kv, bias_B11T)
        # Tokens in row order are the channels-last image: both views are free of copies.
        image_BhwD = modulated_norm(self.norm2, x, shift_f, scale_f).view(x.shape[0], *grid, -1)
        return torch.addcmul(x, gate_f, self.ff(image_BhwD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2))


class LinearDiT(nn.Module):
    """Predict the velocity of latents under a caption; parameter names are those of the published checkpoints.

    `forward` is the composition of four pieces. An engine that runs many steps computes `encode_caption` and
    `cross_attention_kv` once per prompt, `modulation` once per timestep and only `denoise` per step and latent.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.inner_dim
        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time_embed = TimeEmbed(dim, config.guidance_embeds)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        self.caption_norm = RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(LinearBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / math.sqrt(dim))
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.prediction_channels)
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}

    def encode_caption(self, encoder_hidden_states: Tensor) -> Tensor:
        """Project and normalise the text encoder's states: [B, T, E] -> [B, T, D]."""
        out: Tensor = self.caption_norm(self.caption_projection(encoder_hidden_states))
        return out

    def cross_attention_kv(self, caption_BTD: Tensor) -> tuple[KeyValue, ...]:
        """Project an encoded caption to keys and values of every block: [B, T, D] -> per block ([B, A, T, K], same)."""
        return tuple(block.attn2.key_value(caption_BTD) for block in self._blocks())

    def modulation(self, timestep_B: Tensor, guidance_B: Tensor | None = None) -> Modulation:
        """Embed time, already times `timestep_scale`, and guidance, already times `guidance_embeds_scale`: [B], [B].

        Errors: InvalidInput for a timestep that is not one-dimensional, and for a guidance that the model does not
        take or lacks.
        """
        if timestep_B.ndim != 1:
            raise InvalidInput(f"timestep has shape {tuple(timestep_B.shape)}; give one value per latent, shape [B].")
        if self.config.guidance_embeds != (guidance_B is not None):
            hint = "needs an embedded guidance; pass" if guidance_B is None else "takes no embedded guidance; omit"
            raise InvalidInput(f"This transformer {hint} it (config.guidance_embeds).")
        return Modulation(*self.time_embed(timestep_B, guidance_B, self.scale_shift_table.dtype))

    def denoise(
        self,
        latents: Tensor,
        modulation: Modulation,
        kv: Sequence[KeyValue],
        mask: Tensor | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        *,
        branch: Branch | None = None,
        perturbed_layers: Sequence[int] = (),
        perturbed_rows: int = 0,
    ) -> Tensor:
        """Run the blocks: latents [B, C, H, W] -> velocity [B, C_out, H, W], contiguous.

        Args:
            mask: [B, T], 1 at valid text positions; None means that all are valid.
            controlnet_block_samples: [B, N, D] each, added after blocks 1, 2, ... in turn, as diffusers does it.
            branch: reads the tokens after block 0; its residuals are added after blocks 0, 1, ..., as in the original.
            perturbed_layers: blocks whose self-attention the perturbed rows skip.
            perturbed_rows: that many of the last rows go on twice from the first of these blocks, once as they are and
                once perturbed, so B + perturbed_rows rows come out, the perturbed ones last; `kv` and `mask` hold rows
                for them too. 0 perturbs all rows.

        Errors: InvalidInput for a latent size that the patches do not divide, and for blocks that do not exist.
        """
        layers = self._perturbed(perturbed_layers, modulation)
        x, grid, bias = self._tokens(latents, kv, mask)
        samples: Sequence[Tensor] = controlnet_block_samples or ()
        inner: Sequence[Tensor] = ()
        for index, (block, block_kv) in enumerate(zip(self._blocks(), kv, strict=True)):
            split = perturbed_rows if layers and index == layers[0] else 0
            passing = (perturbed_rows or len(x)) if index in layers else 0
            x = self._run(block, x, grid, modulation.mod_B6D, block_kv, bias, passing, bool(split))
            if branch is not None and index == 0:
                inner = branch(x[: len(x) - split])
            again = perturbed_rows if layers and index >= layers[0] else 0
            x = _steered(x, index, samples, inner, again)
        shift, scale = (self.scale_shift_table + modulation.embedded_BD[:, None]).chunk(2, dim=1)
        x = F.layer_norm(x, x.shape[-1:], eps=OUTPUT_NORM_EPS)
        return self._unpatchify(self.proj_out(modulate(x, shift, scale)), grid)

    def features(
        self,
        latents: Tensor,
        modulation: Modulation,
        kv: Sequence[KeyValue],
        mask: Tensor | None,
        taps: Sequence[int],
        controlnet_block_samples: Sequence[Tensor] | None = None,
        *,
        branch: Branch | None = None,
    ) -> list[Tensor]:
        """Return the tokens after each tapped block, [B, N, D] in rising order; blocks after the last one do not run.

        Residuals of a control branch are as in `denoise`; a tapped block's are in its tokens.
        Errors: InvalidInput for blocks that do not exist, and for a latent size that the patches do not divide.
        """
        count = len(self.transformer_blocks)
        if not taps or not all(0 <= tap < count for tap in taps):
            raise InvalidInput(f"Blocks {list(taps)} cannot be tapped; this transformer has blocks 0 to {count - 1}.")
        x, grid, bias = self._tokens(latents, kv, mask)
        found: list[Tensor] = []
        inner: Sequence[Tensor] = ()
        for index, (block, block_kv) in enumerate(zip(self._blocks(), kv, strict=True)):
            x = self._run(block, x, grid, modulation.mod_B6D, block_kv, bias, 0, False)
            if branch is not None and index == 0:
                inner = branch(x)
            x = _steered(x, index, controlnet_block_samples or (), inner)
            if index in taps:
                found.append(x)
            if index == max(taps):
                break
        return found

    def _tokens(
        self, latents: Tensor, kv: Sequence[KeyValue], mask: Tensor | None
    ) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Return the tokens that enter block 0 [B, N, D], their grid, and the bias of the caption's keys."""
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise InvalidInput(f"The latent is {height}x{width}; both sides must be multiples of the patch, {patch}.")
        grid = (height // patch, width // patch)
        x = self.patch_embed(latents)
        if self.config.interpolation_scale is not None:
            x = (x + self._position_table(grid, x.device)).to(x.dtype)
        return x, grid, None if mask is None else text_bias(mask, kv[0][1].dtype)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity at `timestep` [B] of latents [B, C, H, W] under text states [B, T, E].

        `attention_mask` and `attention_kwargs` belong to the documented signature and change nothing here.
        Errors: those of `modulation` and `denoise`.
        """
        kv = self.cross_attention_kv(self.encode_caption(encoder_hidden_states))
        modulation = self.modulation(timestep, guidance)
        sample = self.denoise(hidden_states, modulation, kv, encoder_attention_mask, controlnet_block_samples)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(
        self,
        block: LinearBlock,
        x: Tensor,
        grid: tuple[int, int],
        mod_B6D: Tensor,
        kv: KeyValue,
        bias: Tensor | None,
        passing: int,
        split: bool,
    ) -> Tensor:
        rows = len(x) + (passing if split else 0)
        if len(kv[0]) > rows:  # the perturbed rows are not there yet
            kv, bias = (kv[0][:rows], kv[1][:rows]), None if bias is None else bias[:rows]
        extra = (passing, split) if passing else ()
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, x, grid, mod_B6D, kv, bias, *extra, use_reentrant=False))
        return cast(Tensor, block(x, grid, mod_B6D, kv, bias, *extra))

    def _perturbed(self, layers: Sequence[int], modulation: Modulation) -> tuple[int, ...]:
        """Return the numbers of perturbed blocks in order, checked."""
        count = len(self.transformer_blocks)
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise InvalidInput(
                f"There is no block {wrong[0]} to perturb; this transformer has blocks 0 to {count - 1}."
            )
        if layers and len(modulation.mod_B6D) != 1:
            raise InvalidInput("Perturbed layers need one timestep for all latents; call once per timestep.")
        return tuple(sorted(set(layers)))

    def _blocks(self) -> Iterator[LinearBlock]:
        # One after the other: where memory is small, only the block at hand has weights.
        return iter(self.transformer_blocks)  # type: ignore[arg-type]

    def _position_table(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        key = (*grid, device)
        if key not in self._positions:
            config = self.config
            base, scale = config.sample_size // config.patch_size, config.interpolation_scale
            assert scale is not None
            self._positions[key] = position_table(*grid, config.inner_dim, base, scale).to(device)
        return self._positions[key]

    def _unpatchify(self, x_BNF: Tensor, grid: tuple[int, int]) -> Tensor:
        patch = self.config.patch_size
        x = x_BNF.view(x_BNF.shape[0], *grid, patch, patch, -1)  # [B, h, w, P, P, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()

    def init_weights(
        self, generator: torch.Generator | None = None, caption_norm_scale: float = 0.01, zero_output: bool = False
    ) -> None:
        """Draw new weights for training from scratch; every parameter is set, on the device where it lies.

        `caption_norm_scale` is the first weight of the caption norm. `zero_output` makes the first prediction 0, so
        that the first loss is known exactly; the published recipe leaves the output projection drawn.
        Source: the recipe of arXiv 2410.10629: Xavier for linear layers, N(0, 0.02) for the layers that embed time and
        caption, N(0, 1/D) for the modulation tables.
        """
        for module in self.modules():
            init_module(module, generator)
        for embedder in (self.time_embed, self.caption_projection):
            for module in embedder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1), generator=generator)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.constant_(self.caption_norm.weight, caption_norm_scale)
        for table in (self.scale_shift_table, *(block.scale_shift_table for block in self._blocks())):
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator)
        if zero_output:
            nn.init.zeros_(self.proj_out.weight)


def _steered(x: Tensor, index: int, samples: Sequence[Tensor], inner: Sequence[Tensor], again: int = 0) -> Tensor:
    """Add what a control branch gives after block `index`: outer residuals lag by one block, inner ones do not."""
    for residuals, at in ((samples, index - 1), (inner, index)):
        if 0 <= at < len(residuals):
            x = x + _with_last_again(residuals[at], again)
    return x


def _with_last_again(residual: Tensor, rows: int) -> Tensor:
    """Return a residual for the perturbed rows, too; one row serves all."""
    return torch.cat([residual, residual[-rows:]]) if rows and len(residual) > 1 else residual


def pag_layers(transformer: nn.Module, patterns: str | Sequence[str]) -> tuple[int, ...]:
    """Return the blocks whose self-attention a pattern names, such as "transformer_blocks.8" or "blocks.(0|1)".

    A pattern is a regular expression that is looked for in the names `transformer_blocks.<i>.attn1`. A number in it is
    a whole number: "blocks.1" is not block 10.
    Errors: InvalidInput for what is no pattern, and for one that names no block.
    """
    found: set[int] = set()
    names = {
        f"transformer_blocks.{i}.attn1": i for i in range(len(cast(nn.ModuleList, transformer.transformer_blocks)))
    }
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        if not isinstance(pattern, str):
            raise InvalidInput(f"Expected either a string or a list of string but got type {type(pattern)}")
        try:
            whole = re.compile(f"{_NOT_INSIDE_A_NUMBER}(?:{pattern}){_NOT_INSIDE_A_NUMBER}")
        except re.error as error:
            raise InvalidInput(f"The PAG layer {pattern!r} is no regular expression: {error}.") from error
        blocks = {i for name, i in names.items() if whole.search(name)}
        if not blocks:
            hint = f"Name one of the {len(names)} blocks, from 'transformer_blocks.0' on."
            raise InvalidInput(f"Cannot find PAG layer to set attention processor for: {pattern}. {hint}")
        found |= blocks
    return tuple(sorted(found))


def init_module(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the weights of a single layer as for training from scratch; containers are left to their layers."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        if module.bias is not None:
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    elif isinstance(module, RMSNorm | nn.LayerNorm):
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.constant_(parameter, float(name == "weight"))
