"""Softmax attention to the caption, with a gradient that suits few keys on a CPU.

Shapes: B batch, A heads, N tokens, T text length, K head width.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana.nn.inference import learning, transformed
from sana.nn.linear_attention import no_autocast


def caption_attention(q_BANK: Tensor, k_BATK: Tensor, v_BATK: Tensor, bias_B11T: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + bias) v, [B, A, N, K]; the bias is not differentiated in training on a CPU."""
    if learning(q_BANK, k_BATK, v_BATK):
        # torch's fused kernel has the slowest backward pass of the whole network there.
        return cast(Tensor, _CaptionAttention.apply(q_BANK, k_BATK, v_BATK, bias_B11T))  # type: ignore[no-untyped-call]
    if transformed():  # the fused kernels have no forward mode
        scores = (q_BANK * q_BANK.shape[-1] ** -0.5) @ k_BATK.mT
        scores = scores if bias_B11T is None else scores + bias_B11T
        mixed: Tensor = scores.softmax(-1).to(v_BATK.dtype) @ v_BATK
        return mixed
    return F.scaled_dot_product_attention(q_BANK, k_BATK, v_BATK, attn_mask=bias_B11T)


class _CaptionAttention(torch.autograd.Function):
    """Scores and their slopes in float32 at least, all other products in the dtype of the values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        ctx.scale = q.shape[-1] ** -0.5
        with no_autocast(q.device.type):
            scores = (q.to(wide) * ctx.scale) @ k.to(wide).mT
            if bias is not None:
                scores.add_(bias)
            share = scores.softmax(-1).to(v.dtype)
            out: Tensor = share @ v
        ctx.save_for_backward(q, k, v, share)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, share = ctx.saved_tensors
        wide = torch.promote_types(v.dtype, torch.float32)
        with no_autocast(grad.device.type):
            of_v = share.mT @ grad
            of_share = grad.to(wide) @ v.to(wide).mT
            of_scores = torch._softmax_backward_data(of_share, share.to(wide), -1, wide).mul_(ctx.scale).to(v.dtype)
            return of_scores @ k, of_scores.mT @ q, of_v, None
