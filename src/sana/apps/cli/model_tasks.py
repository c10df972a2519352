"""What `sana models` does with one model: fetch it, hold its files against their digests, remove it."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from sana.apps.cli import cache
from sana.apps.cli.known import terms
from sana.apps.cli.machine import Machine, hub_bars
from sana.apps.cli.output import Terminal, duration, is_terminal, listed, printable
from sana.cards import CARDS, Card
from sana.checkpoints import library
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError


class GoldenDiffers(SanaError):
    """A model does not give the values that were kept for it."""

    exit_code = 3


def pull(name: str, revision: str | None, variant: str | None, terminal: Terminal) -> dict[str, Any]:
    """Download what of a model is not here yet, after saying how large it is and on which terms.

    Raises:
        ModelNotFound: the hub does not have it, or does not answer; or the disk is too small.
        CheckpointError: it has no such variant, or came damaged.
    """
    card = library.card_of(name)
    if card is not None and card.folder is not None:
        terminal.say(f"{name} is built in: nothing needs to be fetched.")
        return {"name": name, "folder": None, "downloaded_bytes": 0}
    if Path(name).expanduser().is_dir():
        raise InvalidInput(
            f"{name} is a folder here: nothing needs to be fetched. For the model on the hub, use its id."
        )
    repo = _repository(name)
    if variant is None and card is not None and card.name == name:
        variant = card.variant
    began, before = time.perf_counter(), cache.repository_size(repo)
    if not cache.is_here(name, revision, variant):
        _announce(name, card, revision, variant, terminal)
    with hub_bars(shown=not terminal.quiet and is_terminal(sys.stderr)):
        located = cache.fetch(name, revision, variant)
    gained = cache.repository_size(repo) - before
    seconds = duration(time.perf_counter() - began)
    told = f"{cache.said(gained)} in {seconds}" if gained > 0 else "nothing was fetched, all of it was here"
    terminal.say(f'{name} is here, commit {str(located.commit)[:12]} ({told}). To draw: sana -m {name} "PROMPT"')
    place = located.file or located.folder
    terminal.result(str(place))
    return {"name": name, "commit": located.commit, "folder": str(place), "downloaded_bytes": max(gained, 0)}


def verify(name: str, revision: str | None, terminal: Terminal) -> dict[str, Any]:
    """Compare the files of a model with what they should be; every file is read to its end.

    Raises:
        ModelNotFound: it is not here.
        CheckpointError: files are damaged, or missing.
        GoldenDiffers: the files are whole, and yet it does not draw what it drew.
    """
    try:
        located = cache.fetch(name, revision, None, offline=True)
    except ModelNotFound as error:
        if Path(name).expanduser().is_dir() or library.card_of(name) is None:
            raise
        raise ModelNotFound(f"{name} is not whole on this computer. To fetch it: sana models pull {name}") from error
    whole = library.model_files(located.folder) if located.file is None else [(located.file, located.folder)]
    paths = list(whole)
    checked = []
    with terminal.count(max(sum(path.stat().st_size for path, _ in paths if path.exists()), 1)) as progress:
        for path, folder in paths:
            checked.append(one := library.check_file(path, folder))
            progress.move(progress.done + one.size, progress.total, one.name)
            if one.state == "damaged":
                terminal.result(f"damaged  {one.name}: {one.why}")
    states = [one.state for one in checked]
    report = {
        "name": name,
        "folder": str(located.folder),
        "files": [{"file": one.name, "bytes": one.size, "state": one.state} for one in checked],
    }
    terminal.draft = report
    damaged = [one.name for one in checked if one.state == "damaged"]
    if damaged:
        mend = _mending(name, located.card)
        raise CheckpointError(f"{len(damaged)} of the {len(checked)} files of {name} are damaged. Mend it: {mend}.")
    size = cache.said(sum(one.size for one in checked))
    unknown = f", {states.count('unknown')} carry no digest" if "unknown" in states else ""
    terminal.result(f"files    {states.count('whole')} of {len(checked)} are as they were saved ({size}){unknown}")
    report["golden"] = _golden(name, terminal)
    return report


def _mending(name: str, card: Card | None) -> str:
    if card is not None and card.folder is not None:
        return "install sanakit again"
    return "copy it again" if Path(name).expanduser().is_dir() else f"sana models rm {name}, then pull it again"


def _golden(name: str, terminal: Terminal) -> list[dict[str, Any]]:
    """Draw what was drawn once, and compare; only of models of which something is kept.

    Raises:
        GoldenDiffers: the model does not draw what it drew.
    """
    from sana.engine import golden

    if name not in golden.GOLDEN:
        terminal.result(f"golden   {golden.NOT_CHECKED}")
        return [{"check": "golden", "passed": None, "said": golden.NOT_CHECKED}]
    machine = Machine(model=name)
    parts, _ = machine.load(terminal)
    with machine.in_use(parts):
        findings = golden.verify(parts)
    for one in findings:
        terminal.result(f"{one.check:<8} {'' if one.passed else 'WRONG: '}{one.said}")
    terminal.draft["golden"] = told = [dataclasses.asdict(one) for one in findings]
    if not all(one.passed for one in findings):
        raise GoldenDiffers(f"{name} does not draw what it drew: its files or this computer's arithmetic are at fault.")
    return told


def remove(name: str, yes: bool, terminal: Terminal) -> dict[str, Any]:
    """Delete a model from the cache, and say how many bytes that freed; on a terminal it is asked first.

    Raises:
        ModelNotFound: it is not in the cache.
        InvalidInput: it is built in, or a folder of its own, or the user said no.
    """
    if name not in CARDS and Path(name).expanduser().is_dir():
        raise InvalidInput(f"{name} is a folder of yours, not a download. Remove it yourself if you mean it.")
    repo = library.hub_id(name)
    held = library.find(repo, cache.folder())
    if held is None:
        raise ModelNotFound(f"{name} is not in {cache.tilde(cache.folder())}, so there is nothing to remove.")
    size = cache.said(held.size)
    terminal.say(f"{name} takes {size} in {cache.tilde(held.folder)}, with all its revisions and variants.")
    if not yes and is_terminal(sys.stdin) and is_terminal(sys.stderr) and not _agreed("Remove it? [y/N] "):
        raise InvalidInput("Nothing was removed.")
    freed = library.remove(held, cache.folder())
    terminal.result(f"{name} was removed: {cache.said(freed)} are free again.")
    return {"name": name, "folder": str(held.folder), "freed_bytes": freed}


def _repository(name: str) -> str:
    from sana.checkpoints.references import is_reference, parse_reference

    return parse_reference(name).repo if is_reference(name) else library.hub_id(name)


def _announce(name: str, card: Card | None, revision: str | None, variant: str | None, terminal: Terminal) -> None:
    """Say what a download brings, how large it is and on which terms, and check that there is room for it."""
    repo = _repository(name)
    asked = None if cache.is_offline() or "://" in name else library.remote(repo, revision, variant)
    about = cache.download_size(card) if card is not None and card.name == name else None
    size = asked.size if asked is not None and asked.size else about
    here = cache.repository_size(repo)
    if size is not None and not cache.is_offline():
        begun = f", of which {cache.said(here)} are here" if here else ""
        place = f"{cache.said(cache.free_bytes(cache.folder()))} are free in {cache.tilde(cache.folder())}"
        licence = terms(card) if card is not None else (asked.licence if asked is not None else None)
        terminal.say(f"{name} is fetched from {cache.host()}/{repo}:")
        rows = {
            "size": f"{'about ' if size == about else ''}{cache.said(size)}{begun}; {place}",
            "licence": printable(licence or "not stated; read the page of the model before you use it"),
            "terms": card.terms if card is not None else "",
        }
        for line in listed(rows):
            terminal.say(line)
        cache.check_room(name, size - here)


def _agreed(question: str) -> bool:
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
