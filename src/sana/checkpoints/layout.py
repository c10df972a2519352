"""Names inside a model folder: which files belong to which part, variant and format. Opens JSON, never a tensor.

The layout is the published one of the SANA checkpoints: `model_index.json` and one subfolder per part, weights as one
file or as shards with an index, and "variants" (`fp16`, `bf16`) of the same weights side by side.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.checkpoints.built_in import part_folder
from sana.checkpoints.foreign import first_line, foreign
from sana.errors import CheckpointError, InvalidInput, ModelNotFound

MODEL_INDEX = "model_index.json"
LAYOUT_VERSION = "0.42.1"
"""The release of the reference whose layout is written; readers of these folders look for the key."""
ROOT = ""
"""Name of the part whose files lie in the folder itself: a model saved alone."""

MAX_JSON = 1 << 24
"""Bytes of the largest configuration or shard index that is read."""

_SHARD = r"-\d+-of-\d+"
_INDEX_FILE = re.compile(r".*\.index(\.[\w-]+)?\.json")
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, kw_only=True)
class Part:
    """File names of one kind of part; a part without `stem` has no weights."""

    config: str
    stem: str | None = None
    pickle_stem: str | None = None

    def names(self, variant: str | None, suffix: str) -> tuple[str, str]:
        """Return the names of the single weights file and of the shard index.

        Errors: InvalidInput for a variant that cannot be part of a file name.
        """
        if variant is not None and not re.fullmatch(r"[\w-]+", variant):
            raise InvalidInput(f"variant is {variant!r}; it must be a word such as 'fp16' or 'bf16'.")
        dot = f".{variant}" if variant else ""
        stem = self.pickle_stem if suffix == "bin" else self.stem
        return f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"

    def is_shard(self, name: str, variant: str | None, suffix: str) -> bool:
        """Tell whether `name` is a shard of that variant, in today's or in the older way of writing it."""
        dot = re.escape(f".{variant}") if variant else ""
        stem = self.pickle_stem if suffix == "bin" else self.stem
        return bool(re.fullmatch(rf"{stem}({dot}{_SHARD}|{_SHARD}{dot})\.{suffix}", name))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files that together hold the tensors of one part."""

    folder: Path
    files: tuple[str, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files with their folder."""
        return tuple(self.folder / name for name in self.files)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; the literal `-Infinity` of published scheduler files is accepted.

    Errors: ModelNotFound when there is no file, CheckpointError when it cannot be read, is absurdly large, or holds
    no JSON object, a key twice or NaN.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise CheckpointError(f"{path} has more than {MAX_JSON >> 20} MB, which no model's has: do not use it.")
        if kind := foreign(data[:512]):
            raise CheckpointError(f"{path} is {kind}.")
        value = json.loads(data.decode(), object_pairs_hook=_without_doubles, parse_constant=_infinity)
    except FileNotFoundError as error:
        text = f"There is no {path.name} in {path.parent}: it is no model folder, or its saving was interrupted."
        raise ModelNotFound(text) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_line(error)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def part_of(name: str) -> Part:
    """Return the file names of a part by the name of its subfolder; an unknown name is a model of ours."""
    return PARTS.get(name, PARTS[ROOT])


def index_parts(folder: Path) -> dict[str, tuple[str, str] | None]:
    """Return what `model_index.json` lists: part -> (library, class), or None for a part saved as absent."""
    parts: dict[str, tuple[str, str] | None] = {}
    for name, entry in read_json(folder / MODEL_INDEX).items():
        if name.startswith("_") or (not isinstance(entry, list) and name not in PARTS):
            continue
        if not re.fullmatch(r"\w+", name):
            raise CheckpointError(f"{folder / MODEL_INDEX} names a part {name[:80]!r}, which is no folder name.")
        if entry == [None, None]:
            parts[name] = None
        elif isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry):
            parts[name] = (entry[0], entry[1])
        else:
            text = f"{folder / MODEL_INDEX} must name library and class of part '{name}'"
            raise CheckpointError(f"{text}: copy the folder again.")
    return parts


def find_weights(folder: Path, part: Part, variant: str | None = None, use_safetensors: bool | None = None) -> Weights:
    """Find the weights of a part in its folder; an index with all its shards goes before a single file.

    `use_safetensors=False` allows pickled `.bin` files and prefers them.
    Errors: ModelNotFound (an OSError) when no file fits; CheckpointError when shards are missing or only pickles fit.
    """
    for suffix in _suffixes(use_safetensors):
        single, index = part.names(variant, suffix)
        shards = _shard_names(folder / index) if (folder / index).is_file() else ()
        absent = [name for name in shards if not (folder / name).is_file()]
        if shards and not absent:
            return Weights(folder=folder, files=shards)
        if (folder / single).is_file():
            return Weights(folder=folder, files=(single,))
        if absent:
            text = f"{folder / index} lists {len(shards)} files of which {len(absent)} are missing, first {absent[0]}"
            raise CheckpointError(f"{text}: download or copy the folder again.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    raise _no_weights(str(folder), names, part, variant)


def part_variants(folder: Path, parts: Iterable[str], variant: str | None) -> dict[str, str | None]:
    """Choose for each part with weights the variant to load: the wanted one where it exists, else the plain files.

    Errors: CheckpointError when no part at all has the variant.
    """
    weighted = [name for name in parts if part_of(name).stem]
    if variant is None:
        return dict.fromkeys(weighted)
    there = {name: _names(part_folder(folder, name)) for name in weighted}
    chosen = {name: variant if _has_variant(there[name], name, variant) else None for name in weighted}
    if weighted and not any(chosen.values()):
        available = sorted({found for name in weighted for found in _variants(there[name], part_of(name))})
        raise no_such_variant(variant, available)
    return chosen


def sole_variant(folder: Path, parts: Iterable[str]) -> str | None:
    """Return the one variant that all parts without plain weights have, or None where plain weights will do.

    Errors: CheckpointError when several variants would do, naming them.
    """
    common: set[str] | None = None
    for name in parts:
        part, names = part_of(name), _names(part_folder(folder, name))
        if part.stem is None or not names.isdisjoint(part.names(None, "safetensors")):
            continue
        found = set(_variants({file for file in names if ".safetensors" in file}, part))
        common = found if common is None else common & found
    if common and len(common) > 1:
        several = f"no plain weights but the variants {', '.join(sorted(common))}"
        raise CheckpointError(f"{folder} has {several}: keep one of them in a folder of its own, and name that one.")
    return common.pop() if common else None


def missing_files(
    folder: Path,
    parts: Sequence[str] | None,
    variant: str | None,
    use_safetensors: bool | None = None,
    *,
    plain_will_do: bool = False,
    optional: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return what a folder lacks to load `parts` (None: all that its index lists), as names relative to the folder.

    With `plain_will_do` a part without the wanted variant may have plain weights instead. Of `optional` parts those
    are needed that the index lists.
    """
    missing: list[str] = []
    if parts is None and not (folder / MODEL_INDEX).is_file():
        return (MODEL_INDEX,)
    listed = index_parts(folder) if (folder / MODEL_INDEX).is_file() else {}
    there = [name for name, entry in listed.items() if entry is not None]
    parts = there if parts is None else [*parts, *(name for name in optional if name in there and name not in parts)]
    for name in parts:
        part, place = part_of(name), part_folder(folder, name)
        prefix = f"{name}/" if name else ""
        if not (place / part.config).is_file():
            missing.append(prefix + part.config)
        if part.stem is None:
            continue
        wanted = variant
        if plain_will_do and variant and not _has_variant(_names(place), name, variant):
            wanted = None
        try:
            find_weights(place, part, wanted, use_safetensors)
        except (CheckpointError, ModelNotFound):
            missing.append(prefix + part.names(wanted, "safetensors")[0])
    return tuple(missing)


def wanted_files(
    listing: Iterable[str],
    parts: Sequence[str] | None,
    variant: str | None,
    use_safetensors: bool | None = None,
    optional: Sequence[str] = (),
) -> tuple[str, ...]:
    """Choose from the files of a repository those that `parts` (None: all known ones) in this variant need.

    Of `optional` parts those are wanted that the repository has.

    Errors: as `find_weights` and `part_variants`, before anything is downloaded.
    """
    folders: dict[str, set[str]] = {}
    for path in listing:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    wanted = [MODEL_INDEX] if MODEL_INDEX in folders.get(ROOT, ()) and parts != (ROOT,) else []
    if parts is None:
        parts = [name for name in PARTS if name and name in folders]
    parts = [*parts, *(name for name in optional if name in folders and name not in parts)]
    found_variant = False
    for name in parts:
        part, names = part_of(name), folders.get(name, set())
        prefix = f"{name}/" if name else ""
        chosen = {file for file in names if file.endswith(_SMALL_FILES) and not _INDEX_FILE.fullmatch(file)}
        chosen -= {MODEL_INDEX}
        if part.stem:
            has_variant = _has_variant(names, name, variant)
            found_variant |= has_variant
            chosen |= _listed_weights(names, part, variant if has_variant else None, use_safetensors, prefix or ".")
        wanted += [prefix + file for file in sorted(chosen)]
    if variant and not found_variant and any(part_of(name).stem for name in parts):
        found = {found for name in parts for found in _variants(folders.get(name, set()), part_of(name))}
        raise no_such_variant(variant, sorted(found))
    return tuple(wanted)


def no_such_variant(variant: str, available: Sequence[str]) -> CheckpointError:
    """Build the error for a variant that no part has; the wording of its first half is documented elsewhere."""
    text = f"You are trying to load the model files of the `variant={variant}`, but no such modeling files are"
    choice = f"Available: {', '.join(available)}." if available else "There are only plain files: leave variant out."
    return CheckpointError(f"{text} available. {choice}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"'{name}' is there twice")
        table[name] = value
    return table


def _infinity(word: str) -> float:
    if word == "NaN":
        raise ValueError("NaN is no value")
    return float(word)


def _suffixes(use_safetensors: bool | None) -> tuple[str, ...]:
    return ("bin", "safetensors") if use_safetensors is False else ("safetensors",)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _shard_names(index: Path) -> tuple[str, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, so the shards are unknown: copy the folder again.")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} points outside its folder, to {name!r}: do not use this model.")
    return tuple(files)


def _has_variant(names: Collection[str], part_name: str, variant: str | None) -> bool:
    return variant is None or variant in _variants(names, part_of(part_name))


def _variants(names: Collection[str], part: Part) -> Iterator[str]:
    """Yield the variants of which `names` holds weights, shard indices included."""
    stems = "|".join({part.stem or "", part.pickle_stem or ""})
    single = re.compile(rf"(?:{stems})\.([\w-]+?)(?:{_SHARD})?\.(?:safetensors|bin)")
    index = re.compile(rf"(?:{stems})\.(?:safetensors|bin)\.index\.([\w-]+)\.json")
    for name in names if part.stem else ():
        if match := single.fullmatch(name) or index.fullmatch(name):
            yield match[1]


def _listed_weights(
    names: set[str], part: Part, variant: str | None, use_safetensors: bool | None, where: str
) -> set[str]:
    for suffix in _suffixes(use_safetensors):
        single, index = part.names(variant, suffix)
        if index in names:
            return {index} | {name for name in names if part.is_shard(name, variant, suffix)}
        if single in names:
            return {single}
    raise _no_weights(where, names, part, variant)


def _no_weights(where: str, names: set[str], part: Part, variant: str | None) -> CheckpointError | ModelNotFound:
    pickled = [name for name in part.names(variant, "bin") if name in names]
    if pickled:
        advice = "if you trust their author pass use_safetensors=False once and save the model again"
        return CheckpointError(f"{where} has only pickled weights ({pickled[0]}), which are not opened: {advice}.")
    single, plain = part.names(variant, "bin")[0], part.names(None, "safetensors")[0]
    text = f"There are no weights in {where}, no {part.names(variant, 'safetensors')[0]}"
    others = sorted(set(_variants(names, part)) - {variant})
    if others:
        text += f": pass variant='{others[0]}' to load the variant that is there"
    elif variant and plain in names:
        text += ": leave variant out to load the plain file that is there"
    else:
        text += ": check the folder, or download the model again"
    # Callers of comparable libraries look for the words in brackets.
    return ModelNotFound(f"{text} (Error no file named {single} found in directory {where}.)")


_MODEL = Part(config="config.json", stem="diffusion_pytorch_model", pickle_stem="diffusion_pytorch_model")

PARTS: dict[str, Part] = {
    ROOT: _MODEL,
    "tokenizer": Part(config="tokenizer_config.json"),
    "text_encoder": Part(config="config.json", stem="model", pickle_stem="pytorch_model"),
    "vae": _MODEL,
    "transformer": _MODEL,
    "controlnet": _MODEL,
    "scheduler": Part(config="scheduler_config.json"),
}
