"""The models that come inside the package: where they lie, and where the parts are that one shares with another."""

import importlib.resources
import json
from pathlib import Path

from sana.cards import CARDS, Card
from sana.errors import ModelNotFound


def folder_of(card: Card) -> Path:
    """Return the folder of a built-in model, whether it is there or not."""
    return Path(str(importlib.resources.files("sana"))) / "assets" / str(card.folder)


def installed(card: Card) -> Path:
    """Return the folder of a built-in model.

    Errors: ModelNotFound where it, or the model that it shares parts with, is not there.
    """
    for one in (card, *([CARDS[card.base]] if card.base is not None else [])):
        if not folder_of(one).is_dir():
            raise ModelNotFound(f"The built-in model '{one.name}' is not part of this installation: install it again.")
    return folder_of(card)


def missing_parts(card: Card) -> tuple[str, ...]:
    """Return what of a built-in model is not there: parts by name, or its index; loads nothing."""
    index = folder_of(card) / "model_index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (index.name,)
    parts = [name for name, entry in listed.items() if isinstance(entry, list)]
    return tuple(name for name in parts if not any(part_folder(index.parent, name).glob("*")))


def is_built_in(folder: Path, card: Card) -> bool:
    """Tell whether a folder is the one in the package that holds the model of a card, not just one that names it."""
    return card.folder is not None and folder.resolve() == folder_of(card).resolve()


def part_folder(folder: Path, name: str) -> Path:
    """Return where a part of the model in `folder` lies: in it, or where a built-in model shares it."""
    for card in CARDS.values():
        if name in card.shared and card.base is not None and is_built_in(folder, card):
            return part_folder(folder_of(CARDS[card.base]), name)
    return folder / name


def shared_folders(folder: Path) -> tuple[Path, ...]:
    """Return the folders of the parts that the model in `folder` shares; none but for a built-in one."""
    card = next((card for card in CARDS.values() if card.shared and is_built_in(folder, card)), None)
    return tuple(part_folder(folder, name) for name in card.shared) if card is not None else ()
