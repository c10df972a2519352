"""Samples of tars written as a folder of pictures: the way back of `packing`.

Every picture is copied as it is stored, under the key of its sample; `metadata.jsonl` beside them holds the captions
with their names, weights and scores.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sana.data.folder import RECORDS
from sana.data.packing import unique
from sana.data.samples import BadSample, Finding, Sample
from sana.data.webdataset import ShardSource

LONGEST = 200
"""Bytes of a key that go into the name of a file; names may have 255."""


def unpack(source: ShardSource, numbers: Sequence[int], folder: Path) -> Iterator[Finding | None]:
    """Write these samples into an empty folder; yields, sample by sample, why one was left out, or None.

    Errors: OSError naming the file that could not be written.
    """
    names = unique(_short(source.shard(number)[1]) for number in numbers)
    with (folder / RECORDS).open("x", encoding="utf-8") as records:
        for number, name in zip(numbers, names, strict=True):
            try:
                sample, (data, suffix) = source.sample(number), source.encoded(number)
                source.picture(number)  # decoded once to see that it is sound
            except BadSample as error:
                yield error.finding
                continue
            with (folder / f"{name}{suffix}").open("xb") as file:
                file.write(data)
            records.write(json.dumps(_record(f"{name}{suffix}", sample), ensure_ascii=False) + "\n")
            yield None


def _short(key: str) -> str:
    return key.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")


def _record(file: str, sample: Sample) -> dict[str, Any]:
    captions = []
    for one in sample.captions:
        told: dict[str, Any] = {"text": one.text, "name": one.name}
        told |= {} if one.weight == 1 else {"weight": one.weight}
        captions.append(told if one.score is None else {**told, "score": one.score})
    return {"file_name": file, "captions": captions}
