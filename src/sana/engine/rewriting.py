"""A model written anew with another transformer: everything around that stays as it is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana.checkpoints import hub
from sana.checkpoints.built_in import part_folder, shared_folders
from sana.checkpoints.original.examine import original_tensors
from sana.checkpoints.original.keymap import transformer_keys
from sana.checkpoints.original.loading import load_single_file
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.storage import Leftovers, publish, saving
from sana.checkpoints.tensors import write_tensors
from sana.checkpoints.weights import MAX_SHARD_SIZE
from sana.errors import CheckpointError, InvalidInput

PART = "transformer"


def rewrite(
    model: str | Path,
    target: str | Path,
    change: Callable[[SanaTransformer2DModel, Path | None], None],
    *,
    force: bool = False,
    variant: str | None = None,
    **where: Any,
) -> None:
    """Load the transformer of a model, change it, and write the model with it; `target` appears whole or not at all.

    Args:
        model: folder of a pipeline or of a transformer, original file, short name or hub id.
        target: a folder, or an original file where it ends in .safetensors.
        change: works on the transformer in place, given the folder of the pipeline if there is one.
        force: whether to write over what is there.
        where: arguments of `hub.locate`, such as `revision`.

    Raises:
        InvalidInput: the target exists, or is the model itself.
        ModelNotFound, CheckpointError: the model cannot be had.
    """
    place = Path(target).expanduser()
    to_file = place.suffix == ".safetensors"
    if place.is_dir() if to_file else place.is_file():
        raise InvalidInput(f"'{place}' is a {'folder' if to_file else 'file'}. Give another target.")
    if not force and place.exists() and (to_file or any(place.iterdir())):
        raise InvalidInput(f"'{place}' exists already. Give another target, or --force to write over it.")
    located = hub.locate(model, single=True, parts=(PART,) if to_file else None, variant=variant, **where)
    source = located.file or located.folder
    if place.exists() and place.samefile(source):
        raise InvalidInput(f"'{place}' is the model itself. Give another target.")
    transformer = _transformer(located)
    piped = located.file is None and part_folder(located.folder, PART).is_dir()
    change(transformer, located.folder if piped else None)
    if to_file:
        _write_file(transformer, place)
    elif piped:
        _write_pipeline(transformer, located.folder, place, located.variant)
    else:
        transformer.save_pretrained(place)


def _transformer(located: hub.Located) -> Any:
    if located.file is not None:
        made = load_single_file(located.file, name=located.name, card=located.card, dtype="auto").transformer
        if made is None:
            raise CheckpointError(f"{located.file} holds no transformer, which is what this is about.")
        return made
    part = PART if part_folder(located.folder, PART).is_dir() else None
    return SanaTransformer2DModel.from_pretrained(
        located.folder, subfolder=part, torch_dtype="auto", variant=located.variant
    )


def _write_file(transformer: Any, place: Path) -> None:
    keys = transformer_keys(transformer.config.guidance_embeds)
    tensors = dict(original_tensors(transformer.state_dict(), keys, transformer.config))
    place.parent.mkdir(parents=True, exist_ok=True)
    publish(place, lambda beside: write_tensors(beside, tensors))


def _write_pipeline(transformer: Any, source: Path, place: Path, variant: str | None) -> None:
    """Copy all parts of a pipeline but the transformer, which is written anew."""
    leftovers: list[Leftovers] = []
    with saving(place, leftovers) as stage:
        for entry in sorted([*source.iterdir(), *shared_folders(source)]):
            if entry.name.startswith(".") or entry.name == PART:
                continue
            if entry.is_dir():
                shutil.copytree(entry, stage / entry.name)
            else:
                shutil.copyfile(entry, stage / entry.name)
        (stage / PART).mkdir()
        stale = transformer.write_files(
            stage / PART, place / PART, variant=variant, max_shard_size=MAX_SHARD_SIZE, safe_serialization=True
        )
        leftovers.append(lambda: [f"{PART}/{name}" for name in stale()])
