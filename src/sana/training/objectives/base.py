"""What the trainer asks of an objective. An objective owns its models, its data and its losses, and no loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor, nn


class Objective(Protocol):
    """One thing to train. Every method is a pure function of its arguments and the weights: no hidden random state."""

    name: str
    module: nn.Module
    """What is optimised, averaged and saved; parameters without `requires_grad` stay as they are."""

    def loss(self, draw: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch number `draw`, and detached scalars for the log."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Figures on held-out data, always the same data; the first one is the one that should be watched."""
        ...

    def preview(self) -> Image.Image | None:
        """A picture that shows how far the training is, or None."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained part into `folder`, in the layout that the loaders read."""
        ...
