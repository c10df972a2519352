"""What `sana generate` is asked to do: the flags, read into one checked order before anything is loaded."""

import contextlib
import dataclasses
import importlib.util
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.machine import MACHINE, Machine
from sana.apps.cli.names import plan_files
from sana.apps.cli.values import Shape, read_seeds, read_size
from sana.cards import Card
from sana.engine.request import Request, ResolvedRequest
from sana.errors import InvalidInput, MissingDependency

USAGE = 'sana "PROMPT" [options]'
DESCRIPTION = """\
Draw pictures of a prompt and print the paths of their files, one a line.

  sana "a red fish above a yellow boat" --seed 1-4
  sana "a lighthouse in fog" -m sana-1.6b-1024 --size 16:9 -o pictures/

Picture i is drawn from seed + i, alone or among others the same: to the last bit at the same
--batch-size, --threads and device, and but for rounding otherwise."""

RANDOM_SEEDS = 1_000_000
"""Seeds that are drawn for the user lie below this: short enough to type again."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A second way to say width and height."""

    size: Annotated[Shape | None, Spelling(value="WxH|W:H", read=read_size)] = None
    """Size in pixels (1024x768, or 512) or shape (16:9: the nearest that the model was trained on)."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is written, and where."""

    output: Annotated[str | None, Spelling(short="-o", value="PATH")] = None
    """A .png file, or a folder; left out, PROMPT-SEED.png in this folder."""
    metadata: Literal["full", "label", "none"] = "full"
    """What a file says about itself: settings and AI label, the label only, or nothing."""
    force: bool = False
    """Overwrite files that exist."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A parsed command line, complete but for what only the model can tell."""

    request: Request
    """Seed and count are those of the first picture; `seeds` has them all."""
    seeds: Sequence[int]
    files: Sequence[Path]
    """Where each picture goes."""
    shape: Shape | None
    given: frozenset[str]
    """Fields of the request that the user set."""
    machine: Machine
    writing: Files

    def fitted(self, card: Card) -> Request:
        """Return the request with its size in pixels, checked against the model.

        Raises:
            InvalidInput: the model cannot do it, or an option would have no effect.
        """
        request = self.request
        if self.shape is not None:
            width, height = self.shape.pixels(card)
            request = request.replace(width=width, height=height)
        check_effects(request.resolve(card), card, self.given)
        return request


def parse(words: Sequence[str]) -> Order:
    """Return what the command line orders.

    Raises:
        InvalidInput, MissingDependency: no model could carry it out.
    """
    prompts, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION, refused=REFUSED)
    prompt, shape, wished = _prompt(prompts), given.pop("size", None), given.pop("seed", None)
    machine, writing = Machine(**arguments.take(Machine, given)), Files(**arguments.take(Files, given))
    picture = arguments.take(Request, given)
    if shape is not None and {"width", "height"} & set(picture):
        raise InvalidInput("--size says the same as --width and --height. Give the one or the others.")
    if wished is not None and len(wished) > 1 and "count" in picture:
        raise InvalidInput("Several seeds already say how many pictures to draw. Drop --count, or give one --seed.")
    if shape is not None and not shape.ratio:
        picture |= {"width": shape.width, "height": shape.height}
    request = Request(prompt=prompt, **picture)
    _check_cleaning(request)
    seeds = _seeds(wished, request, writing)
    return Order(
        request=request.replace(seed=seeds[0], count=1),
        seeds=seeds,
        files=plan_files(prompt, seeds, writing.output),
        shape=shape if shape is not None and shape.ratio else None,
        given=frozenset(picture),
        machine=machine,
        writing=writing,
    )


def check_effects(settings: ResolvedRequest, card: Card, given: frozenset[str]) -> None:
    """Refuse options that were given and would change nothing.

    Raises:
        InvalidInput: naming the option.
    """
    if "guidance" in given and settings.guidance < 1 and card.product != "sprint":
        raise InvalidInput("`guidance` below 1 draws the same picture as 1, which is without guidance. Give 1 or more.")
    if "guidance_interval" not in given:
        return
    if card.product == "sprint":
        raise InvalidInput(f"{card.name} is a SANA-Sprint model, where `guidance_interval` has no effect. Drop it.")
    if settings.guidance <= 1:
        raise InvalidInput("`guidance_interval` has no effect with `guidance` 1 or less. Drop one of them.")


@contextlib.contextmanager
def named_as_flags() -> Iterator[None]:
    """Let errors about fields of the request speak of flags: `steps` becomes --steps."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(re.sub(r"`(\w+)`", _as_flag, str(error))) from error


def _as_flag(found: re.Match[str]) -> str:
    if found[1] == "prompt":
        return "The prompt" if found.start() == 0 else "the prompt"
    known = {f.name for group in GROUPS for f in dataclasses.fields(group.options)}
    return arguments.flag_of(found[1]) if found[1] in known else found[0]


def _prompt(prompts: Sequence[str]) -> str:
    if not prompts:
        raise InvalidInput('What should the picture show? For example: sana "a red fish above a yellow boat"')
    if len(prompts) > 1:
        raise InvalidInput(f'The prompt must be one argument. Put it in quotes: sana "{" ".join(prompts)}"')
    if not prompts[0].strip():
        raise InvalidInput("The prompt is empty. Say what the picture should show.")
    try:
        prompts[0].encode()
    except UnicodeEncodeError:
        raise InvalidInput("The prompt is not valid UTF-8. Check the encoding of the terminal.") from None
    return prompts[0]


def _check_cleaning(request: Request) -> None:
    missing = [name for name in ("bs4", "ftfy") if importlib.util.find_spec(name) is None]
    if request.clean_caption and missing:
        raise MissingDependency(
            "--clean-caption needs the packages beautifulsoup4 and ftfy. Install `sanakit[clean]`, or drop it."
        )


def _seeds(wished: list[int] | None, request: Request, writing: Files) -> list[int]:
    """Return the seed of every picture; drawn ones give names that are not taken yet."""
    if wished is not None and len(wished) > 1:
        return wished
    if wished is not None:
        return list(range(wished[0], wished[0] + request.replace(seed=wished[0]).count))
    for _ in range(100):
        start = secrets.randbelow(RANDOM_SEEDS)
        seeds = list(range(start, start + request.count))
        if writing.force or not any(file.exists() for file in plan_files(request.prompt, seeds, writing.output)):
            break
    return seeds


REQUEST = Group(
    title="the picture",
    options=Request,
    leave_out=frozenset({"prompt"}),
    spellings={
        "negative_prompt": Spelling(short="-n"),
        "width": Spelling(short="-W", value="PIXELS"),
        "height": Spelling(short="-H", value="PIXELS"),
        "steps": Spelling(also=("--num-inference-steps",)),
        "guidance": Spelling(also=("--cfg", "--cfg-scale", "--guidance-scale")),
        "sampler": Spelling(also=("--scheduler",)),
        "seed": Spelling(
            short="-s",
            value="N|N-M|N,M",
            read=read_seeds,
            hint="Start of the random numbers: one seed, a range or a list, a picture each. Left out, one is drawn.",
        ),
        "count": Spelling(short="-b", also=("--n",)),
    },
)
GROUPS = (
    Group(title="the picture", options=Extent),
    REQUEST,
    MACHINE,
    Group(title="the files", options=Files),
)
REFUSED = {
    "--eta": "There is no --eta: none of SANA's samplers uses it. Drop it.",
    "--lora": "There is no --lora in this version.",
    "--image": "There is no --image in this version: pictures are drawn from words only.",
}
