"""Training a DC-AE on the drawn world.

Shapes: B batch, H W picture size, h w latent size (H / 32), C latent channels.

The loss is L1 plus squared error, weighted towards the things (they cover a tenth of the pixels), on
reconstructions from noisy latents: a decoder that forgives small errors of the latent forgives the diffusion model
too. Three terms shape the latent itself: each channel is pulled to mean 0 and standard deviation 1 (a free latent
drifts to a scale of tens), and a linear read-out of every latent cell must name the kind and colour of the thing
that covers it (representation alignment as in Yu et al. 2024, REPA, and Yao et al. 2025, VA-VAE, with the world's
own labels in place of a vision model's features).
"""

import dataclasses
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sana.config import AutoencoderConfig
from sana.data import cutouts
from sana.data.cutout_shapes import KINDS
from sana.models.dc_ae import DCAutoencoder
from sana.training.config import RunSettings
from sana.training.objectives.base import MAIN, trainable

CELL = 32
HELD_OUT_PICTURES = 64


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The `[autoencoder]` table of a recipe."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `AutoencoderConfig`."""
    start: str = ""
    """Folder of an autoencoder to go on from; empty starts from nothing."""
    train: str = "all"
    """all, or decoder: the encoder, and with it every latent, stays as it is (DC-AE phase 3)."""
    thing_weight: float = 3.0
    latent_noise: float = 0.1
    latent_penalty: float = 0.1
    label_weight: float = 0.05
    squared_weight: float = 2.0


class _Trained(nn.Module):
    """The autoencoder and the read-out that training throws away."""

    def __init__(self, autoencoder: DCAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.label_head = nn.Conv2d(autoencoder.config.latent_channels, len(KINDS) + len(cutouts.COLOURS) + 2, 1)


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cell_labels(scene: cutouts.Scene) -> NDArray[np.int64]:
    """Per latent cell the kind and the colour, [2, h, w]; 0 is paper, a thing covers the cells whose centre it
    reaches.
    """
    side = cutouts.SIZE // CELL
    labels = np.zeros((2, side, side), np.int64)
    centres = (np.arange(side) + 0.5) * CELL
    for thing in scene.things:
        near = np.hypot(centres[None] - thing.x, centres[:, None] - thing.y) < thing.radius
        labels[0][near] = 1 + list(KINDS).index(thing.kind)
        labels[1][near] = 1 + list(cutouts.COLOURS).index(thing.colour)
    return labels


def load_autoencoder(folder: str) -> DCAutoencoder:
    """The autoencoder saved in `folder`, in float32."""
    from sana.checkpoints.autoencoder import AutoencoderDC

    return AutoencoderDC.from_pretrained(folder, torch_dtype=torch.float32)


class AutoencoderObjective:
    """Reconstruction of drawn scenes."""

    name = "autoencoder"
    turns = MAIN
    better: Literal["lower", "higher"] = "higher"

    def __init__(self, settings: AutoencoderSettings, run: RunSettings, device: torch.device) -> None:
        """Build or load the autoencoder."""
        torch.manual_seed(run.seed)
        self.settings, self.run, self.device = settings, run, device
        model = (
            load_autoencoder(settings.start)
            if settings.start
            else DCAutoencoder(AutoencoderConfig.from_dict(settings.model))
        )
        self.module = _Trained(model).to(device)
        if settings.train == "decoder":
            self.module.autoencoder.encoder.requires_grad_(False)
            self.module.label_head.requires_grad_(False)
        self._forward: Any = self._reconstruct
        if run.compile:
            self._forward = torch.compile(self._reconstruct)
        held_out = random.Random(f"{run.seed}/held-out")
        self._scenes = [
            cutouts.sample_scene(held_out, held_out=bool(i % 2), counts=None if i % 2 == 0 else (1, 1))
            for i in range(HELD_OUT_PICTURES)
        ]

    def _reconstruct(self, pictures: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        latents = self.module.autoencoder.encode(pictures)[0]
        noisy = latents if noise is None else latents + noise
        return self.module.autoencoder.decode(noisy)[0], latents

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """All that is not frozen."""
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw`; scenes and noise depend on (seed, draw) only."""
        rng = random.Random(f"{self.run.seed}/{draw}")
        scenes = [cutouts.sample_scene(rng) for _ in range(self.run.batch_size)]
        pictures = to_tensor(np.stack([cutouts.render(scene) for scene in scenes])).to(self.device)
        labels = torch.from_numpy(np.stack([cell_labels(scene) for scene in scenes])).to(self.device)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        side = cutouts.SIZE // CELL
        channels = self.module.autoencoder.config.latent_channels
        noise = torch.randn(len(scenes), channels, side, side, generator=generator).to(self.device)
        # Half of the batch sees almost clean latents: the decoder must be sharp on those.
        noise = (
            noise * self.settings.latent_noise * torch.rand(len(scenes), 1, 1, 1, generator=generator).to(self.device)
        )
        restored, latents = self._forward(pictures, noise)
        things = (pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02
        weight = 1 + self.settings.thing_weight * things
        error = restored.float() - pictures
        reconstruction = (weight * (error.abs() + self.settings.squared_weight * error.square())).mean()
        total = reconstruction
        logged = {"reconstruction": reconstruction.detach(), "squared": error.detach().square().mean()}
        if self.settings.train == "all":
            per_channel = latents.float().transpose(0, 1).flatten(1)
            spread = (per_channel.mean(1).square() + (per_channel.std(1) - 1).square()).mean()
            scores = self.module.label_head(latents).float()
            kinds, colours = scores.split([len(KINDS) + 1, len(cutouts.COLOURS) + 1], dim=1)
            reading = F.cross_entropy(kinds, labels[:, 0]) + F.cross_entropy(colours, labels[:, 1])
            total = total + self.settings.latent_penalty * spread + self.settings.label_weight * reading
            logged |= {"spread": spread.detach(), "labels": reading.detach()}
        return total, logged

    def _held_out(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        pictures = to_tensor(np.stack([cutouts.render(scene) for scene in self._scenes[:count]])).to(self.device)
        latents = self.module.autoencoder.encode(pictures)[0]
        return pictures, latents, self.module.autoencoder.decode(latents)[0].float()

    def evaluate(self) -> Mapping[str, float]:
        """PSNR in dB over the held-out scenes, clean and at a latent error of 0.2, and the latent's root mean
        square.
        """
        pictures, latents, restored = self._held_out(HELD_OUT_PICTURES)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        shaken = self.module.autoencoder.decode(latents + 0.2 * noise)[0].float()

        def psnr(picture: Tensor) -> float:
            return float(-10 * torch.log10((picture.clamp(-1, 1) - pictures).div(2).square().mean()))

        return {
            "psnr": psnr(restored),
            "psnr_shaken": psnr(shaken),
            "latent_rms": float(latents.float().square().mean().sqrt()),
        }

    def preview(self) -> Image.Image:
        """Eight held-out pictures above their reconstructions."""
        pictures, _, restored = self._held_out(8)
        rows = torch.stack([pictures, restored]).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).cpu().numpy())

    def export(self, folder: Path) -> None:
        """Write the autoencoder with its latent scale, measured over training scenes, in half precision."""
        rng = random.Random(f"{self.run.seed}/scale")
        squares = torch.zeros((), dtype=torch.float64)
        for _ in range(16):
            pictures = np.stack([cutouts.render(cutouts.sample_scene(rng)) for _ in range(16)])
            latents = self.module.autoencoder.encode(to_tensor(pictures).to(self.device))[0]
            squares += latents.double().square().mean().cpu() / 16
        from sana.checkpoints.autoencoder import AutoencoderDC

        config = dataclasses.replace(self.module.autoencoder.config, scaling_factor=round(float(squares.rsqrt()), 5))
        finished = AutoencoderDC.from_config(config)
        finished.load_state_dict(self.module.autoencoder.state_dict())
        finished.to(torch.float16).save_pretrained(folder)
