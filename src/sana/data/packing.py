"""Samples written as the original code's tars: pictures as they are stored, and a record beside each.

Every sample gets `KEY.png` (or jpg, webp) and `KEY.json` with its first caption as `prompt`, width and height, and its
other captions; `SHARD_scores.json` beside the tar holds the CLIP scores, keyed by sample and captioner. The same
samples give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from sana.data.samples import BadSample, Caption, Dataset, Finding, Sample

SCORES = "_scores"
_RESERVED = ("prompt", "text", "caption", "captions", "width", "height", "score", "scores", "weight", "weights")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What went into one tar."""

    samples: int
    scores: Mapping[str, Mapping[str, float]]
    """Sample -> captioner -> CLIP score."""
    findings: tuple[Finding, ...]
    """Pictures that could not be decoded, and are left out."""


def shard_name(number: int) -> str:
    """Return the name of a shard without suffix."""
    return f"{number:05d}"


def keys(source: Dataset, numbers: Sequence[int]) -> list[str]:
    """Return a key for every sample: its own, without the dots and slashes that mean something in tars."""
    return unique(source.sample(number).key for number in numbers)


def unique(keys: Iterable[str]) -> list[str]:
    """Return the keys without dots and slashes, those that are there before with a number behind them."""
    given: set[str] = set()
    made = []
    for told in keys:
        key = told.replace("/", "_").replace(".", "_")
        name, count = key, 2
        while name in given:
            name, count = f"{key}_{count}", count + 1
        given.add(name)
        made.append(name)
    return made


def write_shard(file: BinaryIO, source: Dataset, numbers: Sequence[int], names: Sequence[str]) -> Packed:
    """Write a tar of these samples under these keys; every picture is decoded once to see that it is sound."""
    scores: dict[str, dict[str, float]] = {}
    findings: list[Finding] = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number, key in zip(numbers, names, strict=True):
            try:
                sample, (data, suffix) = source.sample(number), source.encoded(number)
                source.picture(number)
            except BadSample as error:
                findings.append(error.finding)
                continue
            captions = list(_named(sample.captions))
            _add(archive, key + suffix, data)
            _add(archive, f"{key}.json", json.dumps(_record(sample, captions), ensure_ascii=False).encode())
            told = {caption.name: caption.score for caption in captions if caption.score is not None}
            if told:
                scores[key] = told
    return Packed(samples=len(numbers) - len(findings), scores=scores, findings=tuple(findings))


def index_of(name: str, shards: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return what `wids-meta.json` tells of the shards, (file, number of samples) each."""
    return {
        "name": name,
        "__kind__": "Sana-WebDataset",
        "wids_version": 1,
        "shardlist": [{"url": url, "nsamples": count} for url, count in shards],
    }


def _record(sample: Sample, captions: Sequence[Caption]) -> dict[str, Any]:
    """Return the record of a sample; other captions are there twice: as we read them, and as the original code does."""
    first, others = captions[0], captions[1:]
    record: dict[str, Any] = {"prompt": first.text, "width": sample.width, "height": sample.height}
    record |= {} if first.weight == 1 else {"weight": first.weight}
    if others:
        record["captions"] = [
            {"text": one.text, "name": one.name} | ({} if one.weight == 1 else {"weight": one.weight}) for one in others
        ]
    return record | {one.name: one.text for one in others}


def _named(captions: Sequence[Caption]) -> Iterator[Caption]:
    """Yield the captions, the first as `prompt` and the others under names of their own."""
    used = set(_RESERVED)
    for place, one in enumerate(captions):
        name, count = one.name if place else "prompt", 2
        while place and name in used:
            name, count = f"{one.name}-{count}", count + 1
        used.add(name)
        yield Caption(text=one.text, weight=one.weight, score=one.score, name=name)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    archive.addfile(info, io.BytesIO(data))
