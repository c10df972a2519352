"""What a request brings along besides words and numbers: pictures, control pictures, adapters. Torch-free."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

from sana.engine.resolution import BINS, nearest_bin
from sana.engine.values import MAX_PATH, check_integer, check_interval, check_number, check_text, shown
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from sana.cards import Card
    from sana.engine.request import Request

ControlKind = Literal["canny", "scribble", "soft-edge", "ink", "hed", "depth", "map"]
CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
MOST_CONTROLS = 8
MOST_LORAS = 32
MAX_SCALE = 10.0
MAX_ANGLE = 1.57080
"""Largest start of a SANA-Sprint run: pure noise."""
FEATHER = 16
MAX_LAYERS = 256
"""Names of layers in one request."""


class PictureLike(Protocol):
    """A PIL image, as far as it must be known without importing PIL."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        ...

    def convert(self, mode: str) -> Any:
        """Return the picture in another mode."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileRef:
    """A file that was used once, as records name it: by what it is called and what is in it, never by a path."""

    name: str
    """Base name; empty for what never was a file."""
    sha256: str
    """Of the pixels of a picture, of the bytes of any other file."""

    def __post_init__(self) -> None:
        check_text("name", self.name, 255)
        if any(mark in self.name for mark in "/\\"):
            raise InvalidInput("`name` of a file in a record must be a base name, not a path. Drop the folders.")
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise InvalidInput(f"`sha256` must be 64 hexadecimal digits but is {shown(self.sha256)}.")

    def to_dict(self) -> dict[str, str]:
        """Return both fields."""
        return {"name": self.name, "sha256": self.sha256}


Source = str | Path | PictureLike | FileRef
"""A picture: a path, a PIL image, or what a record says of one, which must be found before anything is drawn."""


@dataclass(frozen=True, kw_only=True)
class ControlRequest:
    """One picture that a control network follows."""

    kind: ControlKind
    """What is made of the picture before the network sees it; map uses it as it is."""

    image: Source = field(hash=False)
    """The picture: a path or a PIL image."""

    scale: float = 1.0
    """How strongly it is followed; 0 is not at all."""

    start: float = 0.0
    """Share of the steps after which it begins to act."""

    end: float = 1.0
    """Share of the steps after which it acts no more."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CONTROL_KINDS:
            hint = did_you_mean(self.kind[:40], CONTROL_KINDS) if isinstance(self.kind, str) else ""
            known = ", ".join(CONTROL_KINDS)
            raise InvalidInput(f"`kind` of a control must be one of {known} but is {shown(self.kind)}.{hint}")
        object.__setattr__(self, "image", checked_source("image", self.image))
        check_number("scale", self.scale, 0.0, MAX_SCALE)
        check_interval("start, end", "two shares of the steps (start, end)", (self.start, self.end))
        for name in ("scale", "start", "end"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {one.name: plain(getattr(self, one.name)) for one in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build it from JSON values. Raises InvalidInput."""
        return cls(**_known(cls, "A control", values))


@dataclass(frozen=True, kw_only=True)
class LoraRequest:
    """One adapter that is laid over the transformer for this request alone."""

    source: str | Path | FileRef
    """The file: a path, or a name on the hub."""

    scale: float = 1.0
    """How strongly it acts; 0 is not at all, below 0 the other way."""

    def __post_init__(self) -> None:
        checked = checked_source("source", self.source)
        if not isinstance(checked, str | Path | FileRef):
            raise InvalidInput(f"`source` of a LoRA must be a path or a name on the hub but is {shown(self.source)}.")
        object.__setattr__(self, "source", checked)
        check_number("scale", self.scale, -MAX_SCALE, MAX_SCALE)
        object.__setattr__(self, "scale", float(self.scale))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {"source": plain(self.source), "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build it from JSON values. Raises InvalidInput."""
        return cls(**_known(cls, "A LoRA", values))


def checked_source(name: str, value: object) -> Source:
    """Return a picture or file that was handed over, in one of the forms of `Source`; nothing is opened.

    Raises:
        InvalidInput: it is none, or an address: nothing is fetched from the network for a request.
    """
    if isinstance(value, Mapping):
        return FileRef(**_known(FileRef, f"`{name}`", value))
    if isinstance(value, str | Path):
        text = str(value)
        check_text(name, text, MAX_PATH)
        if not text or text == ".":
            raise InvalidInput(f"`{name}` is empty. Give the path of a file.")
        if text.lower().startswith(("http://", "https://", "ftp://", "file://")):
            raise InvalidInput(f"`{name}` is an address, which is not fetched. Download it and give the path.")
        return value
    if isinstance(value, FileRef) or (hasattr(value, "convert") and hasattr(value, "size") and hasattr(value, "mode")):
        return value
    raise InvalidInput(f"`{name}` must be a path or a PIL image but is {shown(value)}.")


def plain(value: Any) -> Any:
    """Return a field of a request as a JSON-ready value; a PIL image as what records say of it."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, FileRef | ControlRequest | LoraRequest):
        return value.to_dict()
    if value is None or isinstance(value, str | int | float):
        return value
    from sana.engine.pictures import read_picture, reference

    return reference(value, read_picture(value)).to_dict()


def listed(name: str, kind: "type[ControlRequest] | type[LoraRequest]", value: object, most: int) -> tuple[Any, ...]:
    """Return controls or adapters as a tuple of that kind; mappings are read as JSON.

    Raises:
        InvalidInput: it is no list of such, too long, or one of them is impossible.
    """
    if not isinstance(value, list | tuple):
        raise InvalidInput(f"`{name}` must be a list but is {shown(value)}.")
    if len(value) > most:
        raise InvalidInput(f"`{name}` has {len(value)} entries, the most are {most}. Drop some.")
    return tuple(_one(name, kind, item) for item in value)


def checked_border(value: object, most: int) -> tuple[int, ...]:
    """Return four widths in pixels as a tuple. Raises InvalidInput."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise InvalidInput(f"`outpaint` must be four widths (left, top, right, bottom) but is {shown(value)}.")
    for side in value:
        check_integer("outpaint", side, 0, most)
    return tuple(value)


def checked_layers(value: object) -> str | tuple[str, ...] | None:
    """Return a name of layers, or several as a tuple. Raises InvalidInput."""
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not 0 < len(names) <= MAX_LAYERS:
        raise InvalidInput(f"`pag_layers` must be a name or a list of names but is {shown(value)}.")
    for one in names:
        check_text("pag_layers", one, 200)
        if not one.strip():
            raise InvalidInput("`pag_layers` holds an empty name. Name blocks such as transformer_blocks.8.")
    return value if isinstance(value, str) else tuple(names)


def check_edit(request: "Request") -> None:
    """Check the fields of a request that need others to have an effect. Raises InvalidInput."""
    for name, given in (
        ("mask", request.mask is not None),
        ("outpaint", any(request.outpaint)),
        ("strength", request.strength is not None),
    ):
        if given and request.image is None:
            raise InvalidInput(f"`{name}` needs a picture that it is about. Give `image`, or drop it.")
    if request.strength == 0:
        raise InvalidInput("`strength` 0 would give the picture back as it is. Give a value above 0, up to 1.")
    if request.feather != FEATHER and request.mask is None and not any(request.outpaint):
        raise InvalidInput("`feather` has no effect without `mask` or `outpaint`. Drop it.")
    for name in ("pag_adaptive_scale", "pag_layers"):
        if getattr(request, name) and not request.pag_scale:
            raise InvalidInput(f"`{name}` has no effect without `pag_scale`. Give that too, or drop it.")
    middle, last = request.intermediate_timesteps, MAX_ANGLE if request.max_timesteps is None else request.max_timesteps
    if middle is not None and request.steps not in (None, 2):
        raise InvalidInput(f"`intermediate_timesteps` belongs to 2 steps, not to {request.steps}. Drop one of them.")
    if middle is not None and middle >= last:
        raise InvalidInput(
            f"`intermediate_timesteps` must lie below `max_timesteps` but they are {middle:g} and {last:g}."
        )


def grown_size(image: Source, border: tuple[int, ...]) -> tuple[int, int]:
    """Return (width, height) of a picture with its new room. Errors as `pictures.picture_size`."""
    from sana.engine.pictures import picture_size

    width, height = picture_size(image, "image")
    left, top, right, bottom = border
    return width + left + right, height + top + bottom


def shape_of_control(control: ControlRequest, card: "Card") -> tuple[int, int]:
    """Return (width, height) of the trained size nearest to the shape of a control picture, or the card's own."""
    from sana.engine.pictures import picture_size

    width, height = picture_size(control.image, "control image")
    if card.sizes is not None or card.transformer.sample_size not in BINS:
        return card.base_size, card.base_size
    high, wide = nearest_bin(height, width, card.transformer.sample_size)
    return wide, high


def _one(name: str, kind: Any, item: object) -> Any:
    try:
        made = kind.from_dict(item) if isinstance(item, Mapping) else item
    except InvalidInput as error:
        raise InvalidInput(f"In `{name}`: {error}") from error
    if not isinstance(made, kind):
        raise InvalidInput(f"`{name}` must hold {kind.__name__} only but holds {shown(item)}.")
    return made


def _known(cls: Callable[..., Any], what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a JSON object that is to become an object of this class. Raises InvalidInput."""
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [one.name for one in fields]
    for name in values:
        if name not in names:
            raise InvalidInput(f"{what} has no field {shown(name)}. Known: {', '.join(names)}.")
    for one in fields:
        if one.default is dataclasses.MISSING and one.name not in values:
            raise InvalidInput(f"{what} needs `{one.name}`. Give it.")
    return dict(values)
