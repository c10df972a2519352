"""The ReLU attention of DC-AE's heads, in three ways that are the same function.

Shapes: B batch, G heads of all scales, N positions, d head width.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from sana.nn.rows import rows_of_strip

ATTENTION_EPS = 1e-15


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_m (q·k_m) v_m / sum_m (q·k_m) in O(N), computed in float32 even under autocast; [B, G, N, d] each.

    A query without any positive product gives zeros. Source: EfficientViT eq. 2.
    """
    dtype = v.dtype
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        q, k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v))
        values = torch.matmul(q, torch.matmul(k.transpose(-1, -2), v))
        weights = torch.matmul(q, k.sum(dim=-2).unsqueeze(-1))
        return (values / (weights + ATTENTION_EPS)).to(dtype)


def attend_by_heads(tokens: Tensor, head_dim: int, out: Tensor) -> None:
    """Write the linear attention of interleaved heads, [B, N, G·3d], into `out`, [B, N, G·d]; a few heads at a time.

    The float32 copies of a few heads fit into the cache, and their memory is used again for the next.
    """
    heads = torch.unflatten(tokens, -1, (-1, 3, head_dim))
    places = torch.unflatten(out, -1, (-1, head_dim))
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    step = rows_of_strip(3 * head_dim * tokens.shape[:2].numel(), dtype)
    for part, place in zip(torch.split(heads, step, dim=2), torch.split(places, step, dim=2), strict=True):
        q, k, v = part.permute(3, 0, 2, 1, 4).to(dtype, memory_format=torch.contiguous_format, copy=True)
        q.relu_(), k.relu_()
        summary = torch.cat([torch.matmul(k.mT, v), k.sum(dim=-2).unsqueeze(-1)], dim=-1)
        values = torch.matmul(q, summary)
        place.copy_(values[..., :-1].div_(values[..., -1:] + ATTENTION_EPS).transpose(1, 2))


def quadratic_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same as `linear_attention` in O(N²), for fewer positions than head channels; [B, G, N, d] each."""
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores / (scores.sum(dim=-1, keepdim=True) + ATTENTION_EPS)
    return torch.matmul(weights.to(v.dtype), v)
