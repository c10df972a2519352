"""What a user can order, and what comes back. Free of torch: a command line or a web form is built from it."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from sana.engine.attachments import (
    FEATHER,
    MAX_ANGLE,
    MOST_CONTROLS,
    MOST_LORAS,
    ControlRequest,
    FileRef,
    LoraRequest,
    Source,
    check_edit,
    checked_border,
    checked_layers,
    checked_source,
    grown_size,
    listed,
    plain,
    shape_of_control,
)
from sana.engine.resolution import check_known, check_step
from sana.engine.values import MAX_CHARACTERS, check_integer, check_interval, check_number, check_text, shown
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.cards import Card

__all__ = [
    "MAX_CHARACTERS",
    "MAX_PIXELS",
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_STEPS",
    "SAMPLER_NAMES",
    "ControlRequest",
    "FileRef",
    "LoraRequest",
    "Request",
    "ResolvedRequest",
    "Result",
    "SamplerName",
    "shown",
]

SamplerName = Literal["flow-dpm", "flow-euler", "scm"]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
"""Names a request accepts; a test holds them equal to the keys of the sampler registry."""

MAX_SIDE = 16384
MAX_PIXELS = 2**30
"""Most pixels of all pictures that are computed at once: four of the largest, or a thousand of 1024 x 1024."""
MAX_STEPS = 1000
MAX_SEED = 2**53 - 1
"""Largest integer that every JSON reader keeps exactly."""
STRENGTH = 0.6
"""How far image-to-image goes where nobody says so; with a mask it is 1, and what it covers is drawn anew."""
OUTPAINT_STRENGTH = 0.7
"""The same for room around a picture: near 1 the new part often takes another background than the picture."""


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

    image: Source | None = field(default=None, hash=False)
    """Picture to begin with (a path, or a PIL image); the result has its size unless width and height are given."""

    mask: Source | None = field(default=None, hash=False)
    """What of it to draw anew: white is drawn, black stays as it is to the last bit; a picture of the same shape."""

    strength: float | None = None
    """How far to go from the picture: near 0 little changes, 1 draws anew (default: 0.6; outpaint 0.7; mask 1)."""

    feather: int = FEATHER
    """Width in pixels of the soft border inside of the mask, over which old and new are mixed."""

    outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels to add around the picture: left, top, right, bottom."""

    controls: tuple[ControlRequest, ...] = ()
    """Pictures for the control network to follow, each with its kind and scale."""

    pag_scale: float = 0.0
    """How strongly to keep away from what the network draws without self-attention (PAG); 0 is off, 3 is usual."""

    pag_adaptive_scale: float = 0.0
    """By how much `pag_scale` falls with each thousandth of the way; 0 keeps it."""

    pag_layers: str | tuple[str, ...] | None = None
    """Blocks that PAG acts in, such as transformer_blocks.8; left out, those that suit the model."""

    loras: tuple[LoraRequest, ...] = ()
    """Adapters for this request alone, each with its scale."""

    max_timesteps: float | None = None
    """Angle at which SANA-Sprint begins; 1.5708 is pure noise."""

    intermediate_timesteps: float | None = None
    """Angle between the two steps of SANA-Sprint (default: 1.3)."""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            check_text(name, getattr(self, name))
        for name, low, high in _INTEGER_RANGES:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_integer(name, getattr(self, name), low, high)
        for name, least, most in _NUMBER_RANGES:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_number(name, getattr(self, name), least, most)
                self._set(name, float(getattr(self, name)))
        for name in ("binning", "instruction", "clean_caption"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"`{name}` must be true or false but is {shown(getattr(self, name))}.")
        check_interval("guidance_interval", "two noise levels (lowest, highest)", self.guidance_interval)
        self._set("guidance_interval", tuple(float(v) for v in self.guidance_interval))
        self._check_sampler()
        self._check_attached()
        self._check_together()
        check_edit(self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_attached(self) -> None:
        """Check pictures, adapters and names of layers, each for itself."""
        for name in ("image", "mask"):
            if getattr(self, name) is not None:
                self._set(name, checked_source(name, getattr(self, name)))
        self._set("controls", listed("controls", ControlRequest, self.controls, MOST_CONTROLS))
        self._set("loras", listed("loras", LoraRequest, self.loras, MOST_LORAS))
        self._set("outpaint", checked_border(self.outpaint, MAX_SIDE))
        self._set("pag_layers", checked_layers(self.pag_layers))

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
        if not self.binning and self.image is None:
            check_step(self.height, self.width)

    def validate(self, card: "Card") -> None:
        """Check the request against the model it is for.

        Raises:
            InvalidInput: the model was not made for this size, sampler or option.
        """
        if self.image is None:  # a picture that is edited comes back in its own size, whatever size is drawn
            check_known(card.name, card.sizes, self.height or card.base_size, self.width or card.base_size)
        sprint = card.product == "sprint"
        if sprint and self.negative_prompt:
            raise InvalidInput(f"{card.name} is a SANA-Sprint model and has no negative prompt. Drop it.")
        if sprint and self.guidance_interval != (0.0, 1.0):
            raise InvalidInput(f"{card.name} is a SANA-Sprint model, where `guidance_interval` has no effect. Drop it.")
        if sprint and self.pag_scale:
            raise InvalidInput(
                f"{card.name} is a SANA-Sprint model, which is guided from within and has no PAG. Drop `pag_scale`."
            )
        for name in _SPRINT_ONLY:
            if not sprint and getattr(self, name) is not None:
                raise InvalidInput(f"`{name}` is for SANA-Sprint models only, and {card.name} is none. Drop it.")
        if self.sampler is not None and sprint != (self.sampler == "scm"):
            raise InvalidInput(f"{card.name} does not work with `sampler` {self.sampler!r}. Use {card.sampler!r}.")

    def resolve(self, card: "Card") -> "ResolvedRequest":
        """Validate against the model and return the request with every `None` replaced; a missing seed is drawn.

        Without `width` and `height` the size is that of the picture to be edited, of which only the header is read, or
        the trained size nearest to the shape of the first control picture, or else the card's.
        """
        self.validate(card)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Request)}
        width, height = (self.width, self.height) if self.width is not None else self._own_size(card)
        defaults = {
            "width": width,
            "height": height,
            "steps": card.steps if self.intermediate_timesteps is None else 2,
            "guidance": card.guidance,
            "sampler": card.sampler,
            "strength": self._own_strength(),
        }
        values.update({name: value for name, value in defaults.items() if values[name] is None})
        if self.pag_scale and self.pag_layers is None:
            values["pag_layers"] = card.pag_layers
        if values["seed"] is None:
            values["seed"] = secrets.randbelow(2**32)
        return ResolvedRequest(**values)

    def _own_strength(self) -> float | None:
        """Return the strength of a request that does not name it; None where there is no picture."""
        if self.image is None:
            return None
        if self.mask is not None:
            return 1.0
        return OUTPAINT_STRENGTH if any(self.outpaint) else STRENGTH

    def _own_size(self, card: "Card") -> tuple[int, int]:
        """Return the (width, height) of a request that does not name it."""
        if self.image is not None:
            width, height = grown_size(self.image, self.outpaint)
            for name, side in (("width", width), ("height", height)):
                check_integer(name, side, 1, MAX_SIDE)
            return width, height
        if self.controls:
            return shape_of_control(self.controls[0], card)
        return card.base_size, card.base_size

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, in their order of definition.

        Paths stay paths, as they were given; what `generate` reports names files as `FileRef` does.
        """
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

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
                hint = hint or f" Known: {', '.join(names)}."
                raise InvalidInput(f"{shown(name)} is not a field of a request.{hint}")
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

    selection: Sequence[Mapping[str, Any]] = ()
    """For each picture how it was chosen among candidates, where it was; goes into the files."""

    @property
    def image(self) -> "Image":
        """The first picture."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """Seed of the first picture."""
        return self.seeds[0]


_SPRINT_ONLY = ("max_timesteps", "intermediate_timesteps")
_OPTIONAL = frozenset(
    {"width", "height", "steps", "seed", "guidance", "strength", "max_timesteps", "intermediate_timesteps"}
)
_INTEGER_RANGES = (
    ("width", 1, MAX_SIDE),
    ("height", 1, MAX_SIDE),
    ("steps", 1, MAX_STEPS),
    ("seed", 0, MAX_SEED),
    ("count", 1, 10_000),
    ("batch_size", 1, 1024),
    ("max_prompt_tokens", 1, 4096),
    ("feather", 0, 1024),
)
_NUMBER_RANGES = (
    ("guidance", 0.0, 100.0),
    ("strength", 0.0, 1.0),
    ("pag_scale", 0.0, 100.0),
    ("pag_adaptive_scale", 0.0, 100.0),
    ("max_timesteps", 0.001, MAX_ANGLE),
    ("intermediate_timesteps", 0.001, MAX_ANGLE),
)
