"""`sana dataset`: what can be done with pictures and captions before a training."""

import importlib
from collections.abc import Sequence

from sana.apps.cli import arguments
from sana.apps.cli.output import Terminal, listed
from sana.errors import InvalidInput, did_you_mean

USAGE = "sana dataset TASK [arguments] [options]"
DESCRIPTION = "Prepare pictures and captions. `sana dataset TASK --help` lists the options of a task.\n\ntasks:"


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the task that the first word names."""
    if words and words[0] in ("-h", "--help"):
        rows = {name: summary for name, (_, summary) in TASKS.items()}
        arguments.read(words[:1], (), usage=USAGE, description="\n".join([DESCRIPTION, *listed(rows)]))
    if not words or words[0].startswith("-"):
        raise InvalidInput(f"Say what to do: sana dataset {', '.join(TASKS)}. More: sana dataset --help")
    if words[0] not in TASKS:
        hint = did_you_mean(words[0][:40], TASKS)
        raise InvalidInput(f"`sana dataset` does not know '{words[0][:40]}'.{hint} It does {', '.join(TASKS)}.")
    code: int = importlib.import_module(TASKS[words[0]][0]).run(words[1:], terminal)
    return code


TASKS: dict[str, tuple[str, str]] = {
    "caption": ("sana.apps.cli.verbs.dataset.caption", "write captions with a vision-language model"),
    "score": ("sana.apps.cli.verbs.dataset.score", "score captions with CLIP"),
    "features": ("sana.apps.cli.verbs.dataset.features", "encode pictures and texts before a training"),
}
"""Task -> the module whose `run(words, terminal)` carries it out, and what it does."""
