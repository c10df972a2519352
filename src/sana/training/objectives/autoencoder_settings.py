"""The `[autoencoder]` table of a recipe, and what in it fits together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sana.config import AutoencoderConfig
from sana.data import cutouts
from sana.errors import InvalidInput, did_you_mean
from sana.training.config import RunSettings, check_fields

PHASES = ("full", "latent", "refine", "decoder")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The `[autoencoder]` table of a recipe."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `AutoencoderConfig`, for one that starts from nothing."""
    start: str = ""
    """Folder of an autoencoder, or of a whole model, to go on from; counts from the run's folder. Empty starts from
    nothing."""
    phase: str = "full"
    """full: everything; latent: the layers around the latents, at a high resolution; refine: the decoder's head,
    against a discriminator; decoder: all of it. In the last two the encoder, and every latent, stays as it is."""
    data: str = ""
    """Folder of pictures; empty draws scenes of the drawn world."""
    size: int = cutouts.SIZE
    """Side of the square pictures in pixels; scenes of the drawn world are enlarged to it."""
    thing_weight: float = 3.0
    """How much more the pixels of things count, of the drawn world only."""
    latent_noise: float = 0.1
    """Standard deviation, at most, of the noise that latents get before they are decoded."""
    latent_penalty: float = 0.1
    """Pull of each channel to mean 0 and deviation 1 (full)."""
    label_weight: float = 0.05
    """Weight of reading kinds and colours out of the latents (full; of the drawn world only)."""
    squared_weight: float = 2.0
    """Weight of the squared error beside L1, whose weight is 1."""
    edge_weight: float = 0.0
    """Weight of the differences between neighbouring pixels over three scales, which stand in for LPIPS."""
    gan_weight: float = 0.5
    """Weight of the discriminator's answer, beside the factor that balances its pull (refine)."""
    channels: tuple[int, ...] = ()
    """Each step keeps only so many of the first latent channels, one of these numbers, so that early ones come to hold
    structure and later ones detail (DC-AE 1.5, arXiv 2508.00413); empty keeps all."""

    def check(self, run: RunSettings) -> None:
        """Refuse settings that contradict each other, or would change nothing.

        Raises:
            InvalidInput: naming the setting.
        """
        if self.phase not in PHASES:
            hint = did_you_mean(self.phase, PHASES)
            raise InvalidInput(f"autoencoder.phase must be one of {', '.join(PHASES)}, but is '{self.phase}'.{hint}")
        if self.phase != "full" and not self.start:
            raise InvalidInput(f"The phase {self.phase} goes on from a trained autoencoder: set autoencoder.start.")
        check_fields(AutoencoderConfig, self.model, "autoencoder.model")
        if self.start and self.model:
            raise InvalidInput("autoencoder.model has no effect with autoencoder.start. Drop one of them.")
        for name, phases in _ONLY.items():
            if self.phase not in phases and getattr(self, name) != getattr(AutoencoderSettings, name):
                raise InvalidInput(f"autoencoder.{name} has no effect in the phase {self.phase}. Drop it.")
        for name in ("thing_weight", "label_weight"):
            if self.data and getattr(self, name) != getattr(AutoencoderSettings, name):
                raise InvalidInput(f"autoencoder.{name} is about the drawn world and has no effect on data. Drop it.")
        for name in (
            "thing_weight",
            "latent_noise",
            "latent_penalty",
            "label_weight",
            "squared_weight",
            "edge_weight",
            "gan_weight",
        ):
            if getattr(self, name) < 0:
                raise InvalidInput(f"autoencoder.{name} must not be negative, but is {getattr(self, name)}.")
        if self.size < 64 or self.size % 32:
            raise InvalidInput(f"autoencoder.size must be a multiple of 32 from 64 on, but is {self.size}.")
        if run.offload:
            raise InvalidInput("run.offload has no effect on 'autoencoder': nothing is encoded for it. Switch it off.")
        if self.phase == "refine" and run.compile:
            raise InvalidInput("run.compile cannot take the two gradients of the phase refine apart. Switch it off.")

    def check_model(self, config: AutoencoderConfig) -> None:
        """Refuse channels that the model cannot drop.

        Raises:
            InvalidInput: there are not as many, or shortcuts mix them.
        """
        if not self.channels:
            return
        most = config.latent_channels
        wrong = [count for count in self.channels if not 1 <= count <= most]
        if wrong or max(self.channels) != most:
            raise InvalidInput(f"autoencoder.channels must be numbers from 1 to {most}, and {most} among them.")
        if config.encoder_out_shortcut or config.decoder_in_shortcut:
            text = "autoencoder.channels needs a model whose latents are not mixed"
            raise InvalidInput(f"{text}: set encoder_out_shortcut and decoder_in_shortcut to false.")


_ONLY = {
    "latent_penalty": ("full",),
    "label_weight": ("full",),
    "gan_weight": ("refine",),
    "channels": ("full", "latent", "decoder"),
}
"""Setting -> the phases that read it."""
