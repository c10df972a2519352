"""`sana train`: recipes one after the other, each resumed if it was begun, skipped if it is finished."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.demo import demo, next_steps
from sana.apps.cli.names import tell_place
from sana.apps.cli.output import Terminal, duration
from sana.apps.cli.recipes import Stage, plan, split_overrides
from sana.errors import InvalidInput, NotWritten, SanaError

if TYPE_CHECKING:
    from sana.training.estimate import Estimate
    from sana.training.loop import Trainer, TrainStep

USAGE = "sana train RECIPE.toml [RECIPE.toml ...] [--TABLE.KEY VALUE] [options]"
DESCRIPTION = """\
Train from recipes, one after the other. Each is trained in runs/FOLDER/NAME,
after the recipe's folder and name, and exported to runs/FOLDER/NAME/export,
whose path is printed.

  sana train recipes/nano/*.toml             train the built-in model
  sana train my.toml --run.steps 100         change a setting of the recipe
  sana train --demo                          teach it palm trees, in two minutes
  sana train my.toml --dry-run               what memory and time it will need

A run that was stopped goes on where it was; a finished one is not trained again.
Ctrl-C saves and ends with exit code 130, SIGTERM and SIGUSR1 save and end with 75.
Several processes: accelerate launch -m sana.apps.cli train RECIPE.toml, or torchrun."""

FINISHED = "finished.json"
"""File in a run's folder that says that it was trained to the end and exported, and from which recipe."""


class Preempted(KeyboardInterrupt):
    """The system asked to stop; the run is saved and should be started again."""

    exit_code = 75


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the verb."""

    output: Annotated[str | None, Spelling(short="-o", value="FOLDER")] = None
    """Folder for the runs, instead of runs/FOLDER."""
    demo: bool = False
    """Teach the built-in model palm trees, from twelve pictures that come with it; about two minutes."""
    dry_run: bool = False
    """Tell what memory and time each recipe will need, from one batch; train nothing."""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Train every recipe that is not finished, and print where the exports are."""
    rest, overrides = split_overrides(words)
    recipes, given = arguments.read(rest, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Options(**arguments.take(Options, given))
    if options.demo and recipes:
        raise InvalidInput("`--demo` brings its own recipe; leave it out, or the other one.")
    if not recipes and not options.demo:
        raise InvalidInput("Which recipe? For example: sana train recipes/nano/*.toml, or sana train --demo")
    if options.demo:
        recipe, own = demo()
        recipes, overrides = [recipe], {**own, **overrides}
    stages = plan(recipes, overrides, options.output)
    if options.dry_run:
        return _tell_needs(stages, terminal)
    if os.environ.get("RANK", "0") != "0":  # the launchers of several processes number them so
        terminal.quiet, terminal.json, terminal.events = True, False, False
    done: list[dict[str, Any]] = []
    for folder in dict.fromkeys(place for stage in stages for place in (stage.folder.parent, stage.folder)):
        tell_place(folder, "the training goes", terminal)
    for stage in stages:
        began = time.perf_counter()
        if _is_finished(stage, terminal):
            terminal.say(f"{stage.name}: finished before")
        elif not _train(stage, terminal, shlex.join(["sana", "train", *words])):
            continue
        seconds = round(time.perf_counter() - began, 1)
        done.append({"name": stage.name, "folder": str(stage.folder), "export": str(stage.export), "seconds": seconds})
        terminal.draft = {"stages": list(done), "warnings": terminal.warnings}
        terminal.result(str(stage.export))
    if options.demo:
        for line in next_steps(stages[0].export):
            terminal.say(line)
    terminal.document(terminal.draft)
    return 0


def _tell_needs(stages: Sequence[Stage], terminal: Terminal) -> int:
    from sana.training.start import estimated

    exports = {Path(os.path.normpath(stage.export)): stage.recipe for stage in stages}
    told = []
    with tempfile.TemporaryDirectory() as place:
        for stage in stages:
            with stage.located():
                needs = estimated(stage.recipe, stage.folder, exports, Path(place))
            told.append(_needs_told(stage, needs, terminal))
    terminal.document({"stages": told, "warnings": terminal.warnings})
    return 0


def _needs_told(stage: Stage, needs: "Estimate", terminal: Terminal) -> dict[str, Any]:
    """Print what one stage needs, and return it."""
    assert needs.seconds is not None
    about = f"{'' if needs.rate is None else 'about '}{duration(needs.seconds)} for {stage.recipe.run.steps} steps"
    terminal.result(f"{stage.name}: {_gib(needs.total)} at most, beside the program itself; {about}")
    for kind, meaning in KINDS.items():
        if getattr(needs, kind):
            terminal.result(f"  {_gib(getattr(needs, kind)):>10}  {meaning}")
    if needs.rate is not None:
        terminal.result(_step_told(needs))
    seconds = {"step_seconds": needs.step_seconds, "least_step_seconds": needs.least_step_seconds}
    return {"name": stage.name, **dataclasses.asdict(needs), "total": needs.total, **seconds}


def _step_told(needs: "Estimate") -> str:
    from sana.training.estimate import SHARE

    assert needs.rate is not None
    assert needs.least_step_seconds is not None
    assert needs.step_seconds is not None
    return (
        f"  {needs.flop / 1e12:,.1f} TFLOP a step: at least {duration(needs.least_step_seconds)} by the rate of a bare"
        f" product here, {needs.rate / 1e12:.3g} TFLOP/s; about {duration(needs.step_seconds)} by {SHARE:.0%} of it,"
        " which training steps reach on a CPU"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _is_finished(stage: Stage, terminal: Terminal) -> bool:
    """Tell whether a stage was trained to the end; a longer recipe is trained on, other changes are only mentioned."""
    try:
        record = json.loads((stage.folder / FINISHED).read_text(encoding="utf-8"))
        steps, data = int(record["run"]["steps"]), dict(record.pop("data", {}))
        models, files = dict(record.pop("models", {})), list(record.pop("files", []))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    is_whole = stage.export.is_dir() and all((stage.export / name).is_file() for name in files)
    if not is_whole or steps < stage.recipe.run.steps:
        return False
    if record != stage.record():
        from sana.training.folders import changed_settings

        told = changed_settings(record, stage.record())
        terminal.warn(
            f"{stage.folder} was trained with other settings than the recipe has now: {told}. It is kept as it is;"
            " to train again, remove it or choose another -o."
        )
    if models:
        _tell_models(stage, models, terminal)
    if data:
        _tell_data(stage, data, terminal)
    return True


def _tell_models(stage: Stage, models: Mapping[str, str], terminal: Terminal) -> None:
    """Tell when a finished stage began from weights that are others now."""
    from sana.training.contents import weights_of

    now = weights_of(stage.recipe, stage.folder)
    told = [name for name, digest in models.items() if now.get(name, digest) != digest]
    if told:
        terminal.warn(
            f"{stage.folder} was trained from other weights than {', '.join(told)} names now. It is kept as it is; to"
            " train again, remove it or choose another -o."
        )


def _tell_data(stage: Stage, data: Mapping[str, Any], terminal: Terminal) -> None:
    """Tell when a finished stage was trained on other data than its recipe finds now."""
    from sana.training.contents import contents
    from sana.training.folders import changed_data

    try:
        told = changed_data(data, contents(stage.recipe))
    except SanaError as error:
        terminal.warn(f"{stage.folder} is kept as it is; what it was trained on cannot be read any more: {error}")
        return
    if told:
        terminal.warn(
            f"{stage.folder} was trained on other data than there are now: {told}. It is kept as it is; to train again,"
            " remove it or choose another -o."
        )


def _train(stage: Stage, terminal: Terminal, command: str) -> bool:
    """Train one stage to its end and export it; of several processes the first speaks, and this tells whether it is.

    Raises:
        KeyboardInterrupt: the user, or the system, asked to stop; the run is saved, and the text says how to go on.
        NotWritten: the last state, the export or the note of its end could not be written.
    """
    from sana.training.start import start

    terminal.say(f"{stage.name}: preparing {stage.recipe.objective.replace('_', ' ')} in {stage.folder}")
    with stage.located(), _preempting(f"{stage.name} was still being prepared. To go on: {command}"):
        trainer = start(stage.recipe, stage.folder)
    if trainer.step:
        terminal.say(f"{stage.name}: going on at step {trainer.step} of {stage.recipe.run.steps}")
    asked = _loop(stage, trainer, terminal)
    if not trainer.is_finished:
        where = f"{stage.name} is saved at step {trainer.step} of {stage.recipe.run.steps}"
        raise _stop(asked)(f"{where}. To go on: {command}")
    trainer.export(stage.export)
    if trainer.is_first:
        _note_finished(stage, trainer)
    if asked:
        raise _stop(asked)(f"{stage.name} is finished. To go on: {command}")
    return trainer.is_first


def _note_finished(stage: Stage, trainer: "Trainer") -> None:
    from sana.checkpoints.storage import publish

    files = sorted(path.relative_to(stage.export).as_posix() for path in stage.export.rglob("*") if path.is_file())
    beside = {"data": trainer.data, "models": trainer.models, "files": files}
    text = json.dumps({**stage.record(), **beside}, indent=1)
    try:
        publish(stage.folder / FINISHED, lambda beside: beside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise NotWritten(
            f"{stage.name} is exported, but {error.filename} could not be written ({error.strerror}). Make room, and "
            "run it again to finish it."
        ) from error


def _stop(asked: int | None) -> type[KeyboardInterrupt]:
    """Return the error for a signal; what another process was told is what the system told all."""
    return KeyboardInterrupt if asked == signal.SIGINT else Preempted


def _loop(stage: Stage, trainer: "Trainer", terminal: Terminal) -> int | None:
    """Train until the end or until a stop is asked for, and return the signal that asked this process."""
    total, is_first = stage.recipe.run.steps, trainer.is_first
    unit = UNITS.get(stage.recipe.objective, "images")
    with stop_requests() as asked, terminal.count(total, trainer.step, stage.name) as progress:
        steps = cast("Generator[TrainStep, None, None]", trainer.steps(lambda: asked() is not None))
        with contextlib.closing(steps):  # closing it early saves the run
            for report in steps:
                rate = f"{report.samples / max(report.seconds, 1e-9):.3g} {unit}/s"
                if is_first:
                    progress.advance(f"{stage.name} · step {report.step}/{total} · loss {report.loss:.4f} · {rate}")
                    held_out = {name: _finite(value) for name, value in (report.figures or {}).items()}
                    facts = {"step": report.step, "of": total, "loss": _finite(report.loss), "held_out": held_out}
                    terminal.event("step", recipe=stage.name, **facts)
                if is_first and report.figures:
                    terminal.say(_figures(stage, report))
        return asked()


def _finite(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return value if math.isfinite(value) else None


def _figures(stage: Stage, report: "TrainStep") -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in (report.figures or {}).items())
    return f"{stage.name} · step {report.step} · held out: {figures}"


@contextlib.contextmanager
def _preempting(told: str) -> Iterator[None]:
    """Stop at once, saying so, when the system asks: before the first step there is nothing to save."""

    def stop(number: int, frame: object) -> None:
        raise Preempted(told)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGUSR1")] if is_main else []
    before = {number: signal.signal(number, stop) for number in numbers if number is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Let signals wait for the end of a step, so that what is saved is whole, and tell which came first.

    Ctrl-C a second time does not wait.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt("Stopped in the middle of a step.")
        asked.append(number)

    main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    user = [number for number in (getattr(signal, "SIGUSR1", None),) if number is not None]
    numbers = (signal.SIGINT, signal.SIGTERM, *user) if main_thread else ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


GROUPS = (Group(title="the runs", options=Options),)
KINDS = {
    "weights": "weights that learn, and what is saved beside them",
    "frozen": "weights that stay as they are",
    "optimizer": "states of the optimiser",
    "average": "averaged weights (run.ema)",
    "encoders": "encoders, which stay: no features were computed before",
    "gradients": "gradients",
    "activations": "activations of a micro-batch",
    "encoding": "while offloaded encoders encode, in the place of activations",
    "previews": "while previews are drawn, in the place of gradients and activations",
}
"""Parts of an estimate, as they are told."""
UNITS = {"language_model": "captions"}
"""What a row of a batch is, where it is no image."""
