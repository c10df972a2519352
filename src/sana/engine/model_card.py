"""Which card describes a model that was loaded: the one its folder names, if the transformer is what the card says."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from sana.cards import CARDS, Card
from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.config import TransformerConfig
from sana.errors import CheckpointError, did_you_mean

_log = logging.getLogger(__name__)

CARD_KEY = "_sanakit_card"
"""Key of `model_index.json` that names the card of a model; other readers skip it because of the underscore."""
_DEPTH = ("num_layers", "qk_norm")
"""What growing and pruning change of an architecture."""


def card_in(folder: Path) -> Card | None:
    """Return the card that the `model_index.json` of a folder names, or None.

    Raises:
        CheckpointError: it names a card that this version does not know.
    """
    name = read_json(folder / MODEL_INDEX).get(CARD_KEY)
    if name is None:
        return None
    if name not in CARDS:
        hint = did_you_mean(str(name), CARDS)
        raise CheckpointError(
            f"{MODEL_INDEX} names the card {name!r}, which this version does not know.{hint} Update sanakit."
        )
    return CARDS[name]


def fitting(card: Card | None, transformer: Any) -> Card | None:
    """Return the card if the transformer has the architecture it describes, else None: its rules would mislead.

    A transformer of another depth, grown or pruned, follows the card with its own depth in it.
    """
    if card is None or transformer is None:
        return card
    given = getattr(transformer, "config", None)
    found = None if given is None else at_depth(card, given, sum(weight.numel() for weight in transformer.parameters()))
    if found is None:
        _log.warning(
            "the transformer is not the one of the card %s; the card's limits and defaults are not used", card.name
        )
    return found


def at_depth(card: Card, config: TransformerConfig, params: int) -> Card | None:
    """Return the card for a transformer that is the card's own but for its depth; None for any other.

    Where the blocks are not as many, it is no published model, and PAG perturbs the one as far into the network.
    """
    own = {f.name: getattr(card.transformer, f.name) for f in dataclasses.fields(card.transformer)}
    differing = {name for name, value in own.items() if getattr(config, name) != value}
    if not differing:
        return card
    if not differing <= set(_DEPTH):
        return None
    depth = {name: getattr(config, name) for name in _DEPTH}
    return dataclasses.replace(
        card,
        transformer=dataclasses.replace(card.transformer, **depth),
        params=params,
        pag_layers=tuple(_moved(layer, card.transformer.num_layers, config.num_layers) for layer in card.pag_layers),
        hub_id="",
        folder=None,
        base=None,
        shared=(),
    )


def _moved(layer: str, before: int, after: int) -> str:
    name, _, number = layer.rpartition(".")
    return f"{name}.{int(number) * after // before}"
