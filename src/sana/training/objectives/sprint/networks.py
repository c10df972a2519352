"""Teacher and student of a distillation, as functions of state and time under given texts.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width, N tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sana.config import TransformerConfig
from sana.errors import InvalidInput
from sana.flow.path import flow_from_trig, sigma_from_angle
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like
from sana.training.objectives.sprint.trigflow import Network, trig_network
from sana.training.starting import StartModel
from sana.training.trainables import computing

DENSE = 0.001
"""Timestep scale of a model that is told sigma itself: pipelines count 1000 sigma."""
PUBLISHED_TAPS = {20: (2, 8, 14, 19), 28: (2, 8, 14, 20, 27)}
"""Blocks under the discriminator's heads, by the number of blocks."""

Text = tuple[Tensor, Tensor]
"""Embeddings [B, T, E] and mask [B, T]."""


def network_of(transformer: LinearDiT, text: Text, guidance: Tensor | None = None) -> Network:
    """Return the TrigFlow network of a transformer under texts; `guidance` [B] is for students.

    What depends on the text alone is computed here, once.
    """
    with computing(transformer):
        kv = transformer.cross_attention_kv(transformer.encode_caption(text[0]))
    embedded = None if guidance is None else guidance * transformer.config.guidance_embeds_scale

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with computing(transformer):
            out = transformer.denoise(x, transformer.modulation(sigma, embedded), kv, text[1])
        return out.to(torch.promote_types(out.dtype, torch.float32))

    return trig_network(velocity)


def guided(transformer: LinearDiT, text: Text, null: Text, guidance: Tensor) -> Network:
    """Return the TrigFlow network of a flow model under classifier-free guidance with a scale per sample [B].

    The two velocities enter F with the same coefficients, so to guide F is to guide the velocity.
    """
    both = network_of(transformer, (torch.cat([null[0], text[0]]), torch.cat([null[1], text[1]])))

    def network(x: Tensor, t: Tensor) -> Tensor:
        without, under = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return without + guidance.view(-1, 1, 1, 1) * (under - without)

    return network


def tapped(transformer: LinearDiT, text: Text, x: Tensor, t: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Return the tokens [B, N, D] after the tapped blocks, for TrigFlow states divided by sigma_d."""
    sigma = sigma_from_angle(t)
    with computing(transformer):
        kv = transformer.cross_attention_kv(transformer.encode_caption(text[0]))
        return transformer.features(flow_from_trig(x, sigma, 1.0), transformer.modulation(sigma), kv, text[1], taps)


def taps_of(layers: int) -> tuple[int, ...]:
    """Return the blocks to tap: the published ones, or at like depths."""
    return PUBLISHED_TAPS.get(layers, tuple(sorted({round((layers - 1) * depth) for depth in (0.1, 0.42, 0.74, 1)})))


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
