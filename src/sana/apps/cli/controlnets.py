"""`--controlnet`: a control network beside a model that comes without one, or instead of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sana.apps.cli.machine import introduce
from sana.apps.cli.output import Terminal
from sana.cards import CARDS, Card
from sana.checkpoints import library
from sana.checkpoints.layout import read_json
from sana.config import ControlNetConfig
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.engine.parts import Parts


def attach(parts: "Parts", name: str, terminal: Terminal) -> None:
    """Load a control network to where the transformer is.

    Args:
        name: a model of kind controlnet, a hub id, a folder (of the network alone, or of a whole model), or a file.

    Raises:
        InvalidInput: it is a model without a control network.
        ModelNotFound, CheckpointError: it is not to be had, or broken.
    """
    card = card_of(name)
    if card is not None:
        introduce(card, terminal)
    parts.controlnet = _load(name, card, torch_dtype=parts.transformer.dtype, device_map=parts.device)
    is_path = card is None and not name.startswith("hf://") and Path(name).expanduser().exists()
    parts.controlnet_name = card.name if card is not None else Path(name).name if is_path else name


def card_of(name: str) -> Card | None:
    """Return the card of a control network's model, None for one of unknown origin; errors as `attach`."""
    card = None if Path(name).expanduser().is_dir() else library.card_of(name)
    if card is not None and card.controlnet is None:
        known = ", ".join(one.name for one in CARDS.values() if one.controlnet is not None)
        raise InvalidInput(f"{name} has no control network. Those that have: {known}.")
    return card


def shape(name: str) -> ControlNetConfig | None:
    """Return the configuration of a control network before it is loaded, None where it must be downloaded first.

    Raises: as `attach`.
    """
    card, path = card_of(name), Path(name).expanduser()
    if path.is_dir():
        folder = path / "controlnet" if (path / "controlnet").is_dir() else path
        return ControlNetConfig.from_dict(read_json(folder / "config.json"))
    if card is None and path.is_file():
        from sana.checkpoints.original.examine import examine

        found = examine(path).models.get("controlnet")
        if found is None:
            raise InvalidInput(f"{name} holds no control network. Name a file or a model that has one.")
        return cast(ControlNetConfig, found.config)
    return card.controlnet if card is not None else None


def _load(name: str, card: Card | None, **settings: Any) -> Any:
    from sana.checkpoints.controlnet import SanaControlNetModel

    path = Path(name).expanduser()
    if path.is_file() or name.startswith("hf://"):
        return SanaControlNetModel.from_single_file(name, **settings)
    if card is not None and card.is_single_file:
        return SanaControlNetModel.from_single_file(str(card.original), **settings)
    whole = card is not None or (path / "controlnet").is_dir()
    return SanaControlNetModel.from_pretrained(name, subfolder="controlnet" if whole else None, **settings)
