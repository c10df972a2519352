"""The `[sprint]` table of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sana.errors import InvalidInput, did_you_mean
from sana.training.config import RunSettings, build, changed, named
from sana.training.objectives.flow_settings import DataSettings, check_card, check_offload
from sana.training.objectives.sprint.consistency import LIMITS
from sana.training.objectives.sprint.trigflow import DERIVATIVES
from sana.training.trainables import TRAINABLES, ControlSettings, LoraSettings


@dataclass(frozen=True, kw_only=True)
class SprintSettings:
    """What is distilled, on what, and every constant of its losses (arXiv 2503.09641 and its published code)."""

    teacher: str
    """Flow model with dense time and normalised queries and keys, as the teacher recipe makes it: folder or name."""
    student: str = ""
    """Distilled model to go on from, folder or name; empty starts as a copy of the teacher."""
    train: str = "full"
    """full (all weights of the student), lora (adapters beside it) or controlnet (a branch in front of it)."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """As `[flow_matching.lora]`."""
    control: Mapping[str, Any] = field(default_factory=dict)
    """As `[flow_matching.control]`; `start` is the control network of the teacher."""
    base_dtype: str = "float32"
    """float32 or bfloat16: how the teacher is held, which stays as it is."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Pictures with captions, as `[flow_matching.data]`; empty is the drawn world."""
    features: str = ""
    """Folder of the drawn world's features; what is missing there is computed first."""
    scenes: int = 16384
    """Scenes of the drawn world."""
    captions: int = 2
    """Captions of each scene."""
    terse: float = 0.0
    """Share of these captions that name kinds and counts alone."""
    angle_mean: float = 0.2
    """Mean of tau in t = arctan(e^tau / sigma_d), for the consistency loss and the generator's jumps."""
    angle_std: float = 1.6
    """Its standard deviation."""
    guidance: tuple[float, ...] = (4.0, 4.5, 5.0)
    """Scales that the student learns to have built in; one is drawn per sample, and is an input of the student."""
    warmup_steps: int = 4000
    """Steps, of both players together, over which the derivative of the student enters the tangent."""
    limit: str = "norm"
    """How tangents are kept small: norm (of each sample), clip or batch (for samples of a few values)."""
    derivative: str = "forward"
    """How the student is differentiated in time: forward (mode, exact) or difference (of two more passes)."""
    consistency_weight: float = 1.0
    """Weight of the consistency loss; 0 leaves it out."""
    adversarial_weight: float = 0.5
    """Weight of the generator's adversarial loss; 0 leaves the heads of the discriminator out."""
    matching_weight: float = 0.0
    """Weight of the distribution matching loss, for which a critic learns what the student draws; 0 leaves it out. With
    neither this nor the adversarial loss every step is the generator's."""
    max_time_probability: float = 0.5
    """Share of the generator's jumps that start from pure noise, t = 1.5708, as one-step pictures do. Others start from
    noised data in the adversarial loss, and from what the student drew, noised again, in the matching loss."""
    discriminator_mean: float = -0.6
    """Mean of tau of the angles to which the discriminator's samples are noised."""
    discriminator_std: float = 1.0
    """Its standard deviation."""
    taps: tuple[int, ...] = ()
    """Blocks of the teacher that a head reads, from 0; empty takes the published ones, or such by depth."""
    virtual_batch: int = 8
    """Samples that share the statistics of the heads' norm, at most: a batch that is no multiple of it is split into
    groups that differ by one sample."""
    misaligned: bool = True
    """Let true latents under the captions of their neighbours count as fakes, too; a lone sample has none."""
    gradient_penalty: float = 0.0
    """Weight of R1 on what enters the heads; the published code has 1e-5, off by default."""
    prompts: tuple[str, ...] = ()
    """What previews show; empty takes captions of the data."""
    card: str = ""
    """Name of the card that the exported pipeline shall carry."""

    def __post_init__(self) -> None:
        """Refuse choices that do not exist and numbers that cannot be."""
        for name, choices in (("train", TRAINABLES), ("limit", LIMITS), ("derivative", DERIVATIVES)):
            given = getattr(self, name)
            if given not in choices:
                told = f"sprint.{name} is '{given}'.{did_you_mean(given, choices)}"
                raise InvalidInput(f"{told} Choose one of: {', '.join(choices)}.")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise InvalidInput(f"sprint.base_dtype is float32 or bfloat16, but not '{self.base_dtype}'.")
        if not self.guidance:
            raise InvalidInput("sprint.guidance is empty; name at least one scale, for example [4.5].")
        for name in ("angle_std", "discriminator_std", "warmup_steps", "virtual_batch"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"sprint.{name} must be positive, but is {getattr(self, name)}.")
        for name in (*WEIGHTS, "gradient_penalty"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"sprint.{name} must not be negative, but is {getattr(self, name)}.")
        if not any(getattr(self, weight) for weight in WEIGHTS):
            raise InvalidInput(f"sprint.{', '.join(WEIGHTS[:-1])} and {WEIGHTS[-1]} are all 0, so nothing would learn.")
        for name, weights in USED_BY.items():
            if changed(self, name) and not any(getattr(self, weight) for weight in weights):
                unset = " and ".join(f"{weight} = 0" for weight in weights)
                raise InvalidInput(f"sprint.{name} has no effect with {unset}. Remove one of them.")
        self._check_train()
        if not 0 <= self.terse <= 1:
            raise InvalidInput(f"sprint.terse is a share of the captions, 0 to 1, but is {self.terse}.")
        if not 0 <= self.max_time_probability <= 1:
            raise InvalidInput(
                f"sprint.max_time_probability must lie in [0, 1], but is {self.max_time_probability}; it is a share of"
                " the samples, no angle."
            )
        if not self.data and not self.features:
            raise InvalidInput("The drawn world needs a folder for its features: set sprint.features, or sprint.data.")
        drawn = changed(self, "features", "scenes", "captions", "terse")
        if self.data and drawn:
            more = "; write [sprint.data] features" if drawn[0] == "features" else " and has no effect on [sprint.data]"
            raise InvalidInput(f"sprint.{drawn[0]} is of the drawn world{more}.")
        if self.data:
            with named("flow_matching.data", "sprint.data"):
                build(DataSettings, self.data, "sprint.data")

    def _check_train(self) -> None:
        for table, owner in (("lora", "lora"), ("control", "controlnet")):
            if getattr(self, table) and self.train != owner:
                raise InvalidInput(f'[sprint.{table}] acts only with train = "{owner}"; it is "{self.train}".')
        check_card(self.card, self.train, "sprint")
        if self.train == "full":
            return
        if not self.student:
            raise InvalidInput(
                f'sprint.train = "{self.train}" learns something beside a distilled model: name it in sprint.student.'
            )
        with named("flow_matching.lora", "sprint.lora"):
            build(LoraSettings, self.lora, "sprint.lora")
        with named("flow_matching.control", "sprint.control"):
            control = build(ControlSettings, self.control, "sprint.control")
        if self.train == "controlnet" and not control.start:
            raise InvalidInput(
                "sprint.control.start names no control network. Train one in front of the teacher first."
            )

    @property
    def has_two_players(self) -> bool:
        """Whether there is anything that the discriminator learns."""
        return self.adversarial_weight > 0 or self.matching_weight > 0

    def check(self, run: RunSettings) -> None:
        """Refuse a run that does not go with these settings.

        Raises:
            InvalidInput: naming the setting.
        """
        check_offload(run, self.data, "sprint.data")
        if run.compile:
            raise InvalidInput("run.compile does not go with sprint: the student is differentiated in forward mode.")
        if self.gradient_penalty and run.shard:
            raise InvalidInput(
                "run.shard does not go with sprint.gradient_penalty, which differentiates twice: split weights are gone"
                " the second time. Remove one of them."
            )
        if self.matching_weight and run.export == "best":
            raise InvalidInput(
                "run.export = 'best' does not go with sprint.matching_weight: what is watched is the distance from the"
                " teacher's own pictures, and matching finds others. Remove run.export."
            )
        if self.adversarial_weight and self.misaligned and run.batch_size < 2:
            raise InvalidInput("sprint.misaligned exchanges captions within a batch: raise run.batch_size above 1.")


CONSISTENCY, ADVERSARIAL, MATCHING = "consistency_weight", "adversarial_weight", "matching_weight"
WEIGHTS = (CONSISTENCY, ADVERSARIAL, MATCHING)
"""The weights of the losses."""
USED_BY = {
    "angle_mean": (CONSISTENCY, ADVERSARIAL),
    "angle_std": (CONSISTENCY, ADVERSARIAL),
    "warmup_steps": (CONSISTENCY,),
    "limit": (CONSISTENCY,),
    "derivative": (CONSISTENCY,),
    "max_time_probability": (ADVERSARIAL, MATCHING),
    "discriminator_mean": (ADVERSARIAL,),
    "discriminator_std": (ADVERSARIAL,),
    "taps": (ADVERSARIAL,),
    "virtual_batch": (ADVERSARIAL,),
    "misaligned": (ADVERSARIAL,),
    "gradient_penalty": (ADVERSARIAL,),
}
"""The losses that a setting is for; without any of them it would have no effect."""
