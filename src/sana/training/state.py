"""Training state on disk: safetensors and JSON in a folder that appears at once, so that it is whole or absent."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.checkpoints.digests import verified
from sana.checkpoints.layout import read_json
from sana.checkpoints.storage import naming, recover, saving, sweep
from sana.checkpoints.tensors import read_tensors, write_tensors
from sana.errors import CheckpointError
from sana.training.sharding import local, piece_of, whole

KEEP = 2
VERSION = 1
"""Of the layout; a state with a higher one was written by a later release."""

_FACTS = "state.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on exactly: tensors by part (`module`, `ema`, `optimizer`) and plain facts."""

    step: int
    parts: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def save_state(folder: Path, state: State) -> Path:
    """Write `folder/step-00000042`; the older ones but the last are removed only after the new one is safe.

    Errors: OSError naming the file that could not be written; what was there before is as it was.
    """
    target = folder / f"step-{state.step:08d}"
    _write(target, state)
    for old in _whole(folder)[:-KEEP]:
        (old / _FACTS).unlink()  # without it the folder is no state, however far its removal gets
        shutil.rmtree(old)
    return target


def _write(place: Path, state: State) -> None:
    with saving(place) as stage:
        for part, tensors in state.parts.items():
            write_tensors(stage / f"{part}.safetensors", tensors)
        facts = {"version": VERSION, "step": state.step, "parts": sorted(state.parts), **state.facts}
        with naming(stage / _FACTS):
            (stage / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def save_best(place: Path, state: State) -> None:
    """Write a state into `place` over the one that is there.

    Errors: as `save_state`.
    """
    _write(place, state)


def load_best(place: Path) -> State:
    """Read what `save_best` wrote.

    Errors: CheckpointError when there is nothing, or nothing whole.
    """
    recover(place)
    if not (place / _FACTS).is_file():
        raise CheckpointError(f"There are no best weights in {place}: set run.export = 'last'.")
    return _read(place)


def load_state(folder: Path, *, tidy: bool = True) -> State | None:
    """Read the newest whole state below `folder`, or None when there is none; what killed saves left is swept.

    A damaged state is set aside with a message, and the one before it is read. Without `tidy` the folder is only read:
    of several processes one tidies.
    Errors: CheckpointError when there are states and none can be read, or when a later release wrote them.
    """
    if tidy:
        _tidy(folder)
    damaged: list[tuple[Path, CheckpointError]] = []
    for place in reversed(_whole(folder)):
        try:
            state = _read(place)
        except CheckpointError as error:
            damaged.append((place, error))
            continue
        for bad, fault in damaged if tidy else ():
            _log.error("the training state %s cannot be used (%s) going on from step %d", bad, fault, state.step)
            bad.rename(bad.with_name(f"damaged-{bad.name}"))
        return state
    if damaged:
        text = f"No training state in {folder} can be read; the newest: {damaged[0][1]}"
        raise CheckpointError(f"{text} Remove the folder to begin again.") from damaged[0][1]
    return None


def _tidy(folder: Path) -> None:
    """Sweep what killed saves left."""
    for orphan in folder.glob(".partial-*"):
        shutil.rmtree(orphan)
    for place in folder.glob("step-*"):
        recover(place)
        sweep(place)
        if not any(place.iterdir()):
            place.rmdir()


def _whole(folder: Path) -> list[Path]:
    """Return the states that were saved to the end, the oldest first."""
    return sorted(place for place in folder.glob("step-*") if (place / _FACTS).is_file())


def _read(place: Path) -> State:
    facts = read_json(place / _FACTS)
    version, step = facts.pop("version", VERSION), facts.pop("step", None)
    files = sorted(place.glob("*.safetensors"), key=lambda file: file.stem)
    wanted = facts.pop("parts", [file.stem for file in files])
    if version != VERSION:
        raise CheckpointError(f"{place} was written by another release (version {version}): update sanakit.")
    if not isinstance(step, int) or wanted != [file.stem for file in files]:
        raise CheckpointError(f"{place} is not whole: a file is missing or its {_FACTS} is damaged.")
    with verified(files):
        parts = {file.stem: dict(read_tensors(file)) for file in files}
    return State(step=step, parts=parts, facts=facts)


class Average:
    """Exponential moving average of parameters, with the warm-up min(decay, (1 + k) / (10 + k)).

    Of parameters that are split over processes it averages this process's pieces.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        """Start from the present values, in float32."""
        self.decay = decay
        self.values = {name: local(p.detach()).float().clone() for name, p in parameters.items()}
        self._live = dict(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights as they are after step `step` of those that change them."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            live = [local(self._live[name].detach()).float() for name in self.values]
            torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the live weights; calling it twice restores both exactly."""
        for name, value in self.values.items():
            live = local(self._live[name])
            kept = live.detach().clone()
            live.copy_(value)
            value.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The averages, each tensor whole."""
        return {name: whole(value, self._live[name]) for name, value in self.values.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave.

        Errors: KeyError for one that is not there; RuntimeError for one of another shape.
        """
        for name, value in self.values.items():
            value.copy_(local(piece_of(tensors[name], self._live[name])))
