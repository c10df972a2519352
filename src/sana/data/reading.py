"""Pictures of a draw, cut to their bucket: what turns out broken on the way is counted, listed and replaced.

The replacement is of the same bucket and, as the order itself, a function of (seed, draw) and of what is broken, so all
other places of the order stay as they are.
"""

import itertools
from typing import TYPE_CHECKING, NamedTuple

from sana.data.buckets import cut
from sana.data.examine import TOLERANCE, Survey, check_share
from sana.data.order import BucketedOrder
from sana.data.samples import BadSample, Dataset, Finding, Sample
from sana.errors import BadData

if TYPE_CHECKING:
    from PIL.Image import Image


class Taken(NamedTuple):
    """One place of a batch: the sample's number in the source, what is known of it, and its picture."""

    number: int
    sample: Sample
    picture: "Image"


class Reader:
    """Reads the batches of an order from a source."""

    def __init__(
        self,
        source: Dataset,
        survey: Survey,
        order: BucketedOrder,
        *,
        tolerance: float = TOLERANCE,
        upscale: bool = False,
    ) -> None:
        """Take an order of the positions in the survey; `upscale` lets pictures that are too small be enlarged."""
        self.source, self.survey, self.order = source, survey, order
        self.tolerance, self.upscale = tolerance, upscale
        self.broken: dict[int, Finding] = {}
        """Number in the source -> what is wrong, for those that the survey had found sound."""

    def read(self, draw: int) -> list[Taken]:
        """Return the batch of a draw.

        Raises:
            BadData: more samples than tolerated are broken, or none of the bucket can be read.
        """
        return [self._sound(draw, position) for position in self.order.batch(draw)]

    def _sound(self, draw: int, position: int) -> Taken:
        for place in itertools.chain((position,), self.order.stand_ins(draw, position)):
            index = self.survey.indices[place]
            if index not in self.broken:
                try:
                    return self._take(index, place)
                except BadSample as error:
                    self.broken[index] = error.finding
                    check_share([*self.survey.findings, *self.broken.values()], self.survey.total, self.tolerance)
        first = next(iter(self.broken.values()))
        raise BadData(f"No picture of the bucket {self.survey.buckets[position]} can be read. The first: {first}")

    def _take(self, index: int, position: int) -> Taken:
        sample, picture, bucket = self.source.sample(index), self.source.picture(index), self.survey.buckets[position]
        if bucket is None:
            return Taken(index, sample, picture)
        return Taken(index, sample, cut(picture, *bucket, upscale=self.upscale))
