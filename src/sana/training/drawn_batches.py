"""Batches of the drawn world, from its precomputed features.

Shapes: see `batches`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.training.batches import Batch, without_some_controls
from sana.training.drawn_features import Features, FeatureStore

HELD_OUT = 256


class DrawnBatches:
    """Scenes with one of their captions each; the last `HELD_OUT` scenes are kept apart."""

    def __init__(
        self,
        store: FeatureStore,
        *,
        batch_size: int,
        seed: int,
        dropout: float,
        device: torch.device,
        control_dropout: float = 0.0,
    ) -> None:
        """Compute the features that are missing, and read them all.

        Errors: InvalidInput, before anything is computed, when fewer scenes are trained on than a batch holds.
        """
        self._training = store.scenes - HELD_OUT
        if batch_size > self._training:
            raise InvalidInput(
                f"run.batch_size is {batch_size}, but of {store.scenes} drawn scenes {HELD_OUT} are held out, which"
                f" leaves {max(0, self._training)} to train on. Lower it, or raise scenes."
            )
        for _ in store.compute():
            pass
        self.store, self.size, self.seed, self.dropout, self.device = store, batch_size, seed, dropout, device
        self.control_dropout = control_dropout
        self.features: Features = store.read()
        # One width for all batches: compiled code is made once, and the attention to a few words is cheap.
        self._width = math.ceil(int(self.features.lengths.max()) / 8) * 8
        self.null: Tensor = store.null().to(device)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        """Batch number `draw`: each epoch is a fresh order of all training scenes."""
        scenes = self._scenes(draw)
        which = torch.randint(self.store.captions, (self.size,), generator=generator)
        dropped = torch.rand(self.size, generator=generator) < self.dropout
        made = self._batch(scenes, which, dropped)
        return without_some_controls(made, self.control_dropout, generator)

    def held_out(self) -> Sequence[Batch]:
        """The scenes kept apart, each with its first caption."""
        scenes = torch.arange(self._training, self._training + HELD_OUT)
        never, first = torch.zeros(HELD_OUT, dtype=torch.bool), torch.zeros(HELD_OUT, dtype=torch.long)
        return [self._batch(scenes, first, never)]

    def _scenes(self, draw: int) -> Tensor:
        epoch, position = divmod(draw, self._training // self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._order = (epoch, torch.randperm(self._training, generator=generator))
        return self._order[1][position * self.size : (position + 1) * self.size]

    def _batch(self, scenes: Tensor, which: Tensor, dropped: Tensor) -> Batch:
        embeds, mask = self._text(scenes, which, dropped)
        control = self.features.control
        return Batch(
            latents=self.features.latents[scenes].to(self.device, torch.float32),
            embeds=embeds,
            mask=mask,
            labels=self.features.labels[scenes].to(self.device, torch.long),
            control=None if control is None else control[scenes].to(self.device, torch.float32),
        )

    def _text(self, scenes: Tensor, which: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, E] and mask [B, T] of one caption of each scene; dropped ones see the null text."""
        starts, lengths = self.features.starts[scenes, which], self.features.lengths[scenes, which]
        lengths = torch.where(dropped, torch.ones_like(lengths), lengths)
        columns = torch.arange(self._width)[None]
        mask = columns < lengths[:, None]
        rows = (starts[:, None] + columns).clamp_(max=len(self.features.text) - 1)
        embeds = self.features.text[rows].to(self.device, torch.float32)
        mask = mask.to(self.device)
        embeds[dropped.to(self.device), :1] = self.null
        return embeds * mask[..., None], mask.long()
