"""What a run will need, told before it: memory by kind, and time, from micro-batches that train nothing."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana.training.config import OptimizerSettings, RunSettings
from sana.training.ledger import Ledger, bytes_of
from sana.training.objectives.base import Objective
from sana.training.optimizers import is_matrix
from sana.training.players import check_players, let_learn
from sana.training.processes import Processes
from sana.training.sharding import blocks_of

SMALLEST_8BIT = 4096
"""Tensors with fewer numbers are kept whole by the 8-bit optimiser."""
BLOCK_8BIT = 256
MAP_8BIT = 2 * 256 * 4
"""Bytes of the two tables of what a byte means."""
SHARE = 0.25
"""Share of a bare product's rate that training steps reach: 24 to 29 % in `benchmarks/README.md`, training.py."""
WALKS = 4
"""Micro-batches that are walked at most: two in each of two turns, numbers 0 to 3."""
GATHERED = 3
"""Times a whole block that split weights are put together to: this one, the next one, and its gradients."""

Walk = Callable[[int, str], object]
"""(number of a micro-batch, turn): forward and back once."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by kind on one device, and seconds for all steps without looking and saving."""

    weights: int
    """What learns, and what is saved beside it."""
    frozen: int
    """What the gradients only pass through."""
    gradients: int
    optimizer: int
    average: int
    activations: int
    """What a micro-batch keeps beside the gradients, at the moment of most, in the turn that needs most."""
    encoders: int = 0
    """Encoders that stay beside the training, because nothing was computed before it."""
    encoding: int = 0
    """What encoders that rest outside of the device take there while they encode, in the place of activations."""
    previews: int = 0
    """What drawing previews takes in the place of gradients and activations."""
    flop: int = 0
    """Operations of the products of a step: forward, backward, and what is computed again in between."""
    rate: float | None = None
    """Operations per second of a bare product on this computer; None where the steps themselves were timed."""
    seconds: float | None = None
    """None where neither was timed."""

    @property
    def total(self) -> int:
        """Bytes of everything at the moment at which most is kept."""
        held = self.weights + self.frozen + self.optimizer + self.average + self.encoders
        return held + max(self.gradients + max(self.activations, self.encoding), self.previews)

    @property
    def least_step_seconds(self) -> float | None:
        """Seconds of a step that does nothing but products, at the rate of a bare one."""
        return self.flop / self.rate if self.rate else None

    @property
    def step_seconds(self) -> float | None:
        """The same at the share of that rate that training steps reach."""
        return None if self.least_step_seconds is None else self.least_step_seconds / SHARE


def estimate(
    objective: Objective, run: RunSettings, optimizer: OptimizerSettings, second: OptimizerSettings | None = None
) -> Estimate:
    """Run micro-batches of every turn forward and back, and count; no weight changes, nothing is written."""
    device = next(objective.module.parameters()).device
    processes = Processes(objective, run, device)

    def walk(draw: int, turn: str) -> None:
        processes.loss(draw, turn, is_last=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return counted(objective, run, optimizer, second, walk, processes.world, timed=True)


def counted(
    objective: Objective,
    run: RunSettings,
    optimizer: OptimizerSettings,
    second: OptimizerSettings | None,
    walk: Walk,
    world: int,
    *,
    timed: bool,
) -> Estimate:
    """Return what one of `world` processes needs for an objective whose turns `walk` walks.

    Errors: InvalidInput for settings that do not fit the players.
    """
    check_players(objective, run, optimizer, second)
    objective.module.train()
    frozen = _outside(objective)
    owned = {turn: dict(objective.parameters_of(turn)) for turn in objective.turns}
    first, share = objective.turns[0], world if run.shard else 1
    settings = {turn: optimizer if turn == first else second or optimizer for turn in objective.turns}
    known = [*objective.module.parameters(), *objective.module.buffers(), *frozen]
    needs, flop, seconds = [], 0, 0.0
    for draw, (turn, mine) in enumerate(owned.items()):
        if len(owned) > 1:
            let_learn(objective.module, mine.values())
        gradients = bytes_of(mine.values())
        again = run.accumulate > 1
        beside, products = _beside_gradients(known, mine, again, functools.partial(walk, 2 * draw, turn))
        needs.append((gradients, beside))
        flop += products * run.accumulate // len(owned)
        began = time.perf_counter()
        if timed:
            walk(2 * draw + 1, turn)
        seconds += (time.perf_counter() - began) * run.accumulate * run.steps / len(owned)
        for p in mine.values():
            p.grad = None
    gradients, activations = max(needs, key=sum)
    # Copies average their gradients out of buckets, which are as large; pieces are put together at times.
    buckets = gradients if world > 1 and not run.shard else 0
    gathered = _gathered(objective) if run.shard else 0
    return Estimate(
        weights=_piece(bytes_of([*objective.module.parameters(), *objective.module.buffers()]), share),
        frozen=_piece(bytes_of(frozen), share),
        gradients=_piece(gradients, share) + buckets,
        optimizer=_piece(sum(state_bytes(settings[turn].name, mine) for turn, mine in owned.items()), share),
        average=_piece(4 * sum(p.numel() for p in owned[first].values()), share) if run.ema else 0,
        activations=activations + gathered,
        flop=flop,
        seconds=seconds if timed else None,
    )


def _beside_gradients(
    known: list[Tensor], mine: Mapping[str, nn.Parameter], again: bool, walk: Callable[[], object]
) -> tuple[int, int]:
    """Return the most bytes that a micro-batch, the first or one after it, holds beside the gradients of `mine`.

    Beside them, the operations of its products.
    """
    if again:  # the gradients of the micro-batch before are there
        for p in mine.values():
            p.grad = torch.zeros_like(p)
        known = known + [p.grad for p in mine.values() if p.grad is not None]
    ledger = Ledger(known)
    with ledger:
        walk()
    return max(0, ledger.peak - (0 if again else bytes_of(mine.values()))), ledger.flop


def _outside(objective: Objective) -> list[Tensor]:
    """Return the weights that the gradients pass through, outside of what is saved."""
    inside = {id(p) for p in objective.module.parameters()}
    parts: tuple[nn.Module, ...] = getattr(objective, "frozen", ())
    found = {id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}
    return [tensor for key, tensor in found.items() if key not in inside]


def _gathered(objective: Objective) -> int:
    """Return the bytes of what split weights are put together to: a block at a time, and all that is in no block."""
    parts: tuple[nn.Module, ...] = (objective.module, *getattr(objective, "frozen", ()))
    units = [list(block.parameters()) for part in parts for block in blocks_of(part)]
    inside = {id(p) for unit in units for p in unit}
    others = [p for part in parts for p in part.parameters() if id(p) not in inside]
    learning = [p for p in others if p.requires_grad]
    return GATHERED * max(map(bytes_of, units), default=0) + bytes_of(others) + bytes_of(learning)


def _piece(size: int, share: int) -> int:
    return -(-size // share)


def state_bytes(name: str, parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes that an optimiser keeps about parameters."""
    return sum(_STATES[name](key, p) for key, p in parameters.items())


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
