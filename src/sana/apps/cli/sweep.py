"""Sweeps: one field, several values, every combination of several such axes."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sana.apps.cli.arguments import Option
from sana.apps.cli.options import PICTURE, STEERING
from sana.apps.cli.settings import from_text
from sana.apps.cli.values import read_seeds
from sana.errors import InvalidInput, did_you_mean

MOST_VALUES = 100
MOST_AXES = 3
SWEEPABLE = (
    "steps", "guidance", "sampler", "seed", "size", "negative_prompt", "binning", "instruction", "clean_caption",
    "max_prompt_tokens", "strength", "feather", "pag", "pag_adaptive_scale", "pag_layers", "max_timesteps",
    "intermediate_timesteps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field and the values it takes, with what stands for each in names and on the sheet."""

    field: str
    values: Sequence[Any]
    labels: Sequence[str]


def read_axes(texts: Sequence[str], keys: Mapping[str, Option]) -> list[Axis]:
    """Return the axes of `--sweep` texts such as `steps=4,8,20`, `guidance=1-5:0.5` or `sampler=flow-dpm,flow-euler`.

    Raises:
        InvalidInput: a field is unknown or cannot be swept, or a value is impossible.
    """
    axes = [_axis(text, keys) for text in texts]
    if len(axes) > MOST_AXES:
        raise InvalidInput(f"A sweep has at most {MOST_AXES} fields, not {len(axes)}. Drop one.")
    fields = [axis.field for axis in axes]
    for name in fields:
        if fields.count(name) > 1:
            raise InvalidInput(f"`sweep` names {name} twice. Put all its values into one.")
    return axes


def points(axes: Sequence[Axis]) -> Iterator[dict[str, tuple[Any, str]]]:
    """Yield every combination, the last axis moving fastest: field -> value and label."""
    sides = [list(zip(axis.values, axis.labels, strict=True)) for axis in axes]
    for combination in itertools.product(*sides):
        yield dict(zip([axis.field for axis in axes], combination, strict=True))


def _axis(text: str, keys: Mapping[str, Option]) -> Axis:
    name, mark, listed = text.partition("=")
    field = _field(name.strip(), text if not mark or not listed.strip() else None)
    labels: list[str] = []
    for part in listed.split(","):
        labels += _range(part.strip(), keys[field].kind) if field != "seed" else _seeds(part)
    if len(labels) > MOST_VALUES:
        raise InvalidInput(f"`sweep` takes at most {MOST_VALUES} values of {field}, not {len(labels)}.")
    try:
        values = [from_text(keys[field], label) for label in labels]
    except InvalidInput as error:
        raise InvalidInput(f"`sweep`: {field} {error}") from None
    if any(value in values[:i] for i, value in enumerate(values)):
        raise InvalidInput(f"`sweep` names a value of {field} twice.")
    return Axis(field=field, values=values, labels=labels)


def _field(name: str, broken: str | None) -> str:
    field = name.replace("-", "_")
    aliases = {
        also.removeprefix("--").replace("-", "_"): spelling.name or of
        for group in (PICTURE, STEERING)
        for of, spelling in group.spellings.items()
        for also in spelling.also
    }
    field = aliases.get(field, field)
    if field in ("prompt", "prompts", "prompt_file"):
        raise InvalidInput("`sweep` takes no prompts. Write them into a file and give it as `prompt_file`.")
    if field not in SWEEPABLE:
        hint = did_you_mean(field, SWEEPABLE) or f" There are {', '.join(SWEEPABLE)}."
        raise InvalidInput(f"`sweep` cannot vary '{name[:40]}'.{hint}")
    if broken is not None:
        raise InvalidInput(f"`sweep` takes a field and its values, such as {field}=A,B, not '{broken[:40]}'.")
    return field


def _seeds(part: str) -> list[str]:
    try:
        seeds = read_seeds(part)
    except InvalidInput as error:
        raise InvalidInput(f"`sweep`: seed {error}") from None
    if seeds is None:
        raise InvalidInput("`sweep` takes seeds by number. To draw one for all pictures, leave seed out.")
    return [str(seed) for seed in seeds[: MOST_VALUES + 1]]


def _range(part: str, kind: Any) -> list[str]:
    """Return the values of `4-20:4`, of `4-8` with a step of 1, or of anything else just that."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)-(\d{1,6}(?:\.\d{1,9})?)(?::(\d{1,6}(?:\.\d{1,9})?))?", part)
    if kind not in (int, float) or found is None:
        return [part]
    first, last, step = Decimal(found[1]), Decimal(found[2]), Decimal(found[3] or 1)
    if step <= 0 or last < first:
        raise InvalidInput(f"`sweep` takes rising ranges with a step above 0, such as 4-20:4, not '{part}'.")
    count = int((last - first) / step) + 1
    if count > MOST_VALUES:
        raise InvalidInput(f"`sweep` takes at most {MOST_VALUES} values of a field, not {count}.")
    return [f"{(first + i * step).normalize():f}" for i in range(count)]
