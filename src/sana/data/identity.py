"""What tells the content of one source from that of any other, without reading all of it."""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from sana.data.samples import BadSample, Dataset, Sample

ENDS = 4096
"""Bytes of a picture's beginning and end that go into the identity: compressed pixels change the end of a file."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What tells one data set from any other, whatever of it is trained on."""

    samples: int
    digest: str


def content_of(source: Dataset, readable: Mapping[int, Sample], beside: str = "") -> Content:
    """Return the content of a source whose `readable` samples are known by their numbers.

    `beside` tells the pictures that belong to it from any others.
    """
    digest = hashlib.sha256(f"{source.identity(captions=False)}/{beside}".encode())
    for index, sample in readable.items():
        digest.update(repr((index, sample.repeats, sample.captions)).encode("utf-8", "surrogatepass"))
    return Content(samples=len(source), digest=digest.hexdigest())


def identity_of(
    places: Iterable[str], opened: Callable[[int], BinaryIO], captions: Callable[[int], object] | None
) -> str:
    """Return the digest over places, sizes and both ends of all pictures, and over the captions unless that is None.

    `opened` and `captions` are asked by number; what cannot be read goes in as the kind of its fault.
    """
    digest = hashlib.sha256()
    for number, place in enumerate(places):
        digest.update(f"\n{place}\0".encode("utf-8", "surrogateescape"))
        try:
            with opened(number) as file:
                size = file.seek(0, io.SEEK_END)
                digest.update(b"%d\0" % size)
                for start in (0, max(0, size - ENDS)):
                    file.seek(start)
                    digest.update(file.read(ENDS))
            if captions is not None:
                digest.update(repr(captions(number)).encode("utf-8", "surrogatepass"))
        except BadSample as error:
            digest.update(error.finding.kind.encode())
        except OSError as error:
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()
