"""The captions of a batch, and what a network reads of them.

Shapes: U distinct captions, R rows of a forward pass, T caption length, E text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.errors import InvalidInput
from sana.nn.attention import KeyValue


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """The encoded captions of a batch; captions that several rows share are held once."""

    embeds: Tensor
    """[U, T, E], padded to the longest caption of the batch only."""
    mask: Tensor
    """[U, T], 1 at tokens and 0 at padding."""
    rows: tuple[int, ...]
    """Which caption each of the R rows reads."""

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3 or self.mask.shape != self.embeds.shape[:2]:
            raise InvalidInput(
                f"Captions need embeds [U, T, E] and a mask [U, T], but got {list(self.embeds.shape)} and"
                f" {list(self.mask.shape)}. Pass the mask that belongs to the embeds."
            )

    @classmethod
    def stack(cls, groups: Sequence[tuple[Tensor, Tensor]], repeat: int = 1) -> "Captions":
        """Join groups of captions (embeds [g, t, E], mask [g, t]) in their order, each caption for `repeat` rows."""
        length = max(mask.shape[1] for _, mask in groups)
        device, dtype = groups[-1][0].device, groups[-1][0].dtype
        count = sum(len(mask) for _, mask in groups)
        embeds = torch.zeros(count, length, groups[-1][0].shape[2], device=device, dtype=dtype)
        mask = torch.zeros(count, length, device=device, dtype=groups[-1][1].dtype)
        start = 0
        for one_embeds, one_mask in groups:
            stop = start + len(one_mask)
            embeds[start:stop, : one_mask.shape[1]] = one_embeds
            mask[start:stop, : one_mask.shape[1]] = one_mask
            start = stop
        return cls(embeds=embeds, mask=mask, rows=tuple(row for row in range(count) for _ in range(repeat)))

    def trimmed(self) -> "Captions":
        """Return the captions without positions that are masked in every row; exact, because masked keys weigh nothing.

        A row without any token reads all of its positions in the published models, so nothing is dropped then.
        """
        used = self.mask != 0
        keep = used.any(dim=0)
        if bool(keep.all()) or not bool(used.any(dim=1).all()):
            return self
        return replace(self, embeds=self.embeds[:, keep], mask=self.mask[:, keep])


def padded(captions: Captions, multiple: int) -> Captions:
    """Return the captions padded to a length that `multiple` divides; exact, because masked keys weigh nothing.

    A row without any token reads all of its positions in the published models, so nothing is added then.
    """
    extra = -captions.mask.shape[1] % multiple
    if not extra or not bool((captions.mask != 0).any(dim=1).all()):
        return captions
    return replace(captions, embeds=F.pad(captions.embeds, (0, 0, 0, extra)), mask=F.pad(captions.mask, (0, extra)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """What a network reads of the captions: keys and values of its blocks, and the mask."""

    kv: tuple[KeyValue, ...]
    """Per block, keys and values of R rows."""
    mask: Tensor | None
    """[R, T], or None where nothing is masked: the attention kernels are faster without."""

    @classmethod
    def of(cls, network: Any, captions: Captions, device: torch.device, dtype: torch.dtype) -> "Text":
        """Project the captions with a network; those that several rows share are projected once."""
        kv = network.cross_attention_kv(network.encode_caption(captions.embeds.to(device, dtype)))
        mask = captions.mask.to(device)
        text = cls(kv=kv, mask=None if bool((mask == 1).all()) else mask)
        in_order = captions.rows == tuple(range(len(mask)))
        return text if in_order else text.at(torch.tensor(captions.rows, device=device))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.kv[0][0])

    def at(self, rows: slice | Tensor) -> "Text":
        """Return some of the rows."""
        mask = None if self.mask is None else self.mask[rows]
        return Text(kv=tuple((key[rows], value[rows]) for key, value in self.kv), mask=mask)

    def since(self, first: int) -> "Text":
        """Return the rows from `first` on."""
        return self.at(slice(first, None)) if first else self

    def with_last_again(self, count: int) -> "Text":
        """Return the rows with the last `count` of them once more behind."""
        rows = torch.arange(self.rows, device=self.kv[0][0].device)
        return self.at(torch.cat([rows, rows[-count:]]))
