"""`sana dataset score`: write beside captions how well they describe their pictures."""

import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Annotated

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.apps.cli.verbs.dataset import one_path
from sana.apps.cli.verbs.dataset_labels import Work, carry_out

USAGE = "sana dataset score DATA [options]"
DESCRIPTION = """\
Score every caption by CLIP, from 0 to 100: 100 times the cosine of the embeddings
of picture and text, of which 77 tokens are read. The scores go where the training
finds them: in a folder into metadata.jsonl, beside a tar into
TAR_NAME_clip_score.json. By them one of several captions is drawn.

  sana dataset score pictures/
  sana dataset score shards/ -m openai/clip-vit-base-patch16

Captions that have a score are skipped."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Who scores."""

    model: Annotated[str | None, Spelling(short="-m", value="MODEL")] = None
    """Hub id or folder of a CLIP model; left out, openai/clip-vit-large-patch14."""


GROUPS = (Group(title="the scores", options=Scoring), Group(title="the work", options=Work))


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Write scores, and print how many."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    data = one_path(names, "score")
    scoring, work = Scoring(**arguments.take(Scoring, given)), Work(**arguments.take(Work, given))

    from sana.engine.placement import pick_device
    from sana.evaluation.clip_score import MODEL, ClipScorer
    from sana.training.labelling.files import open_labels
    from sana.training.labelling.work import Labelled, scored, to_score

    labels = open_labels(data)
    plan = to_score(labels, again=work.again)
    model = scoring.model or MODEL
    document = {"data": data, "model": model, "pictures": len(labels.source)}
    terminal.draft = {**document, "warnings": terminal.warnings}

    def start() -> Generator[Labelled]:
        scorer = ClipScorer(model, device=pick_device(work.device), revision=work.revision, offline=work.offline)
        return scored(labels, plan, scorer, work.batch_size, again=work.again)

    command = shlex.join(["sana", "dataset", "score", *words])
    document |= carry_out(labels, plan, start, command, "scores", terminal)
    terminal.result(f"{document['made']} scores in {data}")
    terminal.document({**document, "warnings": terminal.warnings})
    return 0
