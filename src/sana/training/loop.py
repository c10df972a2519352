"""The one training loop: any objective, exact resume, averaged weights, a log that can be plotted.

Every batch, noise draw and dropout is a function of (seed, step) alone, so a run that was killed and resumed goes
through the same numbers as one that was not. Where a process group exists (`torchrun`), its processes take turns at the
micro-batches and average their gradients; the first of them writes the files.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sana.checkpoints.storage import publish
from sana.errors import InvalidInput, NonFinite
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.curve import append_line, draw_curve
from sana.training.objectives.base import Objective
from sana.training.optimizers import Optimizers, rate
from sana.training.state import Average, State, load_state, save_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What one optimisation step reports; `figures` holds held-out figures when they were computed at this step."""

    step: int
    steps: int
    loss: float
    parts: dict[str, float]
    seconds: float
    figures: dict[str, float] | None = None


def autocast(run: RunSettings, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the settings and the device want it."""
    native = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    wanted = run.precision == "bf16" or (run.precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


class Trainer:
    """Trains an `Objective` in `folder`, which holds the states, `metrics.jsonl`, `loss.png`, previews and, at the
    end, the export.
    """

    def __init__(
        self,
        objective: Objective,
        run: RunSettings,
        optimizer: OptimizerSettings,
        folder: Path,
        discriminator_optimizer: OptimizerSettings | None = None,
    ) -> None:
        """Build optimisers and average, and take up the newest state in `folder` if there is one.

        `discriminator_optimizer` is for every turn but the first; without it all have the same settings.
        """
        if discriminator_optimizer is not None and len(objective.turns) == 1:
            raise InvalidInput(f"[discriminator_optimizer] has no effect on '{objective.name}', which has one player.")
        self.objective, self.run, self.folder = objective, run, folder
        self.device = next(objective.module.parameters()).device
        first, *others = objective.turns
        self.settings = {first: optimizer, **dict.fromkeys(others, discriminator_optimizer or optimizer)}
        self.owned = {turn: dict(objective.parameters_of(turn)) for turn in objective.turns}
        self.optimizers = {turn: Optimizers(self.owned[turn].items(), self.settings[turn]) for turn in objective.turns}
        self.average = Average(self.owned[first], run.ema)
        self.step = 0
        self.refused = 0
        grouped = distributed.is_available() and distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        self._take_up()

    def _facts(self) -> dict[str, Any]:
        return {
            "objective": self.objective.name,
            "refused": self.refused,
            "seed": self.run.seed,
            "batch_size": self.run.batch_size,
            "optimizer": self.settings[self.objective.turns[0]].name,
        }

    def _take_up(self) -> None:
        state = load_state(self.folder / "states")
        if state is None:
            return
        for key in ("objective", "seed", "batch_size", "optimizer"):
            if state.facts.get(key) != self._facts()[key]:
                raise InvalidInput(
                    f"The run in '{self.folder}' was started with {key} {state.facts.get(key)!r}, not "
                    f"{self._facts()[key]!r}; use another folder, or the same setting."
                )
        try:
            self.objective.module.load_state_dict(dict(state.parts["module"]), strict=True)
            for turn, optimizers in self.optimizers.items():
                optimizers.load(dict(state.parts[self._part(turn)]))
            self.average.values = {name: state.parts["ema"][name].clone() for name in self.average.values}
        except (KeyError, RuntimeError) as error:
            text = f"The run in '{self.folder}' trained another model than this recipe describes"
            raise InvalidInput(f"{text}; use another folder, or the same settings.") from error
        self.step, self.refused = state.step, int(state.facts.get("refused", 0))
        logger.info("resumed '%s' at step %d", self.folder, self.step)

    def _part(self, turn: str) -> str:
        """The name of an optimiser's part of a state."""
        return "optimizer" if turn == self.objective.turns[0] else f"optimizer-{turn}"

    def _take_turn(self) -> str:
        """Let only the parameters of the present step's turn have gradients, and return its name."""
        turns = self.objective.turns
        turn = turns[self.step % len(turns)]
        if len(turns) > 1:
            for p in self.objective.module.parameters():
                p.requires_grad_(False)
            for p in self.owned[turn].values():
                p.requires_grad_(True)
        return turn

    def save(self) -> None:
        """Write a state now."""
        if self.rank != 0:
            return
        parts = {
            "module": self.objective.module.state_dict(),
            "ema": self.average.values,
            **{self._part(turn): optimizers.tensors() for turn, optimizers in self.optimizers.items()},
        }
        save_state(self.folder / "states", State(step=self.step, parts=parts, facts=self._facts()))

    def _update(self) -> tuple[float, dict[str, float]]:
        """One optimisation step over `accumulate` micro-batches; a non-finite one is refused and counted."""
        self.objective.module.train()
        turn = self._take_turn()
        total, parts = 0.0, {}
        for part in range(self.run.accumulate):
            with autocast(self.run, self.device):
                draw = (self.step * self.run.accumulate + part) * self.world + self.rank
                loss, logged = self.objective.loss(draw, turn)
            (loss / self.run.accumulate).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / self.run.accumulate
            parts = {name: float(value) for name, value in logged.items()}
        trainable = [p for p in self.owned[turn].values() if p.grad is not None]
        total = self._average(total, trainable)
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, self.settings[turn].clip))
        parts["gradient_norm"] = norm
        if math.isfinite(total) and math.isfinite(norm):
            self.optimizers[turn].step(rate(self.step, self.run.steps, self.settings[turn]))
            if turn == self.objective.turns[0]:
                self.average.update(self.step // len(self.objective.turns))
        else:
            self.refused += 1
            for p in trainable:
                p.grad = None
            if self.refused > self.run.max_non_finite:
                self.save()
                raise NonFinite(
                    f"{self.refused} steps had a non-finite loss or gradient; lower the learning rate. "
                    "The run is saved."
                )
        return total, parts

    def _average(self, loss: float, parameters: list[torch.nn.Parameter]) -> float:
        """Average gradients over the processes, in place, and return the averaged loss."""
        if self.world == 1:
            return loss
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor([loss])])
        distributed.all_reduce(flat)
        flat /= self.world
        for gradient, piece in zip(gradients, torch.split(flat[:-1], [g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))
        return float(flat[-1])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the module for the length of a `with` block."""
        if self.run.ema:
            self.average.swap()
        self.objective.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if self.run.ema:
                self.average.swap()

    def _look(self) -> dict[str, float] | None:
        if self.rank != 0:
            return None
        with self.averaged():
            figures = {name: float(value) for name, value in self.objective.evaluate().items()}
            picture = self.objective.preview()
        if picture is not None:
            (self.folder / "previews").mkdir(exist_ok=True)
            picture.save(self.folder / "previews" / f"{self.step:08d}.png")
        return figures

    def steps(self) -> Iterator[TrainStep]:
        """Train to the end, yielding one report a step; closing the generator saves first."""
        try:
            while self.step < self.run.steps:
                began = time.perf_counter()
                loss, parts = self._update()
                self.step += 1
                last = self.step == self.run.steps
                figures = self._look() if last or self.step % self.run.evaluate_every == 0 else None
                report = TrainStep(
                    step=self.step,
                    steps=self.run.steps,
                    loss=loss,
                    parts=parts,
                    seconds=time.perf_counter() - began,
                    figures=figures,
                )
                if figures is not None or self.step % self.run.log_every == 0:
                    self._log(report)
                if last or self.step % self.run.save_every == 0:
                    self.save()
                yield report
        except GeneratorExit:
            self.save()
            raise

    def _log(self, report: TrainStep) -> None:
        if self.rank != 0:
            return
        line: dict[str, Any] = {"step": report.step, "loss": report.loss, **report.parts, "seconds": report.seconds}
        if report.figures is not None:
            line["held_out"] = report.figures
        log = self.folder / "metrics.jsonl"
        try:
            append_line(log, line)
            if report.figures is not None:
                picture = draw_curve(log, self.objective.name)
                publish(self.folder / "loss.png", lambda beside: picture.save(beside, "PNG"))
        except OSError as error:  # the weights matter, not the log
            logger.warning("step %d is not in the log (%s: %s)", report.step, error.filename, error.strerror)

    def export(self, folder: Path) -> None:
        """Write the averaged weights through the objective."""
        if self.rank != 0:
            return
        with self.averaged():
            self.objective.export(folder)
