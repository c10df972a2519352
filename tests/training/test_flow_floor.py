"""Flow matching on Gaussian data, whose smallest possible loss is known: it is approached, and never undercut.

Shapes: B batch, C latent channels, h w latent size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana.config import TransformerConfig
from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch
from sana.training.config import RunSettings
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.origins import ModelOrigin
from sana.training.trainables import FullTrainable

CPU = torch.device("cpu")
CAPTION = 192
"""Width of the texts that nano reads."""


class GaussianBatches:
    """Independent N(mean, std^2) in every element, under a text that says nothing."""

    def __init__(self, size: int, shape: tuple[int, int, int], mean: float, std: float) -> None:
        self.size, self.shape, self.mean, self.std = size, shape, mean, std
        self.null = torch.zeros(1, CAPTION)

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        latents = self.mean + self.std * torch.randn(self.size, *self.shape, generator=generator)
        return Batch(latents=latents, embeds=self.null.expand(self.size, 1, CAPTION), mask=torch.ones(self.size, 1))

    def held_out(self) -> Iterator[Batch]:
        return iter(())


class PerElement(nn.Module):
    """Reads each element of the state alone, [B, C, h, w], with its time: enough for independent elements."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TransformerConfig()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, _embeds: Tensor, timesteps: Tensor, **_: Any) -> tuple[Tensor]:
        angles = torch.pi * (timesteps / 1000).view(-1, 1) * torch.arange(1, 5)
        slope, shift = self.layers(torch.cat([angles.sin(), angles.cos()], dim=1)).view(-1, 2, 1, 1, 1).unbind(1)
        return (slope * x + shift,)


def objective(made: GaussianBatches, transformer: Any = None, **changes: Any) -> FlowMatchingObjective:
    class Origin(ModelOrigin):
        def _drawn(self) -> Any:
            return made

        def trainable(self) -> Any:
            return super().trainable() if transformer is None else FullTrainable(transformer)

    settings = FlowMatchingSettings(start="nano", **changes)
    run = RunSettings(steps=1, batch_size=made.size, precision="float32")
    return FlowMatchingObjective(settings, run, CPU, Origin)


def tiny_transformer() -> LinearDiT:
    config = {
        "in_channels": 2, "out_channels": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": CAPTION, "sample_size": 4,
    }  # fmt: skip
    transformer = LinearDiT(TransformerConfig.from_dict(config))
    transformer.init_weights(torch.Generator().manual_seed(0), caption_norm_scale=0.1, zero_output=True)
    return transformer


@pytest.mark.parametrize(("std", "floor"), [(1.0, 1.5824), (0.5, 0.5167)])
@pytest.mark.parametrize(
    ("network", "shape", "size", "steps"),
    [
        (PerElement, (1, 4, 4), 256, 300),
        pytest.param(tiny_transformer, (2, 4, 4), 128, 150, marks=pytest.mark.slow),
    ],
)
def test_a_trained_network_approaches_the_irreducible_loss_and_never_undercuts_it(
    network: Callable[[], nn.Module], shape: tuple[int, int, int], size: int, steps: int, std: float, floor: float
) -> None:
    """S1.1: a loss below the floor means that the answer leaks into what the network reads."""
    learning = network()
    one = objective(GaussianBatches(size, shape, 0.3, std), learning, shift=3.0)
    optimizer = torch.optim.Adam(learning.parameters(), lr=5e-3)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for draw in range(steps):
        optimizer.zero_grad()
        one.loss(draw)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        slower.step()
    with torch.no_grad():
        losses = torch.stack([one.loss(steps + draw)[0] for draw in range(51_200 // size)])
    error = float(losses.std()) / len(losses) ** 0.5
    assert error < 0.003 * max(1.0, floor)
    assert floor - 3 * error < float(losses.mean()) < 1.02 * floor


def test_the_first_loss_is_the_variance_of_noise_and_data() -> None:
    """S1.2: latents of unit variance, and an output layer of zeros."""
    one = objective(GaussianBatches(48, (32, 8, 8), 0.0, 1.0), fresh=True)
    with torch.no_grad():
        loss, parts = one.loss(0)
    assert not one.trainable.transformer.proj_out.weight.any()
    assert float(loss) == float(parts["velocity"]) == pytest.approx(2.0, abs=0.02)
