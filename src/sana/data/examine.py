"""Every sample of a data set looked at before a run: what can be trained on, in which bucket, and what is amiss.

The same findings serve `sana dataset check` and the trainer. A broken sample is left out and counted; when more than a
tolerated share is broken, the run is refused, naming the first.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sana.data.buckets import Small, bucket_for, enlargement
from sana.data.captions import DEFAULT, PLACEHOLDER, CaptionChoice, is_wanted
from sana.data.samples import BadSample, Dataset, Finding, Sample
from sana.errors import BadData, InvalidInput

TOLERANCE = 0.01
"""Share of broken samples from which on a run is refused."""
SHOWN = 3
"""Broken samples that a refusal names."""
TINY = 64
"""Pixels of a shorter side, below which a picture is told as tiny."""
Bucket = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks of its samples."""

    base: int | None = None
    """Side of the square bucket; None asks nothing of the size."""
    aspect: bool = True
    """Whether there are other buckets than the square one."""
    small: Small = "refuse"
    """What becomes of pictures that do not cover their bucket: see `buckets.Small`."""
    choice: CaptionChoice = DEFAULT


class Seen(NamedTuple):
    """What was found about one sample: `sample` is None when it is broken."""

    number: int
    sample: Sample | None
    bucket: Bucket | None
    findings: tuple[Finding, ...]
    is_used: bool = True
    """Whether a run draws it."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The samples that a run draws from, the n-th of which is `indices[n]` of the source."""

    indices: tuple[int, ...]
    """Numbers in the source; one that is repeated in an epoch is there as often."""
    buckets: tuple[Bucket | None, ...]
    """(height, width) of each."""
    findings: tuple[Finding, ...]
    total: int
    """Samples there would be if none were broken, repeats not counted."""

    @property
    def broken(self) -> int:
        """How many samples are broken."""
        return sum(finding.samples for finding in self.findings if finding.is_broken)


def examine(source: Dataset, wanted: Wanted | None = None) -> Iterator[Seen]:
    """Yield what is found about each sample, from its texts and the header of its picture.

    Raises:
        InvalidInput: the base has no buckets.
    """
    wanted = wanted or Wanted()
    for index in range(len(source)):
        try:
            sample = source.sample(index)
        except BadSample as error:
            yield Seen(index, None, None, (error.finding,), False)
            continue
        yield _judged(index, sample, wanted)


def survey(source: Dataset, wanted: Wanted | None = None, *, tolerance: float = TOLERANCE) -> Survey:
    """Look at every sample and return those that can be trained on.

    Raises:
        BadData: too many are broken, a picture is too small and `small` is `refuse`, or nothing remains.
        InvalidInput: as `examine`.
    """
    if not 0 <= tolerance <= 1:
        raise InvalidInput(f"The share of broken samples that is put up with must lie from 0 to 1 but is {tolerance}.")
    indices: list[int] = []
    buckets: list[Bucket | None] = []
    findings = list(source.findings)
    for seen in examine(source, wanted):
        findings += seen.findings
        if seen.sample is not None and seen.is_used:
            indices += [seen.number] * seen.sample.repeats
            buckets += [seen.bucket] * seen.sample.repeats
    total = len(source) + sum(finding.samples for finding in source.findings if finding.is_broken)
    small = [finding for finding in findings if finding.kind == "small"]
    if small:
        raise BadData(
            f"{len(small)} of {total} pictures are smaller than what they are trained at: {small[0]} "
            "Train at a smaller size, leave small pictures out (skip), or let them be enlarged (upscale)."
        )
    check_share(findings, total, tolerance)
    if not indices:
        raise BadData("No sample remains to be trained on: all are broken, left out as small, or score low.")
    return Survey(indices=tuple(indices), buckets=tuple(buckets), findings=tuple(findings), total=total)


def check_share(
    findings: Sequence[Finding], total: int, tolerance: float = TOLERANCE, *, where: str = "", controls: str = ""
) -> None:
    """Raise BadData if more than the tolerated share of `total` samples is broken.

    `where` names their source, `controls` that of their control pictures.
    """
    broken = [finding for finding in findings if finding.is_broken]
    count = sum(finding.samples for finding in broken)
    if count > tolerance * total:
        source = f" in {where}" if where else ""
        shown = "; ".join(str(finding).removesuffix(".") for finding in broken[:SHOWN])
        command = [
            "sana",
            "dataset",
            "check",
            *([where] if where else []),
            *(["--controls", controls] if controls else []),
        ]
        raise BadData(
            f"{count} of {total} samples{source} are broken ({count / max(total, 1):.1%}), which is more than the"
            f" {tolerance:.1%} that a run puts up with. The first: {shown}. `{shlex.join(command)}` lists all."
        )


def _judged(index: int, sample: Sample, wanted: Wanted) -> Seen:
    """Return what is found about a sample that can be read."""
    findings: list[Finding] = []
    size = f"{sample.width} x {sample.height}"
    if not is_wanted(sample.captions, wanted.choice):
        text = f"No caption scores {wanted.choice.least_best:g} or more. The picture is left out."
        return Seen(index, sample, None, (Finding(kind="low-score", place=sample.place, text=text),), False)
    if not wanted.choice.trigger and any(PLACEHOLDER in caption.text for caption in sample.captions):
        text = f"A caption has {PLACEHOLDER} in it. Training needs what it stands for: data.trigger in its recipe."
        findings.append(Finding(kind="trigger", place=sample.place, text=text))
    if min(sample.width, sample.height) < TINY:
        findings.append(Finding(kind="tiny", place=sample.place, text=f"The picture has {size} pixels only."))
    if wanted.base is None:
        return Seen(index, sample, None, tuple(findings))
    bucket = bucket_for(sample.width, sample.height, wanted.base, aspect=wanted.aspect)
    larger = enlargement(sample.width, sample.height, bucket)
    if larger <= 1:
        return Seen(index, sample, bucket, tuple(findings))
    told = f"{size} pixels do not cover the bucket of {bucket[1]} x {bucket[0]}"
    if wanted.small == "refuse":
        found = Finding(kind="small", place=sample.place, text=f"{told}.")
        return Seen(index, sample, bucket, (*findings, found), False)
    if wanted.small == "skip":
        text = f"{told}. The picture is left out."
        found = Finding(kind="left-out", place=sample.place, text=text)
        return Seen(index, sample, bucket, (*findings, found), False)
    text = f"{told}. The picture is enlarged {larger:.2f} times."
    return Seen(index, sample, bucket, (*findings, Finding(kind="enlarged", place=sample.place, text=text)))
