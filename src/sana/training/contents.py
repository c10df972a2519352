"""What tells the data sets and weights that a recipe names from any others, read from the disk without a model."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sana.data.controls import ControlMaps
from sana.data.identity import Content, content_of, identity_of
from sana.data.open import open_source
from sana.data.samples import BadSample, Dataset, Sample
from sana.training.config import Recipe

MODELS = ("start", "teacher", "student", "autoencoder", "text")
"""Settings that may name a folder of weights, such as the export of another recipe."""


def weights_of(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Return digests of the weights in folders that a recipe names, whose run lies in `folder`: sizes and both ends.

    Models by name or repository are left out: these do not change under their name.
    """
    named = {name: recipe.settings.get(name) for name in MODELS}
    named["control.start"] = (recipe.settings.get("control") or {}).get("start")
    found: dict[str, str] = {}
    for name, value in named.items():
        for place in (folder / str(value), Path(str(value))) if value else ():
            files = sorted(place.rglob("*.safetensors")) if place.is_dir() else []
            if files:
                found[f"{recipe.objective}.{name}"] = _identity(place, files)
                break
    return found


def _identity(place: Path, files: list[Path]) -> str:
    names = [file.relative_to(place).as_posix() for file in files]
    return identity_of(names, lambda number: files[number].open("rb"), None)


def contents(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return what a trainer of the recipe says of its data, by the names of the tables or settings.

    Raises:
        ModelNotFound, InvalidInput, BadData: a data set is not there any more, or cannot be read.
    """
    return {f"{recipe.objective}.{name}": asdict(content) for name, content in _contents(recipe)}


def _contents(recipe: Recipe) -> Iterator[tuple[str, Content]]:
    data, prior = recipe.settings.get("data"), recipe.settings.get("prior")
    if recipe.objective == "autoencoder":
        if data:
            yield "data", content_of(open_source(data), {})
        return
    if data:
        source = open_source(data["path"], prompt=data.get("caption", ""))
        readable = _readable(source)
        controls = data.get("controls", "")
        yield (
            "data",
            content_of(source, readable, ControlMaps(controls, readable.values()).identity() if controls else ""),
        )
    if prior:
        source = open_source(prior["folder"], prompt=prior["prompt"])
        yield "prior", content_of(source, _readable(source))


def _readable(source: Dataset) -> dict[int, Sample]:
    found: dict[int, Sample] = {}
    for index in range(len(source)):
        try:
            found[index] = source.sample(index)
        except BadSample:
            continue
    return found
