"""Training a DC-AE, on the drawn world or on pictures of one's own, in the three phases of DC-AE (arXiv 2410.10733).

Shapes: B batch, H W picture size, h w latent size (H / 32), C latent channels.

`full` trains everything at a low resolution; `latent` adapts the latents to a high one through the two layers around
them; `refine` sharpens the decoder's head against a discriminator of patches, with every latent as it is; `decoder`
trains the whole decoder under a frozen encoder.

On the drawn world the loss is L1 plus squared error, weighted towards the things (they cover a tenth of the pixels), on
reconstructions from noisy latents: a decoder that forgives small errors of the latent forgives the diffusion model
too. Three terms shape the latent itself: each channel is pulled to mean 0 and standard deviation 1 (a free latent
drifts to a scale of tens), and a linear read-out of every latent cell must name the kind and colour of the thing
that covers it (representation alignment as in Yu et al. 2024, REPA, and Yao et al. 2025, VA-VAE, with the world's
own labels in place of a vision model's features).
"""

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sana.config import AutoencoderConfig
from sana.data import cutouts
from sana.data.cutout_shapes import KINDS
from sana.data.identity import Content
from sana.errors import ModelNotFound
from sana.models.dc_ae import DCAutoencoder
from sana.models.patch_discriminator import PatchDiscriminator
from sana.training.autoencoder_pictures import CELL, DatasetPictures, DrawnPictures, Pictures, PictureSource
from sana.training.config import RunSettings, about, called
from sana.training.objectives.autoencoder_settings import AutoencoderSettings
from sana.training.objectives.base import MAIN, Check, unasked
from sana.training.reconstruction import adaptive_weight, edge_loss, hinge_loss, mean_square, psnr, squared_error

__all__ = ["AutoencoderObjective", "AutoencoderSettings", "load_autoencoder"]

PLAYERS = ("generator", "discriminator")
PREVIEWED = 8
SCALED_PICTURES = 256
"""Training pictures over which the scale of the latents is measured."""
TRAINED = {
    "full": ("autoencoder.", "label_head."),
    "latent": ("autoencoder.encoder.conv_out.", "autoencoder.decoder.conv_in."),
    "refine": ("autoencoder.decoder.norm_out.", "autoencoder.decoder.conv_out."),
    "decoder": ("autoencoder.decoder.",),
}
"""Phase -> beginnings of the names of what it trains, besides the discriminator."""


class _Trained(nn.Module):
    """The autoencoder, and what training throws away: the read-out, the discriminator."""

    def __init__(self, autoencoder: DCAutoencoder, phase: str) -> None:
        super().__init__()
        self.autoencoder, self._phase = autoencoder, phase
        self.label_head = nn.Conv2d(autoencoder.config.latent_channels, len(KINDS) + len(cutouts.COLOURS) + 2, 1)
        self.discriminator = PatchDiscriminator() if phase == "refine" else None

    def train(self, mode: bool = True) -> "_Trained":
        """Switch to training; where only some layers learn, the batch norms of the others keep what they know."""
        super().train(mode)
        if self._phase in ("latent", "refine"):
            self.autoencoder.eval()
        return self


def load_autoencoder(folder: str) -> DCAutoencoder:
    """The autoencoder saved in `folder`, or that of the whole model there, in float32.

    Errors: ModelNotFound, CheckpointError.
    """
    from sana.checkpoints.autoencoder import AutoencoderDC

    if not Path(folder).exists():
        raise ModelNotFound(
            f"autoencoder.start: there is no {folder}. A path that does not begin with / counts from the run's folder,"
            " so that stages find each other's export."
        )
    part = Path(folder) / "vae"
    with about("autoencoder.start"):
        return AutoencoderDC.from_pretrained(part if part.is_dir() else folder, torch_dtype=torch.float32)


class AutoencoderObjective:
    """Reconstruction of pictures."""

    name = "autoencoder"
    better: Literal["lower", "higher"] = "higher"

    def __init__(self, settings: AutoencoderSettings, run: RunSettings, device: torch.device) -> None:
        """Build or load the autoencoder.

        Raises:
            InvalidInput: settings contradict each other, or the model.
        """
        torch.manual_seed(run.seed)
        self.settings, self.run, self.device = settings, run, device
        settings.check(run)
        with called("Autoencoder", "autoencoder.model"):
            model = (
                load_autoencoder(settings.start)
                if settings.start
                else DCAutoencoder(AutoencoderConfig.from_dict(settings.model))
            )
        settings.check_model(model.config)
        self.turns = PLAYERS if settings.phase == "refine" else MAIN
        self.module = _Trained(model, settings.phase).to(device)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name.startswith((*TRAINED[settings.phase], "discriminator.")))
        self._forward: Any = self._reconstruct
        if run.compile:
            self._forward = torch.compile(self._reconstruct)
        self.pictures: PictureSource
        with about("autoencoder.data"):
            self.pictures = (
                DatasetPictures(settings.data, run.seed, settings.size, run.batch_size)
                if settings.data
                else DrawnPictures(run.seed, settings.size)
            )

    @property
    def data(self) -> Mapping[str, Content]:
        """The pictures, where they are not drawn."""
        return {"data": self.pictures.content} if isinstance(self.pictures, DatasetPictures) else {}

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """What the phase trains, or the discriminator."""
        begin = ("discriminator.",) if turn == PLAYERS[1] else TRAINED[self.settings.phase]
        return [(name, p) for name, p in self.module.named_parameters() if name.startswith(begin)]

    def _reconstruct(self, pictures: Tensor, noise: Tensor | None, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        latents = self.module.autoencoder.encode(pictures)[0]
        noisy = latents if noise is None else latents + noise
        return self.module.autoencoder.decode(noisy if kept is None else noisy * kept)[0], latents

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw`; pictures, noise and dropped channels depend on (seed, draw) only."""
        rng = random.Random(f"{self.run.seed}/{draw}")
        batch = self.pictures.batch(rng, draw, self.run.batch_size)
        pictures = batch.pixels.to(self.device)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        noise, kept = self._noise(pictures, generator), self._kept(rng)
        restored, latents = self._forward(pictures, noise, *([] if kept is None else [kept]))
        if turn == PLAYERS[1]:
            return self._discriminate(pictures, restored.detach().float())
        total, logged = self._reconstruction(pictures, restored.float(), batch.labels is not None)
        if self.settings.phase == "full":
            total, figures = self._shape_latents(total, latents, batch)
            return total, logged | figures
        if turn == PLAYERS[0]:
            discriminator = cast(PatchDiscriminator, self.module.discriminator)
            adversarial = -discriminator(restored).float().mean()
            factor = adaptive_weight(total, adversarial, self._last_weights())
            logged |= {"adversarial": adversarial.detach(), "factor": factor}
            total = total + self.settings.gan_weight * factor * adversarial
        return total, logged

    def _noise(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        count, side = len(pictures), self.settings.size // CELL
        channels = self.module.autoencoder.config.latent_channels
        noise = torch.randn(count, channels, side, side, generator=generator).to(self.device)
        # Half of the batch sees almost clean latents: the decoder must be sharp on those.
        return noise * self.settings.latent_noise * torch.rand(count, 1, 1, 1, generator=generator).to(self.device)

    def _kept(self, rng: random.Random) -> Tensor | None:
        """Draw how many of the first channels stay, and return 1 for them and 0 for the others, [1, C, 1, 1]."""
        if not self.settings.channels:
            return None
        return self._first(rng.choice(self.settings.channels))

    def _first(self, count: int) -> Tensor:
        numbers = torch.arange(self.module.autoencoder.config.latent_channels, device=self.device)
        return (numbers < count).float().view(1, -1, 1, 1)

    def _reconstruction(self, pictures: Tensor, restored: Tensor, drawn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        error = restored - pictures
        amount = error.abs() + self.settings.squared_weight * error.square()
        if drawn:
            things = (pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02
            amount = (1 + self.settings.thing_weight * things) * amount
        total = amount.mean()
        logged = {"reconstruction": total.detach(), "squared": error.detach().square().mean()}
        if self.settings.edge_weight:
            edges = edge_loss(restored, pictures)
            total, logged["edges"] = total + self.settings.edge_weight * edges, edges.detach()
        return total, logged

    def _shape_latents(self, total: Tensor, latents: Tensor, batch: Pictures) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the terms that shape the latents."""
        per_channel = latents.float().transpose(0, 1).flatten(1)
        spread = (per_channel.mean(1).square() + (per_channel.std(1) - 1).square()).mean()
        total, logged = total + self.settings.latent_penalty * spread, {"spread": spread.detach()}
        if batch.labels is not None:
            labels = batch.labels.to(self.device)
            scores = self.module.label_head(latents).float()
            kinds, colours = scores.split([len(KINDS) + 1, len(cutouts.COLOURS) + 1], dim=1)
            reading = F.cross_entropy(kinds, labels[:, 0]) + F.cross_entropy(colours, labels[:, 1])
            total, logged["labels"] = total + self.settings.label_weight * reading, reading.detach()
        return total, logged

    def _discriminate(self, pictures: Tensor, restored: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        discriminator = cast(PatchDiscriminator, self.module.discriminator)
        real, fake = discriminator(pictures), discriminator(restored)
        loss = hinge_loss(real, fake)
        return loss, {"real": real.detach().float().mean(), "restored": fake.detach().float().mean()}

    def _last_weights(self) -> Tensor:
        last = self.module.autoencoder.decoder.conv_out
        return last.weight if isinstance(last, nn.Conv2d) else last.conv.weight

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        """PSNR in dB over the held-out pictures, clean, at a latent error of 0.2 and from the first channels alone;
        the latent's root mean square, and what becomes of it when the same pictures have twice the size.
        """
        autoencoder, generator = self.module.autoencoder, torch.Generator().manual_seed(0)
        squares: dict[str, float] = {}
        for first in range(0, self.pictures.held, self.run.batch_size):
            check()
            pictures = self.pictures.held_out(first, self.run.batch_size).to(self.device)
            latents = autoencoder.encode(pictures)[0]
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            seen = {"psnr": latents, "psnr_shaken": latents + 0.2 * noise}
            seen |= {f"psnr_{count}": latents * self._first(count) for count in self.settings.channels}
            found = {name: squared_error(autoencoder.decode(one)[0], pictures) for name, one in seen.items()}
            found["latent_rms"] = mean_square(latents)
            if self.settings.phase == "latent":
                twice = F.interpolate(pictures, scale_factor=2, mode="bicubic")
                found["rms_twice"] = mean_square(autoencoder.encode(twice)[0])
            for name, value in found.items():
                squares[name] = squares.get(name, 0.0) + value * len(pictures) / self.pictures.held
        figures = {name: psnr(value) if name.startswith("psnr") else value**0.5 for name, value in squares.items()}
        if "rms_twice" in figures:
            figures["rms_twice"] /= figures["latent_rms"]
        return figures

    def preview(self, check: Check = unasked) -> Image.Image:
        """Eight held-out pictures above their reconstructions."""
        pictures = self.pictures.held_out(0, PREVIEWED).to(self.device)
        restored = []
        for part in torch.split(pictures, self.run.batch_size):
            check()
            restored.append(self.module.autoencoder(part, return_dict=False)[0].float())
        rows = torch.stack([pictures, torch.cat(restored)]).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).cpu().numpy())

    def export(self, folder: Path) -> None:
        """Write the autoencoder in half precision, with the scale of its latents over training pictures; where the
        encoder stayed as it was, so did the scale.
        """
        from sana.checkpoints.autoencoder import AutoencoderDC

        config = self.module.autoencoder.config
        if self.settings.phase in ("full", "latent"):
            config = dataclasses.replace(config, scaling_factor=self._scale())
        finished = AutoencoderDC.from_config(config)
        finished.load_state_dict(self.module.autoencoder.state_dict())
        finished.to(torch.float16).save_pretrained(folder)

    def _scale(self) -> float:
        rng, square = random.Random(f"{self.run.seed}/scale"), 0.0
        for number in range(SCALED_PICTURES):
            picture = self.pictures.batch(rng, number, 1).pixels.to(self.device)
            square += mean_square(self.module.autoencoder.encode(picture)[0]) / SCALED_PICTURES
        return round(1 / math.sqrt(square), 5)
