"""The files and seeds of a batch: the same at every run, whatever else the file holds, and cut into disjoint shards."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sana.apps.cli.manifest import digest
from sana.apps.cli.names import STDOUT, distinct, is_folder, safe_name, slug
from sana.apps.cli.options import Files
from sana.apps.cli.order import RANDOM_SEEDS, Job
from sana.apps.cli.settings import Settings
from sana.apps.cli.values import Shard
from sana.errors import InvalidInput

MARK = 8
"""Digits that tell apart pictures of one name."""


def share(jobs: Sequence[Job], shard: Shard) -> list[Job]:
    """Return the jobs with the pictures of one shard: neighbours in the file, as equal in number as can be."""
    total = sum(len(job.seeds) for job in jobs)
    first, last = ((shard.number - k) * total // shard.of for k in (1, 0))
    shared: list[Job] = []
    place = 0
    for job in jobs:
        begin, end = (min(max(bound - place, 0), len(job.seeds)) for bound in (first, last))
        place += len(job.seeds)
        if begin < end:
            seeds = list(job.seeds[begin:end])
            request = job.request.replace(seed=seeds[0])
            shared.append(dataclasses.replace(job, request=request, seeds=seeds, files=job.files[begin:end]))
    return shared


def name_batch(jobs: Sequence[Job], writing: Files, base: Settings) -> list[Job]:
    """Return the jobs with seeds and files that depend on each line alone.

    A line without a seed gets one from what it says. A name is the line's own, or its prompt's first words; where that
    does not tell it from every other prompt, digits of what the line says stand behind it.

    Raises:
        InvalidInput: `output` is a file.
    """
    if writing.output is not None and not is_folder(writing.output):
        raise InvalidInput("A batch goes into a folder. Name one as `output`.")
    source = str(base.values["prompt_file"])
    stem = "batch" if source == STDOUT else slug(Path(source).stem)
    folder = Path(writing.output).expanduser() if writing.output is not None else Path(stem)
    own = [digest(job.entry.values, ("seed", "count", "batch_size")) for job in jobs]
    seeds = _seeds(jobs, own)
    titles = [safe_name(job.entry.name) if job.entry.name else slug(job.request.prompt) for job in jobs]
    plain = [_stems(job, title, numbers) for job, title, numbers in zip(jobs, titles, seeds, strict=True)]
    taken = Counter(stem.casefold() for stems in plain for stem in stems)
    files = []
    for job, title, numbers, stems, mark in zip(jobs, titles, seeds, plain, own, strict=True):
        if not _tells_all(job, title) or any(taken[stem.casefold()] > 1 for stem in stems):
            stems = [f"{title}-{mark[:MARK]}-{seed}" for seed in numbers]
        files += [folder / f"{stem}.png" for stem in stems]
    rest = iter(distinct(files))
    return [
        dataclasses.replace(
            job,
            request=job.request.replace(seed=numbers[0], count=1),
            settings=_seeded(job, numbers),
            seeds=numbers,
            files=[next(rest) for _ in numbers],
        )
        for job, numbers in zip(jobs, seeds, strict=True)
    ]


def _seeded(job: Job, seeds: Sequence[int]) -> Settings:
    """Return the settings of a job with its seeds, which now nobody draws."""
    own = job.settings
    return Settings(values={**own.values, "seed": list(seeds)}, origins={"seed": job.entry.place, **own.origins})


def _stems(job: Job, title: str, seeds: Sequence[int]) -> list[str]:
    return [title] if job.entry.name and len(seeds) == 1 else [f"{title}-{seed}" for seed in seeds]


def _seeds(jobs: Sequence[Job], own: Sequence[str]) -> list[list[int]]:
    """Return the seeds of each job; a line that stands in the file again draws on where the one before ended."""
    seeds: list[list[int]] = []
    met: Counter[str] = Counter()
    for job, mark in zip(jobs, own, strict=True):
        if job.seeds:
            seeds.append(list(job.seeds))
            continue
        start = int(mark, 16) % RANDOM_SEEDS + met[mark]
        met[mark] += job.request.count
        seeds.append(list(range(start, start + job.request.count)))
    return seeds


def _tells_all(job: Job, title: str) -> bool:
    """Tell whether a name has all the words of its prompt, or all the letters of the name that was wished for."""
    if job.entry.name:
        return title == job.entry.name
    letters = "".join(mark for mark in job.request.prompt.lower() if mark.isalnum())
    return letters == "".join(mark for mark in title if mark.isalnum())
