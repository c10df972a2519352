"""What the models return: named, and indexable like the tuple of `return_dict=False`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, overload

from torch import Tensor


@dataclass
class ModelOutput:
    """Base of the outputs: read a field by attribute, name (`out["sample"]`), position (`out[0]`) or unpacking."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the field values in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, str):
            if key not in (field.name for field in fields(self)):
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(fields(self))


@dataclass
class Transformer2DModelOutput(ModelOutput):
    """Prediction of the diffusion transformer."""

    sample: Tensor
    """[B, C, H, W]."""


@dataclass
class EncoderOutput(ModelOutput):
    """Latent of the autoencoder (deterministic: there is no distribution to sample from)."""

    latent: Tensor
    """[B, C, H / 32, W / 32] for the f32 autoencoders."""


@dataclass
class DecoderOutput(ModelOutput):
    """Picture of the autoencoder, about -1 to 1 and not clamped."""

    sample: Tensor
    """[B, 3, H, W]."""


@dataclass
class SanaControlNetOutput(ModelOutput):
    """Residuals of the control branch."""

    controlnet_block_samples: tuple[Tensor, ...]
    """One [B, N, D] per block."""
