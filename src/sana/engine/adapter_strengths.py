"""What is told of adapters: how strongly each acts on which layer, and what came of loading it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sana.checkpoints.lora.files import LoraFile
from sana.errors import InvalidInput
from sana.models.lora import LowRank

Strength = float | Mapping[str, float]
"""One factor, or factors by parts of layer names such as "transformer_blocks.3" or "attn2"; other layers take 1."""


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What came of loading an adapter."""

    name: str
    dialect: str
    matched: tuple[str, ...]
    """The layers that it acts on."""
    unmatched: tuple[str, ...]
    """What it holds besides and this model does not have."""
    rank: int
    """The largest of its layers."""
    alpha: float
    """Of the first layer."""
    dora: bool
    sha256: str
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, name: str, file: LoraFile) -> "LoraReport":
        """Report an adapter as it was read."""
        return cls(
            name=name,
            dialect=file.dialect,
            matched=tuple(file.updates),
            unmatched=file.unmatched,
            rank=max(file.ranks),
            alpha=next(iter(file.updates.values())).alpha,
            dora=file.is_dora,
            sha256=file.sha256,
            metadata=file.metadata,
        )

    def __str__(self) -> str:
        total = len(self.matched) + len(self.unmatched)
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind} '{self.name}': {len(self.matched)} of {total} layers matched, rank {self.rank}"


def check_strength(name: str, strength: Strength, updates: Mapping[str, LowRank]) -> None:
    """Raise InvalidInput for a strength that is no finite number, and for a part that is in no layer."""
    parts = strength if isinstance(strength, Mapping) else {}
    for value in parts.values() if isinstance(strength, Mapping) else [strength]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidInput(f"The weight of adapter '{name}' is {value!r:.60}; it must be a finite number.")
    for part in parts:
        if not any(is_part(part, layer) for layer in updates):
            raise InvalidInput(f"The weights of adapter '{name}' name '{part}', which is none of its layers.")


def strength_of(strength: Strength, layer: str) -> float:
    """Return the factor of a layer; of several parts that name it the first counts."""
    if not isinstance(strength, Mapping):
        return float(strength)
    return next((float(value) for part, value in strength.items() if is_part(part, layer)), 1.0)


def is_part(part: str, layer: str) -> bool:
    """Whether a layer's path has these steps in a row, whole: block 1 is not block 11. The empty part is in every."""
    return not part or f".{part}." in f".{layer}."


def times(strength: Strength, scale: float) -> Strength:
    """Return a strength multiplied by a number, for layers that are not named too."""
    if not isinstance(strength, Mapping):
        return float(strength) * scale
    return {**{part: value * scale for part, value in strength.items()}, **({} if "" in strength else {"": scale})}


def free_name(wanted: str, taken: Mapping[str, Any]) -> str:
    """Return the name, or the next with a number behind it, that is not taken."""
    stem, _, number = wanted.rpartition("_")
    if wanted not in taken:
        return wanted
    if not (stem and number.isdigit()):
        stem, number = wanted, "1"
    count = int(number)
    while f"{stem}_{count}" in taken:
        count += 1
    return f"{stem}_{count}"
