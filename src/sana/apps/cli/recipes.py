"""Recipes as a command line names them: with overrides, each with its folder and in its turn."""

import contextlib
import dataclasses
import functools
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from sana.training.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One recipe and where it is trained."""

    name: str
    recipe: "Recipe"
    folder: Path

    @property
    def export(self) -> Path:
        """Where the trained part goes."""
        return self.folder / "export"

    located: "Callable[[], contextlib.AbstractContextManager[None]]"
    """Adds to a sentence about a setting where it was given."""

    def record(self) -> Any:
        """Return what `FINISHED` holds beside the data: the recipe, as JSON reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self.recipe)))


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--table.key VALUE` and `--table.key=VALUE` out of a command line.

    Raises:
        InvalidInput: an override has no value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag, mark, value = word.partition("=")
        if not flag.startswith("--") or "." not in flag:
            rest.append(word)
        elif mark or (queue and not queue[0].startswith("--")):
            overrides[flag[2:].replace("-", "_")] = value if mark else queue.pop(0)
        else:
            raise InvalidInput(f"{flag} needs a value.")
    return rest, overrides


def plan(recipes: Sequence[str], overrides: Mapping[str, str], output: str | None) -> list[Stage]:
    """Read all recipes, before the first is trained, each with the overrides that concern it.

    Raises:
        InvalidInput: a recipe or an override is wrong, or two recipes would share a folder.
        ModelNotFound: there is no such recipe.
    """
    from sana.training.config import load_recipe, located
    from sana.training.start import settings_of

    stages: list[Stage] = []
    tables = {path: _tables(path) for path in recipes}
    for path in recipes:
        own = {key: text for key, text in overrides.items() if _concerns(key, path, tables)}
        file = Path(path)
        root = Path(output) if output is not None else _root(file)
        recipe = load_recipe(path, own)
        where = functools.partial(located, path, file.read_text(encoding="utf-8"), own)
        with where():
            settings_of(recipe)
        stages.append(Stage(name=file.stem, recipe=recipe, folder=root / file.stem, located=where))
    folders = [stage.folder for stage in stages]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InvalidInput(f"Two of the recipes would be trained in {folder}. Train them with separate commands.")
    _check_moved(stages, recipes)
    for stage in stages:
        with stage.located():
            _check_begun(stage, stages)
    return list(_in_order(stages))


def _in_order(stages: Sequence[Stage]) -> Iterator[Stage]:
    """Yield the stages as given, but each after those whose exports it names: shells sort 10 before 2."""
    waiting = list(stages)
    while waiting:
        exports = {os.path.abspath(stage.export) for stage in waiting}
        ready = next((stage for stage in waiting if not exports & _named_paths(stage)), waiting[0])
        waiting.remove(ready)
        yield ready


def _named_paths(stage: Stage) -> set[str]:
    """Return the paths that a stage may mean by its settings, which count from here or from its folder."""
    own = stage.recipe.settings
    tables = [own, *(value for value in own.values() if isinstance(value, Mapping))]
    texts = [value for table in tables for value in table.values() if isinstance(value, str)]
    return {os.path.abspath(path) for text in texts for path in (text, os.path.join(stage.folder, text))}


def _check_begun(stage: Stage, stages: Sequence[Stage]) -> None:
    """Refuse a stage that begins from a run that is not there and that none of the stages makes.

    Raises:
        ModelNotFound: naming the setting; before the stages ahead of it are trained.
    """
    exports = {os.path.abspath(other.export) for other in stages}
    for name in ("start", "teacher", "student"):
        value = str(stage.recipe.settings.get(name, ""))
        is_path = value.startswith(("runs/", "./", "/"))
        places = {os.path.abspath(path) for path in (value, os.path.join(stage.folder, value))}
        if is_path and not places & exports and not any(os.path.exists(place) for place in places):
            raise ModelNotFound(
                f"{stage.recipe.objective}.{name}: There is no model folder '{value}', and no recipe of this command"
                " makes it. Train that first, or name another."
            )


def _check_moved(stages: Sequence[Stage], recipes: Sequence[str]) -> None:
    """Refuse stages that begin from where another of this command would export, had `-o` not moved it.

    Raises:
        InvalidInput: naming both paths.
    """
    for path, other in zip(recipes, stages, strict=True):
        usual = os.path.abspath(_root(Path(path)) / other.name / "export")
        if usual == os.path.abspath(other.export):
            continue
        for stage in stages:
            if stage is not other and usual in _named_paths(stage):
                raise InvalidInput(
                    f"{stage.name} begins from {os.path.relpath(usual)}, but with -o the recipe {other.name} of this"
                    f" command exports to {other.export}. Name that in the recipe, or leave -o out."
                )


def _root(recipe: Path) -> Path:
    """Return the folder of a recipe's runs, where none is given."""
    return Path("runs") / (recipe.resolve().parent.name or "recipes")


def _tables(path: str) -> frozenset[str]:
    """Return the names of a recipe's tables and of its objective; nothing of what `load_recipe` will refuse."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    return frozenset({*content, str(content.get("objective"))})


def _concerns(key: str, path: str, tables: Mapping[str, frozenset[str]]) -> bool:
    """Tell whether an override is for this recipe: its table is there, or common, or in none of the recipes."""
    table = key.partition(".")[0]
    everywhere = table in ("run", "optimizer") or not any(table in found for found in tables.values())
    return everywhere or table in tables[path]
