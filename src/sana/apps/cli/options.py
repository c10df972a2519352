"""The flags of `sana generate`, which are also the keys of its configuration files."""

from dataclasses import dataclass
from typing import Annotated, Literal

from sana.apps.cli.arguments import Group, Option, Spelling, options_of
from sana.apps.cli.machine import MACHINE
from sana.apps.cli.values import Shape, read_seeds, read_size
from sana.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A second way to say width and height."""

    size: Annotated[Shape | None, Spelling(value="WxH|W:H", read=read_size)] = None
    """Size in pixels (1024x768, or 512) or shape (16:9: the nearest that the model was trained on)."""


@dataclass(frozen=True, kw_only=True)
class Several:
    """More than one prompt, more than one value."""

    prompt_file: Annotated[str | None, Spelling(value="FILE")] = None
    """Prompts, each drawn with every seed: .txt has one a line; .jsonl, .json and .csv may also set fields for each,
    which then win over flags; - reads stdin."""
    sweep: Annotated[tuple[str, ...], Spelling(value="FIELD=A,B")] = ()
    """Draw with each of these values (steps=4,8,20 or guidance=1-5:0.5); several sweeps: every combination. Adds a
    sheet of all pictures."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is written, and where."""

    output: Annotated[str | None, Spelling(short="-o", value="PATH")] = None
    """A .png file, a folder, or - for the bytes on stdout; left out, PROMPT-SEED.png in this folder."""
    metadata: Literal["full", "label", "none"] = "full"
    """What a file says about itself: settings and AI label, the label only, or nothing."""
    force: bool = False
    """Overwrite files that exist."""
    skip_existing: bool = False
    """Leave out pictures whose files exist, as after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Manner:
    """Where settings come from besides the flags, and what to do instead of drawing."""

    config: Annotated[str | None, Spelling(value="FILE")] = None
    """TOML file of settings, named as the flags; they win over the user's file, flags over them. See: sana config."""
    print_config: bool = False
    """Print such a file for this command instead of drawing."""
    dry_run: bool = False
    """Print settings, files and about how much time, memory and download it takes, instead of drawing."""


PICTURE = Group(
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
EXTENT = Group(title="the picture", options=Extent)
SETTINGS = (
    EXTENT,
    PICTURE,
    Group(title="several prompts or settings", options=Several),
    MACHINE,
    Group(title="the files", options=Files),
)
"""What a configuration file may set, besides the prompt."""
GROUPS = (*SETTINGS, Group(title="settings from elsewhere, and trying out", options=Manner))
REFUSED = {
    "--eta": "There is no --eta: none of SANA's samplers uses it. Drop it.",
    "--lora": "There is no --lora in this version.",
    "--image": "There is no --image in this version: pictures are drawn from words only.",
}


def keys() -> dict[str, Option]:
    """Return the keys of a configuration file: the prompt and the flags that are settings."""
    return {"prompt": Option(str, str), **options_of(SETTINGS), "seed": _SEEDS}


def picture_keys() -> dict[str, Option]:
    """Return the keys that a single line of a prompt file may set."""
    return {"prompt": Option(str, str), **options_of((EXTENT, PICTURE)), "seed": _SEEDS}


_SEEDS = Option(list, read_seeds)
