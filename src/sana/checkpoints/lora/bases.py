"""Which models an adapter file is for, told by its names and shapes; no weights of a model are needed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sana.cards import CARDS
from sana.checkpoints import hub
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.layout import read_json
from sana.checkpoints.lora.dialects import Reading
from sana.checkpoints.lora.files import Header, judge
from sana.checkpoints.pretrained import inside
from sana.checkpoints.weights import on_meta
from sana.config import TransformerConfig
from sana.errors import CheckpointError
from sana.models.linear_dit import LinearDiT
from sana.models.lora import Target, targets


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The models that an adapter could be loaded into."""

    reading: Reading
    targets: Mapping[str, Target]
    """The layers of the first of them."""
    cards: tuple[str, ...]
    """Known models, by name; empty when only the model that was named fits."""


def fit(header: Header, model: str | Path | None = None) -> Fit:
    """Find the models whose layers an adapter has, all of its layers first.

    `model` names one, by folder, short name or hub id, instead of all the known ones.
    Errors: CheckpointError when it fits none; those of `hub.locate`.
    """
    if model is not None:
        only = layers_of(_config(model))
        return Fit(reading=judge(header, only), targets=only, cards=())
    fits: dict[str, tuple[Reading, Mapping[str, Target]]] = {}
    faults: list[CheckpointError] = []
    for name, card in CARDS.items():
        try:
            own = layers_of(card.transformer)
            fits[name] = judge(header, own), own
        except CheckpointError as error:
            faults.append(error)
    if not fits:
        raise min(faults, key=lambda error: "does not fit" not in str(error))  # the one that came furthest
    # An adapter of 20 blocks also fits a model of 60 of the same width; the one it fills is the likelier base.
    rest = {name: (len(reading.unmatched), _spare(reading, layers)) for name, (reading, layers) in fits.items()}
    likeliest = tuple(name for name in rest if rest[name] == min(rest.values()))
    reading, layers = fits[likeliest[0]]
    return Fit(reading=reading, targets=layers, cards=likeliest)


def layers_of(config: TransformerConfig) -> dict[str, Target]:
    """Return the layers of a transformer of that configuration, as `targets` does."""
    # These fields change no layer; without them most cards are the same.
    return _layers(replace(config, sample_size=32, interpolation_scale=None, qk_norm=None, timestep_scale=1.0))


@cache
def _layers(config: TransformerConfig) -> dict[str, Target]:
    with on_meta():
        return targets(LinearDiT(config))


def _config(model: str | Path) -> TransformerConfig:
    card = CARDS.get(str(model))
    if card is not None:
        return card.transformer
    folder = hub.locate(model, parts=("transformer",)).folder
    part = "transformer" if part_folder(folder, "transformer").is_dir() else None
    return TransformerConfig.from_dict(read_json(inside(folder, part) / "config.json"))


def _blocks(layers: Mapping[str, Target]) -> set[str]:
    return {name.split(".")[1] for name in layers if name.startswith("transformer_blocks.")}


def _spare(reading: Reading, layers: Mapping[str, Target]) -> int:
    """Return how many blocks of a model an adapter leaves out."""
    touched = {name: layers[name] for group in reading.groups for name in group.ours}
    return len(_blocks(layers)) - len(_blocks(touched))
