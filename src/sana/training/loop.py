"""The one training loop: any objective, exact resume, averaged weights, a log that can be plotted.

Every batch, noise draw and dropout is a function of (seed, draw) alone, so a run that was killed and resumed goes
through the same numbers as one that was not. Several processes take turns at the micro-batches and average their
gradients, or split the weights; the first of them writes the files.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sana.checkpoints.storage import naming_foreign
from sana.errors import InvalidInput, NonFinite, NotWritten, SanaError
from sana.training import refusals
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.folders import Lock, check_changes, check_data, check_models
from sana.training.objectives.base import LookLeft, Objective, Resumable
from sana.training.players import Players, check_players, holding, use_checkpointing
from sana.training.processes import Processes
from sana.training.records import Records
from sana.training.state import State, load_best, load_state, save_best, save_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What one optimisation step reports; `figures` holds held-out figures when they were computed at this step.

    `stopping` says that a process was asked to stop: this is the last step, and it is saved.
    """

    step: int
    steps: int
    loss: float
    parts: dict[str, float]
    seconds: float
    samples: int = 0
    figures: dict[str, float] | None = None
    stopping: bool = False


class Trainer:
    """Trains an `Objective` in `folder`, which holds the states, `metrics.jsonl`, `report.html`, previews, the best
    weights and, at the end, the export.
    """

    def __init__(
        self,
        objective: Objective,
        run: RunSettings,
        optimizer: OptimizerSettings,
        folder: Path,
        discriminator_optimizer: OptimizerSettings | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        rebuild: Callable[[], Objective] | None = None,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """Build optimisers and average, and take up the newest state in `folder` if there is one.

        `discriminator_optimizer` is for every turn but the first; without it all have the same settings. `settings` is
        the objective's table, and `models` what tells the weights that it names from others, both kept to tell what
        changed. `rebuild` makes the objective again, whole, to export weights
        that are split over processes.
        Errors: InvalidInput for contradictory settings, a folder in use, or one of another run.
        """
        check_players(objective, run, optimizer, discriminator_optimizer)
        if run.shard and rebuild is None:
            raise InvalidInput("run.shard needs a way to build the objective again for the export: give `rebuild`.")
        self.objective, self.run, self.folder, self._rebuild = objective, run, folder, rebuild
        self._tables = {
            "objective": objective.name,
            "run": asdict(run),
            "optimizer": asdict(optimizer),
            "discriminator_optimizer": discriminator_optimizer and asdict(discriminator_optimizer),
            objective.name: settings,
        }
        if run.checkpointing:
            use_checkpointing(objective)
        self.processes = Processes(objective, run, next(objective.module.parameters()).device)
        self.draws_per_step = run.accumulate * self.processes.world
        self.samples = run.batch_size * self.draws_per_step
        self.players = Players(objective, run, optimizer, discriminator_optimizer, self.samples)
        self.average = self.players.average
        self.data: dict[str, dict[str, Any]] = {
            f"{objective.name}.{name}": asdict(content) for name, content in objective.data.items()
        }
        self.models = dict(models or {})
        self.step, self.draws, self.refused = 0, 0, 0
        self._look_is_due = True
        self.best: dict[str, Any] = {}
        self._refusals: list[dict[str, Any]] = []
        self._lock = Lock(folder) if self.processes.is_first else None
        try:
            with self.processes.first_goes_first():
                self._take_up()
                self._records = Records(folder, self._tables) if self.processes.is_first else None
        except BaseException:
            self.close()
            raise

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.processes.is_first

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken, and the look after the last one."""
        return self.step >= self.run.steps and not self._look_is_due

    def close(self) -> None:
        """Let other processes have the folder; `steps` does it at its end."""
        if self._lock is not None:
            self._lock.release()

    def _facts(self) -> dict[str, Any]:
        return {
            "objective": self.objective.name,
            "refused": self.refused,
            "seed": self.run.seed,
            "batch_size": self.run.batch_size,
            "optimizer": self.players.settings[self.objective.turns[0]].name,
            "draws": self.draws,
            "draws_per_step": self.draws_per_step,
            "best": self.best,
            "look_is_due": self._look_is_due,
            "data": self.data,
            "models": self.models,
            "settings": self._tables,
        }

    def _take_up(self) -> None:
        state = load_state(self.folder / "states", tidy=self.processes.is_first)
        if state is None:
            return
        facts, saved = self._facts(), state.facts
        if self.processes.is_first:
            check_changes(self.folder, saved.get("settings", {}), self._tables)
            check_data(self.folder, saved.get("data", {}), self.data)
            check_models(self.folder, saved.get("models", {}), self.models)
        for key in ("objective", "seed", "batch_size", "optimizer"):
            if saved.get(key) != facts[key]:
                raise InvalidInput(
                    f"The run in '{self.folder}' was started with {key} {saved.get(key)!r}, not {facts[key]!r}; "
                    "use another folder, or the same setting."
                )
        if saved.get("draws_per_step", self.draws_per_step) != self.draws_per_step:
            logger.warning(
                "a step of '%s' was %d micro-batches (run.accumulate x processes) and is %d now: the order of the "
                "data stays, the numbers do not",
                *(self.folder, saved["draws_per_step"], self.draws_per_step),
            )
        try:
            self.players.restore(state.parts)
        except (KeyError, RuntimeError, ValueError) as error:
            text = f"The run in '{self.folder}' trained another model than this recipe describes"
            raise InvalidInput(f"{text}; use another folder, or the same settings.") from error
        self.step, self.refused = state.step, int(saved.get("refused", 0))
        self.draws = int(saved.get("draws", self.step * self.draws_per_step))
        self.best = dict(saved.get("best", {}))
        self._look_is_due = bool(saved.get("look_is_due", False))
        if isinstance(self.objective, Resumable):
            self.objective.resume(self.step, self.draws)
        logger.info("resumed '%s' at step %d", self.folder, self.step)

    def save(self) -> None:
        """Write a state now; all processes of weights that are split must call it.

        Errors: OSError naming the file that could not be written; the states before are as they were.
        """
        if self.processes.is_first or self.run.shard:
            parts = self.players.parts()
            if self.processes.is_first:
                save_state(self.folder / "states", State(step=self.step, parts=parts, facts=self._facts()))

    def _save_now(self, *, last: bool) -> None:
        """Save; where the disk refuses, go on from the last good state, unless there is no more to do."""
        try:
            self.save()
        except OSError as error:
            told = f"tep {self.step} could not be saved ({error.filename}: {error.strerror})"
            if last:
                raise NotWritten(f"S{told}. The state before is as it was: make room, and run it again.") from error
            logger.warning("s%s; the training goes on, the state before is as it was", told)

    def _update(self, stop: Callable[[], bool]) -> tuple[float, dict[str, float], bool] | None:
        """One optimisation step over `accumulate` micro-batches; a non-finite one is refused and counted.

        Returns None when it was given up, since alone there is no reason to finish a step before a stop.
        """
        run, world, rank = self.run, self.processes.world, self.processes.rank
        self.objective.module.train()
        turn = self.players.take_turn(self.step)
        self.processes.prepare(turn)
        total, parts = 0.0, {}
        for part in range(run.accumulate):
            if part and world == 1 and stop():
                self.players.drop_gradients(turn)
                return None
            draw = self.draws + part * world + rank
            loss, logged = self.processes.loss(draw, turn, is_last=part == run.accumulate - 1)
            total += float(loss) / run.accumulate
            parts = {name: float(value) for name, value in logged.items()}
        norm = self.players.norm(turn)
        parts["gradient_norm"] = float(norm)
        mine = [float(other == rank and not math.isfinite(total)) for other in range(world)]
        bad = not math.isfinite(parts["gradient_norm"])
        loss_sum, all_bad, stops, *broken = self.processes.total(total, bad, stop(), *mine)
        mean = loss_sum / world
        if math.isfinite(mean) and not all_bad:
            self.players.move(turn, self.step, norm)
        else:
            self._refuse(turn, mean, parts, [other for other, flag in enumerate(broken) if flag])
        self.draws += self.draws_per_step
        return mean, parts, bool(stops)

    def _refuse(self, turn: str, loss: float, parts: dict[str, float], ranks: list[int]) -> None:
        """Count a step that is not taken, on all processes alike, and stop the run after too many."""
        self.refused += 1
        draws = list(range(self.draws, self.draws + self.draws_per_step))
        described = refusals.describe(
            self.step, turn, draws, self.run.seed, loss, parts, self.players.owned[turn], ranks
        )
        self._refusals = [*self._refusals, described][-self.run.max_non_finite - 1 :]
        self.players.drop_gradients(turn)
        if self.refused <= self.run.max_non_finite:
            if self.processes.is_first:
                told = f"refused so far: {self.refused}; more than {self.run.max_non_finite} stop the run"
                logger.warning("step %d is not taken: its loss or gradient is not finite (%s)", self.step + 1, told)
            return
        where = ""
        if self.processes.is_first:
            try:
                where = f" What is known about them is in {refusals.write(self.folder, self._refusals)}."
            except OSError as error:
                logger.warning("the report on non-finite steps is not written (%s)", error.strerror)
        self._save_now(last=False)
        text = f"{self.refused} steps had a non-finite loss or gradient; lower the learning rate. The run is saved."
        raise NonFinite(text + where)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the module for the length of a `with` block."""
        self.average.swap()
        self.processes.forget()
        self.objective.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.processes.forget()
            self.average.swap()

    def _look(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Measure, draw a picture, and keep the weights if they are the best so far; all processes take part.

        Returns None when it was left because one of them was asked to stop; it is due still.
        """

        def check() -> None:
            if self.processes.total(stop())[0]:
                raise LookLeft

        with contextlib.suppress(LookLeft), self.averaged():
            check()
            figures = {name: float(value) for name, value in self.processes.look("evaluate", check).items()}
            check()
            picture = self.processes.look("preview", check)
            check()
            if self._records is not None and picture is not None:
                self._records.keep_preview(self.step, picture)
            self._keep_best(figures)
            self._look_is_due = False
            return figures
        return None

    def _make_up(self, stop: Callable[[], bool]) -> bool:
        """Take the look before the first step, or the one that a stop had no time for; tell whether to go on."""
        figures = self._look(stop)
        if figures is None:
            self._save_now(last=True)
            return False
        self._record(
            TrainStep(step=self.step, steps=self.run.steps, loss=math.nan, parts={}, seconds=0, figures=figures)
        )
        if self.step >= self.run.steps:
            self._save_now(last=False)
        return True

    def _keep_best(self, figures: Mapping[str, float]) -> None:
        name, figure = next(iter(figures.items()), ("", math.nan))
        known = float(self.best.get("figure", math.nan))
        is_better = figure < known if self.objective.better == "lower" else figure > known
        is_new = math.isfinite(figure) and (is_better or math.isnan(known))
        if not self.processes.total(is_new and self.is_first)[0]:  # figures of others may differ in their last bit
            return
        best, is_kept = {"step": self.step, "name": name, "figure": figure}, True
        weights = self.players.weights()
        if self.processes.is_first:
            try:
                save_best(self.folder / "best", State(step=self.step, parts={"module": weights}, facts=best))
            except OSError as error:
                is_kept = False
                logger.warning("the best weights, of step %d, are not kept (%s)", self.step, error.strerror)
        if not self.processes.total(not is_kept)[0]:
            self.best = best

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[TrainStep]:
        """Train to the end, yielding one report a step; closing the generator saves first.

        `stop` is asked in every step and during looks; when it says yes in any process, all end after the same step,
        saved. A look that is due then is taken when the run goes on.
        Errors: NonFinite after too many refused steps; ProcessLost; NotWritten when the last state cannot be written.
        """
        if self._lock is not None:
            self._lock.take()
        try:
            with self.processes.watched():
                yield from self._steps(stop)
        except GeneratorExit:
            self._save_now(last=True)
            raise
        finally:
            if self._records is not None:
                self._records.close(self.best)
            self.close()

    def _steps(self, stop: Callable[[], bool]) -> Iterator[TrainStep]:
        run, is_stopping = self.run, False
        if self._look_is_due and not self._make_up(stop):
            return
        while self.step < run.steps and not is_stopping:
            began = time.perf_counter()
            done = self._update(stop)
            if done is None:
                self._save_now(last=True)
                return
            loss, parts, is_stopping = done
            self.step += 1
            last = self.step == run.steps
            self._look_is_due = last or self.step % run.evaluate_every == 0
            # Whoever asks for a stop may soon kill, and a look takes minutes: saving comes first.
            figures = self._look(stop) if self._look_is_due and not is_stopping else None
            is_stopping = is_stopping or self._look_is_due
            report = TrainStep(
                step=self.step,
                steps=run.steps,
                loss=loss,
                parts=parts,
                seconds=time.perf_counter() - began,
                samples=self.samples,
                figures=figures,
                stopping=is_stopping,
            )
            self._record(report)
            if last or is_stopping or self.step % run.save_every == 0:
                self._save_now(last=last or is_stopping)
            yield report

    def _record(self, report: TrainStep) -> None:
        if self._records is not None and (report.figures is not None or report.step % self.run.log_every == 0):
            line: dict[str, Any] = {"loss": report.loss} if report.parts else {}
            line = {"step": report.step, **line, **report.parts, "seconds": report.seconds}
            if report.samples:
                line["samples"] = report.samples
            if report.figures is not None:
                line["held_out"] = report.figures
            self._records.write(line, self.best)

    def export(self, folder: Path) -> None:
        """Write the averaged weights, of the last step or of the best one, through the objective.

        Errors: NotWritten when the disk refuses; the states are as they were.
        """
        objective, weights = self.objective, None
        if self.run.shard:
            with self.averaged():
                weights = {name: tensor.cpu() for name, tensor in self.players.weights().items()}
        if not self.processes.is_first:
            return
        if self.run.export == "best":
            best = load_best(self.folder / "best")
            weights = dict(best.parts["module"])
            if best.step == 0:
                logger.warning("no step was better than the start, so the export is as before the training")
        if self.run.shard:
            assert self._rebuild is not None
            objective = self._rebuild()
        try:
            with self.averaged() if weights is None else holding(objective.module, weights), naming_foreign(folder):
                objective.export(folder)
        except OSError as error:
            if isinstance(error, SanaError):
                raise
            where = f"{error.filename or folder}: {error.strerror or error}"
            text = f"The export of '{self.folder}' could not be written ({where}). Step {self.step} is saved"
            raise NotWritten(f"{text}: make room, and run it again to export it.") from error
