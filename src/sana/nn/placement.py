"""Bringing a module to where another tensor lies."""

from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def placed_like(module: M, tensor: Tensor) -> M:
    """Bring a module to the device and dtype of a tensor; one that is all there is not touched."""
    there = all(p.device == tensor.device and p.dtype == tensor.dtype for p in module.parameters())
    return module if there else module.to(tensor.device, tensor.dtype)
