"""The ReLU attention of linear cost, and its gradient in little memory.

Shapes: B batch, N tokens, A heads, K head width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana.nn.inference import learning
from sana.nn.rows import rows_of_strip

# The epsilon inside the published linear attention: it only decides that a query without positive part gives 0.
LINEAR_EPS = 1e-15


def no_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def linear_attention(q_BNAK: Tensor, k_BNAK: Tensor, v_BNAK: Tensor) -> Tensor:
    """ReLU linear attention in float32: out_n = q_n (sum_m k_m v_m) / (q_n sum_m k_m + eps), all [B, N, A, K].

    Half precision cannot hold the sums, so neither the caller's dtype nor autocast reaches inside; float64 stays.
    Source: arXiv 2410.10629, eq. 2 and 3.
    """
    if learning(q_BNAK, k_BNAK, v_BNAK):
        return cast(Tensor, _LinearAttention.apply(q_BNAK, k_BNAK, v_BNAK))  # type: ignore[no-untyped-call]
    return _attend(q_BNAK, k_BNAK, v_BNAK)


def _attend(q_BNAK: Tensor, k_BNAK: Tensor, v_BNAK: Tensor) -> Tensor:
    with no_autocast(q_BNAK.device.type):
        # The sign survives the conversion, so the ReLU can work in place on the converted copy.
        q, k, v = _by_head(q_BNAK).relu_(), _by_head(k_BNAK).relu_(), _by_head(v_BNAK)
        out = q @ _summary(k, v)
        return (out[..., :-1] / (out[..., -1:] + LINEAR_EPS)).transpose(1, 2)


def _by_head(x_BNAK: Tensor) -> Tensor:
    # One pass converts and reorders; the batched products would otherwise copy again. Always a new tensor.
    wide = torch.promote_types(x_BNAK.dtype, torch.float32)
    return x_BNAK.transpose(1, 2).to(wide, memory_format=torch.contiguous_format, copy=True)


def _summary(k: Tensor, v: Tensor) -> Tensor:
    """Return the sums over the tokens, of k v and, as the last column, of k: [B, A, K, K + 1]."""
    return torch.cat([k.transpose(2, 3) @ v, k.sum(dim=2).unsqueeze(-1)], dim=-1)


class _LinearAttention(torch.autograd.Function):
    """Keeps queries, keys and values as they came instead of several float32 copies, and goes forward once more."""

    @staticmethod
    def forward(ctx: Any, q_BNAK: Tensor, k_BNAK: Tensor, v_BNAK: Tensor) -> Tensor:
        ctx.save_for_backward(q_BNAK, k_BNAK, v_BNAK)
        return _attend(q_BNAK, k_BNAK, v_BNAK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNAK: Tensor) -> tuple[Tensor, ...]:
        given = ctx.saved_tensors
        slopes = tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in given)
        # The float32 copies of a few heads fit into the cache, and their memory is used again for the next.
        step = rows_of_strip(4 * grad_BNAK.shape[3] * grad_BNAK.shape[:2].numel(), torch.float32)
        parts = zip(*(torch.split(one, step, dim=2) for one in (*given, grad_BNAK, *slopes)), strict=True)
        with no_autocast(grad_BNAK.device.type):
            for q, k, v, grad, *places in parts:
                for place, slope in zip(places, _slopes(q, k, v, grad), strict=True):
                    place.copy_(slope.transpose(1, 2))
        return slopes


def _slopes(q_BNAK: Tensor, k_BNAK: Tensor, v_BNAK: Tensor, grad_BNAK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, by head: [B, A, N, K] each, in float32 at least."""
    q, k, v = _by_head(q_BNAK).relu_(), _by_head(k_BNAK).relu_(), _by_head(v_BNAK)
    summary = _summary(k, v)
    out = q @ summary
    weight = out[..., -1:] + LINEAR_EPS
    # The slope of [values, weights] before the division, [B, A, N, K + 1].
    slope = torch.empty_like(out)
    values = torch.div(_by_head(grad_BNAK), weight, out=slope[..., :-1])
    torch.div((values * out[..., :-1]).sum(-1, keepdim=True).neg_(), weight, out=slope[..., -1:])
    of_summary = q.mT @ slope
    of_k = torch.add(v @ of_summary[..., :-1].mT, of_summary[..., -1:].mT)
    return _where_positive(slope @ summary.mT, q), _where_positive(of_k, k), k @ of_summary[..., :-1]


def _where_positive(grad: Tensor, activated: Tensor) -> Tensor:
    """Return the gradient before a ReLU whose result is `activated`."""
    return cast(Tensor, torch.ops.aten.threshold_backward(grad, activated, 0))
