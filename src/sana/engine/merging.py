"""Adapters merged into a model for good: a new folder, or a new original file, that needs them no longer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana.engine.adapter_strengths import LoraReport
from sana.engine.adapters import Adapters
from sana.engine.rewriting import rewrite
from sana.errors import InvalidInput


def merge(
    model: str | Path,
    loras: Sequence[tuple[str | Path, float]],
    target: str | Path,
    *,
    force: bool = False,
    variant: str | None = None,
    **where: Any,
) -> list[LoraReport]:
    """Write a model with adapters in its weights; `target` appears whole or not at all.

    Args:
        model: folder of a pipeline or of a transformer, original file, short name or hub id.
        loras: files or hub ids, each with its scale.
        target: a folder, or an original file where it ends in .safetensors.
        force: whether to write over what is there.
        where: arguments of `hub.locate`, such as `revision`.

    Raises:
        InvalidInput: the target exists, or is the model itself; there is nothing to merge.
        ModelNotFound, CheckpointError: model or adapter cannot be had, or do not fit each other.
    """
    if not loras:
        raise InvalidInput("There is nothing to merge. Name at least one adapter.")
    reports: list[LoraReport] = []

    def fuse(transformer: Any, _: Path | None) -> None:
        reports.extend(_fused(transformer, loras))

    rewrite(model, target, fuse, force=force, variant=variant, **where)
    return reports


def _fused(transformer: Any, loras: Sequence[tuple[str | Path, float]]) -> list[LoraReport]:
    adapters, weights, reports = Adapters(transformer), {}, []
    for source, scale in loras:
        report = adapters.load(source, activate=False)
        weights[report.name] = scale
        reports.append(report)
    adapters.set(weights)
    adapters.fuse()
    adapters.clear()
    return reports
