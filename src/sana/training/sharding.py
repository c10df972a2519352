"""Weights split over the processes (FSDP2): how a module is split, and whole tensors from and into the pieces.

All of it is torch's own; accelerate offers the same split on accelerators only. Functions that gather must be called by
all processes at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from sana.nn.attention import CrossAttention

ASKED_BEFORE: dict[type[nn.Module], str] = {CrossAttention: "key_value"}
"""Layers that a model asks by this method before the block around them runs, so that they are split by themselves."""


def shard(module: nn.Module, device: torch.device, world: int) -> None:
    """Split a module's parameters over all processes, in place: each block of a list by itself, then the rest."""
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks_of(module):
        for part in block.modules():
            method = ASKED_BEFORE.get(type(part))
            if method is not None:
                fully_shard(part, mesh=mesh)
                register_fsdp_forward_method(part, method)
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of all lists in a module; lists inside of a block are a part of it."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks_of(child)


def local(tensor: Tensor) -> Tensor:
    """Return this process's piece, which shares the memory; a whole tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the whole tensor of a piece; where `tensor` is a bare piece, `like` says of what."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(like, DTensor):
        split = DTensor.from_local(tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return split.full_tensor()
    return tensor


def piece_of(full: Tensor, like: Tensor) -> Tensor:
    """Return what `like` is of a whole tensor, which every process has: split as it is split, on its device."""
    full = full.to(like.device)
    if isinstance(like, DTensor) and full.shape == like.shape:
        return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return full
