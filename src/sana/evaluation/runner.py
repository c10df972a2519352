"""Runs a metric by name over a loaded model, and writes its report.

What can be measured is known before torch is imported: the metrics themselves are imported when they run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sana.engine.request import SamplerName
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from sana.engine.parts import Parts
    from sana.engine.request import ResolvedRequest
    from sana.evaluation.comparison import Reference
    from sana.evaluation.seams import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a metric can be told; each takes what concerns it."""

    prompts: int = 50
    """Prompts per task (geneval)."""

    images: int = 4
    """Pictures per prompt (geneval)."""

    scenes: int | None = None
    """Scenes to draw (autoencoder: 256 if left out, control: 100)."""

    control: Literal["canny", "scribble", "ink"] | None = None
    """What the control network follows (control); left out, what the model's card says."""

    steps: Sequence[int] | None = None
    """Denoising steps, for geneval also several, such as 1,2,4, each measured; left out, what the card recommends."""

    guidance: float | None = None
    """Guidance scale (geneval, control); left out, what the model's card recommends."""

    sampler: SamplerName | None = None
    """How the steps are taken (geneval, control); left out, what the model's card recommends."""

    against: str | Path | None = None
    """A report of another run, such as that of a distilled model's teacher: what share of it is reached (geneval)."""

    seed: int = 0
    """geneval: picture i of every prompt is drawn with seed + i; others: which scenes are taken."""

    batch_size: int = 32
    """Pictures computed at once."""


class Report(Protocol):
    """What every metric returns."""

    @property
    def sheet(self) -> "Image.Image | None":
        """Sample pictures."""
        ...

    def table(self) -> str:
        """The figures as an aligned markdown table."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric as callers choose it by name."""

    summary: str
    """What it measures, in one line."""
    needs: tuple[str, ...]
    """The parts of a model that it uses."""
    takes: tuple[str, ...]
    """The settings that concern it, besides `seed` and `batch_size`, which concern all."""
    run: "Callable[[Parts, Settings, Progress | None], Report]"
    """The metric itself; the last argument is told how many pictures are done, and of how many."""
    check: Callable[[Settings], None] = lambda _: None
    """Refuses settings that are known to be impossible before a model is loaded."""


def run(metric: str, parts: "Parts", settings: Settings, progress: "Progress | None" = None) -> Report:
    """Measure a model with the metric of that name.

    Raises:
        InvalidInput: the metric is unknown, a setting is impossible, or the model lacks a part.
    """
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS)
        raise InvalidInput(f"There is no metric {metric!r}.{hint} Choose one of: {', '.join(METRICS)}.")
    if "controlnet" in METRICS[metric].needs and not parts.controlnets:
        raise without_branch(parts.name)
    parts.require(*METRICS[metric].needs)
    METRICS[metric].check(settings)
    return METRICS[metric].run(parts, settings, progress)


def without_branch(name: str) -> InvalidInput:
    """Return what a model is refused with that cannot follow a control picture."""
    return InvalidInput(
        f"{name} comes without a control network, so it follows no picture. Take a model that has one, or name one with"
        " `controlnet`."
    )


def save(report: Report, path: str | Path, *, force: bool = False) -> Path:
    """Write a report as JSON and return the path.

    Raises:
        InvalidInput: the folder is missing, or the file exists and `force` is off.
    """
    from sana.engine.images import write_atomically

    text = json.dumps(report.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"

    def write(file: BufferedWriter) -> None:
        file.write(text.encode())

    write_atomically(Path(path), write, force=force)
    return Path(path)


def save_sheet(report: Report, path: str | Path, *, force: bool = False) -> Path:
    """Write a report's sample pictures as PNG and return the path.

    Raises:
        InvalidInput: there are no pictures, the folder is missing, or the file exists and `force` is off.
    """
    from sana.engine.images import write_atomically

    sheet = report.sheet
    if sheet is None:
        raise InvalidInput("This report has no sample pictures. Save it as JSON only.")
    write_atomically(Path(path), lambda file: sheet.save(file, format="PNG"), force=force)
    return Path(path)


def _geneval(parts: "Parts", settings: Settings, progress: "Progress | None") -> Report:
    from sana.evaluation.comparison import Comparison
    from sana.evaluation.drawing import drawer, restorer
    from sana.evaluation.geneval import evaluate

    reference = _reference(settings)
    orders = [_order(parts, settings, steps) for steps in settings.steps or (None,)]
    runs = []
    for number, order in enumerate(orders):

        def tell(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(orders) * total)

        runs.append(
            evaluate(
                drawer(parts, order),
                prompts=settings.prompts,
                images=settings.images,
                seed=settings.seed,
                batch_size=settings.batch_size,
                restore=restorer(parts, batch_size=settings.batch_size),
                settings=_record(parts, order),
                progress=tell,
            )
        )
    return runs[0] if len(runs) == 1 and reference is None else Comparison(runs=runs, reference=reference)


def _reference(settings: Settings) -> "Reference | None":
    if settings.against is None:
        return None
    from sana.evaluation.comparison import SAME, read_reference

    return read_reference(settings.against, {name: getattr(settings, name) for name in SAME})


def _check_against(settings: Settings) -> None:
    _reference(settings)


def _control(parts: "Parts", settings: Settings, progress: "Progress | None") -> Report:
    from sana.evaluation.control import evaluate_control
    from sana.evaluation.drawing import drawer, follower, restorer

    kind = settings.control or parts.effective_card.control
    if kind is None:
        raise InvalidInput(
            f"What the control network of {parts.name} was trained to follow is not known. Name it with `control`,"
            " such as ink."
        )
    (steps,) = settings.steps or (None,)
    order = _order(parts, settings, steps)
    return evaluate_control(
        follower(parts, order),
        drawer(parts, order),
        kind=kind,
        scenes=100 if settings.scenes is None else settings.scenes,
        seed=settings.seed,
        batch_size=settings.batch_size,
        restore=restorer(parts, batch_size=settings.batch_size),
        settings=_record(parts, order),
        progress=progress,
    )


def _check_steps(settings: Settings) -> None:
    if settings.steps is not None and len(settings.steps) != 1:
        raise InvalidInput("`steps` must be one number to measure control. Measure the others one by one.")


def _order(parts: "Parts", settings: Settings, steps: int | None) -> "ResolvedRequest":
    from sana.evaluation.drawing import resolve

    return resolve(parts, steps=steps, guidance=settings.guidance, sampler=settings.sampler)


def _record(parts: "Parts", order: "ResolvedRequest") -> dict[str, Any]:
    told = {name: getattr(order, name) for name in ("steps", "guidance", "sampler")}
    return {**told, "model": parts.describe()}


def _autoencoder(parts: "Parts", settings: Settings, progress: "Progress | None") -> Report:
    from sana.evaluation.autoencoder import evaluate_autoencoder
    from sana.evaluation.drawing import restorer

    return evaluate_autoencoder(
        restorer(parts, batch_size=settings.batch_size),
        scenes=256 if settings.scenes is None else settings.scenes,
        seed=settings.seed,
        batch_size=settings.batch_size,
        settings={"model": parts.name},
        progress=progress,
    )


METRICS: dict[str, Metric] = {
    "geneval": Metric(
        summary="Share of pictures that hold what their prompt asks for, in six tasks and four languages.",
        needs=("tokenizer", "text_encoder", "transformer", "vae"),
        takes=("prompts", "images", "steps", "guidance", "sampler", "against"),
        run=_geneval,
        check=_check_against,
    ),
    "control": Metric(
        summary="How closely a control picture is followed while the prompt decides the colours.",
        needs=("tokenizer", "text_encoder", "transformer", "vae", "controlnet"),
        takes=("scenes", "control", "steps", "guidance", "sampler"),
        run=_control,
        check=_check_steps,
    ),
    "autoencoder": Metric(
        summary="Share of scenes that are still read right after encoding and decoding, and the PSNR.",
        needs=("vae",),
        takes=("scenes",),
        run=_autoencoder,
    ),
}
