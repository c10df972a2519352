"""The two branches of guidance one after the other, for when memory does not do for both at once.

Shapes: C h w latents.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana.engine.predictor import Captions, Predictor


class Apart:
    """A predictor that runs the two branches of guidance one after the other: less memory, as many operations."""

    def __init__(self, transformer: Any, timesteps: Tensor, captions: Captions, *, guidance: float) -> None:
        self._make = partial(Predictor, transformer, timesteps, guidance=guidance)
        self.use(captions)

    def use(self, captions: Captions) -> None:
        """Set the captions of both branches, or of the conditional one if there are as many as latents."""
        rows = captions.rows
        self._conditional = self._make(replace(captions, rows=rows[-1:]))
        self._unconditional = self._make(replace(captions, rows=rows[:1])) if len(rows) > 1 else None
        self.device = self._conditional.device

    def __call__(self, x: Tensor, i: int, *, guided: bool) -> Tensor:
        """Return velocities of the one latent [1, C, h, w] at step i, the unconditional one first if guided."""
        conditional = self._conditional(x, i, guided=False)
        if not guided:
            return conditional
        assert self._unconditional is not None, "guidance needs a caption for each branch"
        return torch.cat([self._unconditional(x, i, guided=False), conditional])
