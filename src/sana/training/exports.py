"""What a training from a model leaves: a whole model, an adapter file, or a control network, with a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from sana.cards import CARDS, Card
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.folder import COMPONENTS, save_parts
from sana.checkpoints.hub import locate
from sana.checkpoints.lora.dialects import Dialect
from sana.checkpoints.lora.writing import model_spec, save_lora
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.storage import publish
from sana.checkpoints.tensors import read_header
from sana.engine.model_card import CARD_KEY
from sana.engine.parts import load
from sana.flow.schedulers import DPMSolverMultistepScheduler
from sana.training.trainables import ControlTrainable, FullTrainable, LoraTrainable, Trainable

ADAPTER = "pytorch_lora_weights.safetensors"
"""Name of the adapter file that other programs look for."""
CARD_FILE = "README.md"

CONTROL = "control pictures"
"""The fact that names the kind of control pictures, for control networks."""

NATIVE = "as in the original code, which sanakit knows by its config.json; diffusers joins it otherwise: not for that"
"""What a model card tells of a control network that is not joined as in diffusers."""

Facts = Mapping[str, str]
"""Rows of a model card's table."""


def write(
    trainable: Trainable, start: str, card: Card | None, facts: Facts, folder: Path, name: str = "", trigger: str = ""
) -> None:
    """Write what `trainable` learnt on top of the model `start`.

    `card` is that of the start, `facts` are told in the model card, `name` is the card that a whole model shall carry,
    `trigger` calls what it learnt, unless an adapter has its own.
    Errors: NonFinite naming a tensor; OSError naming the file that could not be written.
    """
    if isinstance(trainable, LoraTrainable):
        _adapter(trainable, start, card, folder)
        kind = "lora"
    elif isinstance(trainable, ControlTrainable):
        _branch(trainable, folder)
        kind = "controlnet"
        if trainable.network.wiring != "diffusers":
            facts = {**facts, "joined": NATIVE}
    else:
        assert isinstance(trainable, FullTrainable)
        _model(trainable, start, card, folder, name)
        kind = "text-to-image"
    trigger = trainable.settings.trigger if isinstance(trainable, LoraTrainable) else trigger
    text = model_card(kind, start, card, facts, trigger)
    publish(folder / CARD_FILE, lambda beside: beside.write_text(text, encoding="utf-8"))


def _adapter(trainable: LoraTrainable, start: str, card: Card | None, folder: Path) -> None:
    settings = trainable.settings
    architecture = card.name if card is not None else "sana"
    licence = card.licence if card is not None else ""
    told = model_spec(architecture, title=folder.parent.name, trigger_phrase=settings.trigger, license=licence)
    told |= {"ss_network_dim": str(settings.rank), "ss_network_alpha": f"{settings.alpha or settings.rank:g}"}
    told |= {"ss_base_model_version": architecture}
    dialects: tuple[Dialect, ...] = settings.dialects  # type: ignore[assignment]
    for number, dialect in enumerate(dialects):
        file = folder / (ADAPTER if number == 0 else f"{dialect}.safetensors")
        save_lora(file, trainable.updates, dialect=dialect, metadata=told)


def _branch(trainable: ControlTrainable, folder: Path) -> None:
    weight = trainable.transformer.scale_shift_table
    finished = SanaControlNetModel.from_config(trainable.network.config)
    finished.load_state_dict(trainable.network.state_dict())
    finished.wiring = trainable.network.wiring
    half = torch.float16 if weight.dtype == torch.float32 else weight.dtype
    finished.to(half).save_pretrained(folder)


def _model(trainable: FullTrainable, start: str, card: Card | None, folder: Path, name: str) -> None:
    """Write the model with the trained transformer in place of its own, every part in the dtype that `start` has."""
    kinds = stored_dtypes(start)
    loaded = load(start, device="cpu", dtype=kinds or "auto")
    stored = kinds.get("transformer", next(loaded.transformer.parameters()).dtype)
    finished = SanaTransformer2DModel.from_config(trainable.transformer.config)
    finished.load_state_dict(trainable.transformer.state_dict())
    parts: dict[str, Any] = {part: getattr(loaded, part) for part in COMPONENTS}
    if name in CARDS and CARDS[name].flow_shift != loaded.flow_shift:
        parts["scheduler"] = DPMSolverMultistepScheduler(flow_shift=CARDS[name].flow_shift)
    carried = name or _own(card, finished)
    save_parts(folder, {**parts, "transformer": finished.to(stored)}, notes={CARD_KEY: carried} if carried else None)


def _own(card: Card | None, transformer: SanaTransformer2DModel) -> str:
    """Return the name of the start's card, or none where the model was made another one."""
    return "" if card is None or transformer.config.to_dict() != card.transformer.to_dict() else card.name


def stored_dtypes(start: str) -> dict[str, torch.dtype]:
    """Return the dtype in which a folder or hub model stores each part; nothing for a single file."""
    located = locate(start, single=True)
    if located.file is not None:
        return {}
    found: dict[str, torch.dtype] = {}
    for part in ("text_encoder", "transformer", "vae"):
        files = sorted(part_folder(located.folder, part).glob("*.safetensors"))
        if files:
            found[part] = read_header(files[0])[0].dtype
    return found


def model_card(kind: str, start: str, card: Card | None, facts: Facts, trigger: str = "") -> str:
    """Return the text of a model card: what it is made from, on what terms, how it was trained, how it is used."""
    base = card.hub_id if card is not None and card.hub_id else start
    tags = ["sana", "sanakit", "text-to-image", *([] if kind == "text-to-image" else [kind])]
    header: dict[str, Any] = {"base_model": base, "pipeline_tag": "text-to-image", "tags": tags}
    if trigger:
        header["instance_prompt"] = trigger
    licence = card.licence if card is not None else "that of the base model; look there before you share this"
    control = facts.get(CONTROL, "canny")
    prompt = f"a prompt with {trigger}" if trigger else "a prompt"
    use = {
        "lora": f'sana "{prompt}" -m {start} --lora {ADAPTER}',
        "controlnet": f'sana "{prompt}" -m {start} --controlnet FOLDER --control {control} picture.png',
        "text-to-image": f'sana "{prompt}" -m FOLDER',
    }[kind]
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    sections = [
        f"---\n{yaml.safe_dump(header, allow_unicode=True, sort_keys=False)}---",
        f"# {_TITLES[kind]} {base}",
        f"Made with sanakit. Licence of the base weights: {licence}.",
        *([f"Call it with: `{trigger}`"] if trigger else []),
        f"## Use\n\n```sh\n{use}\n```",
        f"## Training\n\n| setting | value |\n| --- | --- |\n{rows}",
    ]
    return "\n\n".join(sections) + "\n"


_TITLES = {
    "lora": "A low-rank adapter of",
    "controlnet": "A control network for",
    "text-to-image": "A fine-tuned version of",
}
