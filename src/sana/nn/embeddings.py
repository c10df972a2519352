"""Embeddings of the transformer's inputs: latent patches, positions, time, guidance and caption.

Shapes: B batch, C latent channels, H W latent size, P patch side, N tokens (H/P * W/P), D width, T text length,
E text width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_DIM = 256


def sinusoid(values_B: Tensor, dim: int = SINUSOID_DIM) -> Tensor:
    """Return [cos(t f), sin(t f)] with f_i = 10000^(-i / (dim/2)) for each scalar: [B] -> float32 [B, dim].

    Float64 stays.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=values_B.device))
    angle = values_B[:, None].to(torch.promote_types(values_B.dtype, torch.float32)) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def position_table(height: int, width: int, dim: int, base: int, scale: float) -> Tensor:
    """Return the sin-cos table of a grid of height * width tokens, float32 [N, D] on the CPU.

    Every grid spans 0 to base / scale along both sides, whatever its shape. The first half of the channels holds the
    column position, the second the row, each as [sin, cos] with frequencies 10000^(-k / (D/4)).
    """
    quarter = dim // 4
    frequency = torch.arange(quarter, dtype=torch.float64, device="cpu").div_(-quarter)
    frequency = torch.pow(10000.0, frequency)

    def axis(count: int) -> Tensor:
        # Rounded to float32 before the angle, as the reference does.
        position = torch.arange(count, dtype=torch.float32, device="cpu") / (count / base) / scale
        angle = position.double()[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1).float()

    rows = axis(height)[:, None].expand(height, width, dim // 2)
    columns = axis(width)[None, :].expand(height, width, dim // 2)
    return torch.cat((columns, rows), dim=-1).view(height * width, dim)


class PatchEmbed(nn.Module):
    """Project non-overlapping patches of the latent to tokens in row order, [B, C, H, W] -> [B, N, D]."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        # The latent has few channels: reordering it, not the wide result, makes the tokens contiguous for free.
        out: Tensor = self.proj(latents.contiguous(memory_format=torch.channels_last))
        return out.permute(0, 2, 3, 1).flatten(1, 2)


class ScalarEmbedding(nn.Module):
    """Embed one scalar per sample: sinusoid, linear, SiLU, linear, [B] -> [B, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_DIM, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, values_B: Tensor, dtype: torch.dtype) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid(values_B).to(dtype))))
        return out


class TimeEmbed(nn.Module):
    """Embed time, and guidance where the model takes it, and derive the six modulation vectors shared by all blocks.

    [B], [B] or None -> modulation [B, 6, D] and embedding [B, D]. Source: AdaLN-single, arXiv 2310.00426.
    """

    def __init__(self, dim: int, guidance: bool) -> None:
        super().__init__()
        # Published files nest the time embedder one level deeper when there is no guidance embedder.
        if guidance:
            self.timestep_embedder = ScalarEmbedding(dim)
            self.guidance_embedder = ScalarEmbedding(dim)
        else:
            self.emb = nn.ModuleDict({"timestep_embedder": ScalarEmbedding(dim)})
        self.guidance = guidance
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if guidance_B is None:
            embedded: Tensor = self.emb["timestep_embedder"](timestep_B, dtype)
        else:
            embedded = self.timestep_embedder(timestep_B, dtype) + self.guidance_embedder(guidance_B, dtype)
        return self.linear(F.silu(embedded)).view(-1, 6, embedded.shape[-1]), embedded


class CaptionProjection(nn.Module):
    """Project the text encoder's states to the width of the transformer, [B, T, E] -> [B, T, D]."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, caption_BTE: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(caption_BTE), approximate="tanh"))
        return out
