"""A short name for the weights that a model really uses."""

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SAMPLES = 16
"""Values read of each tensor: enough to tell trainings apart, few enough to cost milliseconds."""

SAMPLED = "_sana_samples"
"""Attribute of a module with the values read of tensors that are away."""


def fingerprint(*modules: Any) -> str:
    """Return 16 hexadecimal digits from names, shapes, dtypes and 16 spread values of every tensor; "none" without any.

    It follows what is in memory, so replaced, merged or further trained weights and other dtypes have other names,
    while the layout in memory, compilation and the files they came from do not matter. It is no protection: a change
    that avoids the values read stays unseen. Of weights that are away to save memory the values were read before (see
    `placement`); those of other tensors on the meta device stay unseen.
    """
    digest, empty = hashlib.sha256(), True
    for module in modules:
        tensors = module.state_dict() if module is not None else {}
        away = getattr(module, SAMPLED, {})
        values = {
            name: away.get(name) if tensor.is_meta else sample(tensor)
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        }
        for name in values:
            digest.update(
                f"{name.removeprefix('_orig_mod.')} {tuple(tensors[name].shape)} {tensors[name].dtype};".encode()
            )
            empty = False
        digest.update(_together([value for value in values.values() if value is not None]).numpy().tobytes())
    return "none" if empty else digest.hexdigest()[:16]


def _together(values: list[Tensor]) -> Tensor:
    """Join values in their order on the CPU, with one transfer from each device."""
    placed: dict[int, Tensor] = {}
    for device in {value.device for value in values}:
        there = [(i, value) for i, value in enumerate(values) if value.device == device]
        joined = torch.cat([value for _, value in there]).cpu()
        placed |= dict(zip((i for i, _ in there), torch.split(joined, [len(value) for _, value in there]), strict=True))
    return torch.cat([placed[i] for i in range(len(values))]) if values else torch.empty(0, device="cpu")


@torch.no_grad()
def sample(tensor: Tensor) -> Tensor | None:
    """Return the values read of a tensor, as float32; None if it has none here."""
    inner = getattr(tensor, "tensor_data_names", ())  # torchao's tensors hold others and cannot be indexed freely
    if inner:
        found = [one for name in inner if (one := sample(getattr(tensor, name))) is not None]
        return torch.cat(found) if found else None
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
