"""Tensors between files and modules: strict reading with one copy in memory, writing that appears whole or not at all.

Files are read with `pread`, never mapped: a file that is replaced or cut while it is read gives an error, not a signal.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sana.checkpoints.layout import Part, Weights
from sana.errors import CheckpointError, InvalidInput, NonFinite

MAX_SHARD_SIZE = "10GB"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05", b"7z\xbc\xaf", b"\x1f\x8b")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a file says about one of its tensors, before any data is read."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def inspect(weights: Weights) -> dict[str, Stored]:
    """Return name -> shape, dtype and file of all tensors; of safetensors only the headers are read.

    Errors: CheckpointError naming the file that is damaged, or the tensor that two files hold.
    """
    stored: dict[str, Stored] = {}
    for path in weights.paths:
        for name, shape, dtype in _headers(path):
            if name in stored:
                text = f"Tensor '{name}' is in both {stored[name].file} and {path.name} of {weights.folder}"
                raise CheckpointError(f"{text}: copy the folder again.")
            stored[name] = Stored(file=path.name, shape=shape, dtype=dtype)
    return stored


def stored_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """Return the floating dtype that the file's first floating tensor has; float32 when there is none."""
    return next((entry.dtype for entry in stored.values() if entry.dtype.is_floating_point), torch.float32)


def load_into(
    module: nn.Module,
    weights: Weights,
    stored: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Give a module built on the meta device the tensors of `weights`, cast to `dtype` (None: as stored).

    Memory peaks at the module plus one tensor. Integer tensors keep their dtype.
    Errors: CheckpointError naming the folder and the first tensor that is missing, unexpected, of a wrong shape or not
    finite; names and shapes are checked before any data is read.
    """
    check_names(module, stored, str(weights.folder))
    dtype = dtype or stored_dtype(stored)
    state: dict[str, Tensor] = {}
    for path in weights.paths:
        for name, tensor in _tensors(path):
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            if not is_finite(state[name]):
                raise CheckpointError(_not_finite(name, path, tensor, state[name].dtype))
    module.load_state_dict(state, assign=True)


def check_names(module: nn.Module, stored: Mapping[str, Stored], where: str) -> None:
    """Compare names and shapes with what the module needs.

    Errors: CheckpointError that counts missing, unexpected and misshapen tensors and names the first of each.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshapen = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    faults = [f"{len(missing)} missing, first '{missing[0]}'"] if missing else []
    if unexpected:
        first = unexpected[0]
        faults.append(f"{len(unexpected)} unexpected, first '{first}' in {stored[first].file}")
    if misshapen:
        first = misshapen[0]
        shapes = f"{list(stored[first].shape)} where the config asks for {list(expected[first])}"
        faults.append(f"{len(misshapen)} of a wrong shape, first '{first}' in {stored[first].file}: {shapes}")
    if faults:
        raise CheckpointError(f"The tensors in {where} do not fit its config.json: {'; '.join(faults)}.")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values are finite, in one pass and without a temporary; integers always are."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def save_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    part: Part,
    *,
    variant: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    safe_serialization: bool = True,
) -> Weights:
    """Write tensors as one file, or as shards of at most `max_shard_size` with their index, and return the names.

    Every file is written beside its place, flushed to the disk and renamed, the index last; shards of an earlier save
    of the same variant are removed afterwards.
    Errors: NonFinite naming the tensor that is not finite; InvalidInput for a `max_shard_size` that is no size.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise NonFinite(f"Tensor '{name}' holds NaN or infinity, so the model is not saved.")
    suffix = "safetensors" if safe_serialization else "bin"
    single, index = part.names(variant, suffix)
    pattern = single.removesuffix(f".{suffix}") + "{suffix}." + suffix
    try:
        split = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        text = f"max_shard_size is {max_shard_size!r}; it must be a number of bytes or a text such as '5GB'."
        raise InvalidInput(text) from error
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for name, keys in split.filename_to_tensors.items():
        shard = {key: state[key].detach().cpu().contiguous() for key in keys}
        publish(folder / name, partial(_write_shard, shard, safe_serialization))
    if split.is_sharded:
        table = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / index, table)
    files = set(split.filename_to_tensors) | ({index} if split.is_sharded else set())
    for old in folder.iterdir():
        ours = old.name in (single, index) or part.is_shard(old.name, variant, suffix)
        if ours and old.name not in files:
            old.unlink()
    sync(folder)
    return Weights(folder=folder, files=tuple(sorted(split.filename_to_tensors)))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publish a mapping as the published model files have it: indented, keys sorted."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    publish(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk and rename it: `path` is never half written."""
    beside = path.with_name(f".{path.name}.saving-{os.getpid()}")
    try:
        write(beside)
        beside.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files private
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; systems that cannot open folders flush them themselves."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Give the files that a foreign library wrote the folder's permissions, and flush them to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
            sync(path)
    sync(folder)


def sweep(folder: Path) -> None:
    """Remove the unfinished files that a killed save left behind."""
    for orphan in folder.glob(".*.saving-*"):
        orphan.unlink(missing_ok=True)


def _write_shard(shard: dict[str, Tensor], safe_serialization: bool, path: Path) -> None:
    if safe_serialization:
        save_file(shard, path, metadata={"format": "pt"})
    else:
        torch.save(shard, path)


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    if path.suffix == ".bin":
        for name, tensor in _pickled(path).items():
            yield name, tuple(tensor.shape), tensor.dtype
        return
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    known = f"known are {', '.join(_DTYPES)}"
                    raise CheckpointError(f"Tensor '{name}' in {path} has dtype {view.get_dtype()}; {known}.")
                yield name, tuple(view.get_shape()), _DTYPES[view.get_dtype()]
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        for name, tensor in _pickled(path).items():
            yield name, tensor.clone()  # the original is a view of the mapped file
        return
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """Read a `.bin` that the caller allowed, with the unpickler that only makes tensors."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a hostile or cut pickle may raise anything
        raise CheckpointError(f"{path} cannot be read as plain tensors: {_first_line(error)}") from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path} must hold a mapping of names to tensors and nothing else.")
    return {str(name): tensor for name, tensor in value.items()}


def _damaged(path: Path, error: Exception) -> CheckpointError:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return CheckpointError(f"{path} cannot be opened: {_first_line(error)}")
    if start.startswith(_PICKLE_STARTS):
        return CheckpointError(f"{path} is a pickle or an archive under a safetensors name; it is not opened.")
    text = f"{path} is damaged or cut short ({_first_line(error).rstrip('.')})"
    return CheckpointError(f"{text}: delete it and download or copy it again.")


def _not_finite(name: str, path: Path, stored: Tensor, dtype: torch.dtype) -> str:
    if is_finite(stored):
        kind = str(dtype).removeprefix("torch.")
        return f"Tensor '{name}' in {path} does not fit into {kind}: choose torch_dtype=torch.bfloat16 or float32."
    return f"Tensor '{name}' in {path} holds NaN or infinity: the file is damaged or its training failed."


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
