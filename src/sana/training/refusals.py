"""Steps with a non-finite loss or gradient: what is known about them, kept in the run's folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.checkpoints.storage import publish
from sana.training.sharding import local

DUMP = "non-finite.json"
_SHOWN = 200


def describe(
    step: int, turn: str, draws: list[int], seed: int, loss: float, parts: Mapping[str, float],
    owned: Mapping[str, nn.Parameter], ranks: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Return what can be said about a refused step, before its gradients are dropped."""
    return {
        "step": step,
        "turn": turn,
        "draws": draws,
        "seed": seed,
        "random_state": "torch's generator and every batch are functions of (seed, draw)",
        "loss": loss if math.isfinite(loss) else repr(loss),
        "processes": ranks,
        "parts": {name: value if math.isfinite(value) else repr(value) for name, value in parts.items()},
        "gradients": _broken({name: p.grad for name, p in owned.items() if p.grad is not None}),
        "parameters": _broken({name: p.detach() for name, p in owned.items()}),
    }


def write(folder: Path, refused: list[dict[str, Any]]) -> Path:
    """Write the refused steps of this process; the newest last.

    Errors: OSError naming the file.
    """
    target = folder / DUMP
    publish(target, lambda beside: beside.write_text(json.dumps(refused, indent=1), encoding="utf-8"))
    return target


def _broken(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """How many numbers of each tensor are not finite, of how many; only tensors that have some, and the first 200."""
    found: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        piece = local(tensor)
        bad = int((~torch.isfinite(piece)).sum())
        if bad and len(found) < _SHOWN:
            found[name] = {"not_finite": bad, "of": piece.numel()}
    return found
