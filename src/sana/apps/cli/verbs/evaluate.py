"""`sana evaluate`: measure a model and print the table."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.machine import MACHINE, Machine, introduce
from sana.apps.cli.names import check_files
from sana.apps.cli.order import named_as_flags
from sana.apps.cli.output import Terminal, listed
from sana.apps.cli.values import read_counts
from sana.errors import InvalidInput, did_you_mean
from sana.evaluation import runner

USAGE = "sana evaluate METRIC [options]"
DESCRIPTION = "Measure a model and print the table.\n\nmetrics:"


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is written besides the table."""

    output: Annotated[str | None, Spelling(short="-o", value="FILE.json")] = None
    """Write every figure and every verdict here."""
    sheet: Annotated[str | None, Spelling(value="FILE.png")] = None
    """Write sample pictures here."""
    force: bool = False
    """Overwrite files that exist."""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags(GROUPS):
        names, given = arguments.read(words, GROUPS, usage=USAGE, description=_description())
        metric = _chosen(names, runner.METRICS)
        _check_effect(metric, given)
        machine, files = Machine(**arguments.take(Machine, given)), Files(**arguments.take(Files, given))
        settings = runner.Settings(**arguments.take(runner.Settings, given))
        targets = _targets(files)
        runner.METRICS[metric].check(settings)
        needs = runner.METRICS[metric].needs
        if machine.card is not None:
            if "controlnet" in needs and machine.card.controlnet is None and machine.controlnet is None:
                raise runner.without_branch(machine.card.name)
            own = [part for part in needs if part != "controlnet" or machine.card.controlnet is not None]
            introduce(machine.card, terminal, parts=own)
        parts, _ = machine.load(terminal, needs)
        began = time.perf_counter()
        with machine.in_use(parts), terminal.count(1, text=metric) as progress:

            def tell(done: int, total: int) -> None:
                progress.move(done, total, f"{metric} · {done}/{total} pictures")

            report = runner.run(metric, parts, settings, tell)
        seconds = round(time.perf_counter() - began, 1)
        if files.output is not None:
            runner.save(report, files.output, force=files.force)
        if files.sheet is not None:
            runner.save_sheet(report, files.sheet, force=files.force)
    terminal.result(report.table())
    document = {"files": list(map(str, targets)), "seconds": seconds, "warnings": terminal.warnings}
    terminal.document({**report.to_dict(), **document})
    return 0


def _description() -> str:
    return "\n".join([DESCRIPTION, *listed({name: metric.summary for name, metric in runner.METRICS.items()})])


def _chosen(names: Sequence[str], metrics: Mapping[str, object]) -> str:
    if not names:
        raise InvalidInput(f"What should be measured? One of: {', '.join(metrics)}. More: sana evaluate --help")
    if len(names) > 1:
        raise InvalidInput("`sana evaluate` measures one thing at a time; name one metric.")
    if names[0] not in metrics:
        known = ", ".join(metrics)
        raise InvalidInput(f"There is no metric '{names[0]}'.{did_you_mean(names[0], metrics)} There are: {known}.")
    return names[0]


def _check_effect(metric: str, given: Mapping[str, object]) -> None:
    """Raise InvalidInput for what is given but does not concern the metric."""
    chosen = runner.METRICS[metric]
    idle = {one for other in runner.METRICS.values() for one in other.takes} - {*chosen.takes}
    if "controlnet" not in chosen.needs:
        idle.add("controlnet")
    for name in sorted(idle & given.keys()):
        raise InvalidInput(f"`{name}` has no effect on {metric}. Drop it.")


def _targets(files: Files) -> list[Path]:
    """Return the files that will be written, checked before hours go into them."""
    targets = []
    for name, suffix in ((files.output, ".json"), (files.sheet, ".png")):
        if name is not None:
            target = Path(name).expanduser()
            if target.suffix.lower() != suffix:
                raise InvalidInput(f"{name} does not end in {suffix}. Change the name.")
            check_files([target], force=files.force)
            targets.append(target)
    return targets


GROUPS = (
    Group(
        title="the measurement",
        options=runner.Settings,
        spellings={
            "steps": Spelling(value="N[,N...]", read=read_counts),
            "against": Spelling(value="FILE.json"),
        },
    ),
    MACHINE,
    Group(title="the files", options=Files),
)
