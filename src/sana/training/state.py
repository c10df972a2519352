"""Training state on disk: safetensors and JSON in a folder that appears by one rename, so that it is whole or
absent.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.errors import CheckpointError

KEEP = 2


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on exactly: tensors by part (`module`, `ema`, `optimizer`) and plain facts."""

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(folder: Path, state: State) -> Path:
    """Write `folder/step-00000042`; the older ones but the last are removed only after the new one is safe."""
    target = folder / f"step-{state.step:08d}"
    partial = folder / f".partial-{state.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, tensors in state.parts.items():
        file = partial / f"{part}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
        _sync(file)
    facts = partial / "state.json"
    facts.write_text(json.dumps({"step": state.step, **state.facts}, indent=1), encoding="utf-8")
    _sync(facts)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return target


def load_state(folder: Path) -> State | None:
    """Read the newest whole state below `folder`, or None when there is none; orphans of killed saves are swept."""
    for orphan in folder.glob(".partial-*"):
        shutil.rmtree(orphan)
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        facts = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        parts = {file.stem: load_file(file) for file in sorted(newest.glob("*.safetensors"))}
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"The training state '{newest}' cannot be read ({error}); remove it to go on from an older one."
        ) from error
    return State(step=int(facts.pop("step")), parts=parts, facts=facts)


class Average:
    """Exponential moving average of a module's trainable tensors, with the warm-up min(decay, (1 + k) / (10 + k))."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        """Start from the module's present values, in float32."""
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}
        self._module = module

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights as they are after step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = dict(self._module.named_parameters())
        names = list(self.values)
        torch._foreach_lerp_([self.values[n] for n in names], [live[n].detach().float() for n in names], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the live weights; calling it twice restores both exactly."""
        live = dict(self._module.named_parameters())
        for name, value in self.values.items():
            kept = live[name].detach().clone()
            live[name].copy_(value)
            value.copy_(kept)
