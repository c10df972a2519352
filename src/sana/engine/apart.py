"""The branches of guidance one after the other, for when memory does not do for all at once.

Shapes: C h w latents.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana.engine.predictor import Captions, Control, Predictor


class Apart:
    """A predictor that runs the branches of guidance one after the other: less memory, and as many operations.

    Only what conditional and perturbed rows share up to the first perturbed layer is computed twice. The arguments are
    those of `Predictor`.
    """

    def __init__(
        self,
        transformer: Any,
        timesteps: Tensor,
        captions: Captions,
        *,
        guidance: float | None = None,
        perturbed_layers: Sequence[int] = (),
        controls: Sequence[Control] = (),
    ) -> None:
        self._make = partial(
            Predictor, transformer, timesteps, guidance=guidance, perturbed_layers=perturbed_layers, controls=controls
        )
        self.use(captions)

    def use(self, captions: Captions) -> None:
        """Set the captions of both branches, or of the conditional one if there are as many as latents."""
        rows = captions.rows
        self._conditional = self._make(replace(captions, rows=rows[-1:]))
        self._unconditional = self._make(replace(captions, rows=rows[:1])) if len(rows) > 1 else None
        self.device = self._conditional.device

    def __call__(self, x: Tensor, i: int, *, guided: bool, perturbed: bool = False) -> Tensor:
        """Return velocities of the one latent [1, C, h, w] at step i, in the order of `Predictor`."""
        conditional = self._conditional.one_by_one(x, i) if perturbed else self._conditional(x, i, guided=False)
        if not guided:
            return conditional
        assert self._unconditional is not None, "guidance needs a caption for each branch"
        return torch.cat([self._unconditional(x, i, guided=False), conditional])
