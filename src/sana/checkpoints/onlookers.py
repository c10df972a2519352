"""Models that look at pictures: CLIP and vision-language models, in the layout of transformers.

They are found like other models: a folder, or a hub id whose files are fetched once. transformers builds them, but code
that comes with a model is never run, weights are read from safetensors only, and what the files leave open is an error
instead of random weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download

from sana.checkpoints.digests import hub_digest, verify
from sana.checkpoints.foreign import AGAIN, first_line
from sana.checkpoints.hub_errors import not_served
from sana.checkpoints.layout import read_json
from sana.checkpoints.text_parts import no_progress_bars
from sana.errors import CheckpointError, ModelNotFound

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FETCHED = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"]
_LEFT = ["*/*", "*adapter*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def find(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of a model; one that is whole in the cache causes no request.

    Raises:
        ModelNotFound: it is neither a folder nor to be had from the hub, or its files are not a whole model.
        CheckpointError: a download was damaged.
    """
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        if lack := _lacking(folder):
            raise ModelNotFound(f"The folder {name} has no {lack}: it is no whole model of transformers.")
        return folder
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFound(f"There is no model '{name[:80]}'. Give a folder, or a hub id such as organisation/model.")
    fetch: dict[str, Any] = {"revision": revision, "allow_patterns": _FETCHED, "ignore_patterns": _LEFT}
    try:
        cached = Path(snapshot_download(name, local_files_only=True, **fetch))
    except OSError:  # nothing of it is there yet
        cached = None
    if cached is not None and not _lacking(cached):
        return cached
    title = f"'{name}' at revision '{revision or constants.DEFAULT_REVISION}'"
    if offline or constants.HF_HUB_OFFLINE:
        raise ModelNotFound(
            f"{title} is not whole in the cache and cannot be fetched offline: allow one download, or pass a folder."
        )
    try:
        found = Path(snapshot_download(name, library_name="sanakit", **fetch))
    except Exception as error:  # the client's transport library, and with it its errors, depends on its version
        raise not_served(name, title, revision, None, error) from error
    if lack := _lacking(found):
        raise ModelNotFound(f"{title} has no {lack}: only models with weights in safetensors are read.")
    for file in found.glob("*.safetensors"):
        if hub_digest(file):
            verify(file)
    return found


def load_clip(folder: Path, device: torch.device) -> tuple[Any, Any, Any]:
    """Return CLIP, its tokenizer, and what makes its input of pictures, which needs no torchvision.

    Errors: CheckpointError.
    """
    import transformers

    kind = _checked(folder).get("model_type")
    if kind != "clip":
        raise CheckpointError(f"{folder} holds a model of type {str(kind)[:40]!r}, no CLIP: name a CLIP model.")
    with_pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    model = _loaded(transformers.CLIPModel, folder, torch.float32)
    tokenizer = _foreign(transformers.AutoTokenizer.from_pretrained, folder, "tokenizer")
    return model.to(device), tokenizer, _foreign(with_pil.from_pretrained, folder, "image processor")


def load_describer(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Return a vision-language model and its processor; bfloat16 beside the CPU.

    Errors: CheckpointError.
    """
    import transformers

    _checked(folder)
    processor = _foreign(_load_processor, folder, "processor")
    if getattr(processor, "tokenizer", None) is None:
        raise CheckpointError(f"The processor in {folder} takes no text and picture together: use another model.")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return _loaded(transformers.AutoModelForImageTextToText, folder, dtype).to(device), processor


def _load_processor(folder: Path, **options: Any) -> Any:
    """Load a processor; of one that also reads videos, which needs torchvision, only the part for pictures."""
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(folder, **options)
    except ImportError as error:
        kind = _processor_class(folder)
        if "torchvision" not in str(error).lower() or kind is None:
            raise
        told = tuple(name for name in kind.get_attributes() if name != "video_processor")
        members = {"get_attributes": classmethod(lambda _: list(told))}
        return type(kind.__name__, (kind,), members).from_pretrained(folder, **options)  # type: ignore[attr-defined]


def _processor_class(folder: Path) -> Any:
    """Return the class of transformers that the files name as their processor, or None."""
    import transformers

    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")]
    names = [str(read_json(file).get("processor_class")) for file in files if file.is_file()]
    found = [getattr(transformers, name, None) for name in names if name.endswith("Processor")]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin)]
    return kinds[0] if kinds else None


def _lacking(folder: Path) -> str | None:
    """Return the first file that a whole model has and this folder has not."""
    files = ["config.json"]
    if (folder / INDEX).is_file():
        told = read_json(folder / INDEX).get("weight_map")
        files += sorted({str(file) for file in told.values()}) if isinstance(told, Mapping) else [WEIGHTS]
    else:
        files.append(WEIGHTS)
    return next((file for file in files if not (folder / file).is_file()), None)


def _checked(folder: Path) -> dict[str, Any]:
    """Return the configuration. Errors: CheckpointError for one that would fetch or run what is not in the folder."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter, which names a model elsewhere: give a whole model.")
    config = read_json(folder / "config.json")
    for key, value in _items(config):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{folder / 'config.json'} asks for code from elsewhere ({key}): use another model.")
    return config


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _items(inner)


def _loaded(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a model strictly, in evaluation mode."""

    def load(path: Path, **options: Any) -> Any:
        with no_progress_bars():
            return kind.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options)

    model, told = _foreign(load, folder, "model")
    if missing := sorted(told["missing_keys"]):
        raise CheckpointError(
            f"The weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}: {AGAIN}."
        )
    return model.eval().requires_grad_(False)


def _foreign(load: Any, folder: Path, what: str) -> Any:
    """Call a loader of transformers without code of the model; whatever it raises becomes one sentence."""
    try:
        return load(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the foreign library raises for bad files
        text = str(error)
        if "trust_remote_code" in text:
            reason = "it brings code of its own, which is never run: use a model that transformers knows"
        elif "torchvision" in text.lower():
            reason = "it needs torchvision: use another model, such as llava-hf/llava-1.5-7b-hf"
        else:
            reason = json.dumps(first_line(error))[1:-1][:200]
        raise CheckpointError(f"The {what} in {folder} cannot be loaded ({reason}).") from error
