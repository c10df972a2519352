"""What a run will need, told before it: memory by kind, and time, from one micro-batch that trains nothing."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.training.config import OptimizerSettings, RunSettings
from sana.training.objectives.base import Objective
from sana.training.optimizers import is_matrix
from sana.training.players import Players
from sana.training.processes import Processes

SMALLEST_8BIT = 4096
"""Tensors with fewer numbers are kept whole by the 8-bit optimiser."""
BLOCK_8BIT = 256
MAP_8BIT = 2 * 256 * 4
"""Bytes of the two tables of what a byte means."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by kind on one device, and seconds for all steps without looking and saving."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of everything at the moment at which most is kept."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def estimate(
    objective: Objective, run: RunSettings, optimizer: OptimizerSettings, second: OptimizerSettings | None = None
) -> Estimate:
    """Run two micro-batches of the first turn forward and back, and count; no weight changes, nothing is written."""
    device = next(objective.module.parameters()).device
    processes, players = Processes(objective, run, device), Players(objective, run, optimizer, second, run.batch_size)
    turn = players.take_turn(0)
    objective.module.train()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in objective.module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        processes.loss(0, turn, is_last=True)
    began = time.perf_counter()
    processes.loss(1, turn, is_last=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - began) * run.accumulate * run.steps
    players.drop_gradients(turn)
    states = sum(state_bytes(players.settings[each].name, players.owned[each]) for each in players.turns)
    first = players.owned[players.turns[0]]
    return Estimate(
        weights=_bytes(dict(objective.module.named_parameters())) + _bytes(dict(objective.module.named_buffers())),
        gradients=max(_bytes(owned) for owned in players.owned.values()),
        optimizer=states,
        average=4 * sum(p.numel() for p in first.values()) if run.ema else 0,
        # The way back holds the gradients of the largest ones, of what comes in and of what goes out, beside them.
        activations=sum(kept.values()) + 2 * max(kept.values(), default=0),
        seconds=seconds,
    )


def state_bytes(name: str, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes that an optimiser keeps about parameters."""
    return sum(_STATES[name](key, p) for key, p in parameters.items())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _came(_: str, p: Tensor) -> int:
    pointwise = p.ndim > 2 and p[0, 0].numel() == 1
    if p.ndim != 2 and not pointwise:
        return 8 * p.numel()
    return 4 * (p.numel() + 2 * (p.shape[0] + p.shape[1]))


def _adamw8bit(_: str, p: Tensor) -> int:
    return 8 * p.numel() if p.numel() < SMALLEST_8BIT else 2 * p.numel() + 8 * (p.numel() // BLOCK_8BIT) + MAP_8BIT


_STATES: dict[str, Any] = {
    "adamw": lambda _, p: 8 * p.numel(),
    "muon": lambda name, p: (4 if is_matrix(name, p) else 8) * p.numel(),
    "came": _came,
    "adamw8bit": _adamw8bit,
}
