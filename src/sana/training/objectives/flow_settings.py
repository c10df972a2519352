"""The `[flow_matching]` table of a recipe."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sana.cards import CARDS
from sana.config import TransformerConfig
from sana.data.captions import PLACEHOLDER, CaptionChoice
from sana.errors import InvalidInput, did_you_mean
from sana.flow.density import DENSITIES, WEIGHTINGS
from sana.training.config import RunSettings, build, changed, check_fields
from sana.training.trainables import TRAINABLES, ControlSettings, LoraSettings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The `[flow_matching.data]` table: pictures with captions."""

    path: str
    """Folder of pictures, `.tar`, or folder of tars."""
    size: int = 0
    """Side of the square whose area a picture is brought to, in its own aspect ratio; 0 is that of the model, as
    `[flow_matching.model]` leaves it."""
    square: bool = False
    """Cut every picture to a square, instead of the published aspect ratios."""
    features: str = ""
    """Folder for the encoded pictures and texts, computed before the first step; empty keeps them in memory."""
    held_out: int = 0
    """Samples kept apart for the held-out figures; 0 looks at some that are trained on."""
    small: str = "refuse"
    """What becomes of pictures smaller than their bucket: refuse, skip or upscale."""
    caption: str = ""
    """Caption of pictures that have none of their own (DreamBooth's instance prompt)."""
    trigger: str = ""
    """Word put before every caption, or in the place of `[trigger]`."""
    mode: str = "auto"
    """How one of several captions is chosen: score, weight, first, or auto (by score where there are scores)."""
    threshold: float = 25.0
    """CLIP score below which a caption is not drawn while there are better ones."""
    temperature: float = 0.1
    """Of the choice by score: probability in proportion to score^(1 / temperature)."""
    least_best: float = 0.0
    """Pictures whose best caption scores lower are left out."""
    controls: str = ""
    """Folder of control pictures named like the pictures, for control kind map."""

    def __post_init__(self) -> None:
        """Refuse choices that do not exist."""
        _check_small(self.small, "flow_matching.data")
        if self.held_out < 0 or self.size < 0:
            raise InvalidInput("flow_matching.data.held_out and .size must not be negative.")
        try:
            self.choice()
        except InvalidInput as error:
            raise InvalidInput(re.sub(r"`(\w+)` of the captions", r"flow_matching.data.\1", str(error))) from error
        unused = changed(self, "threshold", "temperature")
        if unused and self.mode in ("weight", "first"):
            told = f"flow_matching.data.{unused[0]} is of the choice by score"
            raise InvalidInput(f"{told} and has no effect with mode = '{self.mode}'. Remove one of them.")

    def choice(self, dropout: float = 0.0) -> CaptionChoice:
        """Return how captions are chosen, a share of them left empty."""
        return CaptionChoice(
            mode=self.mode,  # type: ignore[arg-type]
            threshold=self.threshold,
            temperature=self.temperature,
            trigger=self.trigger,
            least_best=self.least_best,
            dropout=dropout,
        )


@dataclass(frozen=True, kw_only=True)
class PriorSettings:
    """The `[flow_matching.prior]` table: what the model must not forget (DreamBooth, arXiv 2208.12242)."""

    prompt: str
    """What the class is called, such as "a photo of a dog"."""
    folder: str
    """Where its pictures lie: one's own, and as many as are missing from `count`, drawn by the model as it was."""
    count: int = 100
    """Pictures of the class, one's own included; where there are more, all are learnt beside."""
    small: str = "refuse"
    """What becomes of pictures smaller than their bucket, as `[flow_matching.data]` has it for its own."""
    weight: float = 1.0
    steps: int = 20
    guidance: float = 4.5

    def __post_init__(self) -> None:
        """Refuse counts and weights that cannot be."""
        if self.count < 1 or self.steps < 1:
            raise InvalidInput("flow_matching.prior.count and .steps must be at least 1.")
        _check_small(self.small, "flow_matching.prior")
        if not self.folder:
            raise InvalidInput("flow_matching.prior.folder is empty; name a folder for the pictures of the class.")
        if PLACEHOLDER in self.prompt:
            raise InvalidInput(
                f"flow_matching.prior.prompt has {PLACEHOLDER} in it, which a class has not; write it out."
            )
        if not 0 <= self.guidance <= 100:
            raise InvalidInput(f"flow_matching.prior.guidance must lie from 0 to 100, but is {self.guidance}.")
        if not self.weight > 0:
            raise InvalidInput(f"flow_matching.prior.weight must be positive, but is {self.weight}; omit the table.")


@dataclass(frozen=True, kw_only=True)
class FlowMatchingSettings:
    """What is trained on what."""

    start: str = ""
    """Model to start from: short name, folder, hub id or file; empty starts from nothing, in the drawn world."""
    train: str = "full"
    """full (all weights), lora (adapters beside them) or controlnet (a branch in front of them)."""
    fresh: bool = False
    """Draw the weights of the transformer anew and take only the encoders of `start`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig`; beside `start`, those that differ from it."""
    base_dtype: str = "float32"
    """float32 or bfloat16: how a frozen transformer is held."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """See `DataSettings`; empty is the drawn world."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] = field(default_factory=dict)
    autoencoder: str = ""
    """Folder of the autoencoder that makes the latents; relative to the run's folder, like the next two."""
    text: str = ""
    """Folder that holds `text_encoder` and `tokenizer`."""
    features: str = ""
    """Folder of the drawn world's features; what is missing there is computed first."""
    scenes: int = 49152
    captions: int = 3
    terse: float = 0.0
    """Share of the drawn world's captions that name kinds and counts alone, besides the few that are drawn so."""
    dropout: float = 0.1
    """Share of the samples that see the unconditional text."""
    shift: float = 0.0
    """Flow shift of the noise levels; 0 is the model's own, and 1 from nothing."""
    density: str = "logit-normal"
    """How levels are drawn: logit-normal or uniform."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = "none"
    """Weight of a level in the loss: none, min-snr, sigma-sqrt or cosmap."""
    snr_gamma: float = 5.0
    """The gamma of min-snr."""
    label_weight: float = 0.1
    label_block: int = 4
    prompts: tuple[str, ...] = ()
    """What previews show; empty takes captions of the data."""
    preview_guidance: float = 3.0
    card: str = ""
    """Name of the card that the exported pipeline shall carry; it is drawn with the card's shift from then on."""
    caption_gain: float = 0.1
    """First weight of the caption norm, from nothing."""

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and settings that would have no effect."""
        for name, choices in (("train", TRAINABLES), ("density", DENSITIES), ("weighting", WEIGHTINGS)):
            given = getattr(self, name)
            if given not in choices:
                told = f"flow_matching.{name} is '{given}'.{did_you_mean(given, choices)}"
                raise InvalidInput(f"{told} Choose one of: {', '.join(choices)}.")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise InvalidInput(f"flow_matching.base_dtype is float32 or bfloat16, but not '{self.base_dtype}'.")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"flow_matching.dropout must lie in [0, 1), but is {self.dropout}.")
        if not 0 <= self.terse <= 1:
            raise InvalidInput(f"flow_matching.terse is a share of the captions, 0 to 1, but is {self.terse}.")
        for name in ("scenes", "captions"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"flow_matching.{name} must be at least 1, but is {getattr(self, name)}.")
        drawn = changed(self, "terse", "scenes", "captions")
        if drawn and self.data:
            raise InvalidInput(
                f"flow_matching.{drawn[0]} is of the drawn world; the captions of [flow_matching.data] stay."
            )
        if not 0 <= self.preview_guidance <= 100:
            raise InvalidInput(
                f"flow_matching.preview_guidance must lie from 0 to 100, but is {self.preview_guidance}."
            )
        if self.logit_std <= 0:
            raise InvalidInput(f"flow_matching.logit_std must be positive, but is {self.logit_std}.")
        normal = changed(self, "logit_mean", "logit_std")
        if normal and self.density != "logit-normal":
            raise InvalidInput(f'flow_matching.{normal[0]} acts only with density = "logit-normal".')
        if self.base_dtype != "float32" and self.train == "full":
            raise InvalidInput('flow_matching.base_dtype is of a frozen transformer; with train = "full" none is.')
        check_card(self.card, self.train, "flow_matching")
        if self.snr_gamma <= 0:
            raise InvalidInput(f"flow_matching.snr_gamma must be positive, but is {self.snr_gamma}.")
        if self.shift < 0:
            raise InvalidInput(f"flow_matching.shift must be positive, or 0 for the model's own, but is {self.shift}.")
        if self.snr_gamma != 5.0 and self.weighting != "min-snr":
            raise InvalidInput('flow_matching.snr_gamma acts only with weighting = "min-snr".')
        for table, owner in (("lora", "lora"), ("control", "controlnet")):
            if getattr(self, table) and self.train != owner:
                raise InvalidInput(f'[flow_matching.{table}] acts only with train = "{owner}"; it is "{self.train}".')
        check_fields(TransformerConfig, self.model, "flow_matching.model")
        self._check_start() if self.start else self._check_scratch()

    def check(self, run: RunSettings) -> None:
        """Refuse a run that does not go with these settings.

        Raises:
            InvalidInput: naming the setting.
        """
        if run.offload and not self.start:
            raise InvalidInput("run.offload has no effect without flow_matching.start: there are no encoders to move.")
        check_offload(run, self.data, "flow_matching.data")

    def _check_start(self) -> None:
        unused = [name for name in ("autoencoder", "text") if getattr(self, name)]
        if unused:
            raise InvalidInput(f"flow_matching.{unused[0]} has no effect beside start, which brings its encoders.")
        scratch = changed(self, "label_weight", "label_block", *(() if self.fresh else ("caption_gain",)))
        if scratch:
            raise InvalidInput(f"flow_matching.{scratch[0]} has no effect beside start. Remove one of them.")
        if self.fresh and self.train != "full":
            raise InvalidInput('flow_matching.fresh draws all weights anew, which needs train = "full".')
        if self.data and self.features:
            raise InvalidInput("flow_matching.features is of the drawn world; write [flow_matching.data] features.")
        if self.prior and not self.data:
            raise InvalidInput("[flow_matching.prior] needs pictures to learn from: add [flow_matching.data].")
        tables = {name: table(kind, self, name) for name, kind in TABLES.items()}
        self._check_size(tables["data"])
        controls = bool(tables["data"] and tables["data"].controls)
        is_map = self.train == "controlnet" and tables["control"] is not None and tables["control"].kind == "map"
        if controls != is_map:
            raise InvalidInput('flow_matching.data.controls goes with [flow_matching.control] kind = "map".')
        if tables["prior"] and not (tables["data"] and tables["data"].square):
            raise InvalidInput("[flow_matching.prior] needs [flow_matching.data] square = true: one size for both.")
        same = [os.path.realpath(os.path.expanduser(t)) for t in (self.prior.get("folder"), self.data.get("path")) if t]
        if tables["prior"] and len(set(same)) < 2:
            raise InvalidInput(
                f"flow_matching.prior.folder is that of flow_matching.data.path, {self.data['path']}: what is to be"
                " learnt would count as the class. Name another folder."
            )
        if tables["prior"] and is_map:
            raise InvalidInput('[flow_matching.prior] has no control pictures, so kind = "map" does not go with it.')

    def _check_size(self, data: DataSettings | None) -> None:
        side, scale = self.model.get("sample_size"), self.model.get("interpolation_scale")
        for name, value in (("sample_size", side), ("interpolation_scale", scale)):
            if value is None:
                continue
            if self.train != "full":
                told = f'flow_matching.model.{name} is of a whole model, but train = "{self.train}" exports a part'
                raise InvalidInput(f"{told}. Remove it.")
            kinds = int if name == "sample_size" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise InvalidInput(f"flow_matching.model.{name} must be a number above 0, but is {value!r}.")
        if side is not None and data is not None and data.size not in (0, 32 * side):
            raise InvalidInput(
                f"flow_matching.model.sample_size = {side} is a model of {32 * side} px, but flow_matching.data.size is"
                f" {data.size}. Make them agree."
            )
        card = CARDS.get(self.card)
        for name, value in (("sample_size", side), ("interpolation_scale", scale)):
            own = None if card is None else getattr(card.transformer, name)
            if card is not None and value is not None and value != own:
                raise InvalidInput(
                    f"flow_matching.card is that of {self.card}, whose {name} is {own}, but flow_matching.model.{name}"
                    f" is {value}. Make them agree."
                )

    def _check_scratch(self) -> None:
        if self.train != "full":
            raise InvalidInput(f'flow_matching.train = "{self.train}" needs a model to start from: set start.')
        unused = [name for name in ("data", "prior", "fresh") if getattr(self, name)]
        if unused:
            told = "needs the encoders of a model: set start"
            raise InvalidInput(f"flow_matching.{unused[0]} {told}, with fresh = true to draw the transformer anew.")
        if not self.label_weight and changed(self, "label_block"):
            raise InvalidInput("flow_matching.label_block has no effect with label_weight = 0. Remove one of them.")
        missing = [name for name in ("autoencoder", "text", "features") if not getattr(self, name)]
        if missing:
            raise InvalidInput(f"flow_matching lacks {', '.join(missing)}; add it, or a model to start from (start).")


def check_card(card: str, train: str, where: str) -> None:
    """Refuse the name of a card for what is no whole model, and one that the loader of the export would not know.

    Raises:
        InvalidInput: one of these.
    """
    if card and train != "full":
        raise InvalidInput(f'{where}.card is of a whole model, but train = "{train}" exports a part.')
    if card and card not in CARDS:
        raise InvalidInput(f"{where}.card names no model that is known: '{card}'.{did_you_mean(card, CARDS)}")


def check_carried(card: str, config: TransformerConfig, where: str) -> None:
    """Refuse the card of another model than the one that is trained, which its name would be loaded as.

    Raises:
        InvalidInput: naming what differs.
    """
    wanted = {} if card not in CARDS else CARDS[card].transformer.to_dict()
    for name, value in config.to_dict().items():
        if wanted.get(name, value) != value:
            raise InvalidInput(
                f"{where}.card is that of {card}, whose {name} is {wanted[name]}, but what is trained has {value}. Make"
                " them agree, or remove the card."
            )


def _check_small(small: str, where: str) -> None:
    if small not in ("refuse", "skip", "upscale"):
        raise InvalidInput(f"{where}.small is refuse, skip or upscale, but not '{small}'.")


def check_offload(run: RunSettings, data: Mapping[str, Any], where: str) -> None:
    """Raise InvalidInput where the encoders, which should come and go, are not there at all."""
    if run.offload and data.get("features"):
        raise InvalidInput(
            f"run.offload has no effect beside {where}.features: encoders that have done all before are not in memory."
            " Remove one of them."
        )


def table(kind: type[T], settings: FlowMatchingSettings, name: str) -> T | None:
    """Return a table inside `[flow_matching]`, or None where it is absent."""
    given = getattr(settings, name)
    return build(kind, given, f"flow_matching.{name}") if given else None


TABLES: dict[str, type[Any]] = {
    "data": DataSettings,
    "lora": LoraSettings,
    "control": ControlSettings,
    "prior": PriorSettings,
}
"""Tables inside `[flow_matching]`."""
