"""Where a module's weights came from, so that they can be let go and read again, whole, by blocks or by rows.

What is read again is bit for bit what loading gave: the same cast, the same quantisation.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.checkpoints.layout import Weights
from sana.checkpoints.tensors import head_of, opened, read_header
from sana.errors import CheckpointError
from sana.memory import int8
from sana.memory.quantize_configs import Int8Config, QuantizationConfig

_ORIGIN = "_sana_origin"
_BUFFER, _ALIGNED = 64 << 20, 64
_WEIGHT, _SCALE = ".weight", ".weight_scale"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The files of a module and what was done to their tensors."""

    weights: Weights
    dtype: torch.dtype | None
    """What floating tensors were cast to; None means as stored."""
    files: Mapping[str, str]
    """Name of a tensor in the module -> in the files, where they differ."""
    quantization: QuantizationConfig | None
    """What was quantised while reading; None for nothing, also where the files hold int8."""
    targets: frozenset[str]
    """Names of the weights that were quantised while reading."""

    @property
    def readable(self) -> bool:
        """Whether single tensors can be read again: from safetensors, quantised by nothing but our own int8."""
        ours = self.quantization is None or isinstance(self.quantization, Int8Config)
        return ours and all(path.suffix == ".safetensors" for path in self.weights.paths)


def remember(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype | None,
    *,
    files: Mapping[str, str] | None = None,
    quantization: QuantizationConfig | None = None,
    targets: Iterable[str] = (),
) -> None:
    """Note on a module where its weights came from."""
    origin = Origin(
        weights=weights, dtype=dtype, files=files or {}, quantization=quantization, targets=frozenset(targets)
    )
    object.__setattr__(module, _ORIGIN, origin)


def origin_of(module: Any) -> Origin | None:
    """Return where a module's weights came from, or None where that is not known or cannot be read again."""
    found: Origin | None = getattr(module, _ORIGIN, None)
    return found if found is not None and found.readable else None


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FileTensors:
    """The tensors of a module as they can be read from its files at any time, on the CPU.

    Errors: CheckpointError when a file has changed since.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._stamps = {path: _stamp(path) for path in origin.weights.paths}
        self._places  # noqa: B018  # read now, so that a damaged header shows at once

    @cached_property
    def _places(self) -> dict[str, _Place]:
        back = {stored: name for name, stored in self.origin.files.items()}
        places: dict[str, _Place] = {}
        for path in self.origin.weights.paths:
            entries = {entry.name: entry for entry in read_header(path)}
            with opened(path) as (_, data):
                head = head_of(data)
            for stored, told in json.loads(head[8:]).items():
                if stored in entries:
                    start = len(head) + told["data_offsets"][0]
                    name = back.get(stored, stored)
                    places[name] = _Place(path, start, entries[stored].shape, entries[stored].dtype)
        return places

    def names(self) -> frozenset[str]:
        """Return the names of all tensors, as the module has them."""
        scales = (name.removesuffix(_WEIGHT) + _SCALE for name in self.origin.targets)
        return frozenset(self._places) | frozenset(scales)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors; what belongs to one quantised weight comes together, whichever was named."""
        result: dict[str, Tensor] = {}
        wanted = {self._stored(name) for name in names}
        places, buffer = self._places, torch.empty(0, dtype=torch.uint8)
        in_order = sorted(wanted, key=lambda name: (places[name].path, places[name].start))
        for i, name in enumerate(in_order):
            if name in self.origin.targets:
                result |= self.finished(name, self._whole(places[name]))
                continue
            size = self.size([name])
            if len(buffer) < size:
                buffer = _fresh(self._room(in_order[i:]))
            part, buffer = buffer[:size], buffer[-(-size // _ALIGNED) * _ALIGNED :]
            result[name] = self._into(part, places[name])
        return result

    def _room(self, names: list[str]) -> int:
        """Return the size of the next buffer: of the first tensor at least, of the following ones up to `_BUFFER`.

        Few large pieces of memory go back to the system when they are freed, where many small ones leave holes.
        """
        total = 0
        for name in names:
            size = 0 if name in self.origin.targets else -(-self.size([name]) // _ALIGNED) * _ALIGNED
            if total and total + size > _BUFFER:
                break
            total += size
        return total

    def _into(self, part: Tensor, place: _Place) -> Tensor:
        """Read a tensor into memory that is there, as loading makes it."""
        dtype = self.origin.dtype if self.origin.dtype is not None and place.dtype.is_floating_point else place.dtype
        made = part.view(dtype).view(place.shape)
        if dtype != place.dtype:
            return made.copy_(self._whole(place))
        with self._open(place.path) as handle:
            _fill(handle.fileno(), place.start, part, place.path)
        return made

    def finished(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what loading makes of a tensor of the files: cast, or codes and scales."""
        if name not in self.origin.targets:
            return {name: self._cast(tensor)}
        codes, scale = int8.encode(tensor)
        return {name: codes, name.removesuffix(_WEIGHT) + _SCALE: scale.to(self.origin.dtype or tensor.dtype)}

    def rest(self, name: str, tensor: Tensor) -> Tensor:
        """Return what stands in a module for a tensor that is away."""
        return tensor.to("meta")

    def rows(self, name: str, indices: Iterable[int]) -> Tensor:
        """Return rows of one tensor, in the order given. The tensor must not be quantised."""
        place = self._places[name]
        width = place.dtype.itemsize
        for side in place.shape[1:]:
            width *= side
        chosen = list(indices)
        raw = torch.empty(len(chosen), width, dtype=torch.uint8)
        with self._open(place.path) as handle:
            for i, index in enumerate(chosen):
                _fill(handle.fileno(), place.start + index * width, raw[i], place.path)
        return self._cast(raw.view(place.dtype).view(len(chosen), *place.shape[1:]))

    def size(self, names: Iterable[str]) -> int:
        """Return how many bytes these tensors take once they are read."""
        total = 0
        for name in {self._stored(name) for name in names}:
            place = self._places[name]
            count = 1
            for side in place.shape:
                count *= side
            floating = place.dtype.is_floating_point
            each = 1 if name in self.origin.targets else (self.origin.dtype or place.dtype).itemsize
            total += count * (each if floating else place.dtype.itemsize)
        return total

    def _stored(self, name: str) -> str:
        source = name.removesuffix(_SCALE) + _WEIGHT if name.endswith(_SCALE) else name
        return source if source in self.origin.targets else name

    def _whole(self, place: _Place) -> Tensor:
        count = place.dtype.itemsize
        for side in place.shape:
            count *= side
        raw = torch.empty(count, dtype=torch.uint8)
        with self._open(place.path) as handle:
            _fill(handle.fileno(), place.start, raw, place.path)
        return raw.view(place.dtype).view(place.shape)

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.origin.dtype
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _open(self, path: Path) -> Any:
        try:
            handle = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read again: {error.strerror}. Load the model anew.") from error
        if _stamp_of(os.fstat(handle.fileno())) != self._stamps[path]:
            handle.close()
            raise CheckpointError(f"{path} was changed while the model was in use. Load the model anew.")
        return handle


def _fresh(size: int) -> Tensor:
    """Return memory that goes back to the system as soon as it is free, where the C library would keep some of it."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _fill(handle: int, start: int, raw: Tensor, path: Path) -> None:
    left = memoryview(raw.numpy())  # type: ignore[arg-type]
    while left:
        got = os.preadv(handle, [left], start)
        if not got:
            raise CheckpointError(f"{path} is cut short. Load the model anew.")
        left, start = left[got:], start + got


def _stamp(path: Path) -> tuple[int, int, int]:
    return _stamp_of(path.stat())


def _stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
