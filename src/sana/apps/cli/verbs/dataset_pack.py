"""`sana dataset pack`: a data set written as tars; goes on where it was stopped, and every file appears whole."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.data.samples import Dataset

USAGE = "sana dataset pack DATA OUT [options]"
DESCRIPTION = """\
Write a data set as tars with a wids-meta.json, as the original code reads them: pictures of any shape as they are
stored, a record with prompt, width and height beside each, CLIP scores beside each tar. The same data set gives the
same bytes. Started again, it goes on where it was stopped.

  sana dataset pack my-pictures shards --samples 1000"""
STATE = ".pack.json"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How it is written."""

    samples: Annotated[int, Spelling(value="N")] = 1000
    """Samples in a tar."""
    tolerance: Annotated[float, Spelling(value="SHARE")] = 0.01
    """Share of broken samples that are left out; with more of them nothing is written."""
    force: bool = False
    """Write over tars of another packing that are there."""


GROUPS = (Group(title="packing", options=Packing),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Pack a data set."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Packing(**arguments.take(Packing, given))
    if len(names) != 2:
        raise InvalidInput("Name a data set and a folder for the tars: sana dataset pack my-pictures shards")
    if options.samples < 1:
        raise InvalidInput(f"--samples must be at least 1, not {options.samples}.")

    from sana.data.examine import survey
    from sana.data.open import open_source
    from sana.data.packing import keys

    if not names[1] or "\0" in names[1]:
        raise InvalidInput("The folder for the tars has no name that a folder can have. Give another.")
    source, out = open_source(names[0]), Path(os.path.expanduser(names[1]))
    packed = Path(os.path.expanduser(names[0])).resolve()
    if out.resolve() in (packed, packed.parent):
        raise InvalidInput("The tars would lie among what is packed. Give another folder.")
    found = survey(source, tolerance=options.tolerance)
    numbers = list(dict.fromkeys(found.indices))
    for finding in found.findings:
        if finding.is_broken:
            terminal.warn(f"left out: {finding}")
    if len(numbers) < len(found.indices):
        terminal.warn("Tars have no repeats: each picture is packed once, whatever the names of the folders say.")
    wanted = {"source": source.identity(), "samples": options.samples, "shards": []}
    state = _begin(out, wanted, force=options.force)
    named = keys(source, numbers)
    parts = [slice(start, start + options.samples) for start in range(0, len(numbers), options.samples)]
    with terminal.count(len(parts), len(state["shards"]), "packing") as progress:
        for number in range(len(state["shards"]), len(parts)):
            state["shards"].append(_pack(out, source, number, numbers[parts[number]], named[parts[number]], terminal))
            _write(out / STATE, state)
            progress.advance(f"tar {number + 1} of {len(parts)}")
    return _finish(out, names[0], state, terminal)


def _begin(out: Path, wanted: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """Return how far an earlier packing of the same came, or a fresh state.

    Raises:
        InvalidInput: there are tars of another.
    """
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file. Give a folder for the tars.")
    from sana.checkpoints.storage import sweep

    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    before = _state(out)
    if before is not None and all(before.get(key) == wanted[key] for key in ("source", "samples")):
        return {**wanted, "shards": list(itertools.takewhile(lambda shard: _is_whole(out, shard), before["shards"]))}
    others = sorted([*out.glob("*.tar"), *out.glob("wids-meta.json")])
    if others and not force:
        raise InvalidInput(f"{out} holds {others[0].name} of another packing. Give another folder, or --force.")
    for other in [*others, *out.glob("*_scores.json")]:
        other.unlink()
    _write(out / STATE, wanted)  # first of all: what is there when this is killed must be known as ours
    return wanted


def _state(out: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is no use: the packing begins anew
        return None
    return state if isinstance(state, dict) and isinstance(state.get("shards"), list) else None


def _is_whole(out: Path, shard: Any) -> bool:
    if not isinstance(shard, dict) or not {"url", "nsamples", "bytes"} <= shard.keys():
        return False
    path = out / Path(str(shard["url"])).name
    return path.is_file() and path.stat().st_size == shard["bytes"]


def _pack(
    out: Path, source: "Dataset", number: int, numbers: Sequence[int], names: Sequence[str], terminal: Terminal
) -> dict[str, Any]:
    """Write one tar, and the scores beside it, and return what it holds."""
    from sana.checkpoints.storage import publish
    from sana.data.packing import SCORES, Packed, shard_name, write_shard

    packed: list[Packed] = []
    name = shard_name(number)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            packed[:] = [write_shard(file, source, numbers, names)]

    publish(out / f"{name}.tar", write)
    for finding in packed[0].findings:
        terminal.warn(f"left out: {finding}")
    if packed[0].scores:
        _write(out / f"{name}{SCORES}.json", packed[0].scores)
    return {"url": f"{name}.tar", "nsamples": packed[0].samples, "bytes": (out / f"{name}.tar").stat().st_size}


def _finish(out: Path, name: str, state: dict[str, Any], terminal: Terminal) -> int:
    from sana.data.packing import index_of

    shards = [(shard["url"], shard["nsamples"]) for shard in state["shards"]]
    _write(out / "wids-meta.json", index_of(Path(name).name, shards))
    count, size = sum(n for _, n in shards), sum(shard["bytes"] for shard in state["shards"])
    terminal.result(f"{out}: {count} samples in {len(shards)} tars, {size / 1e6:,.1f} MB")
    document = {"folder": str(out), "samples": count, "bytes": size, "shards": state["shards"]}
    terminal.document({**document, "warnings": terminal.warnings})
    return 0


def _write(path: Path, value: Any) -> None:
    from sana.checkpoints.storage import write_json

    write_json(path, value)
