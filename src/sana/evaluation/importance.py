"""How much every block of a transformer does while it draws: what depth pruning goes by."""

import contextlib
from collections.abc import Sequence

from sana.engine.generate import generate
from sana.engine.parts import Parts
from sana.engine.request import Request, Result
from sana.errors import InvalidInput
from sana.evaluation.seams import Progress
from sana.models.pruning import BlockImportance


def block_importance(
    parts: Parts, prompts: Sequence[str], *, steps: int | None = None, seed: int = 0, progress: Progress | None = None
) -> list[float]:
    """Return `1 - cosine(input, output)` of every block, over all tokens, prompts and denoising steps.

    Nothing is decoded. About a hundred prompts are usual.

    Args:
        steps: None is what the model's card recommends.
        seed: prompt i starts from the noise of seed + i.
        progress: told after every prompt.

    Raises:
        InvalidInput: there are no prompts, or the model cannot draw them.
    """
    if not prompts:
        raise InvalidInput("There are no prompts to draw, so that the blocks cannot be ranked. Give about a hundred.")
    parts.require("transformer")
    meter = BlockImportance(len(parts.transformer.transformer_blocks))
    with meter.watching(parts.transformer):
        for done, prompt in enumerate(prompts):
            _denoise(parts, Request(prompt=prompt, steps=steps, seed=seed + done))
            if progress is not None:
                progress(done + 1, len(prompts))
    return meter.values


def _denoise(parts: Parts, request: Request) -> None:
    """Carry out a request up to its last step."""
    with contextlib.closing(generate(parts, request)) as walk:
        for step in walk:
            if isinstance(step, Result) or step.index + 1 == step.num_steps:
                return
