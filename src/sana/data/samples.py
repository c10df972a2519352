"""What a data set is made of: samples with captions, the source that holds them, and what is found wrong with it.

Kinds of findings are the keys of `KINDS`. A finding that makes its sample useless is broken; the others are told only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sana.errors import BadData

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS: dict[str, tuple[bool, str]] = {
    "unreadable": (True, "pictures that cannot be read"),
    "missing": (True, "files that are named but not there"),
    "no-caption": (True, "pictures without a caption"),
    "empty-caption": (True, "empty captions"),
    "bad-text": (True, "texts, lines and files of JSON that cannot be read"),
    "bad-name": (True, "names that are unsafe, or used twice"),
    "bad-member": (True, "members of tars that are refused"),
    "bad-shard": (True, "tars that are empty, cut off or damaged"),
    "lost": (True, "samples that shards should have and have not"),
    "small": (True, "pictures smaller than their bucket"),
    "other-shape": (True, "control pictures of another shape than their picture"),
    "left-out": (False, "pictures left out because they are smaller than their bucket"),
    "enlarged": (False, "pictures that are enlarged to cover their bucket"),
    "tiny": (False, "tiny pictures"),
    "trigger": (False, "pictures with [trigger] in a caption, which training must be told"),
    "long-caption": (False, "captions longer than the text encoder reads"),
    "duplicate": (False, "pictures that are there twice"),
    "similar": (False, "pictures that look the same"),
    "low-score": (False, "pictures whose captions all score low"),
    "ignored": (False, "files that are left out"),
    "count": (False, "shards with more samples than told"),
}
"""Kind of finding -> whether what it is about is broken, and what it says of several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One text that describes a picture."""

    text: str
    weight: float = 1.0
    """How often it is chosen among the captions of its picture, in proportion."""
    score: float | None = None
    """CLIP score, from 0 to 100."""
    name: str = "prompt"
    """Who wrote it; `prompt` is the text that came with the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What is known of a picture without decoding it."""

    key: str
    """Unique in its source: the path without suffix, for shards behind the name of the shard."""
    place: str
    """Where it is, for messages: `cats/a.png` or `shard-000.tar:a.png`."""
    width: int
    height: int
    captions: tuple[Caption, ...]
    """At least one, none of them empty."""
    repeats: int = 1
    """How often it is seen in an epoch, as the names of folders such as `10_cats` tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing, and where."""

    kind: str
    place: str
    text: str
    line: int | None = None
    samples: int = 1
    """How many samples it costs, if it is broken."""

    @property
    def is_broken(self) -> bool:
        """Whether what it is about cannot be trained on."""
        return KINDS[self.kind][0]

    def __str__(self) -> str:
        where = self.place if self.line is None else f"{self.place}:{self.line}"
        return f"{where}: {self.text}"


class BadSample(BadData):
    """A sample that cannot be used; `finding` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class Source(Protocol):
    """Samples by number. Reading one again gives the same; processes may share a source."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def sample(self, index: int) -> Sample:
        """Return what is known of a sample; only the header of its picture is read. Raises BadSample."""
        ...

    def picture(self, index: int) -> "Image":
        """Return the picture in RGB, upright. Raises BadSample naming its place."""
        ...

    def identity(self, *, captions: bool = True) -> str:
        """Return hexadecimal digits that tell this content from any other, for stores of what is computed from it.

        Without `captions` they are about the pictures alone.
        """
        ...


class Dataset(Source, Protocol):
    """A source that was opened from the disk."""

    @property
    def findings(self) -> Sequence[Finding]:
        """What was seen amiss when it was opened; what it is about is not among the samples."""
        ...

    def encoded(self, index: int) -> tuple[bytes, str]:
        """Return a picture as it is stored, and the suffix of its format. Raises BadSample."""
        ...
