"""`sana dataset`: what can be done with pictures and captions before a model is trained on them. A task is a module."""

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput, did_you_mean


class Task(NamedTuple):
    """A task: the module whose `run(words, terminal)` carries it out, and what it does."""

    module: str
    summary: str


TASKS = {
    "check": Task("sana.apps.cli.verbs.dataset_check", "find what is broken, tiny, double, empty or too long"),
    "pack": Task("sana.apps.cli.verbs.dataset_pack", "write a folder as tars that training reads fast"),
    "unpack": Task("sana.apps.cli.verbs.dataset_unpack", "write tars as a folder of pictures again"),
    "caption": Task("sana.apps.cli.verbs.dataset_captioning", "write captions with a vision-language model"),
    "score": Task("sana.apps.cli.verbs.dataset_scoring", "write how well captions describe their pictures (CLIP)"),
    "caption-stats": Task("sana.apps.cli.verbs.dataset_captions", "lengths, words, doubles and scores of the captions"),
    "preview": Task("sana.apps.cli.verbs.dataset_preview", "draw pictures as they are cut, with their captions"),
    "features": Task("sana.apps.cli.verbs.dataset_features", "encode what a recipe trains on, before it does"),
}
USAGE = "sana dataset TASK DATA [options]"
DESCRIPTION = """\
Look after a data set. DATA is a folder of pictures with a .txt beside each, or with a metadata.jsonl; or a .tar, or a
folder of them, as WebDataset and the original code have it.

{tasks}

`sana dataset TASK --help` lists the options of a task."""


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the task that is named first."""
    if not words or words[0] not in TASKS:
        tasks = "\n".join(f"  sana dataset {name:<14} {task.summary}" for name, task in TASKS.items())
        names, _ = arguments.read(words, (), usage=USAGE, description=DESCRIPTION.format(tasks=tasks))
        if not names:
            raise InvalidInput("Say what to do, for example: sana dataset check my-pictures")
        hint = did_you_mean(names[0], TASKS)
        raise InvalidInput(f"`sana dataset` does not know '{names[0][:40]}'.{hint} It does {', '.join(TASKS)}.")
    code: int = importlib.import_module(TASKS[words[0]].module).run(words[1:], terminal)
    return code


def groups() -> tuple[Group, ...]:
    """Return the flags of all tasks, for a shell that completes them."""
    return tuple(group for task in TASKS.values() for group in importlib.import_module(task.module).GROUPS)


def one_path(names: Sequence[str], task: str) -> str:
    """Return the data set that is named.

    Raises:
        InvalidInput: none is, or several are.
    """
    if len(names) != 1:
        raise InvalidInput(f"Name one data set. For example: sana dataset {task} my-pictures")
    return names[0]
