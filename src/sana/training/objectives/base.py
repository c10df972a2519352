"""What the trainer asks of an objective. An objective owns its models, its data and its losses, and no loop."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn

from sana.data.identity import Content

MAIN = ("main",)
"""The turns of an objective with one player."""

Check = Callable[[], None]
"""Called between the batches of a look, as often in every process; raises `LookLeft` when the run was asked to stop."""


class LookLeft(Exception):
    """A look at held-out data is given up for a stop; the objective lets it pass."""


def unasked() -> None:
    """The `Check` of a look that is taken to its end."""


class Objective(Protocol):
    """One thing to train. Every method is a pure function of its arguments and the weights: no hidden random state.

    The trainer seeds torch's own generator from (seed, draw) before each loss, so that a model's dropout is one too.
    """

    name: str
    module: nn.Module
    """All that is optimised, averaged and saved, and what stays as it is beside it."""
    turns: tuple[str, ...]
    """`MAIN`, or the names of the players that alternate: step k is turn k % len(turns)."""
    better: Literal["lower", "higher"]
    """Which way the watched figure should go."""

    @property
    def data(self) -> Mapping[str, Content]:
        """What tells the data sets that it learns from from others, by name; the drawn world is in the settings."""
        ...

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """What a turn optimises, under the names of `module.named_parameters()`; those of the first turn are averaged.

        Asked once, before the trainer switches `requires_grad` from turn to turn.
        """
        ...

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch number `draw` in a turn, and detached scalars for the log."""
        ...

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        """Figures on held-out data, always the same data; the first one is the one that should be watched."""
        ...

    def preview(self, check: Check = unasked) -> Image.Image | None:
        """A picture that shows how far the training is, or None."""
        ...

    def export(self, folder: Path) -> None:
        """Write the trained part into `folder`, in the layout that the loaders read."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """What an objective has beside the rest when its losses depend on the step, which the draw alone does not tell.

    A step may have been more micro-batches, or fewer, before the run went on.
    """

    def resume(self, step: int, draws: int) -> None:
        """Hear, before the first loss, that the run goes on after `step` steps, at micro-batch number `draws`."""
        ...


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module that are not frozen, with their names."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
