"""`sana dataset caption-stats`: how long the captions are, what words they use, which are double, how they score."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal, listed
from sana.apps.cli.verbs.dataset import one_path
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.data.samples import Caption

USAGE = "sana dataset caption-stats DATA [options]"
DESCRIPTION = """\
Tell about the captions of a data set: how many each picture has and from whom, their lengths, the commonest words,
captions that are used more than once, and CLIP scores where they are known. No picture is decoded."""
CUT = 60
"""Letters of a caption that are shown."""


@dataclass(frozen=True, kw_only=True)
class Telling:
    """What is shown."""

    top: Annotated[int, Spelling(value="N")] = 12
    """How many of the commonest words and double captions."""
    threshold: Annotated[float, Spelling(value="SCORE")] = 25.0
    """CLIP score from which on training draws a caption."""


GROUPS = (Group(title="captions", options=Telling),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Print the statistics."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Telling(**arguments.take(Telling, given))
    path = one_path(names, "caption-stats")
    if options.top < 1:
        raise InvalidInput(f"--top must be at least 1, not {options.top}.")

    from sana.data.examine import examine
    from sana.data.open import open_source

    source = open_source(path)
    samples = [seen.sample for seen in examine(source)]
    lost = sum(sample is None for sample in samples)
    if lost:
        terminal.warn(f"{lost} samples are broken and not counted; `sana dataset check {path}` says why.")
    captions = [list(sample.captions) for sample in samples if sample is not None]
    if not captions:
        raise InvalidInput(f"No picture of {path} has a caption that can be read. sana dataset check {path} says why.")
    facts = {"data": path, **_facts(captions, options)}
    terminal.result("\n".join(listed(_rows(facts, options))))
    terminal.document({**facts, "warnings": terminal.warnings})
    return 0


def _facts(pictures: "Sequence[Sequence[Caption]]", options: Telling) -> dict[str, Any]:
    captions = [caption for of_one in pictures for caption in of_one]
    texts = Counter(caption.text for caption in captions)
    words = Counter(word.strip(".,;:!?\"'()").lower() for text in texts.elements() for word in text.split())
    words.pop("", None)
    scores = [caption.score for caption in captions if caption.score is not None]
    return {
        "pictures": len(pictures),
        "captions": len(captions),
        "per_picture": dict(sorted(Counter(len(of_one) for of_one in pictures).items())),
        "captioners": dict(Counter(caption.name for caption in captions).most_common()),
        "words": _spread([len(caption.text.split()) for caption in captions]),
        "characters": _spread([len(caption.text) for caption in captions]),
        "distinct_words": len(words),
        "commonest": dict(words.most_common(options.top)),
        "doubles": {text: count for text, count in texts.most_common(options.top) if count > 1},
        "scores": _spread(scores) if scores else None,
        "scored": len(scores),
        "above_threshold": sum(score >= options.threshold for score in scores),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, the median, the mean and the most."""
    return {
        "least": min(values),
        "median": statistics.median(values),
        "mean": round(statistics.fmean(values), 2),
        "most": max(values),
    }


def _rows(facts: Mapping[str, Any], options: Telling) -> dict[str, str | Sequence[str]]:
    def spread(told: Mapping[str, float]) -> str:
        return f"{told['least']:g} to {told['most']:g}, median {told['median']:g}, mean {told['mean']:g}"

    rows: dict[str, str | Sequence[str]] = {
        "pictures": f"{facts['pictures']} with {facts['captions']} captions",
        "of one picture": [f"{count} have {number}" for number, count in facts["per_picture"].items()],
        "written by": [f"{name}: {count}" for name, count in facts["captioners"].items()],
        "words": spread(facts["words"]),
        "characters": spread(facts["characters"]),
        "different words": f"{facts['distinct_words']}, the commonest:",
        "": " ".join(f"{word} ({count})" for word, count in facts["commonest"].items()),
        "doubles": [f"{count} times: {text[:CUT]}" for text, count in facts["doubles"].items()] or "none",
    }
    if facts["scores"]:
        above = f"{facts['above_threshold']} of {facts['scored']} are at {options.threshold:g} or above"
        rows["CLIP scores"] = [spread(facts["scores"]), above]
    return rows
