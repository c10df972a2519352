"""Values that need more than a number: `canny edges.png 0.8@0-0.5`, `style.safetensors 0.7`, `right=256,left=64`.

The same text stands behind a flag, in a variable, in a table of prompts and, as a string, in a file of settings.
"""

import re
import shlex
from collections.abc import Callable
from typing import Any

from sana.apps.cli.joined import Words, looks_like_number, split
from sana.engine.attachments import CONTROL_KINDS, ControlRequest, LoraRequest
from sana.errors import InvalidInput, did_you_mean

PAG_SCALE = 3.0
"""What `--pag` alone means: the scale of the documented pipeline."""
SIDES = ("left", "top", "right", "bottom")
CONTROL_WORDS = Words(
    needed=2,
    what=f"a type ({', '.join(CONTROL_KINDS)}) and a picture",
    more=lambda word: _is_scale(word),
    choices=CONTROL_KINDS,
)
LORA_WORDS = Words(needed=1, what="a file", more=looks_like_number)
PAG_WORDS = Words(needed=0, more=looks_like_number)


def read_control(text: str) -> ControlRequest:
    """Read `TYPE PATH [SCALE[@START-END]]`; START and END are shares of the steps between which it acts."""
    words = split(text)
    if not 2 <= len(words) <= 3:
        raise InvalidInput(f"takes a type, a picture and perhaps a scale: canny edges.png 0.8, not '{text[:60]}'.")
    kind = _KINDS.get(words[0].lower(), words[0].lower())
    if kind not in CONTROL_KINDS:
        hint = did_you_mean(kind[:40], CONTROL_KINDS)
        raise InvalidInput(f"takes one of {', '.join(CONTROL_KINDS)} first, not '{words[0][:40]}'.{hint}")
    values: dict[str, Any] = {"kind": kind, "image": words[1]}
    if len(words) == 3:
        found = re.fullmatch(r"([^@]*)(?:@([^-@]+)-([^-@]+))?", words[2])
        if found is None or not (found[1] or found[2]):
            raise InvalidInput(f"takes a scale such as 0.8 or 0.8@0-0.5, not '{words[2][:40]}'.")
        parts = {"scale": found[1] or None, "start": found[2], "end": found[3]}
        values |= {name: _number(part) for name, part in parts.items() if part is not None}
    control: ControlRequest = _checked(ControlRequest, values)
    return control


def control_text(control: ControlRequest) -> str:
    """Return what `read_control` reads to the same control."""
    when = "" if (control.start, control.end) == (0.0, 1.0) else f"@{_plain(control.start)}-{_plain(control.end)}"
    return shlex.join([control.kind, str(control.image), _plain(control.scale) + when])


def read_lora(text: str) -> LoraRequest:
    """Read `PATH [SCALE]`."""
    words = split(text)
    if not 1 <= len(words) <= 2:
        raise InvalidInput(f"takes a file and perhaps a scale, such as style.safetensors 0.7, not '{text[:60]}'.")
    scale = {"scale": _number(words[1])} if len(words) == 2 else {}
    lora: LoraRequest = _checked(LoraRequest, {"source": words[0], **scale})
    return lora


def lora_text(lora: LoraRequest) -> str:
    """Return what `read_lora` reads to the same adapter."""
    return shlex.join([str(lora.source), _plain(lora.scale)])


def read_pag(text: str) -> float:
    """Read a scale; nothing at all is the usual one."""
    return _number(text) if text.strip() else PAG_SCALE


def read_layers(text: str) -> str | tuple[str, ...]:
    """Read one name of a layer, or several with commas between them."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise InvalidInput("takes names of layers such as transformer_blocks.8, with commas between them.")
    return names[0] if len(names) == 1 else tuple(names)


def read_outpaint(text: str) -> tuple[int, ...]:
    """Read `64` (all sides), `LEFT,TOP,RIGHT,BOTTOM`, or sides by name: `right=256,left=64`."""
    parts = [part.strip() for part in text.split(",")]
    if any("=" in part for part in parts):
        return _named_sides(parts)
    if len(parts) not in (1, 4):
        raise InvalidInput(f"takes pixels: 64 for all sides, left,top,right,bottom, or right=256, not '{text[:40]}'.")
    pixels = tuple(_pixels(part) for part in parts)
    return pixels if len(pixels) == 4 else pixels * 4


def outpaint_text(sides: tuple[int, ...]) -> str:
    """Return what `read_outpaint` reads to the same sides."""
    return ",".join(map(str, sides))


def _named_sides(parts: list[str]) -> tuple[int, ...]:
    given: dict[str, int] = {}
    for part in parts:
        side, _, pixels = (word.strip() for word in part.partition("="))
        if side not in SIDES or side in given:
            hint = did_you_mean(side[:20], SIDES)
            raise InvalidInput(f"takes each of {', '.join(SIDES)} once, such as right=256, not '{part[:40]}'.{hint}")
        given[side] = _pixels(pixels)
    return tuple(given.get(side, 0) for side in SIDES)


def _pixels(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise InvalidInput(f"takes whole numbers of pixels, such as 64 or right=256, not '{text[:40]}'.")
    return int(text)


def _plain(value: float) -> str:
    """Return a number without an exponent, whose minus would be read as that of a range."""
    return f"{value:.15f}".rstrip("0").rstrip(".")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"takes a number as its scale, not '{text[:40]}'.") from None


def _checked(cls: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Build a control or an adapter; what is wrong with a field is told without the marks of a field."""
    try:
        return cls(**values)
    except InvalidInput as error:
        raise InvalidInput(f"is wrong: {str(error).replace('`', '')}") from None


def _is_scale(word: str) -> bool:
    return looks_like_number(word) or re.fullmatch(r"@[\d.]+-[\d.]+", word) is not None


TEXTS: dict[type, Callable[[Any], str]] = {ControlRequest: control_text, LoraRequest: lora_text}
"""How a value is written down again."""
_KINDS = {"softedge": "soft-edge", "soft_edge": "soft-edge", "sketch": "scribble", "pen": "ink", "none": "map"}
"""What other programs call a type."""
