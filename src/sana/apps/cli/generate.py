"""`sana generate`, the verb that needs not be named: parse, load, draw, save."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.apps.cli.models import TOY, millions
from sana.apps.cli.names import check_files
from sana.apps.cli.order import Machine, Order, named_as_flags, parse
from sana.apps.cli.output import Progress, Terminal, duration
from sana.apps.cli.values import runs_of
from sana.cards import CARDS, Card
from sana.engine.request import Result
from sana.errors import OutOfMemory, SanaError

if TYPE_CHECKING:
    from sana.engine.parts import Parts

SMALL_MODEL = 50_000_000
"""Below this many parameters a second thread costs more than it brings."""


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
        card = CARDS.get(order.machine.model)
        if card is not None:
            order.fitted(card)
        check_files(order.files, force=order.writing.force)
        report = Report(warnings=terminal.warnings)
        if card is not None:
            _introduce(card, order, terminal)
        with _out_of_memory_told():
            parts = _load(order.machine, report, terminal)
        if card is None:
            _introduce(parts.effective_card, order, terminal)
        with _threads(order.machine.threads, parts):
            _draw(parts, order, report, terminal)
    terminal.document(report.to_dict())
    return 0


def _introduce(card: Card, order: Order, terminal: Terminal) -> None:
    """Say what the user should know about the model before waiting for it."""
    if card.folder is not None:
        facts = f"{millions(card.params)} parameters, {card.base_size} px"
        terminal.say(f"{card.name} is the built-in model ({facts}): {TOY}. For others: sana models")
    elif card.hub_id:
        terms = f"{card.licence}{', research only' if card.research_only else ''}"
        terminal.say(f"{card.name} comes from huggingface.co/{card.hub_id} ({terms}); missing files are downloaded.")
    if "zh" not in card.languages and any("\u4e00" <= mark <= "\u9fff" for mark in order.request.prompt):
        terminal.warn(f"{card.name} was not trained on Chinese prompts. Say it in English, or use another model.")


def _load(machine: Machine, report: Report, terminal: Terminal) -> "Parts":
    began = time.perf_counter()
    dtype: Any = "card" if machine.dtype == "auto" else machine.dtype
    if dtype == "float16":  # text encoder and autoencoder overflow in it
        dtype = {"default": "float16", "text_encoder": "bfloat16", "vae": "bfloat16"}
    card = CARDS.get(machine.model)
    is_here = (card is not None and card.folder is not None) or Path(machine.model).expanduser().is_dir()
    if is_here:
        bar: contextlib.AbstractContextManager[Any] = terminal.count(1, text=f"loading {machine.model}")
    else:  # the hub library draws its own
        bar = _hub_bars(shown=not terminal.quiet and sys.stderr.isatty())
    with bar:
        from sana.engine.parts import load

        parts = load(machine.model, device=machine.device, dtype=dtype)
    report.timings["load"] = time.perf_counter() - began
    return parts


@contextlib.contextmanager
def _hub_bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _draw(parts: "Parts", order: Order, report: Report, terminal: Terminal) -> None:
    """Draw and save batch by batch, so that what is finished stays whatever happens to the rest."""
    from sana.engine.generate import generate

    request = order.fitted(parts.effective_card)
    num_steps = request.resolve(parts.effective_card).steps
    runs = list(runs_of(order.seeds, request.batch_size))
    count = len(order.seeds)
    try:
        with terminal.count(num_steps * len(runs)) as progress, _out_of_memory_told():
            for batch in runs:
                loop = generate(parts, request.replace(seed=batch.start, count=len(batch)))
                result = _finished(loop, progress, f"picture {len(report.files) + 1}/{count} · " if count > 1 else "")
                report.add(result, count)
                _save(result, order, report, terminal)
    except SanaError as error:
        if not report.files:
            raise
        raise PartialBatch(f"{error} {len(report.files)} of {count} pictures were written.") from error
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
    seconds = result.timings.get("total", 0.0) / len(result.images)
    for i, (seed, image) in enumerate(zip(result.seeds, result.images, strict=True)):
        target = order.files[order.seeds.index(seed)]
        save_png(result, i, target, metadata=order.writing.metadata, force=order.writing.force)
        report.files.append(str(target))
        report.seeds.append(seed)
        terminal.draft = report.to_dict()
        terminal.result(str(target))
        size, device = f"{image.width}x{image.height}", result.model.get("device", "")
        terminal.say(f"seed {seed} · {size} · {result.settings.steps} steps · {device} · {duration(seconds)}")


@contextlib.contextmanager
def _threads(wanted: int | None, parts: "Parts") -> Iterator[None]:
    """Set the number of CPU threads for the length of a `with` block."""
    import torch

    before = torch.get_num_threads()
    small = sum(weight.numel() for weight in parts.transformer.parameters()) < SMALL_MODEL
    torch.set_num_threads(wanted or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Turn the many forms of running out of memory into one error."""
    try:
        yield
    except SanaError:
        raise
    except (RuntimeError, MemoryError) as error:
        from sana.engine.decode import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("The memory is full. Lower --batch-size or --size, or use a smaller model.") from error
