"""Adapter files: found by path, folder or hub id, judged by their header alone, read whole, and written."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from torch import Tensor

from sana.checkpoints import hub
from sana.checkpoints.bounds import shown
from sana.checkpoints.digests import hub_digest, verified
from sana.checkpoints.foreign import read_pickle
from sana.checkpoints.layout import read_json
from sana.checkpoints.lora.dialects import (
    Dialect,
    Reading,
    assemble,
    check_shapes,
    read_names,
)
from sana.checkpoints.references import Reference, is_reference, parse_reference
from sana.checkpoints.tensors import opened, read_header
from sana.checkpoints.weights import is_finite
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, did_you_mean
from sana.models.lora import LowRank, Target

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHT_NAME = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PICKLED_NAME = "pytorch_lora_weights.bin"
CONFIG_KEY = "lora_adapter_metadata"
"""Entry of a file's metadata with the settings of the adapter as JSON, each behind the name of its part."""
PART = "transformer"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """An adapter as it was read: updates by our layer names, and what the file says about itself."""

    updates: dict[str, LowRank]
    dialect: Dialect
    name: str
    """Base name of the file without its ending; "adapter" for tensors that came from none."""
    sha256: str
    """Of the bytes of the file; of names and values for tensors that came from none."""
    unmatched: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, the smallest first."""
        return tuple(sorted({update.rank for update in self.updates.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        """The alphas that occur, the smallest first."""
        return tuple(sorted({update.alpha for update in self.updates.values()}))

    @property
    def is_dora(self) -> bool:
        """Whether it holds lengths of rows."""
        return any(update.magnitude is not None for update in self.updates.values())


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is known about a file before its data are read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    config: dict[str, Any]
    """Settings in the words of PEFT; empty where there are none."""


def find(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Return the local file of an adapter: a path, a folder, a hub id, or hf://organisation/name/file.

    Errors: ModelNotFound when there is none; InvalidInput when a folder or repository holds several.
    """
    if not isinstance(source, str | Path):
        raise InvalidInput(f"An adapter is a file, a folder, a hub id or a mapping of tensors, not {source!r:.60}.")
    path, text = Path(source).expanduser(), str(source)
    if not text.strip():
        raise InvalidInput("The adapter's name is empty. Give a file, a folder or a hub id.")
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return folder / _chosen(names, weight_name, str(folder))
    direct = parse_reference(text) if isinstance(source, str) and is_reference(text) else None
    if not direct and (isinstance(source, Path) or not _HUB_ID.fullmatch(text)):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelNotFound(f"There is no adapter '{shown(text)}'.{did_you_mean(path.name, siblings)}")
    repo, name = (direct.repo, direct.file) if direct else (text, weight_name)
    inner = f"{subfolder.strip('/')}/" if subfolder and not direct else ""
    if name is None:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise InvalidInput(f"Offline, the file in '{repo}' cannot be looked up. Pass weight_name='...'.")
        name = _chosen(_listing(repo, inner, revision, token, endpoint), None, f"'{repo}'")
    reference = Reference(repo=repo, file=inner + name, revision=direct.revision if direct else None)
    located = hub.locate_file(
        reference,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        endpoint=endpoint,
        offline=local_files_only or constants.HF_HUB_OFFLINE,
        force=force_download,
    )
    assert located.file is not None
    return located.file


def _listing(repo: str, inner: str, revision: str | None, token: str | bool | None, endpoint: str | None) -> list[str]:
    """Return the names of the files of a repository, or of one of its folders."""
    try:
        names = HfApi(endpoint=endpoint, token=token, library_name="sanakit").list_repo_files(repo, revision=revision)
    except Exception as error:  # the client's transport library, and with it its errors, depends on its version
        text = f"There is no folder '{repo}' here, and the hub does not list it ({type(error).__name__})"
        raise ModelNotFound(f"{text}: check the name and the connection.") from error
    inside = [name.removeprefix(inner) for name in names if name.startswith(inner)]
    return [name for name in inside if "/" not in name]


def read_lora(
    source: str | Path | Mapping[str, Tensor],
    targets: Mapping[str, Target],
    *,
    config: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    **where: Any,
) -> LoraFile:
    """Read an adapter for a model with these layers; names and shapes are judged before any data is read.

    `config` are settings in PEFT's words for tensors that bring none. `allow_pickle` lets `.bin` files be read, by the
    unpickler that only makes tensors. `where` are the arguments of `find`.
    Errors: ModelNotFound; CheckpointError for a file that is damaged, hostile, for another model or not finite.
    """
    if config is not None and not (isinstance(config, Mapping) and all(isinstance(key, str) for key in config)):
        raise InvalidInput(f"The settings of an adapter must be a mapping of names to values, not {config!r:.60}.")
    if isinstance(source, Mapping):
        return _from_tensors(dict(source), targets, dict(config or {}))
    path = find(source, **where)
    _check_pickle(path, allow_pickle)
    if path.suffix in _PICKLED:
        return _from_tensors(read_pickle(path), targets, dict(config or {}), path)
    header = read_lora_header(path)
    reading = judge(header, targets)
    wanted = [key for group in reading.groups for key in group.keys.values()]
    # Tensors that nobody asked for, however large, are not read.
    with verified([path]), opened(path) as (file, _):
        tensors = {name: file.get_tensor(name) for name in wanted}
    for name, tensor in tensors.items():
        _check_values(name, tensor, str(path))
    return LoraFile(
        updates=_assembled(reading, tensors, targets, {**header.config, **(config or {})}, str(path)),
        dialect=reading.dialect,
        name=path.stem,
        sha256=file_digest(path),
        unmatched=reading.unmatched,
        metadata=header.metadata,
    )


def read_lora_header(path: Path) -> Header:
    """Read what a file says before its data: names, shapes, metadata and settings.

    Errors: CheckpointError naming the file when it is no whole safetensors file, or its settings are no JSON.
    """
    entries = read_header(path)
    with opened(path) as (file, _):
        metadata = {str(key): str(value) for key, value in (file.metadata() or {}).items()}
    beside = path.with_name(PEFT_CONFIG)
    config = read_json(beside) if path.name == PEFT_WEIGHT_NAME and beside.is_file() else {}
    if CONFIG_KEY in metadata:
        config = _parsed(metadata[CONFIG_KEY], path)
    return Header(
        path=path,
        shapes={entry.name: entry.shape for entry in entries},
        dtypes={entry.name: entry.dtype for entry in entries},
        metadata=metadata,
        config=config,
    )


def read_tensors_of(
    source: str | Path | Mapping[str, Tensor], *, allow_pickle: bool = False, **where: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors of an adapter file by their names in it, and its settings in PEFT's words.

    Errors: as `read_lora`, but for what needs a model to be judged.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    path = find(source, **where)
    _check_pickle(path, allow_pickle)
    if path.suffix in _PICKLED:
        return read_pickle(path), {}
    header = read_lora_header(path)
    _check_dtypes(header.dtypes, str(path))
    with verified([path]), opened(path) as (file, _):
        tensors = {name: file.get_tensor(name) for name in header.shapes}
    for name, tensor in tensors.items():
        _check_values(name, tensor, str(path))
    return tensors, header.config


def judge(header: Header, targets: Mapping[str, Target]) -> Reading:
    """Match the names of a file with the layers of a model and compare the shapes; nothing is read.

    Errors: CheckpointError as `read_names` and `check_shapes`.
    """
    reading = read_names(header.shapes, targets, str(header.path))
    _check_dtypes(header.dtypes, str(header.path))
    check_shapes(reading, header.shapes, targets, str(header.path))
    return reading


def alphas_of(header: Header, reading: Reading) -> list[float]:
    """Return the alphas that occur, the smallest first; of the data only these numbers are read.

    Errors: CheckpointError as `read_lora`.
    """
    told = _alphas(header.config, [name for group in reading.groups for name in group.ours], str(header.path))
    found = set()
    with opened(header.path) as (file, _):
        for group in reading.groups:
            rank = float(header.shapes[group.keys["down"]][0])
            own = file.get_tensor(group.keys["alpha"]) if "alpha" in group.keys else None
            found.add(float(own) if own is not None else told.get(group.ours[0], rank))
    return sorted(found)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; in the hub's cache its name is that."""
    known = hub_digest(path)
    if known:
        return known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """Return the settings in a file's metadata without the name of the part that they are for."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has settings ({CONFIG_KEY}) that are not valid JSON: save it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has settings ({CONFIG_KEY}) that are no JSON object: save it again.")
    return {key.removeprefix(f"{PART}."): entry for key, entry in value.items()}


def _assembled(
    reading: Reading, tensors: Mapping[str, Tensor], targets: Mapping[str, Target], config: dict[str, Any], where: str
) -> dict[str, LowRank]:
    alphas = _alphas(config, [name for group in reading.groups for name in group.ours], where)
    stabilised = config.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise CheckpointError(f"{where} has the setting use_rslora = {shown(stabilised)}: it must be true or false.")
    return assemble(reading, tensors, targets, alphas=alphas, rank_stabilised=stabilised)


def _alphas(config: Mapping[str, Any], names: list[str], where: str) -> dict[str, float]:
    """Return the alpha of each layer that the settings name; {} where they say nothing."""
    pattern = config.get("alpha_pattern") or {}
    general = config.get("lora_alpha")
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{where} has the alpha_pattern {shown(pattern)}: it must be an object of numbers.")
    for value in (*(() if general is None else (general,)), *pattern.values()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not _sane(value):
            raise CheckpointError(f"{where} has the alpha {shown(value)}: it must be a number.")
    found = {} if general is None else dict.fromkeys(names, float(general))
    for key, value in reversed(pattern.items()):  # of several that name a layer PEFT takes the first
        chosen = _layers_meant(str(key), where)
        found.update({name: float(value) for name in names if chosen.fullmatch(name)})
    return found


def _layers_meant(key: str, where: str) -> re.Pattern[str]:
    """Return the pattern of a key of PEFT's tables; only names and `.*` are understood, for a file may be hostile."""
    words = key.removeprefix("^").removesuffix("$").replace("\\.", ".").split(".*")
    if not all(re.fullmatch(r"[\w.]*", word) for word in words) or len(words) > 4:
        raise CheckpointError(f"{where} has a pattern of layers that is not understood, {shown(key)}: name the layers.")
    body = ".*".join(re.escape(word) for word in words)
    return re.compile(body if key.startswith("^") else rf"(?:.*\.)?{body}")


def _sane(value: float) -> bool:
    return math.isfinite(value) and abs(value) < 1e9


def _from_tensors(
    tensors: dict[str, Tensor], targets: Mapping[str, Target], config: dict[str, Any], path: Path | None = None
) -> LoraFile:
    where = str(path) if path is not None else "the given tensors"
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InvalidInput("An adapter in memory must be a mapping of names to tensors and nothing else.")
        if tensor.is_meta:
            raise InvalidInput(
                f"Tensor {shown(name)} of the adapter has no values (it is on the meta device). Load it."
            )
    reading = read_names(tensors, targets, where)
    _check_dtypes({name: tensor.dtype for name, tensor in tensors.items()}, where)
    check_shapes(reading, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, targets, where)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _check_values(name, tensors[name], where)
        digest.update(name.encode() + b"\0")
        digest.update(bytes_of(tensors[name].detach().cpu().contiguous()))
    config = {key.removeprefix(f"{PART}."): value for key, value in config.items()}
    # A copy: the adapter must not change when the caller's tensors do.
    held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return LoraFile(
        updates=_assembled(reading, held, targets, config, where),
        dialect=reading.dialect,
        name=path.stem if path is not None else "adapter",
        sha256=file_digest(path) if path is not None else digest.hexdigest(),
        unmatched=reading.unmatched,
    )


def _check_pickle(path: Path, allowed: bool) -> None:
    if path.suffix in _PICKLED and not allowed:
        text = f"{path} is pickled by its name, and pickles are not opened: ask its author for safetensors"
        raise CheckpointError(f"{text}, or pass use_safetensors=False if you trust them.")


def _check_dtypes(dtypes: Mapping[str, torch.dtype], where: str) -> None:
    for name, dtype in dtypes.items():
        if (not dtype.is_floating_point or dtype.itemsize == 1) and not name.endswith(".alpha"):
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"Tensor {shown(name)} in {where} is {kind}, which no adapter is: save it again.")


def _check_values(name: str, tensor: Tensor, where: str) -> None:
    if not is_finite(tensor):
        text = f"Tensor {shown(name)} in {where} holds NaN or infinity"
        raise CheckpointError(f"{text}: the file is damaged or its training failed.")


def _chosen(names: list[str], weight_name: str | None, where: str) -> str:
    """Return which file of a folder is the adapter.

    Errors: ModelNotFound when there is none, InvalidInput when there are several.
    """
    if weight_name is not None:
        if weight_name not in names:
            hint = did_you_mean(weight_name, names)
            raise ModelNotFound(f"There is no file {shown(weight_name)} in {where}.{hint} Check weight_name.")
        return weight_name
    for usual in (WEIGHT_NAME, PEFT_WEIGHT_NAME):
        if usual in names:
            return usual
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) > 1:
        raise InvalidInput(f"{where} holds {len(found)} files ({', '.join(found[:3])} ...). Pass weight_name='...'.")
    if not found:
        pickled = next((name for name in sorted(names) if name.endswith(_PICKLED)), None)
        told = f"only {pickled}, which is pickled: ask its author for safetensors" if pickled else "no adapter"
        raise ModelNotFound(f"{where} holds {told}.")
    return found[0]
