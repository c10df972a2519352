"""Control pictures in a folder of their own, which belong to the pictures of a data set by their names."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from sana.data.open import open_source
from sana.data.samples import BadSample, Finding, Sample
from sana.data.tar import split_name

if TYPE_CHECKING:
    from PIL.Image import Image


class ControlMaps:
    """The control pictures of samples; each has the shape of its picture, at any size."""

    def __init__(self, path: str, samples: Iterable[Sample]) -> None:
        """Open the control pictures and look at the header of each that belongs to one of `samples`.

        Raises:
            ModelNotFound, InvalidInput, BadData: as `open_source`.
        """
        self.path, self._source = path, open_source(path, prompt="control")
        broken = [finding for finding in self._source.findings if finding.is_broken]
        self.missing: list[Sample] = []
        """Samples without one, those of the findings included."""
        self.samples: dict[str, Sample] = {}
        """What is known of each, by the key of the picture that it belongs to."""
        self._numbers: dict[str, int] = {}
        for index in range(len(self._source)):
            try:
                sample = self._source.sample(index)
            except BadSample as error:
                broken.append(error.finding)
                continue
            self.samples[sample.key], self._numbers[sample.key] = sample, index
        for sample in samples:
            known = self.samples.get(sample.key)
            if known is not None and not _is_of_shape(known, sample):
                text = (
                    f"It has {known.width} x {known.height} pixels, another shape than its picture {sample.place} of"
                    f" {sample.width} x {sample.height}. Save it in that shape."
                )
                broken.append(Finding(kind="other-shape", place=known.place, text=text))
                del self.samples[sample.key]
                known = None
            if known is None:
                self.missing.append(sample)
        wanted = {key for sample in self.missing for key in _keys(sample)}
        self.findings = [self._placed(found) for found in broken if _key_of(found.place) in wanted]
        """What is broken, or of another shape, and would belong to a sample, which has no control picture then."""
        reasons = {_key_of(finding.place) for finding in broken}
        self.unexplained = [sample for sample in self.missing if reasons.isdisjoint(_keys(sample))]
        """The missing ones of which no finding says why."""

    def picture(self, key: str) -> "Image":
        """Return the control picture of a sample in RGB, upright. Raises BadSample naming its place."""
        try:
            return self._source.picture(self._numbers[key])
        except BadSample as error:
            raise BadSample(self._placed(error.finding)) from None

    def identity(self) -> str:
        """Return hexadecimal digits that tell these from any other."""
        return self._source.identity(captions=False)

    def _placed(self, finding: Finding) -> Finding:
        folder = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
        return replace(finding, place=os.path.join(folder, finding.place))


def _key_of(place: str) -> str:
    """Return the key of the sample that a finding is about, or of a tar with all its samples."""
    tar, mark, name = place.partition(".tar:")
    if mark:
        return f"{tar}/{split_name(name)[0]}"
    return place.removesuffix(".tar") if place.endswith(".tar") else str(PurePosixPath(place).with_suffix(""))


def _keys(sample: Sample) -> tuple[str, ...]:
    """Return the keys by which a finding may be about the control picture of a sample: its own, and that of its tar."""
    return (sample.key, *map(str, PurePosixPath(sample.key).parents))


def _is_of_shape(control: Sample, picture: Sample) -> bool:
    # Sides are whole pixels: those of a scaled picture are off by less than one each.
    across = abs(control.width * picture.height - control.height * picture.width)
    return across <= picture.width + picture.height
