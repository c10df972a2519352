"""The work of writing captions and scores: in batches, saved again and again, and resumed where it was stopped."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from sana.data.samples import BadSample, Caption, Finding
from sana.errors import InvalidInput
from sana.training.labelling.files import Labels, captions_in, checked_name

if TYPE_CHECKING:
    from PIL.Image import Image

SAVED_EVERY = 20.0
"""Seconds after which what was made is written, or twenty times as long as writing took the last time."""
DIGITS = 4
"""Decimal places of a score."""


_Make = Callable[[Sequence[int], Sequence["Image"]], Iterator[list[Caption] | str]]
"""Samples and their pictures -> for each the captions to put, or why there are none."""


class Describer(Protocol):
    """Writes several texts about each picture."""

    def describe(self, pictures: Sequence["Image"], salt: str = "") -> list[list[str]]:
        """Return the same number of texts for each picture."""
        ...


class Scorer(Protocol):
    """Says how well texts describe pictures."""

    def scores(self, pictures: Sequence["Image"], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return a score from 0 to 100 for every text of each picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """How far the work is."""

    done: int
    """Samples that were looked at, of those that have to be."""
    total: int
    made: int
    """Captions, or scores, that are new since the last report."""
    faults: tuple[Finding, ...] = ()
    """Samples that were left out since then, and why."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What has to be done."""

    indices: tuple[int, ...]
    skipped: int
    """Samples that have what would be made."""
    faults: tuple[Finding, ...]
    """Samples that cannot be read."""


def caption_names(name: str, count: int) -> tuple[str, ...]:
    """Return what the captions of a captioner are called: `name`, `name-2`, `name-3` and so on."""
    checked_name(name)
    return (name, *(f"{name}-{number}" for number in range(2, count + 1)))


def to_caption(labels: Labels, names: Sequence[str], *, again: bool) -> Plan:
    """Find the samples that lack one of these captions; all of them with `again`."""
    return _plan(labels, lambda captions: again or not {*names} <= {caption.name for caption in captions})


def to_score(labels: Labels, *, again: bool) -> Plan:
    """Find the samples with a caption that has no score; all with captions with `again`."""
    return _plan(labels, lambda captions: any(again or caption.score is None for caption in captions))


def _plan(labels: Labels, is_wanted: Callable[[Sequence[Caption]], bool]) -> Plan:
    wanted, faults, skipped = [], [], 0
    for index in range(len(labels.source)):
        try:
            captions = captions_in(labels, index)
        except BadSample as error:
            faults.append(error.finding)
            continue
        if is_wanted(captions):
            wanted.append(index)
        else:
            skipped += 1
    return Plan(indices=tuple(wanted), skipped=skipped, faults=tuple(faults))


def captioned(
    labels: Labels, plan: Plan, describer: Describer, names: Sequence[str], batch_size: int
) -> Generator[Labelled]:
    """Write the captions that are missing, batch by batch; closing the generator saves what was made.

    Errors: OSError naming the file that could not be written.
    """

    def make(indices: Sequence[int], pictures: Sequence["Image"]) -> Iterator[list[Caption] | str]:
        for texts in describer.describe(pictures, labels.source.sample(indices[0]).key):
            told = [(name, text) for name, text in zip(names, texts, strict=True) if not _is_blank(text)]
            yield [Caption(text=text, name=name) for name, text in told] or "The model wrote no words about it."

    yield from _worked(labels, plan, make, batch_size)


def scored(labels: Labels, plan: Plan, scorer: Scorer, batch_size: int, *, again: bool) -> Generator[Labelled]:
    """Write the scores that are missing, batch by batch; closing the generator saves what was made.

    Errors: as `captioned`.
    """

    def make(indices: Sequence[int], pictures: Sequence["Image"]) -> Iterator[list[Caption] | str]:
        wanted = [[one for one in captions_in(labels, i) if again or one.score is None] for i in indices]
        found = scorer.scores(pictures, [[caption.text for caption in captions] for captions in wanted])
        for captions, scores in zip(wanted, found, strict=True):
            pairs = zip(captions, scores, strict=True)
            yield [replace(caption, score=round(score, DIGITS)) for caption, score in pairs]

    yield from _worked(labels, plan, make, batch_size)


def _worked(labels: Labels, plan: Plan, make: _Make, batch_size: int) -> Generator[Labelled]:
    if batch_size < 1:
        raise InvalidInput(f"`batch_size` must be at least 1 but is {batch_size}.")
    total, due = len(plan.indices), time.monotonic() + SAVED_EVERY
    try:
        for start in range(0, total, batch_size):
            indices, pictures, faults, made = [], [], list[Finding](), 0
            for index in plan.indices[start : start + batch_size]:
                try:
                    pictures.append(labels.source.picture(index))
                    indices.append(index)
                except BadSample as error:
                    faults.append(error.finding)
            for index, found in zip(indices, make(indices, pictures) if indices else (), strict=True):
                try:
                    if isinstance(found, str):
                        place = labels.source.sample(index).place
                        raise BadSample(Finding(kind="empty-caption", place=place, text=found))
                    labels.put(index, found)
                    made += len(found)
                except BadSample as error:
                    faults.append(error.finding)
            if (now := time.monotonic()) >= due:
                labels.save()
                after = time.monotonic()
                due = after + max(SAVED_EVERY, 20 * (after - now))
            yield Labelled(done=min(start + batch_size, total), total=total, made=made, faults=tuple(faults))
    finally:
        labels.save()


def _is_blank(text: str) -> bool:
    """Whether a text says nothing; a lone number would be read as a score."""
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True
