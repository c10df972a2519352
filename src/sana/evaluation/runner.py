"""Runs a metric by name over a loaded model, and writes its report.

What can be measured is known before torch is imported: the metrics themselves are imported when they run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sana.engine.request import SamplerName
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from sana.engine.parts import Parts
    from sana.evaluation.seams import Progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a metric can be told; each takes what concerns it."""

    prompts: int = 50
    """Prompts per task (geneval)."""

    images: int = 4
    """Pictures per prompt (geneval)."""

    scenes: int = 256
    """Scenes to encode and decode (autoencoder)."""

    steps: int | None = None
    """Denoising steps (geneval); left out, what the model's card recommends."""

    guidance: float | None = None
    """Guidance scale (geneval); left out, what the model's card recommends."""

    sampler: SamplerName | None = None
    """How the steps are taken (geneval); left out, what the model's card recommends."""

    seed: int = 0
    """geneval: picture i of every prompt is drawn with seed + i; autoencoder: which scenes are taken."""

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
    run: "Callable[[Parts, Settings, Progress | None], Report]"
    """The metric itself; the last argument is told how many pictures are done, and of how many."""


def run(metric: str, parts: "Parts", settings: Settings, progress: "Progress | None" = None) -> Report:
    """Measure a model with the metric of that name.

    Raises:
        InvalidInput: the metric is unknown, a setting is impossible, or the model lacks a part.
    """
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS)
        raise InvalidInput(f"There is no metric {metric!r}.{hint} Choose one of: {', '.join(METRICS)}.")
    parts.require(*METRICS[metric].needs)
    return METRICS[metric].run(parts, settings, progress)


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
    from sana.evaluation.drawing import drawer, resolve, restorer
    from sana.evaluation.geneval import evaluate

    order = resolve(parts, steps=settings.steps, guidance=settings.guidance, sampler=settings.sampler)
    return evaluate(
        drawer(parts, order),
        prompts=settings.prompts,
        images=settings.images,
        seed=settings.seed,
        batch_size=settings.batch_size,
        restore=restorer(parts, batch_size=settings.batch_size),
        settings={
            "steps": order.steps,
            "guidance": order.guidance,
            "sampler": order.sampler,
            "model": parts.describe(),
        },
        progress=progress,
    )


def _autoencoder(parts: "Parts", settings: Settings, progress: "Progress | None") -> Report:
    from sana.evaluation.autoencoder import evaluate_autoencoder
    from sana.evaluation.drawing import restorer

    return evaluate_autoencoder(
        restorer(parts, batch_size=settings.batch_size),
        scenes=settings.scenes,
        seed=settings.seed,
        batch_size=settings.batch_size,
        settings={"model": parts.name},
        progress=progress,
    )


METRICS: dict[str, Metric] = {
    "geneval": Metric(
        summary="Share of pictures that hold what their prompt asks for, in six tasks and four languages.",
        needs=("tokenizer", "text_encoder", "transformer", "vae"),
        run=_geneval,
    ),
    "autoencoder": Metric(
        summary="Share of scenes that are still read right after encoding and decoding, and the PSNR.",
        needs=("vae",),
        run=_autoencoder,
    ),
}
