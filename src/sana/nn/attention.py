"""The two attentions of the linear diffusion transformer.

Shapes: B batch, N tokens, D width, T text length, A heads, K head width.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.norms import RMSNorm

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of the caption for one block, each [B, A, T, K]."""

# The epsilon inside the published linear attention: it only decides that a query without positive part gives 0.
LINEAR_EPS = 1e-15
NORM_EPS = 1e-5
MASKED = -10000.0
HALF_MAX = 65504.0


class L2Norm(nn.Module):
    """Scale the last axis to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=NORM_EPS)


def head_norm(kind: str | None, dim: int) -> nn.Module | None:
    """Build the norm of queries or keys over all heads together; None means none. The config has checked `kind`."""
    if kind is None:
        return None
    if kind == "rms_norm_across_heads":
        return RMSNorm(dim, eps=NORM_EPS)
    return nn.LayerNorm(dim, eps=NORM_EPS) if kind == "layer_norm_across_heads" else L2Norm()


def _no_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _as_autocast(x: Tensor) -> Tensor:
    # Several projections read the same x: under autocast each of them would convert it again.
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _by_head(x_BNAK: Tensor) -> Tensor:
    # One pass converts and reorders; the batched products would otherwise copy again. Always a new tensor.
    wide = torch.promote_types(x_BNAK.dtype, torch.float32)
    return x_BNAK.transpose(1, 2).to(wide, memory_format=torch.contiguous_format, copy=True)


def linear_attention(q_BNAK: Tensor, k_BNAK: Tensor, v_BNAK: Tensor) -> Tensor:
    """ReLU linear attention in float32: out_n = q_n (sum_m k_m v_m) / (q_n sum_m k_m + eps), all [B, N, A, K].

    Float64 stays. Half precision cannot hold the sums, so neither the caller's dtype nor autocast reaches inside.
    Source: arXiv 2410.10629, eq. 2 and 3.
    """
    with _no_autocast(q_BNAK.device.type):
        # The sign survives the conversion, so the ReLU can work in place on the converted copy.
        q, k, v = _by_head(q_BNAK).relu_(), _by_head(k_BNAK).relu_(), _by_head(v_BNAK)
        summary = torch.cat([k.transpose(2, 3) @ v, k.sum(dim=2).unsqueeze(-1)], dim=-1)
        out = q @ summary
        return (out[..., :-1] / (out[..., -1:] + LINEAR_EPS)).transpose(1, 2)


def text_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask [B, T] (1 valid, 0 padding) or a ready bias [B, 1, T] into the additive bias [B, 1, 1, T].

    A masked key gets -10000 and vanishes exactly. Where every key is masked the bias is 0: that caption is read whole.
    """
    if mask.ndim == 3:
        return mask.to(dtype)[:, None]
    bias = (1 - mask.to(dtype)) * MASKED
    # Softmax ignores a common offset; without it no rounding is left when all keys are masked.
    return (bias - bias.amax(dim=-1, keepdim=True))[:, None, None]


class LinearSelfAttention(nn.Module):
    """Self-attention of linear cost, [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool, dropout: float, qk_norm: str | None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(dim, inner, bias=bias)
        self.to_v = nn.Linear(dim, inner, bias=bias)
        self.norm_q = head_norm(qk_norm, inner)
        self.norm_k = head_norm(qk_norm, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])

    def forward(self, x_BND: Tensor, passing: int = 0, split: bool = False) -> Tensor:
        """Attend, except for the last `passing` rows, which pass their values on: B rows in, B rows out.

        With `split` the passing rows are a copy of the last ones, and come out behind them: B rows in, B + `passing`
        out. Source: the identity attention of perturbed-attention guidance, arXiv 2403.17377, eq. 14.
        """
        x = _as_autocast(x_BND)
        v = self.to_v(x)
        attending = len(x) if split else len(x) - passing
        groups = [self._mix(x[:attending], v[:attending])] if attending else []
        if passing:
            groups.append(v[-passing:].to(x.dtype))
        mixed = torch.cat(groups) if len(groups) > 1 else groups[0]
        out: Tensor = self.to_out[1](self.to_out[0](mixed))
        return out.clamp(-HALF_MAX, HALF_MAX) if out.dtype == torch.float16 else out

    def _mix(self, x: Tensor, v: Tensor) -> Tensor:
        q, k = self.to_q(x), self.to_k(x)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        heads = (*x.shape[:2], -1, self.head_dim)
        mixed = linear_attention(q.reshape(heads), k.reshape(heads), v.reshape(heads))
        return mixed.to(x.dtype, memory_format=torch.contiguous_format).flatten(2)


class CrossAttention(nn.Module):
    """Softmax attention from the tokens to the caption, whose keys and values are computed apart from the queries."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, qk_norm: str | None) -> None:
        super().__init__()
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.norm_q = head_norm(qk_norm, inner)
        self.norm_k = head_norm(qk_norm, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.reshape(*x_BND.shape[:2], -1, self.head_dim).transpose(1, 2)

    def key_value(self, caption_BTD: Tensor) -> KeyValue:
        """Project the caption: [B, T, D] -> keys and values [B, A, T, K]."""
        caption = _as_autocast(caption_BTD)
        k, v = self.to_k(caption), self.to_v(caption)
        if self.norm_k is not None:
            k = self.norm_k(k).to(v.dtype)  # under autocast a norm answers in float32
        return self._split(k), self._split(v)

    def forward(self, x_BND: Tensor, kv: KeyValue, bias_B11T: Tensor | None) -> Tensor:
        """Read the caption with the tokens as queries: [B, N, D] -> [B, N, D]."""
        q = self.to_q(x_BND)
        if self.norm_q is not None:
            q = self.norm_q(q).to(kv[1].dtype)
        mixed = F.scaled_dot_product_attention(self._split(q), kv[0], kv[1], attn_mask=bias_B11T)
        out: Tensor = self.to_out[1](self.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return out
