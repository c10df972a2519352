"""The flags of `sana generate`, which are also the keys of its configuration files."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sana.apps.cli.arguments import Group, Option, Spelling, options_of
from sana.apps.cli.choosing import CHOOSING
from sana.apps.cli.machine import MACHINE
from sana.apps.cli.notation import (
    CONTROL_WORDS,
    LORA_WORDS,
    PAG_SCALE,
    PAG_WORDS,
    read_control,
    read_layers,
    read_lora,
    read_outpaint,
    read_pag,
)
from sana.apps.cli.values import Shape, Shard, read_seeds, read_shard, read_size
from sana.engine.attachments import CONTROL_KINDS
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


CONTROL_HINT = f"""A picture to follow: what to make of it ({", ".join(CONTROL_KINDS)}; map: it is the map),
the file, and how strongly; 0.8@0-0.5 ends after half of the steps. Can be given again."""
_EDITED = ("mask", "strength", "feather", "outpaint")
_STEERING = ("controls", "loras", "pag_scale", "pag_adaptive_scale", "pag_layers")
_SPRINT = ("max_timesteps", "intermediate_timesteps")


def _only(*names: str) -> frozenset[str]:
    """Return the fields of a request that a group with these does not have."""
    return frozenset(f.name for f in dataclasses.fields(Request)) - frozenset(names)


def _path(text: str) -> str:
    """Read the name of a file, also one in the user's home."""
    return str(Path(text).expanduser()) if text.startswith("~") else text


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a batch is shared among several computers."""

    shard: Annotated[Shard | None, Spelling(value="I/N", read=read_shard)] = None
    """Draw only the I-th of N equal shares: run 1/N to N/N, each once, on as many computers as there are."""


PICTURE = Group(
    title="the picture",
    options=Request,
    leave_out=frozenset({"prompt", "image", *_EDITED, *_STEERING, *_SPRINT}),
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
EDIT = Group(
    title="what to change",
    options=Request,
    leave_out=_only(*_EDITED),
    spellings={
        "mask": Spelling(
            value="FILE",
            read=_path,
            hint="Picture of the same shape: white is drawn anew, black stays as it is, to the last bit.",
        ),
        "strength": Spelling(
            hint="How far to go from the picture: near 0 almost nothing changes, 1 draws anew. Left out, 0.6; with a"
            " mask or --outpaint, 1."
        ),
        "outpaint": Spelling(
            value="PIXELS",
            read=read_outpaint,
            hint="Draw more around the picture: right=256, or left,top,right,bottom, or one number for all sides.",
        ),
    },
)
SOURCE = Group(
    title="what to change",
    options=Request,
    leave_out=_only("image"),
    spellings={
        "image": Spelling(
            value="FILE",
            read=_path,
            hint="The picture to begin with, if it does not stand behind the verb; the result has its size unless one"
            " is given.",
        )
    },
)
STEERING = Group(
    title="pictures and adapters that steer",
    options=Request,
    leave_out=_only(*_STEERING),
    spellings={
        "controls": Spelling(
            name="control", value="TYPE FILE [SCALE]", read=read_control, words=CONTROL_WORDS, hint=CONTROL_HINT
        ),
        "loras": Spelling(
            name="lora",
            value="FILE [SCALE]",
            read=read_lora,
            words=LORA_WORDS,
            hint="An adapter to lay over the model, and how strongly (1). Can be given again.",
        ),
        "pag_scale": Spelling(
            name="pag",
            also=("--pag-scale", "--pag-guidance-scale"),
            value="[SCALE]",
            read=read_pag,
            words=PAG_WORDS,
            hint=f"Keep away from what the model draws without self-attention (PAG); left out, SCALE is {PAG_SCALE:g}.",
        ),
        "pag_adaptive_scale": Spelling(
            hint="By how much the SCALE of --pag falls with each thousandth of the way; left out, it stays."
        ),
        "pag_layers": Spelling(value="NAME,NAME", read=read_layers, also=("--pag-applied-layers",)),
    },
)
SPRINT = Group(title="SANA-Sprint models only", options=Request, leave_out=_only(*_SPRINT))
FILES = Group(title="the files", options=Files)
DRAWN = (EXTENT, PICTURE, STEERING, SPRINT)
"""What says how a picture is drawn."""
SETTINGS = (*DRAWN, Group(title="several prompts or settings", options=Several), CHOOSING, MACHINE, FILES)
"""What `sana generate` has, besides its prompt."""
MANNER = Group(title="settings from elsewhere, and trying out", options=Manner)
GROUPS = (*SETTINGS, MANNER)
EDIT_GROUPS = (SOURCE, EDIT, *GROUPS)
_BATCH_SEED = "Start of the random numbers, for the lines that have none. Left out, each gets one from its own words."
SHARING = Group(title="several computers", options=Sharing)
BATCH_GROUPS = (
    EXTENT,
    dataclasses.replace(
        PICTURE,
        spellings={**PICTURE.spellings, "seed": dataclasses.replace(PICTURE.spellings["seed"], hint=_BATCH_SEED)},
    ),
    STEERING,
    SPRINT,
    SOURCE,
    EDIT,
    SHARING,
    MACHINE,
    dataclasses.replace(
        FILES,
        leave_out=frozenset({"skip_existing"}),
        spellings={
            "output": Spelling(
                short="-o", value="FOLDER", hint="Where the pictures go; left out, a folder named after the file."
            ),
            "force": Spelling(hint="Draw also what is there, and overwrite it."),
        },
    ),
    MANNER,
)
EVERYTHING = (*GROUPS, SOURCE, EDIT, SHARING)
"""The flags of all the verbs that draw."""
NOT_HERE = {"--eta": "There is no --eta: none of SANA's samplers uses it. Drop it."}
REFUSED = {
    **NOT_HERE,
    **{
        flag: f'{flag} is about a picture that is there: sana edit PICTURE.png "PROMPT" {example}'.rstrip()
        for flag, example in {
            "--image": "",
            "--init-image": "",
            "--mask": "--mask MASK.png",
            "--strength": "--strength 0.6",
            "--feather": "--mask MASK.png --feather 16",
            "--outpaint": "--outpaint right=256",
        }.items()
    },
}


def keys() -> dict[str, Option]:
    """Return the keys of a configuration file: the prompt and the flags that are settings."""
    return {"prompt": Option(str, str, ""), **options_of((*SETTINGS, SOURCE, EDIT)), "seed": _SEEDS}


def picture_keys() -> dict[str, Option]:
    """Return the keys that a single line of a prompt file may set."""
    named = {"prompt": Option(str, str, ""), "name": Option(str, str, "")}
    return {**named, **options_of((*DRAWN, SOURCE, EDIT)), "seed": _SEEDS}


_SEEDS = Option(list, read_seeds)
FIELDS = {
    spelling.name: field
    for group in EVERYTHING
    for field, spelling in group.spellings.items()
    if spelling.name is not None
}
"""Key -> field of the request, where they are called differently."""
