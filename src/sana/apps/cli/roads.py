"""What the verbs that draw ask for: their words, flags and help. What they then do is the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana.apps.cli.arguments import Group
from sana.apps.cli.names import STDOUT
from sana.apps.cli.options import BATCH_GROUPS, EDIT_GROUPS, GROUPS, NOT_HERE, REFUSED
from sana.apps.cli.prompts import MOST_PROMPTS
from sana.errors import InvalidInput

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Road:
    """How a verb that draws is spoken to."""

    usage: str
    description: str
    words: Callable[[Sequence[str], Mapping[str, Any]], dict[str, Any]]
    """Makes settings of the words that are no flags, given the flags; may raise InvalidInput."""
    nothing: str
    """What is said where there is no prompt."""
    groups: tuple[Group, ...] = GROUPS
    refused: Mapping[str, str] = field(default_factory=lambda: REFUSED)
    most: int | None = None
    """Pictures that may be ordered at once, where they are not as many as elsewhere."""
    needs_image: bool = False
    """Whether every picture begins with another."""


def _prompt(words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    if len(words) > 1:
        raise InvalidInput(f'The prompt must be one argument. Put it in quotes: sana "{" ".join(words)}"')
    if list(words) == [STDOUT]:
        raise InvalidInput("A lone - is no prompt. To read prompts from stdin, a line each: sana --prompt-file -")
    return {"prompt": words[0]} if words else {}


def _image_and_prompt(words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Tell a picture from a prompt, where only one of them is there; both may stand in files of settings."""
    if len(words) > 2 or (len(words) == 2 and "image" in flags):
        raise InvalidInput(
            '`sana edit` takes a picture and a prompt. Put the prompt in quotes: sana edit PICTURE "PROMPT"'
        )
    if len(words) == 2:
        if _is_picture(words[1]) and not _is_picture(words[0]):
            raise InvalidInput(f'The picture comes first: sana edit {words[1][:80]} "{words[0][:80]}"')
        return {"image": words[0], "prompt": words[1]}
    if not words:
        return {}
    return {"image" if "image" not in flags and _is_picture(words[0]) else "prompt": words[0]}


def _file(words: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    if len(words) > 1:
        raise InvalidInput(f"A batch takes one file of prompts, not {len(words)}. Put names with blanks in quotes.")
    if not words:
        raise InvalidInput(BATCH.nothing)
    return {"prompt_file": words[0]}


def _is_picture(word: str) -> bool:
    """Tell whether a word names a picture, there or not, rather than says what one shows."""
    path = Path(word)
    try:
        return path.suffix.lower() in PICTURES or path.is_file()
    except (OSError, ValueError):  # a prompt that is too long for a name, or has a NUL in it
        return False


GENERATE = Road(
    usage='sana "PROMPT" [options]',
    description="""\
Draw pictures of a prompt and print the paths of their files, one a line.

  sana "a red fish above a yellow boat" --seed 1-4
  sana "a lighthouse in fog" -m sana-1.6b-1024 --size 16:9 -o pictures/
  sana "a blue cat" --seed 7 --sweep steps=4,8,20 --sweep guidance=1,4.5
  sana --prompt-file prompts.txt --seed 1-4 -o pictures/

Picture i is drawn from seed + i, alone or among others the same: to the last bit at the same
--batch-size, --threads and device, and but for rounding otherwise.""",
    words=_prompt,
    nothing='What should the picture show? For example: sana "a red fish above a yellow boat"',
)
EDIT = Road(
    usage='sana edit PICTURE "PROMPT" [options]',
    description="""\
Change a picture, or a part of it, or draw more around it; the prompt says what the
whole result shows. The picture itself stays as it is; the paths of the new files
are printed.

  sana edit boat.png "a green boat" --strength 0.5
  sana edit boat.png "a red fish above a boat" --mask sky.png
  sana edit boat.png "a boat on a wide sea" --outpaint left=128,right=128
  sana edit boat.png "a green boat" --seed 7 --sweep strength=0.3-0.9:0.2

In a mask, white is drawn anew and black stays as it is, to the last bit. All the
options of `sana generate` hold too.""",
    words=_image_and_prompt,
    nothing='What should the picture show when it is changed? For example: sana edit boat.png "a green boat"',
    groups=EDIT_GROUPS,
    refused=NOT_HERE,
    needs_image=True,
)
BATCH = Road(
    usage="sana batch PROMPTS.txt|.jsonl|.json|.csv [options]",
    description="""\
Draw every line of a file, and print the paths of the pictures. Pictures that are
there already are left as they are, so that the same command goes on after a stop.

  sana batch prompts.txt -o pictures/
  sana batch prompts.jsonl -m sana-1.6b-1024 --steps 20 --shard 1/4

A .txt file has one prompt a line. Each line of .jsonl, each entry of .json and each
row of .csv may also set what a picture's flags set, which then wins over them, and
its name:

  {"prompt": "a fox", "name": "fox", "steps": 30, "lora": ["my.safetensors"]}

A .json file may also be an object: its keys are the names. A line without a seed gets
one from its own words, the same at every run. What fails is told at the end, with
exit code 6; manifest.jsonl in the folder says what was done.""",
    words=_file,
    nothing="Which file of prompts? For example: sana batch prompts.txt -o pictures/",
    groups=BATCH_GROUPS,
    most=MOST_PROMPTS,
    refused={
        **NOT_HERE,
        "--prompt-file": "The file comes right behind the verb: sana batch PROMPTS.txt",
        "--sweep": "A batch has no --sweep. Write its lines out, or: sana --prompt-file PROMPTS.txt --sweep steps=4,8",
        "--skip-existing": "A batch leaves out what is there anyway; --force draws it again. Drop --skip-existing.",
    },
)
