"""`sana dataset caption`: let a vision-language model describe pictures, and write what it says beside them."""

import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.apps.cli.verbs.dataset import one_path
from sana.apps.cli.verbs.dataset_labels import Work, carry_out
from sana.errors import InvalidInput

USAGE = "sana dataset caption DATA -m MODEL [options]"
DESCRIPTION = """\
Describe pictures with a vision-language model of transformers, a hub id or a
folder, and write the captions where the training finds them: in a folder into
metadata.jsonl, beside a tar into TAR_NAME.json.

  sana dataset caption pictures/ -m llava-hf/llava-1.5-7b-hf
  sana dataset caption shards/ -m MODEL --prompt "Name what you see." --prompt "Tell colours and style."
  sana dataset caption pictures/ -m MODEL --samples 3 --temperature 0.8

Pictures that have the captions of this name are skipped, so that a run that was
stopped goes on; the texts that came with the pictures stay. Score them afterwards:
sana dataset score pictures/"""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Who is asked, and what."""

    model: Annotated[str | None, Spelling(short="-m", value="MODEL")] = None
    """Hub id or folder of the model; code that comes with it is never run."""
    name: Annotated[str | None, Spelling(value="NAME")] = None
    """What its captions are called; left out, the last part of the model's name."""
    prompt: Annotated[tuple[str, ...], Spelling(value="TEXT")] = ()
    """What it shall do; may be given several times, for a caption each."""
    samples: int = 1
    """Captions for each prompt."""
    temperature: float = 0.0
    """How freely words are drawn; 0 takes the likeliest."""
    max_tokens: int = 160
    """Length of a caption."""
    seed: int | None = None
    """Of the words that are drawn."""


GROUPS = (Group(title="the captions", options=Asking), Group(title="the work", options=Work))


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Write captions, and print how many."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    data = one_path(names, "caption")
    asking, work = Asking(**arguments.take(Asking, given)), Work(**arguments.take(Work, given))
    model = asking.model
    if model is None:
        raise InvalidInput("Which model? For example: -m llava-hf/llava-1.5-7b-hf")
    if asking.seed is not None and not asking.temperature:
        raise InvalidInput("--seed has no effect at --temperature 0. Raise it, or leave the seed out.")

    from sana.engine.placement import pick_device
    from sana.training.labelling.captioner import PROMPT, Captioner, Describing
    from sana.training.labelling.files import open_labels
    from sana.training.labelling.work import Labelled, caption_names, captioned, to_caption

    describing = Describing(
        prompts=tuple(asking.prompt) or (PROMPT,),
        samples=asking.samples,
        temperature=asking.temperature,
        max_tokens=asking.max_tokens,
        seed=asking.seed or 0,
    )
    called = caption_names(asking.name or _called(model), describing.count)
    labels = open_labels(data)
    plan = to_caption(labels, called, again=work.again)
    document = {"data": data, "model": model, "names": list(called), "pictures": len(labels.source)}
    terminal.draft = {**document, "warnings": terminal.warnings}

    def start() -> Generator[Labelled]:
        where: dict[str, Any] = {"device": pick_device(work.device), "revision": work.revision}
        captioner = Captioner(model, describing, offline=work.offline, **where)
        return captioned(labels, plan, captioner, called, work.batch_size)

    command = shlex.join(["sana", "dataset", "caption", *words])
    document |= carry_out(labels, plan, start, command, "captions", terminal)
    terminal.result(f"{document['made']} captions by {called[0]} in {data}")
    terminal.document({**document, "warnings": terminal.warnings})
    return 0


def _called(model: str) -> str:
    """Return the name of the captions of a model: the last part of its own."""
    return Path(model.rstrip("/\\")).expanduser().resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
