"""SANA-Sprint: a flow model distilled into one that draws in one to four steps (arXiv 2503.09641).

Two players alternate. The generator is the student, under the consistency loss of `consistency`, an adversarial one on
jumps to the clean sample and the one of `matching`, each with its weight. The discriminator is a head per tapped block
of the frozen teacher, for the second loss, and a flow model of what the student draws, the critic, for the third.

Shapes: B batch, C latent channels, h w latent size; x is a TrigFlow state divided by sigma_d, angles t are [B].
"""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Generator, Tensor, distributed, nn

from sana.flow.path import SIGMA_DATA, sigma_from_angle
from sana.flow.schedules import MAX_ANGLE
from sana.models.discriminator import DiscriminatorHeads
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like
from sana.training.batches import Batch
from sana.training.config import RunSettings
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.sprint.adversarial import generator_loss, gradient_penalty, hinge_loss
from sana.training.objectives.sprint.consistency import LIMITS, tangent, weighted
from sana.training.objectives.sprint.matching import critic_loss, draw_levels, draw_resumed, student_loss
from sana.training.objectives.sprint.networks import (
    check_teacher,
    go_on,
    guided,
    network_of,
    student_of,
    tapped,
    taps_of,
)
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.trigflow import DERIVATIVES, Network, consistent, draw_angles, noised
from sana.training.objectives.sprint.watching import Watch, write
from sana.training.origins import ModelOrigin
from sana.training.starting import StartModel

Text = tuple[Tensor, Tensor]


class _Players(nn.Module):
    """All that learns: the student, the log-variance of its consistency loss, the discriminator's heads and critic."""

    def __init__(self, student: nn.Module, critic: nn.Module | None, width: int, taps: int, group: int) -> None:
        super().__init__()
        self.student, self.critic = student, critic
        self.log_variance = nn.Linear(width, 1)
        self.heads = DiscriminatorHeads(width, taps, group)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.zeros_(self.log_variance.bias)


class SprintObjective:
    """Distillation of a flow model by consistency, adversarial and distribution matching losses."""

    name = "sprint"
    turns: tuple[str, ...] = ("generator", "discriminator")
    better: Literal["lower", "higher"] = "lower"

    def __init__(
        self,
        settings: SprintSettings,
        run: RunSettings,
        device: torch.device,
        opened: type[ModelOrigin] | None = None,
    ) -> None:
        """Load the teacher, copy the student from it, and open the data; `opened` is what they are opened as.

        Raises:
            ModelNotFound, CheckpointError: the teacher is not to be had, or broken.
            InvalidInput: it cannot teach, or the settings do not fit it.
        """
        settings.check(run)
        self.settings, self.run, self.device = settings, run, device
        names = () if settings.data else ("scenes", "captions", "terse")
        drawn: dict[str, Any] = {name: getattr(settings, name) for name in names}
        flow = FlowMatchingSettings(
            start=settings.teacher,
            data=settings.data,
            features=settings.features,
            dropout=0.0,
            prompts=settings.prompts,
            **drawn,
        )
        self.origin = (opened or ModelOrigin)(flow, run, device)
        whole = self.origin.start.transformer(torch.float32, {}).eval().requires_grad_(False)
        check_teacher(whole, settings.teacher)
        config = whole.config
        self.taps = settings.taps or taps_of(config.num_layers)
        torch.manual_seed(run.seed)
        self.student = student_of(whole, run.seed).train().requires_grad_(True)
        if settings.student:
            go_on(self.student, StartModel(settings.student, device))
        is_whole = settings.base_dtype == "float32"
        self.teacher = whole if is_whole else self.origin.start.transformer(torch.bfloat16, {})
        self.teacher.eval().requires_grad_(False)
        self.frozen = (self.teacher,)
        critic = self.origin.start.transformer(torch.float32, {}) if settings.matching_weight else None
        players = _Players(self.student, critic, config.inner_dim, len(self.taps), settings.virtual_batch)
        self.module = placed_like(players, self.student.scale_shift_table)
        if not settings.adversarial_weight:
            self.module.heads.requires_grad_(False)
        if not settings.consistency_weight:
            self.module.log_variance.requires_grad_(False)
        if not settings.has_two_players:
            self.turns = ("generator",)
        self.watch = Watch(self.origin, self.teacher, self.student, settings.guidance)

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """The student and its log-variance, or the heads and the critic: those of the losses that there are."""
        is_second = turn == "discriminator"
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [(name, p) for name, p in named if name.startswith(("heads.", "critic.")) == is_second]

    def loss(self, draw: int, turn: str = "generator") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw` for the player whose turn it is."""
        settings, generator = self.settings, torch.Generator().manual_seed((self.run.seed << 40) + draw)
        batch = self.origin.batches.batch(draw, generator)
        scales = torch.tensor(settings.guidance, dtype=torch.float32)
        chosen = torch.randint(len(scales), (len(batch.latents),), generator=generator)
        guidance = scales[chosen].to(self.device)
        terms: list[tuple[float, Tensor]] = []
        logged: dict[str, Tensor] = {}
        if turn == "discriminator":
            if settings.adversarial_weight:
                hinge, logged = self._discriminator(batch, guidance, generator)
                terms.append((1.0, hinge))
            if settings.matching_weight:
                known = self._critic(batch, guidance, generator)
                terms.append((1.0, known))
                logged["critic"] = known.detach()
            return _sum(terms), logged
        student = network_of(self.student, (batch.embeds, batch.mask), guidance)
        if settings.consistency_weight:
            consistency, logged = self._consistency(student, batch, guidance, generator, self._warmed(draw))
            terms.append((settings.consistency_weight, consistency))
        if settings.adversarial_weight:
            adversarial = generator_loss(self._logits(self._jump(student, batch.latents, generator), batch, generator))
            terms.append((settings.adversarial_weight, adversarial))
            logged["adversarial"] = adversarial.detach()
        if settings.matching_weight:
            matching = self._matching(student, batch, guidance, generator)
            terms.append((settings.matching_weight, matching))
            logged["matching"] = matching.detach()
        return _sum(terms), logged

    def _warmed(self, draw: int) -> float:
        """How much of the tangent's second part is let in at the step of a draw; both players' steps count."""
        grouped = distributed.is_available() and distributed.is_initialized()
        step = draw // (self.run.accumulate * (distributed.get_world_size() if grouped else 1))
        return min(1.0, step / self.settings.warmup_steps)

    def _consistency(
        self, student: Network, batch: Batch, guidance: Tensor, generator: Generator, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, text = self.settings, (batch.embeds, batch.mask)
        t = self._angles(len(batch.latents), settings.angle_mean, settings.angle_std, generator)
        x = noised(batch.latents, self._noise(batch.latents, generator), t)
        with torch.no_grad():
            drift = SIGMA_DATA * guided(self.teacher, text, self._null(text), guidance)(x, t)
        derivative = DERIVATIVES[settings.derivative]
        _, g = tangent(student, x, t, drift, share, derivative=derivative)
        embedded = self.student.modulation(sigma_from_angle(t), guidance * self.student.config.guidance_embeds_scale)
        # The weight must not train the embedding of time: its slope there is a thousand times that of the jump.
        log_variance = self.module.log_variance(embedded.embedded_BD.detach())[:, 0].float()
        predicted = student(x, t)
        # Its own value as the constant: the derivative's pass rounds otherwise, in bfloat16 by as much as g.
        each = weighted(predicted, predicted.detach(), LIMITS[settings.limit](g), t, log_variance)
        return each.mean(), {"consistency": each.detach().mean(), "tangent": g.square().mean().sqrt()}

    def _jump(self, student: Network, latents: Tensor, generator: Generator) -> Tensor:
        """Return the clean samples that the student jumps to, a share of them from pure noise."""
        settings, count = self.settings, len(latents)
        t = self._angles(count, settings.angle_mean, settings.angle_std, generator)
        last = torch.rand(count, generator=generator) < settings.max_time_probability
        t = torch.where(last.to(self.device), MAX_ANGLE, t)
        return consistent(student, noised(latents, self._noise(latents, generator), t), t)

    def _logits(self, latents: Tensor, batch: Batch, generator: Generator) -> Tensor:
        return self.module.heads(self._seen(latents, batch, generator))  # type: ignore[no-any-return]

    def _seen(self, latents: Tensor, batch: Batch, generator: Generator) -> list[Tensor]:
        """Return what the heads read of latents: the teacher's tokens at a level drawn for each."""
        settings = self.settings
        t = self._angles(len(latents), settings.discriminator_mean, settings.discriminator_std, generator)
        x = noised(latents, self._noise(latents, generator), t)
        return tapped(self.teacher, (batch.embeds, batch.mask), x, t, self.taps)

    def _discriminator(self, batch: Batch, guidance: Tensor, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            student = network_of(self.student, (batch.embeds, batch.mask), guidance)
            jumped = self._jump(student, batch.latents, generator)
            fakes = [self._seen(jumped, batch, generator)]
            real = self._seen(batch.latents, batch, generator)
            if self.settings.misaligned:
                fakes.append(self._seen(batch.latents.roll(1, 0), batch, generator))
        on_real, on_fakes = self.module.heads(real), [self.module.heads(fake) for fake in fakes]
        hinge = hinge_loss(on_real, torch.cat(on_fakes))
        logged = {"hinge": hinge.detach(), "real": on_real.detach().mean(), "fake": on_fakes[0].detach().mean()}
        if not self.settings.gradient_penalty:
            return hinge, logged
        penalty = gradient_penalty(self.module.heads, real)
        return hinge + self.settings.gradient_penalty * penalty, {**logged, "penalty": penalty.detach()}

    def _matching(self, student: Network, batch: Batch, guidance: Tensor, generator: Generator) -> Tensor:
        text = (batch.embeds, batch.mask)
        x0 = consistent(student, *self._begun(batch, guidance, generator))
        teacher, critic = guided(self.teacher, text, self._null(text), guidance), network_of(self._critic_model, text)
        return student_loss(x0, self._noise(x0, generator), self._levels(len(x0), generator), teacher, critic)

    def _critic(self, batch: Batch, guidance: Tensor, generator: Generator) -> Tensor:
        text = (batch.embeds, batch.mask)
        with torch.no_grad():
            student = network_of(self.student, text, guidance)
            x0 = consistent(student, *self._begun(batch, guidance, generator))
        critic = network_of(self._critic_model, text)
        return critic_loss(x0, self._noise(x0, generator), self._levels(len(x0), generator), critic)

    def _begun(self, batch: Batch, guidance: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return states and angles as the student meets them in a run: pure noise, or what it drew, noised again."""
        count, share = len(batch.latents), self.settings.max_time_probability
        # Rounded by chance, so that the share holds over batches of any size.
        first = int(count * share + random.Random(generator.initial_seed()).random())
        x = self._noise(batch.latents, generator)
        t = torch.full((count,), MAX_ANGLE, device=self.device)
        if first == count:
            return x, t
        text = (batch.embeds[first:], batch.mask[first:])
        with torch.no_grad():
            once = consistent(network_of(self.student, text, guidance[first:]), x[first:], t[first:])
        angles = draw_resumed(count - first, generator).to(self.device)
        resumed = noised(once, self._noise(once, generator), angles)
        return torch.cat([x[:first], resumed]), torch.cat([t[:first], angles])

    def _levels(self, count: int, generator: Generator) -> Tensor:
        return draw_levels(count, self.origin.shift, generator).to(self.device)

    @property
    def _critic_model(self) -> LinearDiT:
        model = self.module.critic
        assert isinstance(model, LinearDiT)  # there is one wherever it is asked for
        return model

    def _null(self, text: Text) -> Text:
        """The unconditional text for every row of `text`, padded to its length."""
        null, (embeds, mask) = self.origin.batches.null.to(text[0]), text
        kept = min(len(null), embeds.shape[1])
        empty, seen = torch.zeros_like(embeds), torch.zeros_like(mask)
        empty[:, :kept] = null[:kept]
        seen[:, :kept] = 1
        return empty, seen

    def _angles(self, count: int, mean: float, std: float, generator: Generator) -> Tensor:
        return draw_angles(count, mean, std, generator).to(self.device)

    def _noise(self, like: Tensor, generator: Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(self.device)

    def evaluate(self) -> Mapping[str, float]:
        """How far one step lands from where the teacher's many steps do, on texts kept apart.

        Distribution matching finds pictures of its own, so under it the figure says nothing of their quality.
        """
        return self.watch.evaluate(self._null)

    def preview(self) -> Image.Image | None:
        """The preview prompts in one step, and below each row in two."""
        return self.watch.preview()

    def export(self, folder: Path) -> None:
        """Write the student with its teacher's encoders, as SANA-Sprint models are published."""
        write(self.student, self.settings, folder)


def _sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Return the sum of weighted losses, at least one."""
    return torch.stack([weight * loss for weight, loss in terms]).sum()
