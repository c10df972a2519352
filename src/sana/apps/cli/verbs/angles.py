"""`sana angles`: search the angles of a distilled model, and keep them with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group
from sana.apps.cli.machine import MACHINE, Machine
from sana.apps.cli.order import named_as_flags
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput

USAGE = "sana angles -m FOLDER [options]"
DESCRIPTION = """\
Search the angles with which a SANA-Sprint model draws best, for 1 to --steps
steps, and keep them in its folder, where they become its defaults. The judge
is the detector of the drawn world (see `sana evaluate geneval`)."""
NEEDS = ("tokenizer", "text_encoder", "transformer", "vae")


@dataclass(frozen=True, kw_only=True)
class Search:
    """How thorough the search is."""

    steps: int = 4
    """Most steps; those for fewer are found on the way."""
    prompts: int = 8
    """Prompts of each of the six tasks."""
    images: int = 1
    """Pictures of each prompt."""
    seed: int = 0
    """Picture i of every prompt is drawn with seed + i."""
    batch_size: int = 32
    """Pictures computed at once."""
    dry_run: bool = False
    """Print what was found and keep nothing."""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    with named_as_flags():
        names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
        if names:
            raise InvalidInput(f"What is '{names[0]}'? The model is named with -m.")
        machine, search = Machine(**arguments.take(Machine, given)), Search(**arguments.take(Search, given))
        folder = Path(machine.model).expanduser()
        if not folder.is_dir():
            raise InvalidInput(f"Angles are kept in a model's folder, but {machine.model} is none. Name one with -m.")
        parts, _ = machine.load(terminal, NEEDS)
        from sana.engine.angles import keep_angles
        from sana.evaluation.angles import geneval_judge
        from sana.evaluation.angles import search as find

        judge = geneval_judge(
            parts, prompts=search.prompts, images=search.images, seed=search.seed, batch_size=search.batch_size
        )
        with machine.in_use(parts):
            found = find(judge, search.steps)
        if not search.dry_run:
            keep_angles(folder, {steps: one.angles for steps, one in found.items()})
    for steps, one in found.items():
        terminal.result(f"{steps}  {one.score:.3f}  {', '.join(f'{angle:g}' for angle in one.angles)}")
    kept = {steps: {"score": one.score, "angles": list(one.angles)} for steps, one in found.items()}
    terminal.document({"angles": kept, "kept": not search.dry_run, "warnings": terminal.warnings})
    return 0


GROUPS = (Group(title="the search", options=Search), MACHINE)
