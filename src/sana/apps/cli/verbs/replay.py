"""`sana replay`: draw a picture again as its record says, and compare every pixel."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.attached import Attached, found
from sana.apps.cli.controlnets import attach
from sana.apps.cli.known import DEFAULT_MODEL
from sana.apps.cli.machine import RECORDED, Machine, introduce, out_of_memory_told
from sana.apps.cli.names import STDOUT, check_files, plan_files
from sana.apps.cli.output import Terminal, duration
from sana.apps.cli.verbs.info import dtypes_of, nearest, read_file
from sana.cards import CARDS
from sana.engine.metadata import Metadata, shortened
from sana.engine.request import Request, Result
from sana.errors import InvalidInput
from sana.memory.quantize_configs import NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.engine.parts import Parts

USAGE = "sana replay PICTURE [-o PATH] [options]"
DESCRIPTION = """\
Draw a picture again as its record says and compare every pixel with the file: `identical`, or what
differs (exit code 1). First it says what is not as it was then: versions, device, threads, weights.
Options about the model take the place of what was recorded. Without -o nothing is written.
Pictures and adapters that it was made from are looked for beside it, under their names; they must
be the very same."""
LONGEST_ERROR = 300


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is written, and where."""

    output: Annotated[str | None, Spelling(short="-o", value="PATH")] = None
    """Where the new picture goes: a .png file, or a folder; left out, nowhere."""
    force: bool = False
    """Overwrite a file that exists."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far two pictures of one size are from each other; differences in steps of 255."""

    pixels: int
    """Pixels that differ in any colour."""
    total: int
    most: int
    mean: float


GROUPS = (
    RECORDED,
    Group(title="what it was made from", options=Attached),
    Group(title="the file", options=Writing),
)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    files, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    if len(files) != 1:
        raise InvalidInput("Give one picture. For example: sana replay fox-1.png")
    file, writing = files[0], Writing(**arguments.take(Writing, given))
    attached = Attached(**arguments.take(Attached, given))
    metadata = read_file(file)
    request = found(_request(file, metadata), Path(file).parent, attached)
    if writing.output == STDOUT:
        raise InvalidInput("`sana replay` writes no picture to stdout. Let -o name a file.")
    targets = plan_files(request.prompt, [request.seed or 0], writing.output) if writing.output is not None else []
    picture, resized = _pixels(file, request)
    report: dict[str, Any] = {"file": file, "identical": False, "pixels": None, "differences": [], "files": []}
    if resized and not targets:
        terminal.result(resized)
        terminal.document(report)
        return 1
    chosen, machine = "model" in given, _machine(metadata, given)
    if targets:
        check_files(targets, force=writing.force)
    parts, seconds = _load(machine, metadata, chosen, request, terminal)
    with machine.in_use(parts):
        report["differences"] = _differences(metadata.model, parts.describe())
        _tell(report["differences"], metadata, terminal)
        result = _draw(parts, request, terminal)
    report |= {"settings": result.settings.to_dict(), "model": dict(result.model)}
    report["timings"] = {name: round(value, 4) for name, value in {"load": seconds, **result.timings}.items()}
    if targets:
        _save(result, targets[0], machine, writing, terminal)
        report["files"] = [str(target) for target in targets]
    report["warnings"] = terminal.warnings
    return _judge(file, resized, picture, result, report, terminal)


def _request(file: str, metadata: Metadata) -> Request:
    """Return what the record orders.

    Raises:
        InvalidInput: another program made the picture, or the record is gone, damaged or of a newer version.
    """
    if metadata.record is None and metadata.settings is not None:
        line, _ = nearest(metadata.settings)
        program = shortened(metadata.settings.program)
        why = (
            f"{file} has lost its record, and what is left does not say all"
            if program.startswith("sanakit")
            else f"{file} was made by {program}, which draws with other models and in another way"
        )
        command = f" The nearest command: {line}" if line else ""
        raise InvalidInput(f"{why}, so the same pixels cannot be drawn.{command}")
    if metadata.record is None:
        raise InvalidInput(f"{file} does not say how it was made, so it cannot be drawn again.")
    try:
        request = metadata.request()
    except (InvalidInput, TypeError) as error:
        raise InvalidInput(shortened(str(error), LONGEST_ERROR)) from error
    if request.seed is None:
        raise InvalidInput(f"The record in {file} has no seed, so it cannot be drawn again.")
    return request


def _machine(metadata: Metadata, given: dict[str, Any]) -> Machine:
    """Return model and machine as recorded; what was given on the command line goes before it.

    Raises:
        InvalidInput: the record names no model that is here or known; a file from elsewhere downloads nothing else.
    """
    facts = metadata.model
    recorded: dict[str, Any] = {"device": "cpu" if facts.get("device") == "cpu" else "auto"}
    if facts.get("threads", "").isdecimal() and 1 <= int(facts["threads"]) <= 1024:
        recorded["threads"] = int(facts["threads"])
    if facts.get("compiled") in ("yes", "True", "true"):
        recorded["compile"] = True
    if facts.get("quantized") in NAMES:
        recorded["quantize"] = facts["quantized"]
    controlnet = facts.get("controlnet")
    if controlnet is not None and "controlnet" not in given:
        if controlnet not in CARDS and not _is_folder(controlnet):
            raise InvalidInput(
                f"The picture followed the control network '{shortened(controlnet)}', which is not here. Say where with"
                " --controlnet."
            )
        recorded["controlnet"] = controlnet
    dtypes = dtypes_of(facts)
    if dtypes and all(dtype in ("float32", "bfloat16", "float16") for dtype in dtypes.values()):
        recorded["dtype"] = {"default": "auto", **dtypes}  # what --dtype cannot say: one for each part
    if "model" not in given:
        named = (facts.get("source"), facts.get("name"))
        known = [model for model in named if model and (model in CARDS or _is_folder(model))]
        if not known:
            name = shortened(facts.get("source") or facts.get("name") or "none")
            raise InvalidInput(f"The picture names the model '{name}', which is not here. Say where with --model.")
        recorded["model"] = known[0]
    return Machine(**{**recorded, **arguments.take(Machine, given)})


def _is_folder(name: str) -> bool:
    """Tell whether a name from a file is a folder here; one on another computer is not asked for."""
    try:
        return not name.startswith(("//", "\\\\")) and Path(name).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the home folder of an unknown user
        return False


def _load(
    machine: Machine, metadata: Metadata, chosen: bool, request: Request, terminal: Terminal
) -> tuple["Parts", float]:
    """Load the model; one from the hub in the very commit that was recorded."""
    if machine.card is not None and machine.built_in is None:
        introduce(machine.card, terminal)
    commit = metadata.model.get("commit")
    if chosen or commit is None or (machine.folder or machine.built_in) is not None:
        return machine.load(terminal, drawing=[request])
    from sana.engine.parts import load

    began = time.perf_counter()
    with out_of_memory_told():
        dtype: Any = machine.dtype if machine.dtype != "auto" else "card"
        kind = None if machine.quantize == "none" else machine.quantize
        parts = load(machine.model, device=machine.device, dtype=dtype, revision=commit, quantization_config=kind)
        if machine.controlnet is not None:
            attach(parts, machine.controlnet, terminal)
        if machine.compile:
            parts.compile()
    return parts, time.perf_counter() - began


def _differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what is recorded and not so any more."""
    names = [name for name in then if name != "source" and str(now.get(name, "none")) != then[name]]
    names += [name for name in ("compiled",) if name in now and name not in then]
    return [
        {"what": name.replace("_", " "), "then": then.get(name, "none"), "now": str(now.get(name, "none"))}
        for name in names
    ]


def _tell(differences: Sequence[Mapping[str, str]], metadata: Metadata, terminal: Terminal) -> None:
    """Print the table of what differs, before the long part."""
    then_warned = (metadata.record or {}).get("warnings")
    for text in then_warned if isinstance(then_warned, list) else []:
        terminal.say(f"Then it said: {shortened(str(text), LONGEST_ERROR)}")
    if not differences:
        terminal.say("All is as it was then, as far as the record tells.")
        return
    rows = [{"what": "not as it was", "then": "then", "now": "now"}, *differences]
    cells = [[shortened(row[name]) for name in ("what", "then", "now")] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    for row in cells:
        terminal.say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw(parts: "Parts", request: Request, terminal: Terminal) -> Result:
    from sana.engine.generate import generate

    num_steps = request.resolve(parts.effective_card).steps
    with terminal.count(num_steps) as progress, contextlib.closing(generate(parts, request)) as loop:
        while True:
            try:
                step = next(loop)
            except StopIteration as end:
                result: Result = end.value
                return result
            if not isinstance(step, Result):
                progress.advance(f"step {step.index + 1}/{step.num_steps}")
                terminal.event("step", step=step.index + 1, of=step.num_steps, picture=1, pictures=1)


def _save(result: Result, target: Path, machine: Machine, writing: Writing, terminal: Terminal) -> None:
    from sana.engine.images import save_png

    if result.model.get("name") not in (machine.source, DEFAULT_MODEL):
        result = dataclasses.replace(result, model={**result.model, "source": machine.source})
    save_png(result, 0, target, force=writing.force)
    seconds = result.timings.get("total", 0.0)
    terminal.result(str(target))
    terminal.event("image", file=str(target), seed=result.seed, seconds=round(seconds, 4))
    terminal.show(result.image)
    terminal.say(f"seed {result.seed} · drawn again · {duration(seconds)}")


def _judge(
    file: str, resized: str, picture: "Image | None", result: Result, report: dict[str, Any], terminal: Terminal
) -> int:
    """Say whether the pixels are the same, and if not, by how much and what may be the cause."""
    for text in result.warnings:
        terminal.warn(text)
    gap = compare(picture, result.image) if picture is not None else None
    report |= {"pixels": dataclasses.asdict(gap) if gap else None, "identical": gap is not None and gap.pixels == 0}
    if report["identical"]:
        terminal.result("identical")
        terminal.document(report)
        return 0
    if gap is None:
        terminal.result(resized)
    else:
        share = f"{gap.pixels} of {gap.total} pixels ({100 * gap.pixels / gap.total:.3g} %)"
        size = f"by at most {gap.most} of 255, by {gap.mean:.2g} on average over all"
        changed = [f"{d['what']} {shortened(d['then'])} (now {shortened(d['now'])})" for d in report["differences"]]
        cause = f"Not as it was: {', '.join(changed)}." if changed else (
            "All that the record names is as it was; the processor may be another, or the file was edited."
        )  # fmt: skip
        terminal.result(f"{file} differs in {share}, {size}. {cause}")
    if not report["files"]:
        terminal.say("Nothing was written. To keep the new picture: -o PATH")
    terminal.document(report)
    return 1


def compare(one: "Image", other: "Image") -> Gap:
    """Return how far two pictures of one size are from each other."""
    import numpy as np

    apart = np.abs(np.asarray(one.convert("RGB"), np.int16) - np.asarray(other.convert("RGB"), np.int16))
    unlike = apart.max(axis=2) > 0
    return Gap(pixels=int(unlike.sum()), total=unlike.size, most=int(apart.max()), mean=float(apart.mean()))


def _is_see_through(picture: "Image") -> bool:
    alpha: Any = picture.convert("RGBA").getchannel("A").getextrema()
    return bool(picture.has_transparency_data and alpha[0] < 255)


def _pixels(file: str, request: Request) -> tuple["Image | None", str]:
    """Return the pixels of a picture, or a sentence if it has another size than its record: then none are read.

    Raises:
        InvalidInput: it is damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is compared before any is read
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
                if request.width is not None and picture.size != (request.width, request.height):
                    was, now = f"{request.width}x{request.height}", f"{picture.width}x{picture.height}"
                    return None, f"{file} has {now} pixels and its record draws {was}: it was cut or resized since."
                if getattr(picture, "n_frames", 1) > 1 or _is_see_through(picture):
                    return (
                        None,
                        f"{file} has several frames or transparency, which sanakit never writes: it was edited.",
                    )
                return picture.convert("RGB"), ""
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"The pixels of {file} cannot be read ({shortened(str(error))}).") from error
