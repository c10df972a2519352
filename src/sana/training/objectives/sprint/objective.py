"""SANA-Sprint: a flow model distilled into one that draws in one to four steps (arXiv 2503.09641).

Two players alternate. The generator is the student, under the three losses of `losses`, each with its weight. The
discriminator is a head per tapped block of the frozen teacher, for the adversarial one, and a flow model of what the
student draws, the critic, for distribution matching.

Shapes: B batch, C latent channels, h w latent size; x is a TrigFlow state divided by sigma_d, angles t are [B].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from sana.data.identity import Content
from sana.models.linear_dit import LinearDiT
from sana.nn.placement import placed_like
from sana.training import exports
from sana.training.batches import generator_of
from sana.training.config import RunSettings, named, restated
from sana.training.objectives.base import Check, unasked
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.sprint.losses import AdversarialLoss, ConsistencyLoss, MatchingLoss
from sana.training.objectives.sprint.networks import Condition, network_of, taps_of
from sana.training.objectives.sprint.players import Given, Loss, Players, TwoSidedLoss
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.students import check_teacher, take_on
from sana.training.objectives.sprint.watching import Watch, write
from sana.training.origins import ModelOrigin
from sana.training.starting import StartModel


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
        if settings.train == "controlnet":
            drawn |= {"train": "controlnet", "control": settings.control}
        with named("flow_matching", "sprint"):
            flow = FlowMatchingSettings(
                start=settings.teacher,
                data=settings.data,
                features=settings.features,
                dropout=0.0,
                prompts=settings.prompts,
                **drawn,
            )
            with restated(lambda words: words.replace("flow_matching.start", "sprint.teacher")):
                self.origin = (opened or ModelOrigin)(flow, run, device)
        whole = self.origin.start.transformer(torch.float32, {}).eval().requires_grad_(False)
        check_teacher(whole, settings.teacher)
        config = whole.config
        self.taps = settings.taps or taps_of(config.num_layers)
        torch.manual_seed(run.seed)
        with named("flow_matching", "sprint"):
            taught = take_on(settings, run.seed, self.origin, whole)
        self.teacher, self.network, self.trainable, self.frozen = taught
        self.student = self.network.transformer
        critic = self.origin.start.transformer(torch.float32, {}) if settings.matching_weight else None
        learns, width = self.trainable.module, config.inner_dim
        players = Players(learns, critic, width, len(self.taps), settings.virtual_batch)
        self.module = placed_like(players, self.student.scale_shift_table)
        self.losses: list[tuple[float, Loss]] = []
        self.two_sided: list[TwoSidedLoss] = []
        self._take_up_losses(players, critic)
        if not self.two_sided:
            self.turns = ("generator",)
        self._since = (0, 0)
        self.watch = Watch(self.origin, self.teacher, self.network, settings.guidance)

    def _take_up_losses(self, players: Players, critic: LinearDiT | None) -> None:
        """Make those that the settings give a weight, and let learn what these need."""
        settings = self.settings
        if settings.consistency_weight:
            self.losses.append(
                (settings.consistency_weight, ConsistencyLoss(settings, players, self.teacher, self.network))
            )
        if settings.adversarial_weight:
            self.two_sided.append(AdversarialLoss(settings, players, self.teacher, self.taps))
            self.losses.append((settings.adversarial_weight, self.two_sided[-1]))
        if critic is not None:
            own = dataclasses.replace(self.teacher, transformer=critic)
            self.two_sided.append(
                MatchingLoss(settings, self.teacher, self.network, own, self.origin.shift, split=self.run.shard)
            )
            self.losses.append((settings.matching_weight, self.two_sided[-1]))
        self.module.heads.requires_grad_(bool(settings.adversarial_weight))
        self.module.log_variance.requires_grad_(bool(settings.consistency_weight))

    @property
    def data(self) -> Mapping[str, Content]:
        """The pictures."""
        return self.origin.content

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """The student and its log-variance, or the heads and the critic: those of the losses that there are."""
        is_second = turn == "discriminator"
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [(name, p) for name, p in named if name.startswith(("heads.", "critic.")) == is_second]

    def resume(self, step: int, draws: int) -> None:
        """See `Resumable`: the warm-up counts steps."""
        self._since = (step, draws)

    def loss(self, draw: int, turn: str = "generator") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw` for the player whose turn it is."""
        given = self.given(draw)
        with torch.set_grad_enabled(torch.is_grad_enabled() and turn == "generator"):
            student = network_of(self.network, given.under, given.guidance)
        if turn == "discriminator":
            told = [(1.0, loss.of_discriminator(student, given)) for loss in self.two_sided]
        else:
            told = [(weight, loss.of_generator(student, given)) for weight, loss in self.losses]
        total = torch.stack([weight * loss for weight, (loss, _) in told]).sum()
        return total, {name: figure for _, (_, logged) in told for name, figure in logged.items()}

    def given(self, draw: int) -> Given:
        """The data of micro-batch `draw`, and the noise that goes with them."""
        generator = generator_of(self.run.seed, draw)
        batch = self.origin.batches.batch(draw, generator)
        scales = torch.tensor(self.settings.guidance, dtype=torch.float32)
        chosen = torch.randint(len(scales), (len(batch.latents),), generator=generator)
        grouped = distributed.is_available() and distributed.is_initialized()
        draws_per_step = self.run.accumulate * (distributed.get_world_size() if grouped else 1)
        step, draws = self._since
        under = Condition(batch.embeds, batch.mask, batch.control)
        return Given(
            latents=batch.latents,
            under=under,
            null=self._null(under),
            guidance=scales[chosen].to(self.device),
            step=step + (draw - draws) // draws_per_step,
            generator=generator,
        )

    def _null(self, under: Condition) -> Condition:
        """The unconditional text for every row of `under`, padded to its length."""
        null = self.origin.batches.null.to(under.embeds)
        kept = min(len(null), under.embeds.shape[1])
        empty, seen = torch.zeros_like(under.embeds), torch.zeros_like(under.mask)
        empty[:, :kept] = null[:kept]
        seen[:, :kept] = 1
        return under._replace(embeds=empty, mask=seen)

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        """How far one step lands from where the teacher's many steps do, on texts kept apart.

        Distribution matching finds pictures of its own, so under it the figure says nothing of their quality.
        """
        return self.watch.evaluate(self._null, check)

    def preview(self, check: Check = unasked) -> Image.Image | None:
        """The preview prompts in one step, and below each row in two."""
        return self.watch.preview(check)

    def export(self, folder: Path) -> None:
        """Write the student with its teacher's encoders, as SANA-Sprint models are published, or what it learnt."""
        settings, run = self.settings, self.run
        if settings.train == "full":
            write(self.student, settings, folder)
            return
        facts = {
            "trained": settings.train,
            "teacher": settings.teacher,
            "steps": str(run.steps),
            "batch size": str(run.batch_size * run.accumulate),
            "data": str(settings.data.get("path", "the drawn world")),
            **({exports.CONTROL: self.origin.control.kind} if settings.train == "controlnet" else {}),
        }
        card = StartModel(settings.student, self.device).card
        trigger = str(settings.data.get("trigger", ""))
        exports.write(self.trainable, settings.student, card, facts, folder, trigger=trigger)
