"""Batches of pictures with captions, cut to aspect-ratio buckets.

Which samples a batch holds, how they are cut and which caption they get are functions of (seed, draw) alone: they are
the same on any number of processes, and after a resume.

Shapes: see `batches`.
"""

import functools
import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, distributed

from sana.data.buckets import bucket_for, cut, enlargement
from sana.data.captions import choose, is_wanted, probabilities, triggered
from sana.data.identity import Content
from sana.data.open import open_source
from sana.data.order import BucketedOrder
from sana.data.samples import BadSample, Dataset, Sample
from sana.engine.control_maps import control_map
from sana.errors import BadData, InvalidInput
from sana.training.batches import Batch, collated, joined, without_some_controls
from sana.training.broken import BrokenSamples
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
        self._broken = BrokenSamples(self.source, settings.path)
        self._lost: set[tuple[int, int]] = set()
        self._mapped = ""
        self.samples = self._usable()
        self._maps = self._paired() if control is not None and control.kind == "map" else None
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
        rows = self._rows(draw)
        texts = [self._text(self.samples[index], rng) for index in rows]
        made = self._batch(rows, texts)
        return without_some_controls(made, self.control.dropout if self.control else 0.0, generator)

    def held_out(self) -> Iterator[Batch]:
        """The samples kept apart with their likeliest captions; where none are, up to eight that are trained on.

        Broken ones are left out. Errors: BadData where nothing remains.
        """
        trained_on = (index for index in sorted(self.samples) if self._is_sound(index))
        chosen = sorted(self._apart) or list(itertools.islice(trained_on, 8))
        is_empty = True
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index in chosen:
            by_bucket.setdefault(self.buckets[index], []).append(index)
        for rows in by_bucket.values():
            for start in range(0, len(rows), self.size):
                part = [index for index in rows[start : start + self.size] if self._is_sound(index)]
                if not part:
                    continue
                is_empty = False
                yield self._batch(part, [self.caption(index) for index in part])
        if is_empty:
            raise BadData(
                f"No held-out picture in {self.settings.path} can be read. Mend them, or raise data.held_out."
            )

    def caption(self, index: int) -> str:
        """The likeliest caption of a sample, the first of equals, with the trigger in it."""
        captions = self.samples[index].captions
        shares = probabilities(captions, self.choice)
        return triggered(captions[shares.index(max(shares))].text, self.settings.trigger)

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

    def _rows(self, draw: int) -> list[int]:
        """The samples of a draw, or those of another one of its epoch if nothing in its bucket can be read."""
        for turn in itertools.chain((draw,), self.order.elsewhere(draw)):
            rows = [self._sound(turn, position) for position in self.order.batch(turn)]
            found = [row for row in rows if row is not None]
            if found:
                return found
        raise BadData(f"No picture in {self.settings.path} can be read.")

    def _sound(self, draw: int, position: int) -> int | None:
        """The sample at a position of the order, or another of its bucket if it turns out to be broken."""
        bucket = self.buckets[self._numbers[position]]
        if bucket in self._lost:
            return None
        for place in itertools.chain((position,), self.order.stand_ins(draw, position)):
            if self._is_sound(self._numbers[place]):
                return self._numbers[place]
        self._lost.add(bucket)
        return None

    def _is_sound(self, index: int) -> bool:
        """Whether the picture and the control picture of a sample can be read."""
        return self._broken.read(index, self._pictures) is not None

    def _pictures(self, index: int) -> list[Tensor]:
        return [self.features.picture(kind, index) for kind in self.features.pictures]

    def _usable(self) -> dict[int, Sample]:
        """Look at all samples and return those that can be trained on, by their number."""
        found: dict[int, Sample] = {}
        small: list[Sample] = []
        for index in range(len(self.source)):
            sample = self._broken.read(index, self.source.sample)
            if sample is None or not is_wanted(sample.captions, self.choice):
                continue
            if self._is_small(sample):
                small.append(sample)
                if self.settings.small == "skip":
                    continue
            found[index] = sample
        self._broken.counted(len(found))
        if small and self.settings.small == "refuse":
            raise InvalidInput(_small_told(small, self.side))
        if small:
            done = "left out" if self.settings.small == "skip" else "enlarged"
            _log.warning("%d pictures are smaller than their bucket and are %s", len(small), done)
        if not found:
            raise BadData(f"No picture in {self.settings.path} can be trained on; all are small or score low.")
        return found

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
        assert self._maps is not None
        paired, numbers = self._maps

        def read(index: int) -> Image.Image:
            height, width = self.buckets[index]
            return cut(paired.picture(numbers[self.samples[index].key]), height, width, upscale=True)

        return read, self._mapped

    def _paired(self) -> tuple[Dataset, dict[str, int]]:
        """The control pictures, and their numbers by the keys of the samples; those of broken ones are left out."""
        paired = open_source(self.settings.controls, prompt="control")
        numbers: dict[str, int] = {}
        unread = [finding for finding in paired.findings if finding.is_broken]
        for index in range(len(paired)):
            try:
                numbers[paired.sample(index).key] = index
            except BadSample as error:
                unread.append(error.finding)
        missing = [index for index, sample in self.samples.items() if sample.key not in numbers]
        if len(missing) > sum(finding.samples for finding in unread):
            raise InvalidInput(
                f"{len(missing)} pictures have no control picture of the same name in {self.settings.controls}, the"
                f" first is {self.samples[missing[0]].place}."
            )
        for finding in unread if missing else ():
            self._broken.note(finding)
        for index in missing:
            del self.samples[index]
        self._mapped = paired.identity(captions=False)
        return paired, numbers


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
