"""What `sana dataset caption` and `sana dataset score` share: opening, working with a bar, telling what came of it."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli.arguments import Spelling
from sana.apps.cli.output import Terminal
from sana.apps.cli.values import read_device
from sana.errors import InvalidInput, OutOfMemory

if TYPE_CHECKING:
    from sana.data.samples import Finding
    from sana.training.labelling.files import Labels
    from sana.training.labelling.work import Labelled, Plan

_SHOWN = 5
"""Samples that are left out and told one by one; the JSON document has all."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the model works."""

    device: Annotated[str, Spelling(value="auto|cpu|cuda[:N]|mps", read=read_device)] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    batch_size: int = 8
    """Pictures at once."""
    revision: Annotated[str | None, Spelling(value="NAME")] = None
    """Branch, tag or commit of the model's repository."""
    offline: bool = False
    """Download nothing."""
    again: bool = False
    """Also make what is there already."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InvalidInput(f"--batch-size must be at least 1 but is {self.batch_size}.")


def carry_out(
    labels: "Labels",
    plan: "Plan",
    start: Callable[[], Generator["Labelled"]],
    command: str,
    what: str,
    terminal: Terminal,
) -> dict[str, Any]:
    """Do the work with a bar, and return what the JSON document says of it; `start` loads the model if it is needed.

    Raises:
        KeyboardInterrupt: the user asked to stop; what was made is saved, and the text says how to go on.
        OutOfMemory: a batch does not fit.
    """
    began, made, faults, done = time.perf_counter(), 0, list(plan.faults), 0
    total = len(plan.indices)
    terminal.say(f"{len(labels.source)} pictures: {total} to do, {plan.skipped} done before")
    try:
        with terminal.count(max(1, total), text=what) as progress, _memory(), _steps(start, total) as steps:
            for step in steps:
                made, done = made + step.made, step.done
                faults += step.faults
                progress.move(step.done, step.total, f"{what} · {step.done}/{step.total} pictures")
                terminal.event("labelled", done=step.done, total=step.total, made=step.made)
    except KeyboardInterrupt as stop:
        where = f"{done} of {total} pictures are done and saved"
        raise KeyboardInterrupt(f"{where}. To go on: {command}") from stop
    _tell(faults, terminal)
    terminal.say(f"{made} new {what} in {time.perf_counter() - began:.1f} s")
    return {
        "pictures": len(labels.source),
        "done_before": plan.skipped,
        "made": made,
        "left_out": [{"place": one.place, "line": one.line, "kind": one.kind, "text": one.text} for one in faults],
        "seconds": round(time.perf_counter() - began, 1),
    }


@contextlib.contextmanager
def _steps(start: Callable[[], Generator["Labelled"]], total: int) -> Iterator[Iterable["Labelled"]]:
    """Let a block have the steps; leaving it early saves what was made."""
    if total:
        with contextlib.closing(start()) as steps:
            yield steps
    else:
        yield ()


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The pictures do not fit into memory at once. Take a smaller --batch-size.") from error


def _tell(faults: Sequence["Finding"], terminal: Terminal) -> None:
    for finding in faults[:_SHOWN]:
        terminal.warn(f"left out: {finding}")
    if len(faults) > _SHOWN:
        terminal.warn(f"left out: {len(faults) - _SHOWN} more (--json lists them)")
