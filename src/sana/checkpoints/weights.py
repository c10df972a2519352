"""Tensors between files and modules: strict reading with one copy in memory, writing as one file or as shards."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sana.checkpoints.digests import has_digest, verified
from sana.checkpoints.foreign import read_pickle
from sana.checkpoints.layout import Part, Weights
from sana.checkpoints.origins import remember
from sana.checkpoints.storage import naming, write_json
from sana.checkpoints.tensors import read_header, read_tensors, write_tensors
from sana.errors import CheckpointError, InvalidInput, NonFinite
from sana.memory.quantize import Reading

MAX_SHARD_SIZE = "10GB"


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


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without memory for their weights, and without drawing any."""
    with torch.device("meta"), _NoInitialisation():
        yield


def load_into(
    module: nn.Module,
    weights: Weights,
    stored: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Any = None,
) -> None:
    """Give a module built on the meta device the tensors of `weights`, cast to `dtype` (None: as stored).

    Memory peaks at the module plus one tensor. Integer tensors keep their dtype. `quantization` is applied meanwhile
    (see `memory.quantize`). To the device "meta" nothing is read: the weights can be had later, from `origins`.
    Errors: as `check_names`, before any data is read, and `read_state`.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(expected, stored, str(weights.folder))
    reading = None if quantization is None else Reading(module, quantization, dtype or stored_dtype(stored), device)
    if torch.device(device).type == "meta":
        if reading is not None:
            reading.skeleton()
        as_read(module, stored, dtype)
    else:
        state = read_state(weights, dtype=dtype, device=device, take=None if reading is None else reading.take)
        module.load_state_dict(state, assign=True, strict=reading is None)
    if reading is None:
        remember(module, weights, dtype)
    else:
        reading.done()
        remember(module, weights, dtype, quantization=reading.config, targets=reading.targets)


def as_read(module: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype | None) -> None:
    """Give the weights of a module on the meta device the dtypes that reading would give them."""
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        kind = stored[name].dtype if name in stored else weight.dtype
        if dtype is not None and kind.is_floating_point:
            kind = dtype
        if weight.dtype != kind and weight.dtype != torch.int8:
            weight.data = weight.data.to(kind)


def read_state(
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    take: Callable[[str, Tensor], bool] | None = None,
) -> dict[str, Tensor]:
    """Return all tensors, floating ones cast to `dtype` (None: as stored); digests that files carry are compared.

    `take` gets each tensor as stored, valid for the length of the call, and tells whether it has taken it.
    Errors: CheckpointError naming the tensor that is not finite or, in a file that this package did not write, all
    zero; naming the file that is damaged.
    """
    state: dict[str, Tensor] = {}
    with verified([path for path in weights.paths if path.suffix != ".bin"]):
        for path in weights.paths:
            ours = has_digest(path)
            for name, tensor in _tensors(path, dtype):
                if take is not None and take(name, placed(name, tensor, path, dtype=None, device="cpu", ours=ours)):
                    continue
                state[name] = placed(name, tensor, path, dtype=dtype, device=device, ours=ours)
    return state


def placed(
    name: str, tensor: Tensor, path: Path, *, dtype: torch.dtype | None, device: torch.device | str, ours: bool
) -> Tensor:
    """Return a tensor of a file on its device, cast to `dtype` if it is floating and that is not None.

    Errors: CheckpointError naming a tensor that is not finite or, in a file that this package did not write, all zero.
    """
    result = tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
    low, high = _range(result)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(_not_finite(name, path, tensor, dtype))
    if low == high == 0 and not ours and _is_zero_matrix(tensor):
        text = f"Tensor '{name}' in {path} is all zero, as after an interrupted copy"
        raise CheckpointError(f"{text}: download or copy the file again.")
    return result


def check_names(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], where: str) -> None:
    """Compare names and shapes with what a module needs.

    Errors: CheckpointError that counts missing, unexpected and misshapen tensors and names the first of each.
    """
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
    return all(map(math.isfinite, _range(tensor)))


def write_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    part: Part,
    *,
    variant: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    safe_serialization: bool = True,
) -> frozenset[str]:
    """Write tensors as one file, or as shards of at most `max_shard_size` with their index; return the files' names.

    Errors: NonFinite naming the tensor that is not finite; InvalidInput for a `max_shard_size` that is no size.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise NonFinite(f"Tensor '{name}' holds NaN or infinity, so the model is not saved.")
    suffix = "safetensors" if safe_serialization else "bin"
    single, index = part.names(variant, suffix)
    pattern = single.removesuffix(f".{suffix}") + "{suffix}." + suffix
    check_shard_size(max_shard_size)
    split = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    for file, keys in split.filename_to_tensors.items():
        shard = {key: state[key] for key in keys}
        if safe_serialization:
            write_tensors(folder / file, shard)
        else:
            with naming(folder / file):
                torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}, folder / file)
    if not split.is_sharded:
        return frozenset(split.filename_to_tensors)
    write_json(folder / index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return frozenset((*split.filename_to_tensors, index))


def check_shard_size(size: int | str) -> None:
    """Refuse what is no size of a file, by asking what reads it."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        text = f"max_shard_size is {size!r}; it must be a number of bytes or a text such as '5GB'."
        raise InvalidInput(text) from error


def outdated(folder: Path, part: Part, variant: str | None, suffix: str, written: frozenset[str]) -> tuple[str, ...]:
    """Return the files of an earlier save of the same variant that a new one does not overwrite."""
    if part.stem is None:
        return ()
    single, index = part.names(variant, suffix)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    ours = (name for name in names if name in (single, index) or part.is_shard(name, variant, suffix))
    return tuple(name for name in ours if name not in written)


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    if path.suffix == ".bin":
        yield from ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in read_pickle(path).items())
    else:
        yield from ((entry.name, entry.shape, entry.dtype) for entry in read_header(path))


def _tensors(path: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        yield from ((name, tensor.clone()) for name, tensor in read_pickle(path).items())
    else:
        yield from read_tensors(path, dtype)


def _range(tensor: Tensor) -> tuple[float, float]:
    """Return the least and the greatest value; (0, 0) for tensors that hold no floating-point data."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(low), float(high)


class _NoInitialisation(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`, which take half of the time that building on the meta device takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _is_zero_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0 and not bool(tensor.any())


def _not_finite(name: str, path: Path, stored: Tensor, dtype: torch.dtype | None) -> str:
    if is_finite(stored):
        kind = str(dtype).removeprefix("torch.")
        return f"Tensor '{name}' in {path} does not fit into {kind}: choose torch_dtype=torch.bfloat16 or float32."
    return f"Tensor '{name}' in {path} holds NaN or infinity: the file is damaged or its training failed."
