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
from sana.data.captions import PLACEHOLDER, choose, is_wanted, probabilities, triggered
from sana.data.controls import ControlMaps
from sana.data.identity import Content, content_of
from sana.data.open import open_source
from sana.data.order import BucketedOrder
from sana.data.samples import Dataset, Sample
from sana.engine.control_maps import control_map
from sana.errors import BadData, InvalidInput
from sana.training.batches import Batch, collated, joined, without_some_controls
from sana.training.broken import BrokenSamples
from sana.training.config import about, changed
from sana.training.dataset_features import DatasetFeatures, Encoders, Pictures
from sana.training.objectives.flow_settings import DataSettings

LATENTS, CONTROL = "latents", "control"
DATA, PRIOR = "flow_matching.data", "flow_matching.prior"
PATHS = {DATA: "path", PRIOR: "folder"}
"""Table of a recipe that describes samples -> its setting that names their source."""
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
        table: str = DATA,
    ) -> None:
        """Open the source, look at every sample, and compute the features if the settings name a folder for them.

        `side` is that of the square bucket. Without `prepare` nothing is computed, and there are no batches before
        `ready`. `table` is what messages call the settings by.

        Raises:
            ModelNotFound: there is no such source.
            BadData: more than one sample in a hundred is broken, or none is left.
            InvalidInput: pictures are smaller than their bucket, control pictures are missing or other settings do not
                fit the samples.
        """
        self.settings, self.size, self.seed, self.side, self.device = settings, batch_size, seed, side, device
        self.control, self._table = control, table
        with about(f"{table}.{PATHS[table]}"):
            self.source: Dataset = open_source(settings.path, prompt=settings.caption)
        self.choice = settings.choice(dropout)
        self._broken = BrokenSamples(self.source, settings.path, settings.controls)
        self._lost: set[tuple[int, int]] = set()
        self._readable: dict[int, Sample] = {}
        with about("flow_matching.data.size"):
            bucket_for(side, side, side, aspect=not settings.square)
        self.samples = self._usable()
        self._check_captions()
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
        """What tells the samples from others: their pictures, captions, repeats and control pictures."""
        return content_of(self.source, self._readable, "" if self._maps is None else self._maps.identity())

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

    def says(self, words: str) -> bool:
        """Tell whether there are such words in what is read of any sample, in either case of letters."""
        captions = {caption.text for sample in self.samples.values() for caption in sample.captions}
        return any(words.lower() in triggered(text, self.settings.trigger).lower() for text in captions)

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
            if sample is None:
                continue
            self._readable[index] = sample
            if not is_wanted(sample.captions, self.choice):
                continue
            if _is_small(sample, self._bucket(sample)):
                small.append(sample)
                if self.settings.small == "skip":
                    continue
            found[index] = sample
        self._broken.counted(len(found))
        self._tell_small(small, self.settings.path, f"{self._table}.{PATHS[self._table]}")
        if not found:
            raise BadData(f"No picture in {self.settings.path} can be trained on; all are small or score low.")
        return found

    def _tell_small(self, small: Sequence[Sample], where: str, setting: str) -> None:
        """Refuse what of `where`, which a setting names, is smaller than its bucket, or tell what becomes of it."""
        if self.settings.small == "refuse":
            refuse_small(small, where, self.side, self._table, setting)
        if small:
            done = "left out" if self.settings.small == "skip" else "enlarged"
            _log.warning("%d pictures of %s are smaller than their bucket and are %s", len(small), where, done)

    def _check_captions(self) -> None:
        """Refuse a place for a trigger that is not there, and tell of settings that no caption gives anything to do."""
        settings, captions = self.settings, [c for sample in self.samples.values() for c in sample.captions]
        for sample in self.samples.values() if not settings.trigger else ():
            if any(PLACEHOLDER in caption.text for caption in sample.captions):
                told = f"set {DATA}.trigger to what it stands for" if self._table == DATA else "write it out"
                raise InvalidInput(f"A caption of {sample.place} in {settings.path} has {PLACEHOLDER} in it: {told}.")
        of_recipe = self._table == DATA and bool(settings.caption)
        if of_recipe and not any(caption.text == settings.caption for caption in captions):
            _log.warning("data.caption has no effect: all pictures of %s have captions", settings.path)
        unused = changed(settings, "threshold", "temperature", "least_best")
        unused += ["mode"] if settings.mode == "score" else []
        if unused and all(caption.score is None for caption in captions):
            told = "data.%s has no effect: no caption of %s has a score; `sana dataset score` writes them"
            _log.warning(told, unused[0], settings.path)

    def _bucket(self, sample: Sample) -> tuple[int, int]:
        return bucket_for(sample.width, sample.height, self.side, aspect=not self.settings.square)

    def _kept_apart(self) -> set[int]:
        """Which samples are held out: those whose keys have the smallest digests, however the source is ordered."""
        count = self.settings.held_out
        if count >= len(self.samples):
            raise InvalidInput(
                f"{self._table}.held_out is {count}, but there are only {len(self.samples)} samples; hold out fewer."
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
        maps = self._maps

        def read(index: int) -> Image.Image:
            height, width = self.buckets[index]
            upscale = self.settings.small == "upscale"
            return cut(maps.picture(self.samples[index].key), height, width, upscale=upscale)

        return read, maps.identity()

    def _paired(self) -> ControlMaps:
        """Open the control pictures; samples whose own is broken are left out, and small ones as settings have it."""
        with about("flow_matching.data.controls"):
            maps = ControlMaps(self.settings.controls, self.samples.values())
        if maps.unexplained:
            raise InvalidInput(
                f"flow_matching.data.controls: {len(maps.unexplained)} pictures have no control picture of the same"
                f" name in {maps.path}, the first is {maps.unexplained[0].place}: {maps.unexplained[0].key}.png is"
                " missing."
            )
        for finding in maps.findings if maps.missing else ():
            self._broken.note(finding)
        lost = {sample.key for sample in maps.missing}
        small = {
            sample.key: maps.samples[sample.key]
            for sample in self.samples.values()
            if sample.key not in lost and _is_small(maps.samples[sample.key], self._bucket(sample))
        }
        self._tell_small(list(small.values()), maps.path, f"{DATA}.controls")
        lost |= small.keys() if self.settings.small == "skip" else set()
        self.samples = {index: sample for index, sample in self.samples.items() if sample.key not in lost}
        if not self.samples:
            raise BadData(f"No picture in {self.settings.path} has a control picture that can be trained on.")
        return maps


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


def refuse_small(small: Sequence[Sample], where: str, side: int, table: str, setting: str) -> None:
    """Refuse pictures of `where`, if there are any, that are smaller than their bucket; `setting` brought them in.

    Raises:
        InvalidInput: naming the first of them.
    """
    if small:
        shown = ", ".join(f"{one.place} ({one.width}x{one.height})" for one in small[:_SHOWN])
        raise InvalidInput(
            f"{setting}: {len(small)} pictures of {where} are smaller than their bucket at {side} pixels: {shown}"
            f"{', ...' if len(small) > _SHOWN else ''}. Train at a smaller size ({DATA}.size), or set"
            f' {table}.small to "skip" or "upscale".'
        )


def _is_small(sample: Sample, bucket: tuple[int, int]) -> bool:
    return enlargement(sample.width, sample.height, bucket) > 1
