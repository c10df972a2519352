"""`sana dataset unpack`: tars written as a folder of pictures, which appears whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput

USAGE = "sana dataset unpack TARS FOLDER [options]"
DESCRIPTION = """\
Write a tar, or a folder of them, as a folder of pictures, to look at and to mend: pictures as they are stored, and
their captions with names, weights and CLIP scores in a metadata.jsonl. The folder must be new or empty.

  sana dataset unpack shards my-pictures"""


@dataclass(frozen=True, kw_only=True)
class Unpacking:
    """What is put up with."""

    tolerance: Annotated[float, Spelling(value="SHARE")] = 0.01
    """Share of broken samples that are left out; with more of them nothing is written."""


GROUPS = (Group(title="unpacking", options=Unpacking),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Unpack tars."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Unpacking(**arguments.take(Unpacking, given))
    if len(names) != 2:
        raise InvalidInput("Name the tars and a folder for the pictures: sana dataset unpack shards my-pictures")

    from sana.checkpoints.storage import saving
    from sana.data.examine import check_share, survey
    from sana.data.open import open_source
    from sana.data.unpacking import unpack
    from sana.data.webdataset import ShardSource

    folder = _empty(names[1])
    source = open_source(names[0])
    if not isinstance(source, ShardSource):
        raise InvalidInput(f"{names[0][:200]} holds no tars but pictures, which need no unpacking. Name tars.")
    found = survey(source, tolerance=options.tolerance)
    findings = [finding for finding in found.findings if finding.is_broken]
    with (
        saving(folder) as stage,
        terminal.count(len(found.indices), 0, "unpacking") as progress,
    ):
        for number, finding in enumerate(unpack(source, found.indices, stage), 1):
            findings += [] if finding is None else [finding]
            progress.advance(f"picture {number} of {len(found.indices)}")
        check_share(findings, found.total, options.tolerance)
    for finding in findings:
        terminal.warn(f"left out: {finding}")
    count = found.total - sum(finding.samples for finding in findings)
    terminal.result(f"{folder}: {count} pictures with their captions")
    terminal.document({"folder": str(folder), "samples": count, "warnings": terminal.warnings})
    return 0


def _empty(name: str) -> Path:
    """Return the folder to write into. Errors: InvalidInput where something is there."""
    if not name or "\0" in name:
        raise InvalidInput("The folder for the pictures has no name that a folder can have. Give another.")
    folder = Path(os.path.expanduser(name))
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file. Give a folder for the pictures.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty, and nothing is written over. Give a new folder.")
    return folder
