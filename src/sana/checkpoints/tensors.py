"""Single tensor files: safetensors read without mapping them and held to their digest, and foreign content named.

A file is read with plain reads: if it is replaced meanwhile, the old content is read; if it is cut, there is an error,
where a mapped file would end the process by a signal. A digest over the data is added to what the library writes.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sana.checkpoints.bounds import shown
from sana.checkpoints.foreign import AGAIN, first_line, foreign
from sana.checkpoints.storage import naming, system_error, write_all
from sana.errors import CheckpointError, InvalidInput

DIGEST = "sha256"
"""Entry of a header's metadata: SHA-256 over everything after the header."""

_BLOCK = 1 << 22
_METADATA = b'"__metadata__":{'
_MAX_NUMBERS = 1 << 48


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: what its header says."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[Entry, ...]:
    """Return the tensors of a safetensors file in the order of their data; nothing but the header is read.

    Errors: CheckpointError naming the file when it is no whole safetensors file.
    """
    with opened(path) as (file, _):
        return _entries(path, file)


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file; floating ones will be cast to `dtype` by the caller unless it is None.

    A tensor is valid until the next one is asked for, and may be kept if it needed no cast.
    Errors: as `read_header`.
    """
    # The library reads the header and checks that the data fill the rest of the file without a gap. Its `get_tensor`
    # holds the interpreter's lock while it reads and takes new memory for each tensor: with the digest computed
    # meanwhile, plain reads into one buffer take two thirds of the time.
    with opened(path) as (file, data):
        entries = _entries(path, file)
        if not os.path.samestat(os.fstat(data.fileno()), path.stat()):
            raise CheckpointError(f"{path} was replaced while it was opened: load it again.")
        head_of(data)
        buffer = torch.empty(max((e.size for e in entries if _is_cast(e, dtype)), default=0), dtype=torch.uint8)
        for entry in entries:
            raw = buffer[: entry.size] if _is_cast(entry, dtype) else torch.empty(entry.size, dtype=torch.uint8)
            _fill(path, data, raw)
            yield entry.name, raw.view(entry.dtype).view(entry.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that holds its own digest; tensors elsewhere go to the CPU first.

    Errors: OSError naming the file; when the disk is full, with the space that is needed.
    """
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            text = f"Tensor '{name}' has dtype {str(tensor.dtype).removeprefix('torch.')}, which is not saved"
            raise InvalidInput(f"{text}: convert it to float32, float16 or bfloat16.")
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage().data_ptr()
        ready[name] = whole.clone() if storage in storages else whole  # the library writes no shared memory
        storages.add(storage)
    with naming(path, sum(tensor.nbytes for tensor in ready.values())):
        save_file(ready, path, metadata={"format": "pt", DIGEST: "0" * 64})
        with path.open("r+b", buffering=0) as file:
            head = head_of(file)
            digest = digest_of(file)
            # Both entries are written, since the library's order of them changes from process to process.
            file.seek(head.index(_METADATA) + len(_METADATA))
            write_all(file, f'"format":"pt","{DIGEST}":"{digest}"'.encode())


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
    """Open a file for the library and for plain reads.

    Errors: CheckpointError naming the file, also for what the block meets while it reads.
    """
    try:
        with path.open("rb", buffering=0) as data, safe_open(path, "pt", device="cpu", backend="pread") as file:
            yield file, data
    except (OSError, SafetensorError) as error:
        raise _refusal(path, error) from error


def head_of(file: BinaryIO) -> bytes:
    """Return what comes before the data of a whole file: the length of the header in 8 bytes, and the header."""
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def digest_of(file: BinaryIO, stop: Event | None = None) -> str | None:
    """Return the SHA-256 of what is left of a file, or None when `stop` was set before its end."""
    digest, block = hashlib.sha256(), bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1))
    while size := file.readinto(block):  # type: ignore[attr-defined]
        if stop is not None and stop.is_set():
            return None
        digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Say in one sentence why the library does not read a file."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as found:
        return CheckpointError(f"{path} cannot be opened: {found.strerror}.")
    if cause := system_error(error):
        return CheckpointError(f"{path} cannot be read: {cause.strerror}.")
    if not start:
        return CheckpointError(f"{path} is empty: {AGAIN}.")
    kind = foreign(start) if start[8:9] != b"{" else None  # the length of a header may look like anything
    return CheckpointError(f"{path} is {kind or f'damaged or cut short ({shown(first_line(error))}): {AGAIN}'}.")


def _entries(path: Path, file: Any) -> tuple[Entry, ...]:
    return tuple(_entry(path, name, file.get_slice(name)) for name in file.offset_keys())


def _entry(path: Path, name: str, stored: Any) -> Entry:
    kind, shape = stored.get_dtype(), tuple(stored.get_shape())
    if kind not in _DTYPES:
        text = f"Tensor '{name}' in {path} has dtype {kind}, which is not read"
        raise CheckpointError(f"{text}: convert it to one of {', '.join(_DTYPES)}.")
    # The library counts bytes only, of which there are none for any shape with a 0 in it; torch stumbles over some.
    if math.prod(side or 1 for side in shape) > _MAX_NUMBERS:
        text = f"{path} is damaged or cut short (tensor '{name}' has the absurd shape {list(shape)})"
        raise CheckpointError(f"{text}: {AGAIN}.")
    return Entry(name=name, shape=shape, dtype=_DTYPES[kind])


def _fill(path: Path, file: BinaryIO, tensor: Tensor) -> None:
    numbers: Any = tensor.numpy()
    left = memoryview(numbers)
    while left:
        got = file.readinto(left)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(f"{path} is damaged or cut short (it ended while it was read): {AGAIN}.")
        left = left[got:]


def _is_cast(entry: Entry, dtype: torch.dtype | None) -> bool:
    return dtype is not None and entry.dtype.is_floating_point and entry.dtype != dtype


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
