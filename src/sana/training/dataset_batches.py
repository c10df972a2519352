"""Batches of pictures with captions, cut to aspect-ratio buckets.

Which samples a batch holds, how they are cut and which caption they get are functions of (seed, draw) alone: they are
the same on any number of processes, and after a resume.

Shapes: see `batches`.
"""

import functools
import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, distributed

from sana.data.buckets import bucket_for, cut, enlargement
from sana.data.captions import choose, is_wanted, triggered
from sana.data.examine import check_share
from sana.data.identity import Content
from sana.data.open import open_source
from sana.data.order import BucketedOrder
from sana.data.samples import BadSample, Dataset, Finding, Sample
from sana.engine.control_maps import control_map
from sana.errors import BadData, InvalidInput
from sana.training.batches import Batch, collated, joined, without_some_controls
from sana.training.dataset_features import DatasetFeatures, Encoders, Pictures
from sana.training.objectives.flow_settings import DataSettings

LATENTS, CONTROL = "latents", "control"
_SHOWN = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Control:
    """Which control pictures belong to the samples."""

    kind: str
    """A kind of control map, computed from the picture; or map, read from `folder`."""
    dropout: float = 0.0
    """Share of the samples that see none."""


class DatasetBatches:
    """Pictures of one source with one of their captions each."""

    def __init__(
        self,
        settings: DataSettings,
        encoders: Encoders,
        *,
        batch_size: int,
        seed: int,
        side: int,
        dropout: float,
        device: torch.device,
        control: Control | None = None,
        prepare: bool = True,
    ) -> None:
        """Open the source, look at every sample, and compute the features if the settings name a folder for them.

        `side` is that of the square bucket. Without `prepare` nothing is computed, and there are no batches before
        `ready`.

        Raises:
            BadData: more than one sample in a hundred is broken, or none is left.
            InvalidInput: pictures are smaller than their bucket, or control pictures are missing.
        """
        self.settings, self.size, self.seed, self.side, self.device = settings, batch_size, seed, side, device
        self.control = control
        self.source: Dataset = open_source(settings.path, prompt=settings.caption)
        self.choice = settings.choice(dropout)
        self._bad: list[Finding] = []
        self._mapped = ""
        self.samples = self._usable()
        self.buckets = {i: self._bucket(sample) for i, sample in self.samples.items()}
        self._apart = self._kept_apart()
        seen = [i for i, sample in self.samples.items() if i not in self._apart for _ in range(sample.repeats)]
        self._numbers = seen
        self.order = BucketedOrder([self.buckets[i] for i in seen], batch_size, seed)
        self.features = self._features(encoders)
        self.null: Tensor = torch.zeros(0, 0)  # until `ready`
        if prepare:
            self.ready()

    @functools.cached_property
    def content(self) -> Content:
        """What tells the usable samples from others: their pictures, captions, repeats and control pictures."""
        digest = hashlib.sha256(f"{self.source.identity(captions=False)}/{self._mapped}".encode())
        for index, sample in self.samples.items():
            digest.update(repr((index, sample.repeats, sample.captions)).encode("utf-8", "surrogatepass"))
        return Content(samples=len(self.samples), digest=digest.hexdigest())

    def ready(self) -> None:
        """Compute the features that are missing from their folder, and encode the unconditional text.

        Processes that train together share the work; they do not wait for each other.
        """
        alone = not distributed.is_available() or not distributed.is_initialized()
        own = (1, 1) if alone else (distributed.get_rank() + 1, distributed.get_world_size())
        for share in dict.fromkeys((own, (1, 1))):  # after its own share a process makes what others still lack
            for path, done, total in self.features.compute(share) if self.features.folder else ():
                _log.info("features %d of %d: %s", done, total, path.name)
        self.null = self.features.text("").to(self.device)
        self.features.encoders.rest()

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        """Batch number `draw`; captions are a function of (seed, draw), `generator` empties some of the controls."""
        rng = random.Random(f"{self.seed}/captions/{draw}")
        rows = [self._readable(draw, position) for position in self.order.batch(draw)]
        texts = [self._text(self.samples[index], rng) for index in rows]
        made = self._batch(rows, texts)
        return without_some_controls(made, self.control.dropout if self.control else 0.0, generator)

    def held_out(self) -> Iterator[Batch]:
        """The samples kept apart with their likeliest captions; where none are, up to eight that are trained on."""
        chosen = sorted(self._apart) or sorted(self.samples)[:8]
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index in chosen:
            by_bucket.setdefault(self.buckets[index], []).append(index)
        for rows in by_bucket.values():
            for start in range(0, len(rows), self.size):
                part = rows[start : start + self.size]
                yield self._batch(part, [self.caption(index) for index in part])

    def caption(self, index: int) -> str:
        """The first caption of a sample, with the trigger in it."""
        return triggered(self.samples[index].captions[0].text, self.settings.trigger)

    def first_captions(self, count: int) -> tuple[str, ...]:
        """Different captions of the data, for previews: of the samples that `held_out` begins with."""
        order = [*sorted(self._apart), *(i for i in self.samples if i not in self._apart)]
        return tuple(dict.fromkeys(self.caption(index) for index in order))[:count]

    def _text(self, sample: Sample, rng: random.Random) -> str:
        return choose(sample.captions, rng, self.choice)

    def _batch(self, rows: Sequence[int], texts: Sequence[str]) -> Batch:
        latents = torch.stack([self.features.picture(LATENTS, index) for index in rows])
        controls = [self.features.picture(CONTROL, index) for index in rows] if self.control else None
        embeds, mask = collated([self.features.text(text) for text in texts])  # last: one encoder after the other
        self.features.encoders.rest()
        return Batch(
            latents=latents.to(self.device),
            embeds=embeds.to(self.device),
            mask=mask.to(self.device),
            control=None if controls is None else torch.stack(controls).to(self.device),
        )

    def _readable(self, draw: int, position: int) -> int:
        """The sample at a position of the order, or another of its bucket if its picture turns out to be broken."""
        place = position
        for attempt in range(len(self._numbers) + 8):
            index = self._numbers[place]
            try:
                self.features.picture(LATENTS, index)
            except BadSample as error:
                self._report(error.finding)
                place = self.order.instead(draw, position, attempt)
            else:
                return index
        raise BadData(f"No picture of the bucket {self.buckets[self._numbers[position]]} can be read.")

    def _usable(self) -> dict[int, Sample]:
        """Look at all samples and return those that can be trained on, by their number."""
        found: dict[int, Sample] = {}
        small: list[Sample] = []
        for finding in self.source.findings:
            if finding.is_broken:
                self._report(finding, check=False)
        for index in range(len(self.source)):
            try:
                sample = self.source.sample(index)
            except BadSample as error:
                self._report(error.finding, check=False)
                continue
            if not is_wanted(sample.captions, self.choice):
                continue
            if self._is_small(sample):
                small.append(sample)
                if self.settings.small == "skip":
                    continue
            found[index] = sample
        self._judge(len(found))
        if small and self.settings.small == "refuse":
            raise InvalidInput(_small_told(small, self.side))
        if small:
            done = "left out" if self.settings.small == "skip" else "enlarged"
            _log.warning("%d pictures are smaller than their bucket and are %s", len(small), done)
        if not found:
            raise BadData(f"No picture in {self.settings.path} can be trained on; all are small or score low.")
        return found

    def _report(self, finding: Finding, check: bool = True) -> None:
        """Note a broken sample once. Errors: BadData when there are too many."""
        if finding in self._bad:
            return
        self._bad.append(finding)
        _log.warning("left out: %s", finding)
        if check:
            self._judge(len(self.samples))

    def _judge(self, usable: int) -> None:
        total = usable + sum(finding.samples for finding in self._bad)
        check_share(self._bad, total, where=self.settings.path)

    def _bucket(self, sample: Sample) -> tuple[int, int]:
        return bucket_for(sample.width, sample.height, self.side, aspect=not self.settings.square)

    def _is_small(self, sample: Sample) -> bool:
        return enlargement(sample.width, sample.height, self._bucket(sample)) > 1

    def _kept_apart(self) -> set[int]:
        """Which samples are held out: those whose keys have the smallest digests, however the source is ordered."""
        count = self.settings.held_out
        if count >= len(self.samples):
            raise InvalidInput(
                f"flow_matching.data.held_out is {count}, but there are only {len(self.samples)} samples; hold out"
                " fewer."
            )
        ranked = sorted(self.samples, key=lambda i: hashlib.sha256(self.samples[i].key.encode()).digest())
        return set(ranked[:count])

    def _features(self, encoders: Encoders) -> DatasetFeatures:
        texts = [""]
        for sample in self.samples.values():
            texts += [triggered(caption.text, self.settings.trigger) for caption in sample.captions]
        chosen = hashlib.sha256(repr(sorted(self.samples)).encode()).hexdigest()  # others have no features
        cuts = f"{self.side}/{self.settings.square}/{chosen}/{self.source.identity(captions=False)}"
        pictures = {LATENTS: Pictures(count=len(self.source), read=self.picture, identity=cuts)}
        if self.control is not None:
            read, told = self._controls(self.control)
            pictures[CONTROL] = Pictures(count=len(self.source), read=read, identity=f"{cuts}/{told}")
        folder = Path(self.settings.features) if self.settings.features else None
        return DatasetFeatures(encoders, pictures, texts, folder)

    def picture(self, index: int) -> Image.Image:
        """Picture `index` of the source, cut to its bucket. Errors: BadSample."""
        height, width = self.buckets[index]
        return cut(self.source.picture(index), height, width, upscale=self.settings.small == "upscale")

    def _controls(self, control: Control) -> tuple[Callable[[int], Image.Image], str]:
        """What reads the control picture of a sample, and what decides it beside the picture."""
        if control.kind != "map":
            return lambda index: control_map(control.kind, self.picture(index)), control.kind
        paired = open_source(self.settings.controls, prompt="control")
        numbers = {paired.sample(i).key: i for i in range(len(paired))}
        missing = [sample.place for sample in self.samples.values() if sample.key not in numbers]
        if missing:
            raise InvalidInput(
                f"{len(missing)} pictures have no control picture of the same name in {self.settings.controls}, the"
                f" first is {missing[0]}."
            )

        def read(index: int) -> Image.Image:
            height, width = self.buckets[index]
            return cut(paired.picture(numbers[self.samples[index].key]), height, width, upscale=True)

        self._mapped = paired.identity(captions=False)
        return read, self._mapped


class PriorBatches:
    """Batches of what is to be learnt, joined with as many of what must not be forgotten (DreamBooth)."""

    def __init__(self, instance: DatasetBatches, prior: DatasetBatches, weight: float) -> None:
        """Both cut all pictures to one square."""
        self.instance, self.prior, self.weight = instance, prior, weight
        self.null = instance.null

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        """See `Batches`."""
        return joined(self.instance.batch(draw, generator), self.prior.batch(draw, generator), self.weight)

    def held_out(self) -> Iterator[Batch]:
        """Of the instance alone."""
        return self.instance.held_out()


def _small_told(small: Sequence[Sample], side: int) -> str:
    shown = ", ".join(f"{one.place} ({one.width}x{one.height})" for one in small[:_SHOWN])
    return (
        f"{len(small)} pictures are smaller than their bucket at {side} pixels: {shown}"
        f"{', ...' if len(small) > _SHOWN else ''}. Train at a smaller size (flow_matching.data.size), or set"
        ' flow_matching.data.small to "skip" or "upscale".'
    )
