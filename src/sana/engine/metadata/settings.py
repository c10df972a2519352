"""What a picture of any program says about its making, in our words, and the nearest request of ours."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sana.engine.metadata.containers import clean
from sana.engine.request import MAX_SEED, MAX_SIDE, MAX_STEPS, SAMPLER_NAMES, Request
from sana.errors import InvalidInput

MAX_DEPTH = 100
"""Deepest nesting of JSON that is read; graphs of nodes have about ten."""
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one picture; None and empty where the program does not say."""

    dialect: str
    """Key of the reader that understood it."""
    program: str
    """The program that wrote it, with its version if it tells."""
    prompt: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    """The program's own name of the sampler."""
    model: str | None = None
    """The program's own name of the model."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Everything else, by the program's own names."""

    def request(self) -> tuple[Request | None, tuple[str, ...]]:
        """Return the nearest request of ours, None without a prompt, and a sentence for each thing it leaves out."""
        if not self.prompt.strip():
            return None, ()
        values: dict[str, Any] = {"prompt": self.prompt}
        remarks = []
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if value is not None and low <= value <= high:
                values[name] = value
            elif value is not None:
                remarks.append(f"{name} {shortened(str(value))} is not possible here and is left out.")
        if ("width" in values) != ("height" in values):
            values.pop("width", None)
            values.pop("height", None)
        if self.negative_prompt.strip() and values.get("guidance", 2.0) <= 1:
            remarks.append("The negative prompt is left out: it has no effect at guidance 1.")
        elif self.negative_prompt.strip():
            values["negative_prompt"] = self.negative_prompt
        sampler = nearest_sampler(self.sampler)
        if sampler is not None:
            values["sampler"] = sampler
        elif self.sampler:
            remarks.append(f"The sampler '{shortened(self.sampler)}' is not one of ours; the model's own is taken.")
        if "<lora:" in self.prompt or any("lora" in name.lower() for name in self.extra):
            remarks.append("Its LoRA is left out: it is made for another model. Give one of yours with --lora.")
        try:
            return Request(**values), tuple(remarks)
        except InvalidInput as error:
            return None, (f"No command of ours does that: {shortened(str(error), 200)}",)


def nearest_sampler(name: str | None) -> str | None:
    """Return our sampler of the same family as another program's, or None."""
    if not name:
        return None
    if name.lower() in SAMPLER_NAMES:
        return name.lower()
    bare = name.lower().removesuffix(" karras").removesuffix("_k")  # marks of a noise schedule
    return _SAMPLERS.get("".join(c for c in bare if c.isalnum() or c == "+"))


def parse_json(text: str) -> Any:
    """Return what a JSON text says, without NaN, infinity, lone surrogates and NUL; None where it is no usable JSON."""
    try:
        return _cleaned(json.loads(text, strict=False), MAX_DEPTH)
    except (ValueError, RecursionError):  # ValueError: also numbers of thousands of digits
        return None


def parse_object(text: str) -> dict[str, Any] | None:
    """Return a JSON object, or None if the text is something else."""
    value = parse_json(text) if text.lstrip()[:1] == "{" else None
    return value if isinstance(value, dict) else None


def _cleaned(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean(key): _cleaned(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, depth - 1) for item in value]
    return value


def whole(value: object) -> int | None:
    """Return a whole number, also one written as text or as a float, or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    exact = number(value)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal() and exact is not None:
        return int(value)  # a seed of 20 digits loses its last ones as a float
    return int(exact) if exact is not None and exact.is_integer() else None


def number(value: object) -> float | None:
    """Return a finite number, also one written as text, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 40:
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def words(value: object) -> str:
    """Return a text as it is, and nothing instead of anything else."""
    return value if isinstance(value, str) else ""


def rest_of(values: Mapping[str, Any], used: frozenset[str]) -> dict[str, str]:
    """Return the entries that were not used, as text, without the empty ones."""
    left = {name: value for name, value in values.items() if name not in used and value not in (None, "", [], {})}
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in left.items()
    }


def shortened(text: str, limit: int = 60) -> str:
    """Return at most `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


_LIMITS = (
    ("steps", 1, MAX_STEPS),
    ("guidance", 1.0, MAX_GUIDANCE),
    ("seed", 0, MAX_SEED),
    ("width", 1, MAX_SIDE),
    ("height", 1, MAX_SIDE),
)
_SAMPLERS = {
    "euler": "flow-euler",
    "eulerflow": "flow-euler",
    "floweuler": "flow-euler",
    "flowmatcheuler": "flow-euler",
    "flowmatcheulerdiscrete": "flow-euler",
    "eulerflowmatch": "flow-euler",
    "dpm++2m": "flow-dpm",
    "dpmpp2m": "flow-dpm",
    "dpmsolver++": "flow-dpm",
    "dpmsolver": "flow-dpm",
    "dpmsolvermultistep": "flow-dpm",
    "flowdpm": "flow-dpm",
    "flowdpmsolver": "flow-dpm",
    "dpm++2mflowmatch": "flow-dpm",
    "scm": "scm",
}
