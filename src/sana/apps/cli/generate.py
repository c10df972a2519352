"""`sana generate`, the verb that needs not be named: parse, load, draw, save."""

import contextlib
import dataclasses
import importlib.util
import re
import secrets
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.models import DEFAULT_MODEL, TOY, millions
from sana.apps.cli.names import check_files, plan_files
from sana.apps.cli.output import Progress, Terminal, duration
from sana.apps.cli.values import Shape, read_seeds, read_size, runs_of
from sana.cards import CARDS, Card
from sana.engine.request import MAX_SEED, Request, Result
from sana.errors import InvalidInput, MissingDependency, OutOfMemory, SanaError

if TYPE_CHECKING:
    from sana.engine.parts import Parts

USAGE = 'sana "PROMPT" [options]'
DESCRIPTION = """Draw pictures of a prompt. The paths of the written files go to stdout, one a line.

Picture i is drawn from seed + i, so it is the same alone or among others: to the last bit at the same
--batch-size, --threads and device, and up to invisible rounding otherwise."""

SMALL_MODEL = 50_000_000
"""Transformers with fewer parameters draw on one thread: splitting their small products costs more than it saves."""


class PartialBatch(SanaError):
    """Some pictures were written before the error."""

    exit_code = 6


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Spellings of fields of the request that stand for several at once."""

    size: Annotated[Shape | None, Spelling(value="WxH|W:H", read=read_size)] = None
    """Size in pixels (1024x768, 512) or shape (16:9, the nearest that the model was trained on)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Which model draws, and on what."""

    model: Annotated[str, Spelling(short="-m", value="MODEL")] = DEFAULT_MODEL
    """A name from `sana models`, a hub id, or a folder."""
    device: Annotated[str, Spelling(value="auto|cpu|cuda|mps")] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto is what the model's card recommends, and float16 is for the transformer only."""
    threads: int | None = None
    """CPU threads; a small model gets one, others all."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is written, and where."""

    output: Annotated[str | None, Spelling(short="-o", value="PATH")] = None
    """A .png file, or a folder. Left out, PROMPT-SEED.png in this folder."""
    metadata: Literal["full", "label", "none"] = "full"
    """What a file says about itself: settings and AI label, the label only, or nothing."""
    force: bool = False
    """Overwrite files that exist."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A parsed command line, complete but for what only the loaded model can tell."""

    request: Request
    """Without a seed: those are in `seeds`."""
    seeds: Sequence[int]
    shape: Shape | None
    machine: Machine
    files: Sequence[Path]
    metadata: Literal["full", "label", "none"]
    force: bool


@dataclass(kw_only=True)
class Report:
    """What was done so far; becomes the JSON document."""

    files: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Take in one finished batch."""
        self.settings = self.settings or result.settings.to_dict()
        self.model = dict(result.model)
        for stage, seconds in result.timings.items():
            self.timings[stage] = round(self.timings.get(stage, 0.0) + seconds, 4)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    order = parse(words)
    card = CARDS.get(order.machine.model)
    if card is not None:
        _label(card, terminal)
        _fitted(order, card).resolve(card)
    check_files(order.files, force=order.force)
    report = Report(warnings=terminal.warnings)
    with _out_of_memory_told():
        began = time.perf_counter()
        parts = _load(order.machine, terminal)
        report.timings["load"] = round(time.perf_counter() - began, 4)
        if card is None and parts.card is not None:
            _label(parts.card, terminal)
        with _threads(order.machine.threads, parts):
            _draw(parts, order, report, terminal)
    report.settings["count"] = len(order.seeds)
    terminal.document(dataclasses.asdict(report))
    return 0


def parse(words: Sequence[str]) -> Order:
    """Return what the command line orders.

    Raises:
        InvalidInput, MissingDependency: it cannot be carried out by any model.
    """
    prompts, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION, refused=REFUSED)
    prompt = _prompt(prompts)
    shape, wishes = given.pop("size", None), given.pop("seed", None)
    machine, files = Machine(**arguments.take(Machine, given)), Files(**arguments.take(Files, given))
    picture = arguments.take(Request, given)
    if shape is not None and {"width", "height"} & set(picture):
        raise InvalidInput("--size and --width, --height say the same thing. Give one of them.")
    if wishes is not None and len(wishes) > 1 and "count" in picture:
        raise InvalidInput("Several seeds already say how many pictures to draw. Drop --count, or give one --seed.")
    with _named_as_flags():
        request = Request(prompt=prompt, **picture)
        _check_effects(request, picture)
    if machine.threads is not None and not 1 <= machine.threads <= 1024:
        raise InvalidInput(f"--threads must be a whole number from 1 to 1024, not {machine.threads}.")
    seeds = wishes if wishes is not None and len(wishes) > 1 else _seeds(wishes, request, files)
    return Order(
        request=request,
        seeds=seeds,
        shape=shape,
        machine=machine,
        files=plan_files(prompt, seeds, files.output),
        metadata=files.metadata,
        force=files.force,
    )
