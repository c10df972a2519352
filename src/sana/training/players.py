"""What is trained: the parameters of each turn, their optimisers and their average, and all of it as tensors."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana.errors import InvalidInput
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.objectives.base import Objective
from sana.training.optimizers import Optimizers, rate, scaled_rate
from sana.training.sharding import local, piece_of, whole
from sana.training.state import Average

Tensors = dict[str, Tensor]


class Players:
    """One or several players over one module; step k is the turn of player k % count."""

    def __init__(
        self,
        objective: Objective,
        run: RunSettings,
        optimizer: OptimizerSettings,
        second: OptimizerSettings | None,
        samples: int,
    ) -> None:
        """Build the optimisers, for `samples` in a step, and the average of the first player's weights."""
        self.module, self.turns, self.run = objective.module, objective.turns, run
        self.settings = {turn: optimizer if not i else second or optimizer for i, turn in enumerate(self.turns)}
        self.owned = {turn: dict(objective.parameters_of(turn)) for turn in self.turns}
        self.optimizers = {
            turn: Optimizers(owned.items(), self.settings[turn], scaled_rate(self.settings[turn], samples))
            for turn, owned in self.owned.items()
        }
        self.average = Average(self.owned[self.turns[0]] if run.ema else {}, run.ema)

    def take_turn(self, step: int) -> str:
        """Let only the parameters whose turn it is have gradients, and return the turn's name."""
        turn = self.turns[step % len(self.turns)]
        if len(self.turns) > 1:
            let_learn(self.module, self.owned[turn].values())
        return turn

    def norm(self, turn: str) -> Tensor:
        """The norm of a turn's gradients, all taken together."""
        return whole(torch.nn.utils.get_total_norm([p.grad for p in self.owned[turn].values() if p.grad is not None]))

    def move(self, turn: str, step: int, norm: Tensor) -> None:
        """Clip the gradients, whose norm is `norm`, take the optimiser's step and let the average follow."""
        torch.nn.utils.clip_grads_with_norm_(self.owned[turn].values(), self.settings[turn].clip, norm)
        self.optimizers[turn].step(rate(step, self.run.steps, self.settings[turn]))
        if turn == self.turns[0] and self.run.ema:
            self.average.update(step // len(self.turns))

    def drop_gradients(self, turn: str) -> None:
        """Forget what a step that is not taken has computed."""
        for p in self.owned[turn].values():
            p.grad = None

    def kept(self) -> Tensors:
        """What of the module a state holds: all that is optimised, and the buffers. The rest stays as it came."""
        buffers, in_state = dict(self.module.named_buffers()), set(self.module.state_dict())
        optimised = {name: p.detach() for owned in self.owned.values() for name, p in owned.items()}
        return {**optimised, **{name: tensor for name, tensor in buffers.items() if name in in_state}}

    def weights(self) -> Tensors:
        """`kept`, each tensor whole."""
        return {name: whole(tensor) for name, tensor in self.kept().items()}

    def parts(self) -> dict[str, Tensors]:
        """All tensors of a state, whole."""
        averages = {"ema": self.average.tensors()} if self.run.ema else {}
        optimizers = {self._part(turn): optimizers.tensors() for turn, optimizers in self.optimizers.items()}
        return {"module": self.weights(), **averages, **optimizers}

    @torch.no_grad()
    def restore(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the tensors of `parts` up again.

        Errors: KeyError, RuntimeError or ValueError when they are of another model.
        """
        live, saved = self.kept(), parts["module"]
        if unknown := saved.keys() - {*live, *self.module.state_dict()}:
            raise KeyError(min(unknown))
        for name, tensor in live.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(name)
            local(tensor).copy_(local(piece_of(saved[name], tensor)))
        for turn, optimizers in self.optimizers.items():
            optimizers.load(dict(parts[self._part(turn)]))
        if self.run.ema:
            self.average.load(parts["ema"])

    def _part(self, turn: str) -> str:
        return "optimizer" if turn == self.turns[0] else f"optimizer-{turn}"


@contextlib.contextmanager
def holding(module: nn.Module, weights: Tensors) -> Iterator[None]:
    """Other weights in a module for the length of a `with` block."""
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items() if name in weights}
    module.load_state_dict(weights, strict=False)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.load_state_dict(kept, strict=False)


def check_players(
    objective: Objective, run: RunSettings, optimizer: OptimizerSettings, second: OptimizerSettings | None
) -> None:
    """Raise InvalidInput where the optimisers' settings do not fit the players, or the run."""
    if second is not None and len(objective.turns) == 1:
        raise InvalidInput(f"[discriminator_optimizer] has no effect on '{objective.name}', which has one player.")
    for table, settings in (("optimizer", optimizer), ("discriminator_optimizer", second)):
        if run.shard and settings is not None and settings.name != "adamw":
            raise InvalidInput(
                f"run.shard needs {table}.name = 'adamw'; {settings.name} reads whole matrices. Add"
                f" --{table}.name adamw, or remove run.shard."
            )


def let_learn(module: nn.Module, chosen: Iterable[nn.Parameter]) -> None:
    """Let these parameters of a module have gradients, and no others."""
    for p in module.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)


def use_checkpointing(objective: Objective) -> None:
    """Let the models of an objective compute the inside of their blocks again on the way back.

    Those of `frozen`, which gradients only pass through, are among them where an objective has any.
    Errors: InvalidInput when none of them can.
    """
    frozen: tuple[nn.Module, ...] = getattr(objective, "frozen", ())
    able: list[Any] = [m for part in (objective.module, *frozen) for m in part.modules() if hasattr(m, SWITCH)]
    if not able:
        raise InvalidInput(f"run.checkpointing has no effect on '{objective.name}': its models keep everything.")
    for model in able:
        setattr(model, SWITCH, True)


SWITCH = "gradient_checkpointing"
"""The attribute of models that can."""
