"""Optimisers of the trainer: AdamW, Muon beside AdamW, CAME, and AdamW with states of 8 bits; and their rates."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana.errors import MissingDependency
from sana.training.config import NUMBERS, OptimizerSettings
from sana.training.sharding import piece_of, whole

Named = Sequence[tuple[str, nn.Parameter]]
Built = tuple[list[torch.optim.Optimizer], list[tuple[nn.Parameter, nn.Parameter]]]
"""The optimisers, and the parameters that one of them sees in another shape."""


class Optimizers:
    """One or two optimisers stepped together, over named parameters.

    Some are given a view of a weight that shares its storage: a convolution's weight is the matrix [out, in * k * k].
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, lr: float | None = None
    ) -> None:
        """Build over the parameters that are not frozen; `lr` replaces the settings' rate.

        Errors: MissingDependency when the library of the optimiser is not installed.
        """
        self.settings = settings
        self.lr = settings.lr if lr is None else lr
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self._all, self._views = OPTIMIZERS[settings.name](named, settings, self.lr)

    def step(self, rate: float) -> None:
        """Update every parameter at `rate` times the base learning rate, and clear the gradients."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter, _ in self._views:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor, whole, under a stable name, for saving."""
        named: dict[str, Tensor] = {}
        for number, optimizer in enumerate(self._all):
            for index, parameter in enumerate(_parameters(optimizer)):
                for key, value in optimizer.state.get(parameter, {}).items():
                    named[f"{number}.{index}.{key}"] = whole(torch.as_tensor(value))
        return named

    def load(self, named: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave, bit for bit: torch's own way would cast it to the parameters' dtype.

        Errors: KeyError for the state of a parameter that is not here.
        """
        for number, optimizer in enumerate(self._all):
            parameters = dict(enumerate(_parameters(optimizer)))
            optimizer.state.clear()
            for name, tensor in named.items():
                owner, index, key = name.split(".", 2)
                if int(owner) != number:
                    continue
                parameter = parameters[int(index)]
                is_count = tensor.ndim == 0 and tensor.dtype == torch.int64
                on_cpu = tensor.ndim == 0  # torch counts its steps there
                kept = int(tensor) if is_count else tensor.clone() if on_cpu else piece_of(tensor, parameter).clone()
                optimizer.state[parameter][key] = kept


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon should own a weight: an inner linear or dense convolution, not a table, embedding, stem or head."""
    if parameter.ndim < 2 or "table" in name or "embed_tokens" in name:
        return False
    rows, columns = parameter.shape[0], parameter[0].numel()
    is_edge = any(part in name for part in ("conv_in", "conv_out.weight", "patch_embed", "proj_out", "head"))
    return min(rows, columns) >= 32 and parameter[0].ndim != 0 and not is_edge


def rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """The share of the base learning rate at `step`: linear warm-up, constant, then the tail to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.schedule == "constant":
        return warm
    tail = max(1, math.ceil(steps * settings.decay_share))
    left = min(1.0, (steps - step) / tail)
    if settings.schedule == "cosine":
        left = 0.01 + 0.99 * (1 - math.cos(math.pi * left)) / 2
    return warm * max(0.01, left)


def scaled_rate(settings: OptimizerSettings, batch: int) -> float:
    """The base learning rate for `batch` samples a step: times sqrt(batch / 256) where the settings ask for it."""
    return settings.lr * math.sqrt(batch / 256) if settings.scale_lr else settings.lr


def _by_decay(named: Named, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Matrices, whose weights decay, and vectors, which stay as they are."""
    decayed = [p for _, p in named if p.ndim > 1]
    flat = [p for _, p in named if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": flat, "weight_decay": 0.0}]


def _adamw(named: Named, settings: OptimizerSettings, lr: float) -> Built:
    groups = _by_decay(named, settings)
    betas, eps = _numbers(settings)
    return [torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps[0], fused=True)], []


def _muon(named: Named, settings: OptimizerSettings, lr: float) -> Built:
    """Muon orthogonalises the momentum of inner matrices; all else, and the first and last layers, are AdamW's."""
    matrices = [p for name, p in named if is_matrix(name, p)]
    others = [p for name, p in named if not is_matrix(name, p)]
    if not matrices:
        return _adamw(named, settings, lr)
    betas, eps = _numbers(settings)
    built: list[torch.optim.Optimizer] = []
    if others:
        adamw = torch.optim.AdamW(others, lr=lr, betas=(betas[0], betas[1]), eps=eps[0], weight_decay=0.0, fused=True)
        built.append(adamw)
    views = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in matrices]
    muon = torch.optim.Muon(
        [view for _, view in views], lr=lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [*built, muon], views


def _came(named: Named, settings: OptimizerSettings, lr: float) -> Built:
    """CAME (Luo et al. 2023, arXiv 2307.02047); 1 x 1 convolutions are matrices, other kernels are not factored."""
    try:
        from pytorch_optimizer import CAME
    except ImportError as error:
        raise MissingDependency("optimizer.name = 'came' needs: pip install 'sanakit[train]'.") from error
    views = [(p, nn.Parameter(_as_came_sees(p.detach()))) for _, p in named if p.ndim > 2]
    replaced = {id(p): view for p, view in views}
    betas, eps = _numbers(settings)
    groups = _by_decay(named, settings)
    for group in groups:
        group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    filled = [group for group in groups if group["params"]]
    # Step by step: the library's way over lists of tensors needs another copy of all gradients at once.
    return [CAME(filled, lr=lr, betas=betas, eps1=eps[0], eps2=eps[1], foreach=False)], views


def _as_came_sees(weight: Tensor) -> Tensor:
    return weight.view(weight.shape[0], -1) if weight[0, 0].numel() == 1 else weight.view(-1)


def _adamw8bit(named: Named, settings: OptimizerSettings, lr: float) -> Built:
    """AdamW whose two moments are kept in 8 bits, block by block (Dettmers et al. 2022, arXiv 2110.02861)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingDependency("optimizer.name = 'adamw8bit' needs: pip install 'sanakit[train]'.") from error
    betas, eps = _numbers(settings)
    return [AdamW8bit(_by_decay(named, settings), lr=lr, betas=(betas[0], betas[1]), eps=eps[0])], []


def _numbers(settings: OptimizerSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The settings' betas and epsilons, or the optimiser's own where there are none."""
    own = NUMBERS[settings.name]
    return settings.betas or own["betas"], settings.eps or own["eps"]


OPTIMIZERS: dict[str, Callable[[Named, OptimizerSettings, float], Built]] = {
    "adamw": _adamw,
    "muon": _muon,
    "came": _came,
    "adamw8bit": _adamw8bit,
}
