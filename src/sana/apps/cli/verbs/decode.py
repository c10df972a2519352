"""`sana decode`: pictures from finished latents that an earlier run saved, with the autoencoder alone."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.machine import RECORDED, Machine, out_of_memory_told
from sana.apps.cli.names import check_files, plan_files
from sana.apps.cli.output import Terminal, duration
from sana.cards import CARDS
from sana.engine.request import Result
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.engine.latents import Finished
    from sana.engine.parts import Parts

USAGE = "sana decode FILE.latents.safetensors [-o PATH] [options]"
DESCRIPTION = """\
Make pictures from finished latents, which a run saves when memory runs out while it decodes.
Only the autoencoder is loaded; every picture gets the file name and the metadata that it was to have."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is written, and where."""

    output: Annotated[str | None, Spelling(short="-o", value="PATH")] = None
    """A .png file, or a folder; left out, PROMPT-SEED.png in this folder."""
    metadata: Literal["full", "label", "none"] = "full"
    """What a file says about itself: settings and AI label, the label only, or nothing."""
    force: bool = False
    """Overwrite files that exist."""


GROUPS = (dataclasses.replace(RECORDED, leave_out=frozenset({"controlnet"})), Group(title="the files", options=Writing))


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    files, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    if len(files) != 1:
        raise InvalidInput("Give one file of latents. For example: sana decode fox-1.latents.safetensors")
    named = "model" in given
    machine, writing = Machine(**arguments.take(Machine, given)), Writing(**arguments.take(Writing, given))

    from sana.engine.latents import load_latents

    finished = load_latents(files[0])
    if not named:
        machine = dataclasses.replace(machine, model=_recorded(finished))
    targets = plan_files(finished.settings.prompt, finished.seeds, writing.output)
    check_files(targets, force=writing.force)
    parts, seconds = machine.load(terminal, only=("vae",))
    with machine.in_use(parts):
        report = _decode(parts, finished, terminal)
    with out_of_memory_told():
        written = _save(report, targets, writing, terminal)
    terminal.document(
        {
            "files": written,
            "seeds": list(report.seeds),
            "timings": {"load": round(seconds, 4), "decode": round(report.timings["decode"], 4)},
            "settings": report.settings.to_dict(),
            "model": dict(report.model),
            "warnings": terminal.warnings,
        }
    )
    return 0


def _recorded(finished: "Finished") -> str:
    """Return the model that the file names, if it is here or one of ours: a file from elsewhere downloads nothing else.

    Raises:
        InvalidInput: it is neither.
    """
    for fact in ("source", "name"):
        model = finished.model.get(fact)
        if isinstance(model, str) and model and (model in CARDS or Path(model).expanduser().is_dir()):
            return model
    raise InvalidInput("The file names no model that is known here. Say which drew it with --model.")


def _decode(parts: "Parts", finished: "Finished", terminal: Terminal) -> Result:
    """Return the pictures of finished latents."""
    from sana.engine.decode import decode_to

    channels, settings = parts.vae.config.latent_channels, finished.settings
    if finished.latents.shape[1] != channels:
        raise InvalidInput(
            f"The latents have {finished.latents.shape[1]} channels, the model's autoencoder reads {channels}."
            " Say which model drew them with --model."
        )
    pictures: list[Image] = []
    began = time.perf_counter()

    for made in decode_to(finished.pictures, parts.vae, finished.latents, terminal.warn):
        pictures += made
    model = {**finished.model, "vae_dtype": str(parts.vae.dtype).removeprefix("torch.")}
    if parts.name != model.get("name"):  # then the whole is no model that could be named by its weights
        model = {name: fact for name, fact in model.items() if name != "weights"} | {"decoded_with": parts.name}
    return Result(
        images=pictures,
        seeds=finished.seeds,
        settings=settings,
        timings={"decode": time.perf_counter() - began},
        model=model,
    )


def _save(result: Result, targets: Sequence[Path], writing: Writing, terminal: Terminal) -> list[str]:
    """Write the pictures and tell their names."""
    from sana.engine.images import save_png

    files: list[str] = []
    seconds = result.timings["decode"] / len(result.images)
    for i, target in enumerate(targets):
        save_png(result, i, target, metadata=writing.metadata, force=writing.force)
        files.append(str(target))
        terminal.draft = {"files": files, "seeds": list(result.seeds[: i + 1])}
        terminal.result(str(target))
        terminal.event("image", file=str(target), seed=result.seeds[i], seconds=round(seconds, 4))
        terminal.show(result.images[i])
        size = f"{result.images[i].width}x{result.images[i].height}"
        terminal.say(f"seed {result.seeds[i]} · {size} · decoded · {duration(seconds)}")
    return files
