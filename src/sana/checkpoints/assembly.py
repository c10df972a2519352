"""A whole pipeline around a network: what it lacks is copied from the folder of another model, and indexed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana.cards import Card
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.hub import Located
from sana.checkpoints.layout import (
    LAYOUT_VERSION,
    MODEL_INDEX,
    find_weights,
    index_parts,
    part_of,
    part_variants,
    read_json,
    sole_variant,
)
from sana.checkpoints.schedulers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerFiles,
    SCMScheduler,
)
from sana.checkpoints.storage import write_json

CARD_KEY = "_sanakit_card"
SAMPLERS = ("flow-dpm", "flow-euler", "scm")
OTHERS = ("tokenizer", "text_encoder", "vae")
"""Parts that an original file lacks."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".index.json")


def assemble(
    base: Located,
    stage: Path,
    modules: Mapping[str, Any],
    *,
    sampler: str | None,
    card: Card | None,
    variant: str | None,
) -> None:
    """Write into `stage` what a pipeline needs besides `modules`, whose files are there, and its index.

    Of the weights of `base` one variant is copied, under the name that the modules have: `variant`, or none. Where
    neither `sampler` nor `card` tells the scheduler, it is that of `base`, if it is for such a transformer.
    Errors: ModelNotFound and CheckpointError for a base without weights that can be copied.
    """
    listed = index_parts(base.folder)
    copied = [name for name in OTHERS if name not in modules]
    chosen = part_variants(base.folder, copied, base.variant or sole_variant(base.folder, copied))
    entries: dict[str, list[str]] = {}
    for name in copied:
        _copy(part_folder(base.folder, name), stage / name, name, chosen.get(name), variant)
        entries[name] = list(listed.get(name) or ("transformers", "AutoTokenizer"))
    entries |= {name: ["diffusers", type(module).__name__] for name, module in modules.items()}
    sprint = bool(modules["transformer"].config.guidance_embeds)
    told = listed.get("scheduler")
    if sampler is None and card is None and told is not None and sprint == (told[1] == SCMScheduler.__name__):
        _copy(part_folder(base.folder, "scheduler"), stage / "scheduler", "scheduler", None, None)
        entries["scheduler"] = list(told)
    else:
        sampler = sampler or (card.sampler if card is not None else "scm" if sprint else "flow-dpm")
        entries["scheduler"] = ["diffusers", type(write_scheduler(stage / "scheduler", sampler, card)).__name__]
    kind = "SanaControlNetPipeline" if "controlnet" in modules else "SanaSprintPipeline" if sprint else "SanaPipeline"
    header = {"_class_name": kind, "_diffusers_version": LAYOUT_VERSION}
    noted = {CARD_KEY: card.name} if card is not None else {}
    write_json(stage / MODEL_INDEX, {**header, **noted, **entries})


def write_scheduler(folder: Path, sampler: str, card: Card | None) -> SchedulerFiles:
    """Write the settings of a sampler, with the shift of the card, and return it."""
    shift = card.flow_shift if card is not None else 3.0
    scheduler: SchedulerFiles = DPMSolverMultistepScheduler(flow_shift=shift)
    if sampler == "scm":
        scheduler = SCMScheduler()
    elif sampler == "flow-euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    folder.mkdir(exist_ok=True)
    scheduler.save_pretrained(folder)
    return scheduler


def _copy(source: Path, target: Path, name: str, variant: str | None, wanted: str | None) -> None:
    """Copy a part with the weights of one variant only, which are then those of `wanted`."""
    target.mkdir()
    for path in source.iterdir():
        is_weights = path.name.endswith(_WEIGHTS) or ".index." in path.name
        if path.is_file() and not path.name.startswith(".") and not is_weights:
            shutil.copyfile(path, target / path.name)
    part = part_of(name)
    if part.stem is None:
        return
    weights = find_weights(source, part, variant)
    single, index = part.names(wanted, "safetensors")
    if len(weights.files) == 1:
        shutil.copyfile(weights.paths[0], target / single)
        return
    stem, count = single.removesuffix(".safetensors"), len(weights.files)
    renamed = {file: f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i, file in enumerate(weights.files, start=1)}
    for file, path in zip(weights.files, weights.paths, strict=True):
        shutil.copyfile(path, target / renamed[file])
    told = read_json(source / part.names(variant, "safetensors")[1])
    places = {tensor: renamed[str(file)] for tensor, file in told["weight_map"].items()}
    write_json(target / index, {**told, "weight_map": places})
