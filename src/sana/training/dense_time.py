"""Telling a trained model time on another scale without losing what it has learnt.

Shapes: n levels, F sinusoid features, D width.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from sana.models.linear_dit import LinearDiT
from sana.nn.embeddings import ScalarEmbedding, sinusoid

LEVELS = 1001
RIDGE = 1e-4
"""Of the least-squares fit. Told sigma, the features hardly differ: without it the weights reach a thousand and cancel
each other, which no half precision survives, and the curve fits little better."""


def retime(transformer: LinearDiT, old_scale: float, new_scale: float, steps: int = 1500, lr: float = 3e-3) -> float:
    """Fit the time embedder to give at `new_scale` what it gave at `old_scale`, and return the relative error.

    A model that was told 1000 sigma changes a thousand times faster in its time than one that is told sigma, which a
    consistency model cannot bear. The embedding of a trained model is a smooth function of sigma all the same, so most
    of the fine-tuning that the change needs (SANA-Sprint, arXiv 2503.09641, section 3.2) is a curve fit.
    Deterministic.
    """
    embed = transformer.time_embed
    embedder: ScalarEmbedding = (
        embed.timestep_embedder if embed.guidance else embed.emb["timestep_embedder"]  # type: ignore[assignment]
    )
    weight = embedder.linear_1.weight
    sigmas = torch.linspace(0, 1, LEVELS, device=weight.device)
    with torch.no_grad():
        wanted = embedder(1000 * old_scale * sigmas, weight.dtype).float()
    fitted = copy.deepcopy(embedder).float()
    told = 1000 * new_scale * sigmas
    _start(fitted, embedder, sinusoid(told), sinusoid(1000 * old_scale * sigmas))
    spread = (wanted - wanted.mean(0)).square().mean()
    optimizer = torch.optim.Adam(fitted.parameters(), lr=lr)
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.mse_loss(fitted(told, torch.float32), wanted) / spread
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    embedder.load_state_dict(fitted.to(weight.dtype).state_dict())
    return math.sqrt(float(loss.detach()))


@torch.no_grad()
def _start(fitted: nn.Module, embedder: ScalarEmbedding, new: torch.Tensor, old: torch.Tensor) -> None:
    """Set the first layer to the least-squares fit of what it gave before its activation."""
    first = embedder.linear_1
    target = (old @ first.weight.float().T + first.bias.float()).double()
    features = F.pad(new, (0, 1), value=1.0).double()
    gram = features.T @ features + RIDGE * len(features) * torch.eye(features.shape[1], device=new.device).double()
    solved = torch.linalg.solve(gram, features.T @ target).float()
    fitted.linear_1.weight.copy_(solved[:-1].T)  # type: ignore[union-attr,operator]
    fitted.linear_1.bias.copy_(solved[-1])  # type: ignore[union-attr,operator]
