"""The order of samples: a pure function of (seed, draw), so that it is the same for any number of workers and ranks.

An epoch goes through every sample at most once. Each bucket's samples are shuffled and cut into batches, then all the
batches are shuffled; draw number d is batch d of that endless row of epochs, of which rank r of w takes the numbers
step * w + r. What is left over when a bucket is cut makes a shorter batch (`short`), or waits for another epoch, which
is cut elsewhere (`drop`); a bucket with fewer samples than a batch would never be seen then.

Shuffling sorts by a hash of (seed, epoch, number), which no release of a library changes.
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from sana.errors import InvalidInput

Leftovers = Literal["short", "drop"]
_Ints = npt.NDArray[np.int64]
_KEPT = 2
"""Epochs whose order is held in memory: around a boundary, draws fall into both."""


class BucketedOrder:
    """Batches of sample numbers, all of one bucket each."""

    def __init__(
        self, buckets: Sequence[Hashable], batch_size: int, seed: int, *, leftovers: Leftovers = "short"
    ) -> None:
        """Take the bucket of every sample.

        Raises:
            InvalidInput: there are no samples, or with `drop` no bucket has a whole batch.
        """
        if not buckets:
            raise InvalidInput("There are no samples to put in order.")
        if batch_size < 1:
            raise InvalidInput(f"A batch has at least one sample, not {batch_size}.")
        self.batch_size, self.seed, self.leftovers = batch_size, seed, leftovers
        places: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            places.setdefault(bucket, []).append(index)
        self.buckets = tuple(places)
        self._members: list[_Ints] = [np.asarray(members, np.int64) for members in places.values()]
        self._group = {bucket: number for number, bucket in enumerate(places)}
        self._of_index = buckets
        sizes = [len(members) for members in self._members]
        counts = [-(-size // batch_size) if leftovers == "short" else size // batch_size for size in sizes]
        self.batches_per_epoch = sum(counts)
        if not self.batches_per_epoch:
            raise InvalidInput(
                f"No bucket has a whole batch of {batch_size}: the largest has {max(sizes)} samples."
                " Take smaller batches, or let leftovers make short ones."
            )
        self._plans: dict[int, tuple[_Ints, _Ints]] = {}

    @property
    def never_seen(self) -> list[int]:
        """The samples of buckets that are smaller than a batch, where leftovers are dropped."""
        if self.leftovers == "short":
            return []
        return sorted(int(i) for members in self._members if len(members) < self.batch_size for i in members)

    def epoch(self, draw: int) -> int:
        """Return the number of the epoch that a draw lies in."""
        return draw // self.batches_per_epoch

    def batch(self, draw: int) -> list[int]:
        """Return the samples of a draw; the same at every call, in every process."""
        if draw < 0:
            raise InvalidInput(f"Draws are counted from 0, there is none of number {draw}.")
        epoch, position = divmod(draw, self.batches_per_epoch)
        if epoch not in self._plans:
            while len(self._plans) >= _KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._plan(epoch)
        starts, row = self._plans[epoch]
        start, end = starts[position]
        return [int(index) for index in row[start:end]]

    def instead(self, draw: int, index: int, attempt: int = 0) -> int:
        """Return a sample of the same bucket for one that cannot be read; the rest of the order stays as it is.

        It is as pure as the order, but may be seen a second time in the epoch.
        """
        members = self._members[self._group[self._of_index[index]]]
        value = int(_hashed(np.asarray([index], np.uint64), self._salt("instead", draw, attempt))[0])
        return int(members[value % len(members)])

    def stand_ins(self, draw: int, index: int) -> Iterator[int]:
        """Yield what `instead` gives, as often as the bucket has samples, and then all of these: none is left out."""
        members = self._members[self._group[self._of_index[index]]]
        for attempt in range(len(members)):
            yield self.instead(draw, index, attempt)
        yield from (int(member) for member in members)

    def elsewhere(self, draw: int) -> Iterator[int]:
        """Yield the other draws of the epoch, for one in whose bucket nothing can be read; as pure as the order."""
        count = self.batches_per_epoch
        first, begin = draw - draw % count, self._salt("elsewhere", draw, 0)
        for number in range(count):
            other = first + (begin + number) % count
            if other != draw:
                yield other

    def _plan(self, epoch: int) -> tuple[_Ints, _Ints]:
        """Return (start, end) of each batch, in their order, and the samples that these count."""
        rows, spans, offset = [], [], 0
        for number, members in enumerate(self._members):
            row = members[_shuffle(len(members), self._salt("samples", epoch, number))]
            ends = range(self.batch_size, len(row) + self.batch_size, self.batch_size)
            for end in ends:
                if end <= len(row) or self.leftovers == "short":
                    spans.append((offset + end - self.batch_size, offset + min(end, len(row))))
            rows.append(row)
            offset += len(row)
        order = _shuffle(len(spans), self._salt("batches", epoch, 0))
        return np.asarray(spans, np.int64)[order], np.concatenate(rows)

    def _salt(self, what: str, first: int, second: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/{what}/{first}/{second}".encode()).digest()
        return int.from_bytes(digest[:8], "little")


def _shuffle(count: int, salt: int) -> _Ints:
    """Return the numbers below `count` in an order that depends on the salt alone."""
    return np.argsort(_hashed(np.arange(count, dtype=np.uint64), salt), kind="stable")


def _hashed(values: npt.NDArray[np.uint64], salt: int) -> npt.NDArray[np.uint64]:
    """Return each value mixed with the salt (the finaliser of SplitMix64, twice)."""
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for key in (salt, salt >> 32 | (salt & 0xFFFFFFFF) << 32):
        mixed = mixed ^ np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed
