"""Adapter files written: in three dialects, with settings and the metadata that other programs show."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.checkpoints.lora.dialects import Dialect, write_names
from sana.checkpoints.lora.files import CONFIG_KEY, PART, bytes_of
from sana.checkpoints.storage import publish, write_all
from sana.checkpoints.tensors import DIGEST
from sana.checkpoints.weights import is_finite
from sana.errors import InvalidInput, NonFinite
from sana.models.lora import LowRank

MODEL_SPEC = "modelspec."
MODEL_SPEC_VERSION = "1.0.1"
IMPLEMENTATION = "https://github.com/NVlabs/Sana"
"""Where the architecture was first written, which ModelSpec asks for."""


def save_lora(
    path: Path,
    updates: Mapping[str, LowRank],
    *,
    dialect: Dialect = "peft",
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter; the file appears whole or not at all, and is the same for the same content.

    `metadata` are kept as they are, but for hashes and settings, which are written anew. `config` replaces the settings
    that the updates themselves give.
    Errors: InvalidInput for what the dialect cannot say; NonFinite naming the tensor; OSError naming the file.
    """
    named = write_names(updates, dialect)
    if dialect == "peft":
        named = {f"{PART}.{name}": tensor for name, tensor in named.items()}
        config = {f"{PART}.{key}": value for key, value in (config or settings_of(updates)).items()}
    kept = {
        key: value
        for key, value in (metadata or {}).items()
        if key not in (DIGEST, CONFIG_KEY, "format", f"{MODEL_SPEC}hash_sha256")
    }
    if config:
        kept[CONFIG_KEY] = json.dumps(config, indent=2, sort_keys=True)
    write_file(path, named, kept)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, pickled: bool = False
) -> None:
    """Write tensors as they are named, with settings in PEFT's words for the part they are of.

    Errors: as `write_file`; CheckpointError for names that are of no adapter.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if pickled:
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        publish(path, lambda beside: torch.save(ready, beside))
        return
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in (config or {}).items()}
    named = {f"{PART}.{key}": value for key, value in told.items()}
    write_file(path, tensors, {CONFIG_KEY: json.dumps(named, indent=2, sort_keys=True)} if named else {})


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with metadata, among them the SHA-256 of its data; the same content gives the same file.

    Errors: NonFinite naming the tensor that is not finite; OSError naming the file.
    """
    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    # Wide dtypes first, so that all data lie on multiples of their size.
    ready = dict(sorted(ready.items(), key=lambda item: -item[1].dtype.itemsize))
    digest, header, offset = hashlib.sha256(), {}, 0
    for name, tensor in ready.items():
        if not is_finite(tensor):
            raise NonFinite(f"Tensor '{name}' holds NaN or infinity, so the adapter is not saved.")
        if tensor.dtype not in _KINDS:
            raise InvalidInput(f"Tensor '{name}' is {tensor.dtype}; convert it to float32, float16 or bfloat16.")
        digest.update(bytes_of(tensor))
        end = offset + tensor.nbytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    told = {**metadata, "format": "pt", DIGEST: digest.hexdigest()}
    if any(key.startswith(MODEL_SPEC) for key in told):
        told[f"{MODEL_SPEC}hash_sha256"] = f"0x{digest.hexdigest()}"
    text = json.dumps({"__metadata__": dict(sorted(told.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(beside: Path) -> None:
        with beside.open("wb", buffering=0) as file:
            write_all(file, len(text).to_bytes(8, "little") + text)
            for tensor in ready.values():
                write_all(file, bytes_of(tensor))

    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, write)


def settings_of(updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return the settings of an adapter in PEFT's words: the first rank and alpha, and patterns for those that differ.

    Errors: InvalidInput when only some layers are rank-stabilised, which PEFT cannot say.
    """
    first = next(iter(updates.values()))
    if len({update.rank_stabilised for update in updates.values()}) > 1:
        raise InvalidInput("Only some layers of the adapter are rank-stabilised, which cannot be written.")
    ranks = {f"^{name}": update.rank for name, update in updates.items() if update.rank != first.rank}
    alphas = {f"^{name}": _plain(update.alpha) for name, update in updates.items() if update.alpha != first.alpha}
    return {
        "r": first.rank,
        "lora_alpha": _plain(first.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(updates),
        "use_rslora": first.rank_stabilised,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "lora_bias": any(update.bias is not None for update in updates.values()),
    }


def model_spec(architecture: str, **told: str) -> dict[str, str]:
    """Return metadata that other programs show: the ModelSpec keys with these values, e.g. `title`, `trigger_phrase`.

    Source: Stability AI ModelSpec 1.0.1.
    """
    fields = {"sai_model_spec": MODEL_SPEC_VERSION, "architecture": f"{architecture}/lora"}
    fields |= {"implementation": IMPLEMENTATION, **told}
    return {MODEL_SPEC + key: value for key, value in fields.items() if value}


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
