"""Floating point operations of what a training step does, and how many a device does in a second.

Only products are counted, multiplication and addition apart, in matrices, convolutions and attention; the rest of a
step reads and writes memory, and is what keeps it below the speed of a bare product.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

aten = torch.ops.aten

CPU_SHAPE = (2048, 1152, 1152)
"""Rows, inner and outer width of the product that a device is measured with: a linear layer of the 0.6B model."""
ACCELERATOR_SHAPE = (8192, 4096, 4096)
"""The same where a smaller one would be over before it has begun."""
SHORT, LEAST = 0.2, 10
"""Seconds that a measurement takes, and products, of which the first ones pay for being the first."""


def flop_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Operations of one call of an operator of torch; 0 for one that multiplies no matrices."""
    packet = getattr(func, "_overloadpacket", None)
    count = _FLOP.get(packet)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def _convolution_backward(
    grad: Tensor,
    _input: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    *more: Any,
    out_val: Any,
) -> int:
    # Each of the two gradients takes what the way there took. torch's own count takes every group for the whole.
    size = (_input if transposed else grad).numel()
    return 2 * size * weight[0].numel() * (bool(more[-1][0]) + bool(more[-1][1]))


def _fused(q: Tensor, k: Tensor, v: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    count: int = flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)  # type: ignore[no-untyped-call]
    return count


def _fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    shapes = grad.shape, q.shape, k.shape, v.shape
    count: int = flop_counter.sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return count


_FLOP: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


def product_rate(device: torch.device, dtype: torch.dtype, threads: int = 1) -> float:
    """Operations per second of a matrix product, the fastest of a short while; `threads` are those of a CPU.

    A CPU's seconds are those that it worked for this process, whatever else it does meanwhile.
    """
    is_cpu = device.type == "cpu"
    clock, workers = (time.process_time, threads) if is_cpu else (time.perf_counter, 1)
    before = torch.get_num_threads()
    rows, inner, outer = CPU_SHAPE if is_cpu else ACCELERATOR_SHAPE
    x, weight = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (outer, inner)))
    times: list[float] = []
    until = time.perf_counter() + SHORT
    torch.set_num_threads(threads)
    try:
        while time.perf_counter() < until or len(times) < LEAST:
            began = clock()
            torch.nn.functional.linear(x, weight)
            if not is_cpu:
                torch.accelerator.synchronize(device)
            times.append((clock() - began) / workers)
    finally:
        torch.set_num_threads(before)
    return 2 * rows * inner * outer / min(times)
