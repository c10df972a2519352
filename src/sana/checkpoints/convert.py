"""Models from one form into another: original files and folders, both ways; pickles into safetensors; other dtypes.

What is read is a folder (a model alone, or the parts of a pipeline), an original file, or any single file of tensors;
what is written is a folder, or one safetensors file where the target's name ends so. No pickle is ever written. Values
are not touched unless another dtype is asked for, so there and back again gives the same bits.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.cards import Card
from sana.checkpoints import hub
from sana.checkpoints.assembly import OTHERS, SAMPLERS, assemble, write_scheduler
from sana.checkpoints.bounds import shown
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.folder import OPTIONAL, load_parts, save_parts
from sana.checkpoints.hub import Located
from sana.checkpoints.layout import (
    MODEL_INDEX,
    ROOT,
    Weights,
    find_weights,
    index_parts,
    part_of,
    part_variants,
    read_json,
)
from sana.checkpoints.original.architecture import keys_of_autoencoder, kinds_of
from sana.checkpoints.original.examine import Original, examine, original_tensors
from sana.checkpoints.original.keymap import Keymap, controlnet_keys, transformer_keys
from sana.checkpoints.original.loading import PARTS
from sana.checkpoints.pretrained import PretrainedMixin, as_dtype, inside
from sana.checkpoints.single import PICKLES, TensorFile, open_single
from sana.checkpoints.storage import Leftovers, publish, saving
from sana.checkpoints.tensors import write_tensors
from sana.checkpoints.weights import MAX_SHARD_SIZE, check_shard_size, inspect, is_finite
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, NonFinite

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be converted, and how."""

    source: str | Path
    """A folder, a file, a hub id, a short name or an `hf://` reference."""
    target: Path
    """A folder, or a file whose name ends in .safetensors."""
    dtype: str | None = None
    """Precision of what is written; None leaves every tensor as it is."""
    variant: str | None = None
    """Variant under which the weights of a folder are written, for example bf16."""
    from_variant: str | None = None
    """Variant to read from a folder."""
    max_shard_size: int | str = MAX_SHARD_SIZE
    """Largest file of weights in a folder."""
    part: str | None = None
    """Which part of a pipeline is written alone: transformer, in a file with its control branch, controlnet or vae."""
    controlnet: Path | None = None
    """Folder of a control branch that goes into the same original file as its transformer."""
    base: str | Path | None = None
    """Model whose other parts make a whole pipeline of an original file; its files are copied."""
    scheduler: str | None = None
    """Sampler whose settings are written beside: flow-dpm, flow-euler or scm."""
    card: Card | None = None
    """The card that an original file is known to belong to."""
    ema: bool = False
    """Whether to take averaged weights."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that tensors leave open."""
    force: bool = False
    """Whether to write over what is there."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `hub.locate`: revision, cache_dir, local_files_only, token, endpoint."""

    @property
    def to_file(self) -> bool:
        """Whether one file is written."""
        return self.target.suffix == ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was done."""

    form: str
    """What was written: a folder, a pipeline, an original file, or a file of tensors under their own names."""
    target: Path
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Part -> its configuration."""
    tensors: int = 0
    """How many tensors were written, or went into what was written."""
    assumed: tuple[str, ...] = ()
    """What the source did not tell."""
    left_out: tuple[str, ...] = ()
    """Tensors of the source that the target has no place for."""
    card: str | None = None
    """The card of an original file."""


def convert(task: Conversion) -> Converted:
    """Carry out a conversion; the target appears whole or not at all.

    Errors: InvalidInput for a target that exists (without `force`) or that the source cannot become; ModelNotFound and
    CheckpointError as in loading; NonFinite for weights that are not.
    """
    dtype = as_dtype(task.dtype, "dtype")
    _check_target(task)
    _check_names(task)
    wanted: dict[str, Any] = {"parts": _parts(task), "optional": OPTIONAL if task.to_file else ()}
    located = hub.locate(task.source, single=True, variant=task.from_variant, **wanted, **task.where)
    _check_effects(task, located)
    if located.file is None:
        return _file_of(task, located.folder, dtype) if task.to_file else _folder_of(task, located.folder, dtype)
    file = open_single(located.file, averaged=task.ema)
    if task.to_file or not kinds_of(file.entries):
        return _repacked(task, file, dtype)
    found = examine(located.file, name=located.name, card=task.card or located.card, averaged=task.ema, told=task.told)
    return _unpacked(task, found, dtype)


def _check_target(task: Conversion) -> None:
    target = task.target
    if target.suffix in PICKLES:
        text = f"'{target}' would be a pickle, which is never written"
        raise InvalidInput(f"{text}: let its name end in .safetensors, which the original code loads as well.")
    if task.scheduler is not None and task.scheduler not in SAMPLERS:
        raise InvalidInput(f"scheduler is {task.scheduler!r}; choose one of {', '.join(SAMPLERS)}.")
    if task.to_file and (task.base is not None or task.scheduler is not None):
        raise InvalidInput("One file holds no other parts and no scheduler; let the target be a folder.")
    if task.part is not None and task.part not in ("transformer", "vae", "controlnet"):
        raise InvalidInput(f"part is {task.part!r}; choose transformer, controlnet or vae.")
    same = (
        Path(task.source).expanduser().exists() and target.exists() and target.samefile(Path(task.source).expanduser())
    )
    if same:
        raise InvalidInput(f"'{target}' is the source itself; give another target.")
    if target.is_dir() and task.to_file:
        raise InvalidInput(f"'{target}' is a folder; give the name of a file.")
    if target.is_file() and not task.to_file:
        raise InvalidInput(f"'{target}' is a file; give a folder, or a name that ends in .safetensors.")
    taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if taken and not task.force:
        raise InvalidInput(f"'{target}' is there already; give another name, or --force to write over it.")


def _check_names(task: Conversion) -> None:
    """Refuse, before anything is read, names and sizes that no file can have, and what one file has no place for."""
    for variant in (task.variant, task.from_variant):
        part_of(ROOT).names(variant, "safetensors")
    check_shard_size(task.max_shard_size)
    if task.to_file:
        sharded = task.max_shard_size != MAX_SHARD_SIZE
        _refuse({"--variant": task.variant is not None, "--shard": sharded}, "OUT is one file")
    else:
        _refuse({"--controlnet": task.controlnet is not None}, "OUT is a folder")


def _check_effects(task: Conversion, located: Located) -> None:
    """Refuse options that would change nothing for the kind of source there is."""
    told = {"--card": task.card is not None, "--config": bool(task.told)}
    if located.file is None:
        made = {"--base": task.base is not None, "--scheduler": task.scheduler is not None, "--ema": task.ema}
        _refuse({**told, **made}, "IN is a folder")
        return
    chosen = {"--part": task.part is not None, "--from-variant": task.from_variant is not None}
    _refuse({**chosen, "--controlnet": task.controlnet is not None}, "IN is one file")
    if task.to_file:
        _refuse(told, "a file becomes a file as it is")


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    for option, is_given in given.items():
        if is_given:
            raise InvalidInput(f"{option} has no effect where {reason}. Leave it out.")


def _parts(task: Conversion) -> tuple[str, ...] | None:
    """Return which parts of a repository are needed: all, unless one of them is written alone."""
    if task.part is None and not task.to_file:
        return None
    return (task.part or "transformer",)


def _repacked(task: Conversion, file: TensorFile, dtype: torch.dtype | None) -> Converted:
    """Write the tensors of a file as safetensors under their own names."""
    if not task.to_file:
        text = f"{file.path} holds no original SANA model, so that it tells no configuration"
        raise InvalidInput(f"{text}: give a target that ends in .safetensors, or convert its whole folder.")
    _write(task.target, ((name, _cast(tensor, dtype)) for name, tensor in file.read(file.entries)))
    return Converted(
        form="original" if kinds_of(file.entries) else "tensors", target=task.target, tensors=len(file.entries)
    )


def _unpacked(task: Conversion, found: Original, dtype: torch.dtype | None) -> Converted:
    """Write the models of an original file as a folder, or as a pipeline with the other parts of another model."""
    if "transformer" not in found.models:
        _refuse({"--base": task.base is not None, "--scheduler": task.scheduler is not None}, "IN is an autoencoder")
    where = {name: value for name, value in task.where.items() if name != "revision"}
    base = hub.locate(task.base, parts=(*OTHERS, "scheduler"), **where) if task.base is not None else None
    missing = [name for name in OTHERS if base is not None and not part_folder(base.folder, name).is_dir()]
    if base is not None and missing:
        raise ModelNotFound(f"{base.folder} is no folder of a pipeline: it has no {missing[0]}.")
    modules: dict[str, Any] = {part: found.build(part, PARTS[part], dtype=dtype) for part in found.models}
    nested = len(modules) > 1 or base is not None or task.scheduler is not None
    leftovers: list[Leftovers] = []
    with saving(task.target, leftovers) as stage:
        for part, module in modules.items():
            leftovers.append(_write_module(task, module, stage, part if nested else ROOT))
        if base is not None:
            assemble(base, stage, modules, sampler=task.scheduler, card=found.card, variant=task.variant)
        elif task.scheduler is not None:
            write_scheduler(stage / "scheduler", task.scheduler, found.card)
    dropped = {name for part in found.models for name in found.models[part].keys.pieces(found.file.entries)[1]}
    return Converted(
        form="pipeline" if base is not None else "folder",
        target=task.target,
        configs={part: module.config.to_dict() for part, module in modules.items()},
        tensors=len(found.file.entries) - len(dropped),
        assumed=found.assumed,
        left_out=tuple(sorted(dropped)),
        card=found.card.name if found.card else None,
    )


def _write_module(task: Conversion, module: PretrainedMixin, stage: Path, part: str) -> Leftovers:
    (stage / part).mkdir(exist_ok=True)
    told = module.write_files(
        stage / part,
        task.target / part,
        safe_serialization=True,
        variant=task.variant,
        max_shard_size=task.max_shard_size,
    )
    return lambda: [f"{part}/{file}" if part else file for file in told()]


def _file_of(task: Conversion, folder: Path, dtype: torch.dtype | None) -> Converted:
    """Write a model of a folder as an original file, with a control branch where there is one."""
    modules = {}
    for part, place in _model_folders(task, folder).items():
        modules[part] = _load(place, task.from_variant, dtype, part)
    if "controlnet" in modules and modules["controlnet"].wiring != "native":
        _log.warning(
            "the control network is joined as in diffusers, but readers of an original file join it as the original"
            " code does: the pictures will differ, unless it was trained by that code"
        )
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        taken = _shared(tensors, module) if part == "controlnet" else ()
        tensors.update(original_tensors(module.state_dict(), _keys(part, module), module.config, taken))
    count = len(tensors)
    _write(task.target, tensors.items())
    configs = {part: module.config.to_dict() for part, module in modules.items()}
    return Converted(form="original", target=task.target, configs=configs, tensors=count)


def _model_folders(task: Conversion, folder: Path) -> dict[str, Path]:
    """Return part -> folder of the models that go into one original file."""
    found: dict[str, Path] = {}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        named = str(config.get("_class_name") or "")
        kinds = {kind.__name__: part for part, kind in PARTS.items()}
        if named not in kinds:
            others = config.get("architectures")  # as transformers has it
            what = shown(named or (others[0] if isinstance(others, list) and others else "model of no known class"))
            raise CheckpointError(f"{folder} holds a {what}, which cannot be converted; {', '.join(kinds)} can.")
        found[kinds[named]] = folder
    else:
        part = task.part or ("transformer" if part_folder(folder, "transformer").is_dir() else "vae")
        found[part] = inside(folder, part)
        if part == "transformer" and (folder / "controlnet" / "config.json").is_file():
            found["controlnet"] = inside(folder, "controlnet")
    if task.controlnet is not None:
        found["controlnet"] = task.controlnet
    if set(found) == {"controlnet"} and task.to_file:
        text = "An original file holds a control branch together with its transformer"
        raise InvalidInput(f"{text}: convert the transformer's folder, and name this one with --controlnet.")
    return dict(sorted(found.items(), reverse=True))  # the transformer first


def _load(folder: Path, variant: str | None, dtype: torch.dtype | None, part: str) -> Any:
    config, weights = read_json(folder / "config.json"), _weights(folder, part_of(part), variant)
    return PARTS[part].from_weights(config, weights, inspect(weights), dtype=dtype)


def _weights(folder: Path, part: Any, variant: str | None) -> Weights:
    """Find weights, pickled ones where there are no others: converting is what they may be opened for."""
    try:
        return find_weights(folder, part, variant)
    except CheckpointError:
        return find_weights(folder, part, variant, use_safetensors=False)


def _keys(part: str, module: Any) -> Keymap:
    if part == "vae":
        return keys_of_autoencoder(module.config)
    return controlnet_keys() if part == "controlnet" else transformer_keys(module.config.guidance_embeds)


def _shared(base: Mapping[str, Tensor], controlnet: Any) -> tuple[str, ...]:
    """Return the names that a control branch shares with its transformer in one file, where both must be the same.

    Errors: InvalidInput naming the first that differs.
    """
    tensors = dict(original_tensors(controlnet.state_dict(), controlnet_keys(), controlnet.config))
    names = tuple(name for name in tensors if not name.startswith("controlnet."))
    for name in names:
        if name not in base or not torch.equal(base[name], tensors[name]):
            text = f"Control branch and transformer differ in '{name}', which one original file holds only once"
            raise InvalidInput(f"{text}: convert the transformer that the branch was trained with.")
    return names


def _folder_of(task: Conversion, folder: Path, dtype: torch.dtype | None) -> Converted:
    """Write a folder anew: pickles as safetensors, in another dtype, under a variant, in shards."""
    if (folder / MODEL_INDEX).is_file() and task.part is None:
        parts = _pipeline(task, folder, dtype)
        index = read_json(folder / MODEL_INDEX)
        notes = {key: value for key, value in index.items() if key.startswith("_") and isinstance(value, str | dict)}
        kind = notes.pop("_class_name", None)
        notes.pop("_diffusers_version", None)
        save_parts(
            task.target,
            parts,
            class_name=kind if isinstance(kind, str) else "SanaPipeline",
            variant=task.variant,
            max_shard_size=task.max_shard_size,
            notes=notes,
        )
        configs = {name: part.config.to_dict() for name, part in parts.items() if isinstance(part, PretrainedMixin)}
        tensors = sum(len(part.state_dict()) for part in parts.values() if isinstance(part, torch.nn.Module))
        return Converted(form="pipeline", target=task.target, configs=configs, tensors=tensors)
    places = _model_folders(task, folder) if task.part or (folder / "config.json").is_file() else None
    if places is None:
        raise ModelNotFound(f"{folder} holds no model: it has neither {MODEL_INDEX} nor config.json.")
    (part, place), *_ = places.items()
    module = _load(place, task.from_variant, dtype, part)
    module.save_pretrained(task.target, variant=task.variant, max_shard_size=task.max_shard_size)
    return Converted(
        form="folder",
        target=task.target,
        configs={part: module.config.to_dict()},
        tensors=len(module.state_dict()),
    )


def _pipeline(task: Conversion, folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Load all parts of a pipeline; without a dtype each tensor of our own models stays as it is stored."""
    listed = [name for name, entry in index_parts(folder).items() if entry is not None]
    variants = part_variants(folder, listed, task.from_variant)
    ours = [name for name in listed if name in PARTS] if dtype is None else []
    own = {name: _load(inside(folder, name), variants[name], None, name) for name in ours}
    others = {name: part_folder(folder, name) for name in listed if name not in own}
    pickled = any(_is_pickled(place, name, variants.get(name)) for name, place in others.items())
    # Named by itself, the text encoder is not kept out of float16 either, in which it may be stored.
    return load_parts(
        folder,
        torch_dtype={"text_encoder": "auto"} if dtype is None else dtype,
        variant=task.from_variant,
        use_safetensors=False if pickled else None,
        **own,
    )


def _is_pickled(folder: Path, name: str, variant: str | None) -> bool:
    part = part_of(name)
    if part.stem is None:
        return False
    try:
        find_weights(folder, part, variant)
    except (CheckpointError, ModelNotFound):
        single, index = part.names(variant, "bin")
        return (folder / single).is_file() or (folder / index).is_file()
    return False


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _write(target: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise NonFinite(f"Tensor '{name}' holds NaN or infinity, so nothing is written.")
        ready[name] = tensor
    target.parent.mkdir(parents=True, exist_ok=True)
    publish(target, lambda beside: write_tensors(beside, ready))
