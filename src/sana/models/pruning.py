"""Depth pruning: which blocks of a transformer change their input least, and a shallower one without them.

Source: SANA-1.5 (arXiv 2501.18427, section 3.3). Shapes: B batch, N tokens, D width.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.errors import InvalidInput
from sana.models.linear_dit import LinearDiT


class BlockImportance:
    """Collects `1 - cosine(input, output)` of every block, averaged over tokens and over all that goes through.

    0 is a block that does nothing, 2 one that turns every token around.
    """

    def __init__(self, num_blocks: int) -> None:
        self.sums = torch.zeros(num_blocks, dtype=torch.float64)
        self.tokens = torch.zeros(num_blocks, dtype=torch.float64)

    @contextmanager
    def watching(self, model: LinearDiT) -> Iterator[None]:
        """Collect from what `model` computes inside a `with` block."""
        with ExitStack() as hooks:
            for index, block in enumerate(model.transformer_blocks):
                handle = block.register_forward_hook(self._hook(index))
                hooks.callback(handle.remove)
            yield

    def _hook(self, index: int) -> Any:
        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            change = turned(inputs[0], output)
            self.sums[index] += change.sum(dtype=torch.float64).cpu()
            self.tokens[index] += change.numel()

        return add

    @property
    def values(self) -> list[float]:
        """Importance of every block.

        Errors: InvalidInput where nothing went through yet.
        """
        if not self.tokens.all():
            raise InvalidInput("Nothing went through the model, so that its blocks cannot be ranked. Draw something.")
        values: list[float] = (self.sums / self.tokens).tolist()
        return values


def turned(x_BND: Tensor, y_BND: Tensor) -> Tensor:
    """Return 1 - cosine per token, [B, N]; exactly 0 where both are the same.

    Half the squared distance of the unit vectors is the same number without the rounding of 1 - cosine near 0.
    """
    x, y = (F.normalize(tokens.float(), dim=-1) for tokens in (x_BND, y_BND))
    return (x - y).square().sum(-1) / 2


def most_important(importance: Sequence[float], layers: int) -> tuple[int, ...]:
    """Return the numbers of the `layers` most important blocks, in order; of equals the earlier stays.

    Errors: InvalidInput for a depth that is no smaller one.
    """
    if not 1 <= layers < len(importance):
        raise InvalidInput(f"The model has {len(importance)} blocks; give a depth from 1 to {len(importance) - 1}.")
    ranked = sorted(range(len(importance)), key=lambda index: (-importance[index], index))
    return tuple(sorted(ranked[:layers]))


def prune(model: LinearDiT, kept: Sequence[int]) -> None:
    """Keep these blocks of a transformer, in the order given, in place; its configuration follows.

    Errors: InvalidInput for a block that does not exist, or none at all.
    """
    count = len(model.transformer_blocks)
    wrong = [index for index in kept if not 0 <= index < count]
    if wrong or not kept:
        raise InvalidInput(f"Name blocks from 0 to {count - 1} that stay, not {', '.join(map(str, wrong)) or 'none'}.")
    model.transformer_blocks = nn.ModuleList(model.transformer_blocks[index] for index in kept)
    model.config = dataclasses.replace(model.config, num_layers=len(kept))
