"""What a user can order, and what comes back. Free of torch: a command line or a web form is built from it."""

import dataclasses
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from sana.engine.resolution import check_known, check_step
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.cards import Card

SamplerName = Literal["flow-dpm", "flow-euler", "scm"]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
"""Names a request accepts; a test holds them equal to the keys of the sampler registry."""

MAX_SIDE = 16384
MAX_PIXELS = 2**30
"""Most pixels of all pictures that are computed at once: four of the largest, or a thousand of 1024 x 1024."""
MAX_CHARACTERS = 100_000
"""Longest prompt; the text encoder could not read more than about half of it."""
MAX_STEPS = 1000
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader keeps exactly."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One order for pictures: everything that decides their pixels once a model is chosen, and nothing else.

    The fields are the flags of the command, the arguments of `sana.generate`, the schema of the service and the record
    written into each file. `None` means "what the model's card recommends"; `resolve` fills it in.

    Raises:
        InvalidInput: a field has the wrong type or an impossible value (`validate` adds what only the model can tell).
    """

    prompt: str
    """What the picture should show."""

    negative_prompt: str = ""
    """What the picture should not show; needs guidance above 1."""

    width: int | None = None
    """Width in pixels."""

    height: int | None = None
    """Height in pixels."""

    steps: int | None = None
    """Number of denoising steps; more steps take longer and usually give finer pictures."""

    guidance: float | None = None
    """How strictly to follow the prompt; 1 switches guidance off and halves the work."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels (lowest, highest; 1 is pure noise) between which guidance acts; steps outside cost half."""

    sampler: SamplerName | None = None
    """How the steps are taken."""

    seed: int | None = None
    """Start of the random numbers; image i uses seed + i. Left out, one is drawn and reported."""

    count: int = 1
    """How many pictures to make."""

    batch_size: int = 1
    """Pictures computed at once. At one batch size a picture is the same to the last bit, alone or among others."""

    binning: bool = True
    """Draw at the nearest size the model was trained on, then resize and crop; off: draw exactly the requested size."""

    instruction: bool = True
    """Let the text encoder read the built-in instruction that enriches short prompts."""

    clean_caption: bool = False
    """Remove web clutter (links, HTML, ids) from the prompt before it is read; also removes Chinese characters."""

    max_prompt_tokens: int = 300
    """Longest prompt in tokens; the rest is cut off."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        for name, low, high in _INTEGER_RANGES:
            _check_integer(name, getattr(self, name), low, high, optional=name in _OPTIONAL)
        for name in ("binning", "instruction", "clean_caption"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"`{name}` must be true or false but is {shown(getattr(self, name))}.")
        if self.guidance is not None:
            _check_number("guidance", self.guidance, 0.0, 100.0)
            object.__setattr__(self, "guidance", float(self.guidance))
        _check_interval(self.guidance_interval)
        object.__setattr__(self, "guidance_interval", tuple(float(v) for v in self.guidance_interval))
        self._check_sampler()
        self._check_together()

    def _check_sampler(self) -> None:
        name: object = self.sampler
        if name is not None and not (isinstance(name, str) and name in SAMPLER_NAMES):
            hint = did_you_mean(str(name)[:40], SAMPLER_NAMES) if isinstance(name, str) else ""
            raise InvalidInput(f"`sampler` must be one of {', '.join(SAMPLER_NAMES)} but is {shown(name)}.{hint}")

    def _check_together(self) -> None:
        """Check the fields that depend on each other."""
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise InvalidInput(f"`seed` plus `count` goes past {MAX_SEED}, the largest seed. Lower one of them.")
        if self.negative_prompt and self.guidance is not None and self.guidance <= 1:
            raise InvalidInput(
                f"`negative_prompt` has no effect with `guidance` {self.guidance:g}. Drop it, or set guidance above 1."
            )
        if self.width is None or self.height is None:
            if self.width is not self.height:
                raise InvalidInput("`width` and `height` go together. Give both, or neither for the model's own size.")
            return
        if self.width * self.height * self.batch_size > MAX_PIXELS:
            raise InvalidInput(
                f"`batch_size` {self.batch_size} of {self.width} x {self.height} pixels is more than the"
                f" {MAX_PIXELS} pixels that can be computed at once. Lower `batch_size` or the size."
            )
        if not self.binning:
            check_step(self.height, self.width)

    def validate(self, card: "Card") -> None:
        """Check the request against the model it is for.

        Raises:
            InvalidInput: the model was not made for this size, sampler or option.
        """
        check_known(card.name, card.sizes, self.height or card.base_size, self.width or card.base_size)
        sprint = card.product == "sprint"
        if sprint and self.negative_prompt:
            raise InvalidInput(f"{card.name} is a SANA-Sprint model and has no negative prompt. Drop it.")
        if self.sampler is not None and sprint != (self.sampler == "scm"):
            raise InvalidInput(f"{card.name} does not work with `sampler` {self.sampler!r}. Use {card.sampler!r}.")

    def resolve(self, card: "Card") -> "ResolvedRequest":
        """Validate against the model and return the request with every `None` replaced; a missing seed is drawn."""
        self.validate(card)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Request)}
        defaults = {
            "width": card.base_size,
            "height": card.base_size,
            "steps": card.steps,
            "guidance": card.guidance,
            "sampler": card.sampler,
        }
        values.update({name: value for name, value in defaults.items() if values[name] is None})
        if values["seed"] is None:
            values["seed"] = secrets.randbelow(2**32)
        return ResolvedRequest(**values)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, in their order of definition."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a request from JSON values.

        Raises:
            InvalidInput: a name is unknown, a field without default is missing, or a value is impossible.
        """
        if not isinstance(values, Mapping):
            raise InvalidInput(f"A request must be a mapping of field names to values but is {shown(values)}.")
        fields = dataclasses.fields(cls)
        names = [f.name for f in fields]
        for name in values:
            if name not in names:
                hint = did_you_mean(name[:40], names) if isinstance(name, str) else ""
                raise InvalidInput(f"{shown(name)} is not a field of a request.{hint} Known: {', '.join(names)}.")
        for one in fields:
            if one.default is dataclasses.MISSING and one.name not in values:
                raise InvalidInput(f"`{one.name}` is missing in the request. Give it.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(Request):
    """A request in which nothing is left open: the same fields again give the same pictures from the same model."""

    width: int
    height: int
    steps: int
    guidance: float
    sampler: SamplerName
    seed: int

    def __post_init__(self) -> None:
        for name in ("width", "height", "steps", "guidance", "sampler", "seed"):
            if getattr(self, name) is None:
                raise InvalidInput(f"`{name}` is missing in the request. Give it, or let `Request.resolve` do so.")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Finished pictures and how they came about."""

    images: "Sequence[Image]"
    """The pictures, in the order of their seeds."""

    seeds: Sequence[int]
    """Seed of each picture."""

    settings: ResolvedRequest
    """The request as carried out, with nothing left open."""

    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds spent per stage: text, denoise, decode, total."""

    model: Mapping[str, str] = field(default_factory=dict)
    """What made the pictures: model name, dtypes, device, versions; goes into the files."""

    warnings: Sequence[str] = ()
    """What the user should know about this run, for example that memory ran out and the decoder worked in tiles."""

    @property
    def image(self) -> "Image":
        """The first picture."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """Seed of the first picture."""
        return self.seeds[0]


class _Short(reprlib.Repr):
    """Shows any value in at most about a line, also numbers whose digits Python refuses to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 3

    def repr_int(self, x: int, level: int) -> str:
        """Show a whole number, or only its size."""
        return repr(x) if x.bit_length() <= 100 else f"a number of about {round(x.bit_length() * 0.30103)} digits"


def shown(value: object) -> str:
    """Return a wrong value for an error text: short, whatever it is."""
    return " ".join(_SHORT.repr(value).split())[:120]


_SHORT = _Short()


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidInput(f"`{name}` must be text but is {type(value).__name__}.")
    if len(value) > MAX_CHARACTERS:
        raise InvalidInput(f"`{name}` has {len(value)} characters, the most are {MAX_CHARACTERS}. Shorten it.")
    if "\x00" in value:
        raise InvalidInput(f"`{name}` contains a NUL character. Remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"`{name}` is not valid Unicode: character {error.start + 1} is half of a surrogate pair. Remove it, or"
            " check the encoding that it comes in."
        ) from None


def _check_integer(name: str, value: object, low: int, high: int, *, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"`{name}` must be a whole number from {low} to {high} but is {shown(value)}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    # No number is between NaN and anything; whole numbers of any length can be compared.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"`{name}` must be a number from {low:g} to {high:g} but is {shown(value)}.")


def _check_interval(value: object) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidInput(f"`guidance_interval` must be two noise levels (lowest, highest) but is {shown(value)}.")
    for end in value:
        _check_number("guidance_interval", end, 0.0, 1.0)
    if value[0] >= value[1]:
        raise InvalidInput(
            f"`guidance_interval` must rise from lowest to highest but is {shown(value)}. Swap its values."
        )


_OPTIONAL = frozenset({"width", "height", "steps", "seed"})
_INTEGER_RANGES = (
    ("width", 1, MAX_SIDE),
    ("height", 1, MAX_SIDE),
    ("steps", 1, MAX_STEPS),
    ("seed", 0, MAX_SEED),
    ("count", 1, 10_000),
    ("batch_size", 1, 1024),
    ("max_prompt_tokens", 1, 4096),
)
