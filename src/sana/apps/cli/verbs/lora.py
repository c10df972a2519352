"""`sana lora`: what an adapter is, the same in the dialect of another program, and merged into a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal, listed
from sana.errors import CheckpointError, InvalidInput, did_you_mean

if TYPE_CHECKING:
    from sana.checkpoints.lora.bases import Fit
    from sana.checkpoints.lora.files import Header, LoraFile

USAGE = "sana lora info FILE | convert IN OUT --to DIALECT | merge MODEL LORA[:SCALE]... OUT"
DESCRIPTION = """\
Look into an adapter (LoRA or DoRA), turn it into the dialect of another program, or merge adapters into a model.

  sana lora info my.safetensors                           what it is, for which models
  sana lora convert my.safetensors new.safetensors --to comfyui
  sana lora merge sana-1.6b-1024 my.safetensors:0.8 out   a model that has it in itself

A file, a folder or a hub id names an adapter. To draw with one: sana "PROMPT" --lora FILE 0.8"""


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """What is read, and what is written."""

    to: Literal["peft", "kohya", "comfyui"] | None = None
    """Dialect to convert to; peft is also what diffusers reads."""
    model: Annotated[str | None, Spelling(short="-m", value="MODEL")] = None
    """Model that the adapter is for, where it is none of the known ones."""
    title: Annotated[str | None, Spelling(value="TEXT")] = None
    """Name of the adapter, which other programs show."""
    trigger: Annotated[str | None, Spelling(value="WORDS")] = None
    """Words that call for what it was trained on."""
    weight_name: Annotated[str | None, Spelling(value="FILE")] = None
    """Which file of a folder or repository is the adapter."""
    variant: Annotated[str | None, Spelling(value="NAME")] = None
    """Which variant of the model to merge into, for example bf16."""
    revision: Annotated[str | None, Spelling(value="NAME")] = None
    """Branch, tag or commit of the repository that is read: the adapter's, or in a merge the model's."""
    offline: bool = False
    """Download nothing."""
    force: bool = False
    """Write over what is there."""


GROUPS = (Group(title="the adapter", options=Adapting),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out what the first word says."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    if not names:
        raise InvalidInput("Say what to do: sana lora info FILE, sana lora convert IN OUT, or sana lora merge ...")
    if names[0] not in TASKS:
        hint = did_you_mean(names[0], TASKS)
        raise InvalidInput(f"`sana lora` does not know '{names[0][:40]}'.{hint} It does {', '.join(TASKS)}.")
    taken = arguments.take(Adapting, given)
    for name in taken:
        if name not in _USED[names[0]]:
            raise InvalidInput(f"--{name.replace('_', '-')} means nothing to `sana lora {names[0]}`. Leave it out.")
    TASKS[names[0]](names[1:], Adapting(**taken), terminal)
    return 0


def _info(names: Sequence[str], options: Adapting, terminal: Terminal) -> None:
    """Tell what an adapter is; of the data only the few numbers that scale it are read."""
    if len(names) != 1:
        raise InvalidInput("Give one adapter. For example: sana lora info style.safetensors")

    from sana.checkpoints.lora.bases import fit
    from sana.checkpoints.lora.files import find, read_lora_header

    header = read_lora_header(find(names[0], **_where(options)))
    try:
        fitting = fit(header, options.model)
    except CheckpointError as error:
        if "fit" not in str(error) and "is one of this model" not in str(error):
            raise
        terminal.result("\n".join([header.path.name, *listed({"fits": f"no known model: {error}"})]))
        terminal.document({"file": str(header.path), "fits": [], "reason": str(error)})
        return
    facts = _facts(header, fitting)
    terminal.result("\n".join([header.path.name, *listed(_rows(facts))]))
    terminal.document(facts)


def _facts(header: "Header", fitting: "Fit") -> dict[str, Any]:
    from sana.checkpoints.lora.files import alphas_of, file_digest

    reading, shapes = fitting.reading, header.shapes
    ranks = sorted({shapes[group.keys["down"]][0] for group in reading.groups})
    layers = [name for group in reading.groups for name in group.ours]
    query = next((group for group in reading.groups if any(name.endswith("attn1.to_q") for name in group.ours)), None)
    return {
        "file": str(header.path),
        "bytes": header.path.stat().st_size,
        "sha256": file_digest(header.path),
        "dialect": reading.dialect,
        "kind": "DoRA" if any("magnitude" in group.keys for group in reading.groups) else "LoRA",
        "rank": ranks,
        "alpha": alphas_of(header, reading),
        "dtype": sorted({str(kind).removeprefix("torch.") for kind in header.dtypes.values()}),
        "layers": len(layers),
        "targets": dict(Counter(".".join(name.split(".")[2:]) or name for name in layers)),
        "blocks": len({name.split(".")[1] for name in layers if name.startswith("transformer_blocks.")}),
        "base_width": shapes[query.keys["down"]][1] if query is not None else None,
        "fits": list(fitting.cards),
        "unmatched": list(reading.unmatched),
        "metadata": {key: text for key, text in header.metadata.items() if key.startswith(("modelspec.", "ss_"))},
    }


def _rows(facts: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
    told = {key.split(".")[-1]: text for key, text in facts["metadata"].items() if len(text) <= 200}
    names = {"title": "title", "trigger words": "trigger_phrase", "made for": "architecture", "by": "author"}
    width = f", width {facts['base_width']}" if facts["base_width"] else ""
    return {
        **{row: told.get(key, "") for row, key in names.items()},
        "kind": f"{facts['kind']}, dialect {facts['dialect']}",
        "rank": ", ".join(map(str, facts["rank"])) + "; alpha " + ", ".join(f"{alpha:g}" for alpha in facts["alpha"]),
        "layers": f"{facts['layers']} in {facts['blocks']} blocks{width}",
        "targets": ", ".join(f"{name} x{count}" for name, count in facts["targets"].items()),
        "precision": ", ".join(facts["dtype"]),
        "fits": ", ".join(facts["fits"]) or "the model that was named",
        "not in it": ", ".join(facts["unmatched"][:5]),
        "size": f"{facts['bytes'] / 1e6:,.1f} MB",
        "sha256": facts["sha256"],
    }


def _convert(names: Sequence[str], options: Adapting, terminal: Terminal) -> None:
    """Write an adapter in another dialect."""
    if len(names) != 2 or options.to is None:
        raise InvalidInput("Give two files and a dialect. For example: sana lora convert in.safetensors out --to kohya")

    from sana.checkpoints.lora.bases import fit
    from sana.checkpoints.lora.files import WEIGHT_NAME, find, read_lora, read_lora_header
    from sana.checkpoints.lora.writing import save_lora

    source, target = find(names[0], **_where(options)), Path(names[1]).expanduser()
    if target.suffix != ".safetensors":
        target = target / WEIGHT_NAME
    if target.exists() and not options.force:
        raise InvalidInput(f"'{target}' exists already. Give another name, or --force to write over it.")
    fitting = fit(read_lora_header(source), options.model)
    file = read_lora(source, fitting.targets)
    for name in file.unmatched:
        terminal.warn(f"Left out, for no known model has it: {name}")
    save_lora(target, file.updates, dialect=options.to, metadata=_metadata(file, fitting, options))
    layers = f"{len(file.updates)} layers, {file.dialect} to {options.to}"
    terminal.result("\n".join([f"✓ {target}", *listed({"written": layers})]), colour="green")
    terminal.document({"file": str(target), "layers": len(file.updates), "from": file.dialect, "to": options.to})


def _metadata(file: "LoraFile", fitting: "Fit", options: Adapting) -> dict[str, str]:
    """Return what the file said of itself, what is missing there, and what the user says."""
    from sana.checkpoints.lora.writing import MODEL_SPEC, model_spec

    known = next(iter(fitting.cards), "sana")
    said = {"title": options.title, "trigger_phrase": options.trigger}
    fresh = model_spec(known, title=file.name)
    return {**fresh, **file.metadata, **{MODEL_SPEC + key: text for key, text in said.items() if text}}


def _merge(names: Sequence[str], options: Adapting, terminal: Terminal) -> None:
    """Write a model with adapters in its weights."""
    if len(names) < 3:
        raise InvalidInput("Give model, adapters and target. For example: sana lora merge MODEL a.safetensors:0.8 OUT")

    from sana.engine.merging import merge

    model, *loras, target = names
    reports = merge(
        model,
        [_scaled(lora) for lora in loras],
        target,
        force=options.force,
        variant=options.variant,
        revision=options.revision,
        local_files_only=options.offline,
    )
    place = Path(target).expanduser()
    terminal.result("\n".join([f"✓ {place}", *listed({"merged": [str(report) for report in reports]})]), colour="green")
    merged = [
        {"name": report.name, "layers": len(report.matched), "rank": report.rank, "sha256": report.sha256}
        for report in reports
    ]
    terminal.document({"target": str(place), "merged": merged})


def _scaled(word: str) -> tuple[str, float]:
    """Read FILE or FILE:SCALE; a file may have a colon in its name.

    Errors: InvalidInput for a scale that is no number.
    """
    name, colon, scale = word.rpartition(":")
    if not colon or Path(word).expanduser().exists() or "/" in scale:
        return word, 1.0
    try:
        value = float(scale)
    except ValueError:
        raise InvalidInput(f"'{scale[:40]}' is no scale of an adapter. Write FILE:0.8, for example.") from None
    return name, value


def _where(options: Adapting) -> dict[str, Any]:
    return {
        "weight_name": options.weight_name,
        "revision": options.revision,
        "local_files_only": options.offline,
    }


_READING = {"model", "weight_name", "revision", "offline"}
_USED = {
    "info": _READING,
    "convert": {*_READING, "to", "title", "trigger", "force"},
    "merge": {"variant", "revision", "offline", "force"},
}
TASKS = {"info": _info, "convert": _convert, "merge": _merge}
