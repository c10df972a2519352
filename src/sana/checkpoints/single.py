"""One file of tensors that a user named: safetensors or a pickle, listed first and then read one tensor at a time.

A pickle is opened only here and only because its own path was given, with the unpickler that makes nothing but
tensors, and without their data: these are read from their places in the archive, each held to its checksum. So a file
needs no more memory than its largest tensor, and one that is cut meanwhile gives an error and not a signal.
"""

import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sana.checkpoints.bounds import shown
from sana.checkpoints.digests import has_digest, verified
from sana.checkpoints.foreign import AGAIN, first_line, foreign
from sana.checkpoints.tensors import read_header, read_tensors
from sana.checkpoints.weights import Stored
from sana.errors import CheckpointError, InvalidInput, ModelNotFound

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
"""Suffixes under which a pickle is opened when its path is given."""
SINGLE_FILES = (".safetensors", *PICKLES)
PLAIN_WEIGHTS = ("state_dict", "model", "module")
AVERAGED_WEIGHTS = ("state_dict_ema", "model_ema", "ema")
"""Names under which training files keep the weights and their moving average."""

_PREFIXES = ("model.diffusion_model.", "_orig_mod.", "module.")
_MAX_PROGRAM = 1 << 26
"""Bytes of the largest pickle program, which holds names and shapes only."""
_MAX_NUMBERS = 1 << 48
_HEAD = 30  # of a member of a zip archive, before its name
_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the data of one storage lie in an archive."""

    start: int
    size: int
    checksum: int


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of one file, by their names without the prefixes that other programs put before all of them."""

    path: Path
    entries: dict[str, Stored]
    pickled: bool
    averaged: bool = False
    """Whether there are averaged weights too, which were not asked for."""
    _names: dict[str, str] = field(repr=False)
    """Name -> name in the file."""
    _tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Of a pickle: name in the file -> tensor, which has no data if the file is an archive."""
    _places: Mapping[int, _Place] = field(default_factory=dict, repr=False)
    """Offset of a storage's data -> place; empty unless the file is an archive."""

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most numbers have; float32 when there is none."""
        numbers: dict[torch.dtype, int] = {torch.float32: 0}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                numbers[entry.dtype] = numbers.get(entry.dtype, 0) + math.prod(entry.shape)
        return max(numbers, key=lambda dtype: numbers[dtype])

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the wanted tensors in the order of the file, each in memory of its own.

        Errors: CheckpointError naming the tensor or the file that is damaged.
        """
        if self.pickled:
            yield from self._read_pickled(wanted)
            return
        short = {inside: name for name, inside in self._names.items() if name in wanted}
        with verified([self.path] if has_digest(self.path) else []):
            for inside, tensor in read_tensors(self.path):
                if inside in short:
                    yield short[inside], tensor

    def _read_pickled(self, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = [(name, self._tensors[inside]) for name, inside in self._names.items() if name in wanted]
        if not self._places:
            yield from tensors
            return
        offsets = {name: _offset(tensor) for name, tensor in tensors}
        known: tuple[int, Tensor] | None = None
        with self.path.open("rb", buffering=0) as file:
            for name, tensor in sorted(tensors, key=lambda pair: offsets[pair[0]]):
                start = offsets[name]
                if known is None or known[0] != start:
                    known = start, self._fetch(file, name, self._places[start])
                whole = known[1].view(tensor.dtype) if tensor.numel() else torch.empty(0, dtype=tensor.dtype)
                view = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                yield name, view.contiguous()

    def _fetch(self, file: BinaryIO, name: str, place: _Place) -> Tensor:
        file.seek(place.start)
        data = bytearray(place.size)
        left, checksum = memoryview(data), 0
        while left:
            got = file.readinto(left[:_BLOCK])  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{self.path} is cut short (it ended inside '{shown(name)}'): {AGAIN}.")
            checksum = zlib.crc32(left[:got], checksum)
            left = left[got:]
        if place.checksum and checksum != place.checksum:
            raise CheckpointError(f"{self.path} is damaged (the checksum of '{shown(name)}' differs): {AGAIN}.")
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def open_single(path: Path, *, averaged: bool = False) -> TensorFile:
    """List the tensors of a file, recognised by its content.

    `averaged` takes the moving average of the weights, which training files may hold beside them.
    Errors: ModelNotFound when there is no file; InvalidInput for another kind of file; CheckpointError when it is
    damaged, hostile, or holds no tensors.
    """
    if path.suffix.lower() not in SINGLE_FILES:
        raise InvalidInput(f"'{path}' is no file of weights; these end in {', '.join(SINGLE_FILES)}.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise ModelNotFound(f"There is no file '{path}'.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        if averaged:
            raise InvalidInput(f"{path} is a safetensors file, which holds one set of weights: leave `ema` out.")
        stored = {
            entry.name: Stored(file=path.name, shape=entry.shape, dtype=entry.dtype) for entry in read_header(path)
        }
        return _listed(path, stored, pickled=False)
    if start[:2] == b"PK":
        return _archive(path, averaged)
    if start[:1] == b"\x80":
        return _legacy(path, averaged)
    if not start:
        raise CheckpointError(f"{path} is empty: {AGAIN}.")
    raise CheckpointError(f"{path} is {foreign(start) or f'no file of weights: {AGAIN}'}.")


def in_memory(tensors: Mapping[str, Tensor]) -> TensorFile:
    """Return tensors that somebody has read as if they were in a file; a mapping around them is looked into.

    Errors: CheckpointError when it holds no tensors, or more than these.
    """
    path = Path("the mapping")
    found, _ = _weights_in(path, tensors, averaged=False)
    stored = {name: Stored(file=str(path), shape=tuple(t.shape), dtype=t.dtype) for name, t in found.items()}
    return _listed(path, stored, pickled=True, tensors=found)


def _archive(path: Path, averaged: bool) -> TensorFile:
    places = _places_in(path)
    # Under this mode the unpickler makes tensors without data, which know where in the file theirs are.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        value = _unpickled(path)
    tensors, both = _weights_in(path, value, averaged)
    stored = {name: _checked(path, name, tensor, places) for name, tensor in tensors.items()}
    return _listed(path, stored, pickled=True, averaged=both and not averaged, tensors=tensors, places=places)


def _legacy(path: Path, averaged: bool) -> TensorFile:
    """Read the format of torch before 1.6, which can only be read whole."""
    tensors, both = _weights_in(path, _unpickled(path), averaged)
    stored = {
        name: Stored(file=path.name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in tensors.items()
    }
    return _listed(path, stored, pickled=True, averaged=both and not averaged, tensors=tensors)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a hostile or cut pickle may raise anything
        reason = shown(first_line(error))
        advice = "ask its author for safetensors, or for a file with nothing but the weights"
        raise CheckpointError(f"{path} cannot be read as plain tensors ({reason}): {advice}.") from error


def _places_in(path: Path) -> dict[int, _Place]:
    """Return where the data of an archive lie; torch writes them uncompressed and in little-endian order."""
    places: dict[int, _Place] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path} is a compressed archive, which torch does not write: do not use it.")
                if member.filename.endswith("data.pkl") and member.file_size > _MAX_PROGRAM:
                    raise CheckpointError(
                        f"{path} holds a pickle program of {member.file_size >> 20} MB: do not use it."
                    )
                if member.filename.endswith("/byteorder") and archive.read(member) != b"little":
                    raise CheckpointError(f"{path} is in big-endian order, which is not read: save it again elsewhere.")
                file.seek(member.header_offset)
                head = file.read(_HEAD)
                skip = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
                start = member.header_offset + _HEAD + skip
                places[start] = _Place(start=start, size=member.file_size, checksum=member.CRC)
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or cut short ({shown(first_line(error))}): {AGAIN}.") from error
    return places


def _weights_in(path: Path, value: Any, averaged: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the mapping of tensors inside what a training file holds, and whether there was an average too."""
    both = False
    for _ in range(3):
        if not isinstance(value, Mapping):
            break
        average = next((key for key in AVERAGED_WEIGHTS if isinstance(value.get(key), Mapping)), None)
        plain = next((key for key in PLAIN_WEIGHTS if isinstance(value.get(key), Mapping)), None)
        both = both or average is not None
        key = average if averaged and average else plain
        if key is None:
            break
        value = value[key]
    if averaged and not both:
        raise CheckpointError(f"{path} holds no averaged weights: leave `ema` out.")
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{path} must hold a mapping of names to tensors.")
    strange = [name for name, item in value.items() if not isinstance(item, Tensor) or not isinstance(name, str)]
    if strange:
        raise CheckpointError(f"{path} must hold nothing but tensors; '{shown(str(strange[0]))}' is none.")
    return dict(value), both


def _checked(path: Path, name: str, tensor: Tensor, places: Mapping[int, _Place]) -> Stored:
    """Hold what the program says of a tensor against the archive, before any memory is taken for it."""
    shape, kind = tuple(tensor.shape), tensor.dtype
    place = places.get(_offset(tensor)) if tensor.layout == torch.strided else None
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(shape, tensor.stride(), strict=True))
    fits = place is not None and (tensor.numel() == 0 or (last + 1) * kind.itemsize <= place.size)
    if place is None or not fits or tensor.numel() * kind.itemsize > place.size or place.size % kind.itemsize:
        text = f"{path} is damaged (tensor '{shown(name)}' of shape {shown(str(list(shape)))} lies outside its data)"
        raise CheckpointError(f"{text}: {AGAIN}.")
    return Stored(file=path.name, shape=shape, dtype=kind)


def _offset(tensor: Tensor) -> int:
    return int(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)


def _listed(
    path: Path,
    stored: Mapping[str, Stored],
    *,
    pickled: bool,
    averaged: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
    places: Mapping[int, _Place] | None = None,
) -> TensorFile:
    """Return the file with the prefixes of its names removed."""
    names = {name: name for name in stored}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in names):
            short = {name.removeprefix(prefix): inside for name, inside in names.items()}
            if len(short) < len(names):
                raise CheckpointError(f"{path} holds tensors twice, with and without '{prefix}': save one of them.")
            names = short
    if not names:
        raise CheckpointError(f"{path} holds no tensors: {AGAIN}.")
    entries = {name: stored[inside] for name, inside in names.items()}
    for name, entry in entries.items():
        if math.prod(side or 1 for side in entry.shape) > _MAX_NUMBERS:
            raise CheckpointError(f"{path} is damaged (tensor '{shown(name)}' has an absurd shape): {AGAIN}.")
    return TensorFile(
        path=path,
        entries=entries,
        pickled=pickled,
        averaged=averaged,
        _names=names,
        _tensors=tensors or {},
        _places=places or {},
    )
