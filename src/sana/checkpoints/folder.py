"""A whole pipeline from and to a folder in the published layout: `model_index.json` and one subfolder per part."""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.bounds import shown
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.layout import LAYOUT_VERSION, MODEL_INDEX, find_weights, index_parts, part_of, part_variants
from sana.checkpoints.pretrained import (
    PretrainedMixin,
    SanaTransformer2DModel,
    as_dtype,
    inside,
    reject_unknown,
)
from sana.checkpoints.schedulers import SCHEDULERS
from sana.checkpoints.storage import Leftovers, naming_foreign, recover, saving, write_json
from sana.checkpoints.text_parts import (
    TEXT_ENCODERS,
    TOKENIZERS,
    check_vocabulary,
    load_text_encoder,
    load_tokenizer,
    no_progress_bars,
    write_text_encoder,
)
from sana.checkpoints.weights import MAX_SHARD_SIZE, inspect, outdated, stored_dtype
from sana.errors import CheckpointError, InvalidInput, did_you_mean
from sana.flow.scheduler_base import Face
from sana.memory.quantize import entry
from sana.memory.quantize_configs import for_parts

DtypeChoice = torch.dtype | str | Mapping[str, torch.dtype | str] | None
"""A dtype, its name, "auto" (as stored), or a mapping from part names and "default" to these.

None means float32, and for the text encoder as stored, as in the reference, but never float16.
"""

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
OPTIONAL = ("controlnet",)
"""Parts that a model may have besides."""
NO_FLOAT16 = ("text_encoder", "vae")
"""The parts whose activations overflow in float16."""
_log = logging.getLogger(__name__)


def load_parts(
    folder: str | Path,
    *,
    torch_dtype: DtypeChoice = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    only: Collection[str] | None = None,
    device: torch.device | str | Mapping[str, torch.device | str] = "cpu",
    quantization_config: Any = None,
    **components: Any,
) -> dict[str, Any]:
    """Load the parts that `model_index.json` lists, as part name -> object; models come in evaluation mode.

    `components` are taken as they are instead of being loaded, None included. `only` names the parts to load; the
    others are None. `device` may be a mapping from part names; to "meta" no weights are read yet. `quantization_config`
    is one for transformer and text encoder, or a mapping from part names. A part without the wanted variant is loaded
    from its plain files if another part has the variant.
    Errors: ModelNotFound (an OSError) and CheckpointError (a ValueError) naming what is missing or wrong; InvalidInput
    for unknown part names and dtypes.
    """
    root = Path(folder)
    recover(root)
    listed = index_parts(root)
    known = tuple(dict.fromkeys((*COMPONENTS, *listed, *(name for name in OPTIONAL if name in components))))
    reject_unknown("from_pretrained", [name for name in components if name not in known], known)
    classes = _wanted_classes(root, listed, known, only, components)
    variants = part_variants(root, classes, variant)
    # Absent files show before any is read, those of our own models first: callers know the wording of that message.
    for name in sorted(variants, key=lambda name: part_of(name).stem or ""):
        find_weights(part_folder(root, name), part_of(name), variants[name], use_safetensors)
    places = {name: device.get(name, "cpu") if isinstance(device, Mapping) else device for name in classes}
    quantized = for_parts(quantization_config)
    for name in quantized:
        if name not in classes and isinstance(quantization_config, Mapping):
            raise InvalidInput(f"quantization_config names {name}, which is not loaded here. Leave it out.")
    dtypes = part_dtypes(root, torch_dtype, variants, known, use_safetensors, places)
    parts: dict[str, Any] = {name: components.get(name) for name in known}
    for name, class_name in classes.items():
        place, part_variant = inside(root, name), variants.get(name)
        if class_name in TOKENIZERS:
            parts[name] = load_tokenizer(place, class_name)
        elif class_name in SCHEDULERS:
            parts[name] = SCHEDULERS[class_name].from_folder(place)
        else:
            more: dict[str, Any] = {"device": places[name], "quantization": quantized.get(name)}
            parts[name] = _load_weighted(place, class_name, dtypes[name], part_variant, use_safetensors, **more)
        _log.info("loaded %s as %s from %s", name, class_name, place)
    if {"tokenizer", "text_encoder"} <= classes.keys():
        check_vocabulary(parts["tokenizer"], parts["text_encoder"], part_folder(root, "tokenizer"))
    return parts


def _wanted_classes(
    root: Path,
    listed: Mapping[str, Any],
    known: Collection[str],
    only: Collection[str] | None,
    components: Mapping[str, Any],
) -> dict[str, str]:
    """Return part name -> class of what is to be loaded; errors as `load_parts`."""
    for name in only or ():
        if name not in known:
            raise InvalidInput(f"There is no part '{name}' in {root}.{did_you_mean(name, known)}")
    for name in COMPONENTS:
        if name not in listed and name not in components and (only is None or name in only):
            text = f"{root / MODEL_INDEX} lists no {name}"
            raise CheckpointError(f"{text}: copy the folder again, or pass {name}= an object, or {name}=None.")
    classes = {
        name: str(entry[1])
        for name, entry in listed.items()
        if entry is not None and name not in components and (only is None or name in only)
    }
    for name, class_name in classes.items():
        _check_class(name, class_name, root)
    return classes


def _load_weighted(
    folder: Path,
    class_name: str,
    dtype: torch.dtype,
    variant: str | None,
    use_safetensors: bool | None,
    *,
    device: torch.device | str,
    quantization: Any,
) -> Any:
    files: dict[str, Any] = {"variant": variant, "use_safetensors": use_safetensors}
    if class_name in TEXT_ENCODERS:
        return load_text_encoder(folder, class_name, dtype=dtype, device=device, quantization=quantization, **files)
    return MODELS[class_name].from_pretrained(
        folder, torch_dtype=dtype, device_map=device, quantization_config=quantization, **files
    )


def part_dtypes(
    root: Path,
    choice: DtypeChoice,
    variants: Mapping[str, str | None],
    known: Iterable[str],
    use_safetensors: bool | None = None,
    device: torch.device | str | Mapping[str, torch.device | str] = "cpu",
) -> dict[str, torch.dtype]:
    """Choose the dtype of each part in `variants`.

    Text encoder and autoencoder overflow in float16. Unless float16 is asked for by their own name they get bfloat16
    instead, and one warning is logged. A part stored in float16 that no dtype was asked for gets float32 on a CPU. A
    control network that is not named follows the transformer.
    Errors: InvalidInput for an unknown dtype, or a part name that is not in `known`.
    """
    named = choice if isinstance(choice, Mapping) else {"default": choice}
    for name in named:
        if name not in ("default", *known):
            hint = did_you_mean(str(name), ("default", *known))
            raise InvalidInput(f"torch_dtype names '{name}', which is no part of this model.{hint}")
    chosen: dict[str, torch.dtype] = {}
    softened: list[str] = []
    for name, variant in variants.items():
        usual = named.get("transformer", named.get("default")) if name == "controlnet" else named.get("default")
        wanted = named.get(name, usual)
        if wanted == "auto" or (wanted is None and name == "text_encoder"):
            weights = find_weights(part_folder(root, name), part_of(name), variant, use_safetensors)
            chosen[name] = stored_dtype(inspect(weights))
        else:
            chosen[name] = as_dtype(wanted) or torch.float32
        if chosen[name] != torch.float16 or name not in NO_FLOAT16 or name in named:
            continue
        place = device[name] if isinstance(device, Mapping) else device
        if wanted is None and torch.device(place).type in ("cpu", "meta"):
            chosen[name] = torch.float32
        else:
            chosen[name] = torch.bfloat16
            softened.append(name)
    if softened:
        advice = "name the part in torch_dtype={...} to insist"
        _log.warning("%s: loaded in bfloat16 because float16 overflows there; %s", " and ".join(softened), advice)
    return chosen


def save_parts(
    folder: str | Path,
    parts: Mapping[str, Any],
    *,
    class_name: str = "SanaPipeline",
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    safe_serialization: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write parts (None for an absent one) as a folder that this package and the reference load, all at once.

    A killed or failed save leaves what was there before. The text encoder is always written as safetensors. `notes` go
    into `model_index.json`; their keys begin with an underscore, so that other readers skip them.
    Errors: InvalidInput for a path that is a file, and for a part that cannot be saved, before anything is written;
    OSError naming the file that could not be written.
    """
    root = Path(folder)
    whole = {name: _savable(part) for name, part in parts.items()}
    entries = {name: _index_entry(name, part) for name, part in whole.items()}
    for part in whole.values():
        entry(part)  # what cannot be saved is refused before a file is made
    options = {"variant": variant, "max_shard_size": max_shard_size or MAX_SHARD_SIZE}
    leftovers: list[Leftovers] = []
    with saving(root, leftovers) as stage:
        for name, part in whole.items():
            if part is None:
                continue
            leftovers.append(_write_part(name, part, stage / name, root / name, safe_serialization, options))
        header = {"_class_name": class_name, "_diffusers_version": LAYOUT_VERSION, **(notes or {})}
        write_json(stage / MODEL_INDEX, {**header, **entries})


def _write_part(
    name: str, part: Any, stage: Path, folder: Path, safe_serialization: bool, options: dict[str, Any]
) -> Leftovers:
    """Write one part into `stage`; return what tells which files of its folder are then without use."""
    stage.mkdir()
    kind = part_of(name)
    if isinstance(part, PretrainedMixin):
        told = part.write_files(stage, folder, safe_serialization=safe_serialization, **options)
        return lambda: [f"{name}/{file}" for file in told()]
    if type(part).__name__ in TEXT_ENCODERS:
        told = write_text_encoder(part, stage, folder, **options)
        return lambda: [f"{name}/{file}" for file in told()]
    with no_progress_bars(), naming_foreign(stage):
        part.save_pretrained(stage, **(options if kind.stem else {}))
    written = frozenset(path.name for path in stage.iterdir())
    return lambda: [f"{name}/{file}" for file in outdated(folder, kind, options["variant"], "safetensors", written)]


def _check_class(name: str, class_name: str, root: Path) -> None:
    known = SLOTS.get(name) or (*MODELS, *TEXT_ENCODERS, *TOKENIZERS, *SCHEDULERS)
    if class_name not in known:
        text = f"Part '{name}' in {root} is of class {shown(class_name)}, which is not among the known ones"
        raise CheckpointError(f"{text} ({', '.join(known)}): pass {name}= an object, or {name}=None.")


def _savable(part: Any) -> Any:
    """Return what stands behind a compiled module, and the loadable face of a bare scheduler."""
    if isinstance(part, Face) and type(part).__name__ in SCHEDULERS:
        return SCHEDULERS[type(part).__name__].from_config(part.to_config())
    return getattr(part, "_orig_mod", part)


def _index_entry(name: str, part: Any) -> list[str | None]:
    """Return [library, class] of a part; our own classes carry the library name that readers of the layout know."""
    if part is None:
        return [None, None]
    package, class_name = type(part).__module__.partition(".")[0], type(part).__name__
    library = "diffusers" if package == "sana" else package
    if library not in ("diffusers", "transformers") or not hasattr(part, "save_pretrained"):
        raise InvalidInput(f"Part '{name}' is a {class_name}, which cannot be saved; leave it out or pass None.")
    return [library, class_name]


MODELS: dict[str, type[SanaTransformer2DModel] | type[AutoencoderDC] | type[SanaControlNetModel]] = {
    "SanaTransformer2DModel": SanaTransformer2DModel,
    "AutoencoderDC": AutoencoderDC,
    "SanaControlNetModel": SanaControlNetModel,
}
SLOTS: dict[str, tuple[str, ...]] = {
    "tokenizer": TOKENIZERS,
    "text_encoder": TEXT_ENCODERS,
    "vae": ("AutoencoderDC",),
    "transformer": ("SanaTransformer2DModel",),
    "controlnet": ("SanaControlNetModel",),
    "scheduler": tuple(SCHEDULERS),
}
"""The classes that a part of that name may have."""
