"""Who teaches, who learns, and what of the student does: all of it, an adapter, or a control branch."""

from typing import NamedTuple

import torch
from torch import nn

from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.config import TransformerConfig
from sana.errors import InvalidInput
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like
from sana.training.config import about
from sana.training.objectives.flow_settings import check_carried
from sana.training.objectives.sprint.networks import Backbone
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.origins import ModelOrigin
from sana.training.starting import StartModel
from sana.training.trainables import ControlTrainable, FullTrainable, LoraTrainable, Trainable

DENSE = 0.001
"""Timestep scale of a model that is told sigma itself: pipelines count 1000 sigma."""


def check_teacher(transformer: LinearDiT, name: str) -> None:
    """Raise InvalidInput for a model that cannot be differentiated in time, or that is no flow model."""
    config = transformer.config
    if config.guidance_embeds:
        raise InvalidInput(f"{name} is a distilled model already; the teacher must be a flow model.")
    if config.timestep_scale != DENSE or config.qk_norm is None:
        raise InvalidInput(
            f"{name} is no teacher yet: it needs dense time and normalised queries and keys. Fine-tune it with"
            ' [flow_matching.model] timestep_scale = 0.001 and qk_norm = "rms_norm_across_heads" first, as'
            " recipes/nano/5-teacher.toml does."
        )


def student_of(teacher: LinearDiT, seed: int) -> LinearDiT:
    """Return a student that starts as a copy of its teacher, whatever guidance it is told.

    The embedder of guidance ends in zeros; were it zero throughout, nothing but its last bias could ever learn.
    """
    changes = {"guidance_embeds": True, "timestep_scale": 1.0}
    config = TransformerConfig.from_dict({**teacher.config.to_dict(), **changes})
    weight = teacher.scale_shift_table
    student = placed_like(LinearDiT(config), weight)
    state = {name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()}
    first, last = student.time_embed.guidance_embedder.linear_1, student.time_embed.guidance_embedder.linear_2
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        first.weight.copy_(torch.randn(first.weight.shape, generator=generator) * 0.02)
    for tensor in (first.bias, last.weight, last.bias):
        nn.init.zeros_(tensor)
    fresh = {
        f"time_embed.guidance_embedder.{k}": v for k, v in student.time_embed.guidance_embedder.state_dict().items()
    }
    student.load_state_dict(state | fresh)
    return student


def go_on(student: LinearDiT, start: StartModel) -> None:
    """Give a student the weights of a distilled model.

    Errors: InvalidInput for one that was not distilled, or not from such a teacher.
    """
    with about("sprint.student"):
        found = start.transformer(student.scale_shift_table.dtype, {})
    ours, theirs = student.config.to_dict(), found.config.to_dict()
    differing = [key for key, value in ours.items() if theirs.get(key) != value]
    if differing:
        key = differing[0]
        raise InvalidInput(
            f"sprint.student {start.name} is no distilled model of this teacher: its {key} is {theirs.get(key)}, not"
            f" {ours[key]}. Name one that was distilled from it, or leave sprint.student out."
        )
    student.load_state_dict(found.state_dict())


class Taught(NamedTuple):
    """Who takes part in a distillation before there is a loss."""

    teacher: Backbone
    student: Backbone
    trainable: Trainable
    """What of the student learns."""
    frozen: tuple[nn.Module, ...]
    """What gradients pass through although it does not learn, outside of the trainable's module."""


def take_on(settings: SprintSettings, seed: int, origin: ModelOrigin, teacher: SanaTransformer2DModel) -> Taught:
    """Return a student of `teacher`, new or gone on from another, and both as the settings have them.

    Errors: InvalidInput for another model that does not fit, the card of one, an adapter that fits no layer, and a
    control branch that is told time otherwise under a distilled model.
    """
    student = student_of(teacher, seed).train().requires_grad_(True)
    check_carried(settings.card, student.config, "sprint")
    begun = origin.other(settings.student) if settings.student else None
    if begun is not None:
        go_on(student, begun)
    if settings.base_dtype == "bfloat16":
        teacher = origin.start.transformer(torch.bfloat16, {})
    teacher.eval().requires_grad_(False)
    if settings.train == "full":
        return Taught(Backbone(teacher), Backbone(student), FullTrainable(student), (teacher,))
    if settings.train == "lora":
        adapter = LoraTrainable(student, origin.lora(settings.lora), seed)
        return Taught(Backbone(teacher), Backbone(student), adapter, (teacher, student))
    fixed = Backbone(teacher, origin.branch(teacher).eval().requires_grad_(False))
    own = ControlTrainable(student, origin.branch(teacher))
    steered = Backbone(student, own.network)
    if fixed.told_branch != steered.told_branch:
        raise InvalidInput(
            f"{origin.control.start} is told time otherwise under a distilled model than under its teacher. Train it in"
            ' front of the teacher with [flow_matching.control] wiring = "native", and say so in [sprint.control], too.'
        )
    return Taught(fixed, steered, own, (*fixed.parts, student))
