"""The three losses of a distillation, each as its players meet it; their formulas are in the modules of their names.

Shapes: B batch, C latent channels, h w latent size.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from sana.flow.path import SIGMA_DATA, sigma_from_angle
from sana.flow.schedules import MAX_ANGLE
from sana.training.objectives.sprint.adversarial import generator_loss, gradient_penalty, hinge_loss
from sana.training.objectives.sprint.consistency import LIMITS, tangent, weighted
from sana.training.objectives.sprint.matching import critic_loss, draw_levels, draw_resumed, student_loss
from sana.training.objectives.sprint.networks import Backbone, guided, network_of, tapped
from sana.training.objectives.sprint.players import Given, Players, Told
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.trigflow import DERIVATIVES, Network, consistent, noised


class ConsistencyLoss:
    """The student's jumps must end where those from a little farther along the teacher's path do."""

    def __init__(self, settings: SprintSettings, players: Players, teacher: Backbone, student: Backbone) -> None:
        """Nothing is computed yet."""
        self.settings, self.players = settings, players
        self.teacher, self.student = teacher, student

    def of_generator(self, student: Network, given: Given) -> Told:
        """The loss, and the size of its tangent."""
        settings, model = self.settings, self.student.transformer
        t = given.angles(settings.angle_mean, settings.angle_std)
        x = noised(given.latents, given.noise(given.latents), t)
        with torch.no_grad():
            drift = SIGMA_DATA * guided(self.teacher, given.under, given.null, given.guidance)(x, t)
        share = min(1.0, given.step / settings.warmup_steps)
        _, g = tangent(student, x, t, drift, share, derivative=DERIVATIVES[settings.derivative])
        embedded = model.modulation(sigma_from_angle(t), given.guidance * model.config.guidance_embeds_scale)
        # The weight must not train the embedding of time: its slope there is a thousand times that of the jump.
        log_variance = self.players.log_variance(embedded.embedded_BD.detach())[:, 0].float()
        predicted = student(x, t)
        # Its own value as the constant: the derivative's pass rounds otherwise, in bfloat16 by as much as g.
        loss = weighted(predicted, predicted.detach(), LIMITS[settings.limit](g), t, log_variance).mean()
        return loss, {"consistency": loss.detach(), "tangent": g.square().mean().sqrt()}


class AdversarialLoss:
    """Heads on the frozen teacher tell the student's jumps from true latents (LADD)."""

    def __init__(self, settings: SprintSettings, players: Players, teacher: Backbone, taps: Sequence[int]) -> None:
        """The heads read the blocks `taps` of the teacher."""
        self.settings, self.players, self.teacher, self.taps = settings, players, teacher, taps

    def of_generator(self, student: Network, given: Given) -> Told:
        """Minus the mean logit of the student's jumps."""
        loss = generator_loss(self.players.heads(self._seen(self.jump(student, given), given)))
        return loss, {"adversarial": loss.detach()}

    def of_discriminator(self, student: Network, given: Given) -> Told:
        """The hinge loss, with its penalty, and the mean logits of both kinds."""
        with torch.no_grad():
            fakes = [self._seen(self.jump(student, given), given)]
            real = self._seen(given.latents, given)
            if self.settings.misaligned:
                fakes.append(self._seen(given.latents.roll(1, 0), given))
        heads = self.players.heads
        on_real, on_fakes = heads(real), [heads(fake) for fake in fakes]
        if len(given.latents) > 1:
            hinge = hinge_loss(on_real, torch.cat(on_fakes))
        else:
            # A lone sample, as a dataset's last batch may have, has no neighbour: what was rolled is true. It goes
            # through the heads all the same, for processes that share weights gather them equally often.
            hinge = hinge_loss(on_real, on_fakes[0]) + 0 * torch.cat(on_fakes).sum()
        logged = {"hinge": hinge.detach(), "real": on_real.detach().mean(), "fake": on_fakes[0].detach().mean()}
        if not self.settings.gradient_penalty:
            return hinge, logged
        penalty = gradient_penalty(heads, real)
        return hinge + self.settings.gradient_penalty * penalty, {**logged, "penalty": penalty.detach()}

    def jump(self, student: Network, given: Given) -> Tensor:
        """Return the clean samples that the student jumps to, a share of them from pure noise."""
        t = given.angles(self.settings.angle_mean, self.settings.angle_std)
        last = torch.rand(len(t), generator=given.generator) < self.settings.max_time_probability
        t = torch.where(last.to(t.device), MAX_ANGLE, t)
        return consistent(student, noised(given.latents, given.noise(given.latents), t), t)

    def _seen(self, latents: Tensor, given: Given) -> list[Tensor]:
        """Return what the heads read of latents: the teacher's tokens at a level drawn for each."""
        t = given.angles(self.settings.discriminator_mean, self.settings.discriminator_std)
        return tapped(self.teacher, given.under, noised(latents, given.noise(latents), t), t, self.taps)


class MatchingLoss:
    """What the student draws moves to where the teacher finds it more likely than the critic does."""

    def __init__(
        self,
        settings: SprintSettings,
        teacher: Backbone,
        student: Backbone,
        critic: Backbone,
        shift: float,
        *,
        split: bool = False,
    ) -> None:
        """Samples are compared at even levels under `shift`; `split` says that processes share the weights."""
        self.settings, self.shift, self.split = settings, shift, split
        self.teacher, self.student, self.critic = teacher, student, critic

    def of_generator(self, student: Network, given: Given) -> Told:
        """Half the mean squared slope, as a value; what counts is its gradient."""
        x0 = consistent(student, *self.begun(given))
        teacher = guided(self.teacher, given.under, given.null, given.guidance)
        loss = student_loss(x0, given.noise(x0), self._levels(given), teacher, network_of(self.critic, given.under))
        return loss, {"matching": loss.detach()}

    def of_discriminator(self, student: Network, given: Given) -> Told:
        """The flow-matching loss of the critic on what the student draws."""
        with torch.no_grad():
            x0 = consistent(student, *self.begun(given))
        loss = critic_loss(x0, given.noise(x0), self._levels(given), network_of(self.critic, given.under))
        return loss, {"critic": loss.detach()}

    @torch.no_grad()
    def begun(self, given: Given) -> tuple[Tensor, Tensor]:
        """Return states and angles as the student meets them in a run: pure noise, or what it drew, noised again."""
        count, share = len(given.latents), self.settings.max_time_probability
        # Rounded by chance, so that the share holds over batches of any size.
        first = int(count * share + random.Random(given.generator.initial_seed()).random())
        x = given.noise(given.latents)
        t = torch.full((count,), MAX_ANGLE, device=x.device)
        if first == count:
            if self.split and share < 1:
                # Another process may have some to draw, and all gather split weights equally often.
                consistent(network_of(self.student, given.under.since(-1), given.guidance[-1:]), x[-1:], t[-1:])
            return x, t
        student = network_of(self.student, given.under.since(first), given.guidance[first:])
        once = consistent(student, x[first:], t[first:])
        angles = draw_resumed(count - first, given.generator).to(x.device)
        resumed = noised(once, given.noise(once), angles)
        return torch.cat([x[:first], resumed]), torch.cat([t[:first], angles])

    def _levels(self, given: Given) -> Tensor:
        return draw_levels(len(given.latents), self.shift, given.generator).to(given.latents.device)
