"""Models of another depth, written beside the old ones: grown, or pruned to the blocks that matter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.engine.rewriting import rewrite
from sana.errors import InvalidInput
from sana.memory.quantize import noted
from sana.models.growth import Growth, grow
from sana.models.pruning import prune


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What became of a transformer."""

    before: int
    """Blocks of the old one."""
    after: int
    params: int
    """Parameters of the new one."""


def grow_model(model: str | Path, target: str | Path, growth: Growth, **options: Any) -> Resized:
    """Write a model with more blocks; `options` and errors are those of `rewriting.rewrite` and `growth.grow`."""

    def deepen(transformer: SanaTransformer2DModel) -> None:
        grow(transformer, growth)

    return _resized(model, target, deepen, options)


def prune_model(model: str | Path, target: str | Path, kept: Sequence[int], **options: Any) -> Resized:
    """Write a model with some of its blocks only; `options` and errors as `grow_model` and `pruning.prune`."""

    def shorten(transformer: SanaTransformer2DModel) -> None:
        prune(transformer, kept)

    return _resized(model, target, shorten, options)


def _resized(model: str | Path, target: str | Path, change: Any, options: Mapping[str, Any]) -> Resized:
    found: list[Resized] = []

    def resize(transformer: SanaTransformer2DModel, folder: Path | None) -> None:
        if noted(transformer) is not None:
            raise InvalidInput("The model is quantised, so that its depth cannot change. Take the unquantised one.")
        if folder is not None and (folder / "controlnet").is_dir():
            raise InvalidInput(
                f"{folder.name} has a control branch that was made for its blocks. Resize {folder.name}/transformer "
                "alone."
            )
        before = len(transformer.transformer_blocks)
        change(transformer)
        found.append(
            Resized(before=before, after=len(transformer.transformer_blocks), params=transformer.num_parameters())
        )

    rewrite(model, target, resize, **options)
    return found[0]
