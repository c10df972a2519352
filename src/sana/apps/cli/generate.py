"""`sana generate`, the verb that needs not be named: parse, load, draw, save."""

import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sana.apps.cli.machine import introduce, out_of_memory_told
from sana.apps.cli.models import DEFAULT_MODEL
from sana.apps.cli.names import check_files
from sana.apps.cli.order import Order, named_as_flags, parse
from sana.apps.cli.output import Progress, Terminal, duration
from sana.apps.cli.values import runs_of
from sana.engine.request import Result
from sana.errors import SanaError

if TYPE_CHECKING:
    from sana.cards import Card
    from sana.engine.parts import Parts


class PartialBatch(SanaError):
    """Some of the pictures were written before the error."""

    exit_code = 6


@dataclass(kw_only=True)
class Report:
    """What was done so far; becomes the JSON document."""

    files: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the document."""
        timings = {stage: round(seconds, 4) for stage, seconds in self.timings.items()}
        return {**dataclasses.asdict(self), "timings": timings}

    def add(self, result: Result, count: int) -> None:
        """Take in one finished batch of a run of `count` pictures."""
        self.settings = self.settings or {**result.settings.to_dict(), "count": count}
        self.model = dict(result.model)
        for stage, seconds in result.timings.items():
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        order = parse(words)
        card = order.machine.card
        if card is not None:
            order.fitted(card)
        check_files(order.files, force=order.writing.force)
        if card is not None:
            _introduce(card, order, terminal)
        parts, seconds = order.machine.load(terminal)
        if card is None and parts.card is not None:
            _introduce(parts.card, order, terminal, parts.name)
        report = Report(timings={"load": seconds}, warnings=terminal.warnings)
        with order.machine.in_use(parts):
            _draw(parts, order, report, terminal)
    terminal.document(report.to_dict())
    return 0


def _introduce(card: "Card", order: Order, terminal: Terminal, name: str | None = None) -> None:
    introduce(card, terminal, name)
    if "zh" not in card.languages and any("\u4e00" <= mark <= "\u9fff" for mark in order.request.prompt):
        named = name or card.name
        terminal.warn(f"{named} was not trained on Chinese prompts. Say it in English, or use another model.")


def _draw(parts: "Parts", order: Order, report: Report, terminal: Terminal) -> None:
    """Draw and save batch by batch, so that what is finished stays whatever happens to the rest."""
    from sana.engine.generate import generate

    request = order.fitted(parts.effective_card)
    num_steps = request.resolve(parts.effective_card).steps
    runs = list(runs_of(order.seeds, request.batch_size))
    count = len(order.seeds)
    try:
        with terminal.count(num_steps * len(runs)) as progress, out_of_memory_told():
            for batch in runs:
                loop = generate(parts, request.replace(seed=batch.start, count=len(batch)))
                result = _finished(loop, progress, f"picture {len(report.files) + 1}/{count} · " if count > 1 else "")
                if result.model.get("name") not in (order.machine.source, DEFAULT_MODEL):
                    result = dataclasses.replace(result, model={**result.model, "source": order.machine.source})
                report.add(result, count)
                _save(result, order, report, terminal)
    except (SanaError, OSError) as error:
        if not report.files or isinstance(error, BrokenPipeError):
            raise
        reason = str(error) if isinstance(error, SanaError) else f"{error.strerror or error}."
        raise PartialBatch(f"{reason} {len(report.files)} of {count} pictures were written.") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(report.files)} of {count} pictures were written.") from None


def _finished(loop: Generator[Any, Any, Result], progress: Progress, title: str) -> Result:
    """Consume the loop's steps, and return what it ends with."""
    while True:
        try:
            step = next(loop)
        except StopIteration as end:
            result: Result = end.value
            return result
        progress.advance(f"{title}step {step.index + 1}/{step.num_steps}")


def _save(result: Result, order: Order, report: Report, terminal: Terminal) -> None:
    from sana.engine.images import save_png

    for text in result.warnings:
        terminal.warn(text)
    steps = f"{result.settings.steps} step{'s' if result.settings.steps != 1 else ''}"
    seconds = result.timings.get("total", 0.0) / len(result.images)
    for i, (seed, image) in enumerate(zip(result.seeds, result.images, strict=True)):
        target = order.files[order.seeds.index(seed)]
        save_png(result, i, target, metadata=order.writing.metadata, force=order.writing.force)
        report.files.append(str(target))
        report.seeds.append(seed)
        terminal.draft = report.to_dict()
        terminal.result(str(target))
        size, device = f"{image.width}x{image.height}", result.model.get("device", "")
        terminal.say(f"seed {seed} · {size} · {steps} · {device} · {duration(seconds)}")
