"""`sana dataset features`: encode the pictures and texts of a recipe before its training, alone or with others."""

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.apps.cli.recipes import split_overrides
from sana.apps.cli.values import Shard, read_shard
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.training.dataset_features import DatasetFeatures

USAGE = "sana dataset features RECIPE.toml [RECIPE.toml ...] [--TABLE.KEY VALUE] [options]"
DESCRIPTION = """\
Encode the pictures and texts that recipes train on, into the folder that each
names under [flow_matching.data] as features. The training then reads them, and
its losses are the same. Whatever is missing when a training begins it computes
by itself.

  sana dataset features my.toml                 goes on where it was stopped
  sana dataset features my.toml --shard 2/4     the second of four processes

The paths of the folders are printed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the verb."""

    shard: Annotated[Shard | None, Spelling(value="I/N", read=read_shard)] = None
    """Compute one of N equal shares; N processes with the same recipe share the work."""


GROUPS = (Group(title="the work", options=Options),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Compute the features of every recipe, and print where they are."""
    rest, overrides = split_overrides(words)
    recipes, given = arguments.read(rest, GROUPS, usage=USAGE, description=DESCRIPTION)
    if not recipes:
        raise InvalidInput("Which recipe? For example: sana dataset features my.toml")
    shard = Options(**arguments.take(Options, given)).shard or Shard(number=1, of=1)

    from sana.training.config import load_recipe, located
    from sana.training.precompute import features_of

    loaded = [(path, load_recipe(path, overrides)) for path in recipes]  # all of them before the first is computed
    command = shlex.join(["sana", "dataset", "features", *words])
    done: list[dict[str, Any]] = []
    for path, recipe in loaded:
        terminal.say(f"{path}: looking at the pictures")
        with located(path, Path(path).read_text(encoding="utf-8"), overrides):
            found = features_of(recipe, path)
        for features in found:
            done += _compute(features, path, (shard.number, shard.of), command, terminal)
            terminal.draft = {"features": list(done), "warnings": terminal.warnings}
    terminal.document(terminal.draft)
    return 0


def _compute(
    features: "DatasetFeatures", path: str, share: tuple[int, int], command: str, terminal: Terminal
) -> list[dict[str, Any]]:
    """Compute a share of what is missing, and return what there is then.

    Raises:
        KeyboardInterrupt: the user asked to stop; the text says how to go on.
    """
    began = time.perf_counter()
    missing = [(kind, file) for kind, file in features.shards(share) if not file.exists()]
    total, new = sum(len(features.span(kind, file)) for kind, file in missing), Counter[Path]()
    try:
        with terminal.count(max(1, total), text=path) as progress:
            for file, there, of in features.compute(share, lambda: progress.advance(f"{path} · features")):
                new[file.parent] += 1
                terminal.event("shard", file=str(file), done=there, total=of)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{new.total()} of {len(missing)} missing files are made. To go on: {command}"
        ) from stop
    seconds = round(time.perf_counter() - began, 1)
    kinds = (*features.pictures, "texts")
    facts = [_facts(features, kind, path, new[features.place(kind)], seconds) for kind in kinds]
    for told in facts:
        rest = f", {told['missing']} of other shares are missing" if told["missing"] else ""
        terminal.say(f"{told['kind']}: {told['items']} in {told['files']} files, {told['computed']} of them new{rest}")
        terminal.result(told["folder"])
    return facts


def _facts(features: "DatasetFeatures", kind: str, path: str, made: int, seconds: float) -> dict[str, Any]:
    files = [file for of, file in features.shards() if of == kind]
    return {
        "recipe": path,
        "kind": kind,
        "folder": str(features.place(kind)),
        "items": features.items(kind),
        "files": len(files),
        "computed": made,
        "missing": sum(not file.exists() for file in files),
        "bytes": sum(file.stat().st_size for file in files if file.exists()),
        "seconds": seconds,
    }
