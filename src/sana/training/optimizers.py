"""Optimisers of the trainer: torch's AdamW, and torch's Muon for matrices beside AdamW for everything else."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sana.training.config import OptimizerSettings


class Optimizers:
    """One or two torch optimisers stepped together, over named parameters.

    Muon orthogonalises the momentum of a matrix. A convolution's weight is the matrix [out, in * k * k]: torch's
    class takes matrices only, so it is given a view that shares the weight's storage. Depthwise kernels, vectors,
    tables and the first and last layers (`is_matrix` False) are AdamW's.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> None:
        """Sort the trainable parameters into the two families."""
        self.settings = settings
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                (matrices if settings.name == "muon" and is_matrix(name, parameter) else others).append(parameter)
        self._matrices = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in matrices]
        self._all: list[torch.optim.Optimizer] = []
        if others:
            self._all.append(
                torch.optim.AdamW(others, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True)
            )
        if self._matrices:
            views = [view for _, view in self._matrices]
            self._all.append(
                torch.optim.Muon(
                    views, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        elif others:
            decayed = [p for p in others if p.ndim > 1]
            flat = [p for p in others if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": flat, "weight_decay": 0.0}]
            self._all = [torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)]

    def step(self, rate: float) -> None:
        """Update every parameter at `rate` times the base learning rate, and clear the gradients."""
        for parameter, view in self._matrices:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter, _ in self._matrices:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor under a stable name, for saving."""
        named = {}
        for number, optimizer in enumerate(self._all):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    named[f"{number}.{index}.{key}"] = torch.as_tensor(value)
        return named

    def load(self, named: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for number, optimizer in enumerate(self._all):
            whole = optimizer.state_dict()
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in named.items():
                owner, index, key = name.split(".", 2)
                if int(owner) == number:
                    state.setdefault(int(index), {})[key] = tensor.clone()
            whole["state"] = state
            optimizer.load_state_dict(whole)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon should own a weight: an inner linear or dense convolution, not a table, embedding, stem or head."""
    if parameter.ndim < 2 or "table" in name or "embed_tokens" in name:
        return False
    rows, columns = parameter.shape[0], parameter[0].numel()
    is_edge = any(part in name for part in ("conv_in", "conv_out.weight", "patch_embed", "proj_out", "head"))
    return min(rows, columns) >= 32 and parameter[0].ndim != 0 and not is_edge


def rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """The share of the base learning rate at `step`: linear warm-up, constant, then linear to a hundredth at the
    end.
    """
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    tail = max(1, math.ceil(steps * settings.decay_share))
    left = (steps - step) / tail
    return warm * max(0.01, min(1.0, left))
