"""The network of holistically-nested edges (HED), which published control networks were trained on.

Shapes: B batch, H W pixels.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sana.checkpoints import hub
from sana.checkpoints.single import open_single
from sana.errors import CheckpointError, ModelNotFound

HED_FILE = "hf://lllyasviel/Annotators/ControlNetHED.pth"
"""Where the weights come from; the file is read without running anything in it."""
STAGES = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Channels in, channels out and convolutions of each stage."""


class Stage(nn.Module):
    """Convolutions at one scale, and a side output of one channel."""

    def __init__(self, channels_in: int, channels_out: int, count: int) -> None:
        super().__init__()
        widths = [channels_in, *[channels_out] * count]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.projection = nn.Conv2d(channels_out, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """Soft edges of a picture: five scales of a VGG network, each with a side output, averaged before the sigmoid.

    [B, 3, H, W] from 0 to 255 -> [B, H, W] from 0 to 1. Parameter names are those of the file.
    Source: Xie & Tu 2015, section 3.
    """

    def __init__(self, stages: Sequence[tuple[int, int, int]] = STAGES) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, stage in enumerate(stages, start=1):
            self.add_module(f"block{number}", Stage(*stage))

    def forward(self, pixels: Tensor) -> Tensor:
        size, sides = pixels.shape[2:], []
        x = pixels - self.norm
        for number, stage in enumerate(self.children()):
            x, side = stage(x if number == 0 else F.max_pool2d(x, 2))
            sides.append(F.interpolate(side, size=size, mode="bilinear", align_corners=False))
        return torch.stack(sides).mean(dim=0).sigmoid()[:, 0]


def load_hed(file: str | Path = HED_FILE, *, local_files_only: bool = False) -> HED:
    """Return the network with its weights, downloaded on first use.

    Raises:
        ModelNotFound: the file is neither here nor to be had.
        CheckpointError: it holds something else.
    """
    try:
        path = hub.locate(file, single=True, local_files_only=local_files_only).file
    except ModelNotFound as error:
        raise ModelNotFound(
            f"The kind 'hed' needs the file {file}, which is neither here nor to be had ({error}) Go online once, or"
            " take the kind 'soft-edge', which needs no weights."
        ) from error
    assert path is not None
    network = HED()
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = open_single(path)
    if {name: torch.Size(entry.shape) for name, entry in weights.entries.items()} != expected:
        raise CheckpointError(f"{path.name} does not hold the weights of the HED network. Download it again.")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.read(expected)})
    return network.eval()


@torch.no_grad()
def soft_edges(network: HED, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the soft edges of a picture, [H, W, 3] from 0 to 255 -> [H, W] from 0 to 1."""
    picture = torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1)[None].float()
    edges: NDArray[np.float32] = network(picture)[0].numpy()
    return edges
