"""A short name for the weights that a model really uses."""

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SAMPLES = 16
"""Values read of each tensor: enough to tell trainings apart, few enough to cost milliseconds."""


def fingerprint(*modules: Any) -> str:
    """Return 16 hexadecimal digits from names, shapes, dtypes and 16 spread values of every tensor; "none" without any.

    It follows what is in memory, so replaced, merged or further trained weights and other dtypes have other names,
    while the layout in memory, compilation and the files they came from do not matter. It is no protection: a change
    that avoids the values read stays unseen, and so do the values of tensors that lie on the meta device.
    """
    digest, empty = hashlib.sha256(), True
    for module in modules:
        tensors = module.state_dict() if module is not None else {}
        values = {name: _sample(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        for name in values:
            digest.update(
                f"{name.removeprefix('_orig_mod.')} {tuple(tensors[name].shape)} {tensors[name].dtype};".encode()
            )
            empty = False
        read = [value for value in values.values() if value is not None]
        for device in sorted({value.device for value in read}, key=str):
            digest.update(torch.cat([value for value in read if value.device == device]).cpu().numpy().tobytes())
    return "none" if empty else digest.hexdigest()[:16]


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor | None:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    if tensor.ndim == 0:
        return tensor.reshape(1).float()
    return tensor[_positions(tensor.shape)].float()


@lru_cache(maxsize=4096)
def _positions(shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the coordinates of the values read, spread evenly over the rows of the tensor, on the CPU."""
    flat = torch.linspace(0, shape.numel() - 1, min(SAMPLES, shape.numel()), dtype=torch.float64).long()
    return torch.unravel_index(flat, shape)
