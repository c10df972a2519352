"""What training a published model will need, without its weights, its data or the machine for it.

The objective is built as it will be, from the configurations that the card of the model holds, with tensors that have
shapes but no values; a micro-batch then runs through it as on an accelerator, in bfloat16 unless the recipe says
otherwise, while what lives at once is counted.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator
from torch._subclasses import FakeTensorMode

from sana.card import AUTOENCODER_PARAMS, TEXT_ENCODER_PARAMS, Card
from sana.cards import CARDS
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.references import card_of_file
from sana.training.batches import Batch
from sana.training.config import Recipe, RunSettings, build
from sana.training.estimate import Estimate, counted
from sana.training.ledger import Ledger
from sana.training.objectives.base import Objective
from sana.training.objectives.flow_settings import DataSettings, FlowMatchingSettings
from sana.training.origins import ModelOrigin, decoded
from sana.training.players import use_checkpointing
from sana.training.processes import check_shard
from sana.training.trainables import ControlSettings

CPU = torch.device("cpu")
"""Where tensors without values pretend to be: autocast goes by devices, and other ones may not be there."""
MAX_TOKENS = 300
"""Rows that a text encoder keeps of a caption at most."""
PREVIEWED = 4
"""Pictures on a sheet where the recipe names no prompts."""


def card_of(name: str) -> Card | None:
    """Return the card of a model by short name, hub id or original file."""
    named = next((card for card in CARDS.values() if name and name in (card.name, card.hub_id)), None)
    return named or (card_of_file(name) if name.startswith("hf://") else None)


def rehearse(recipe: Recipe, objective: type[Any], settings: Any, card: Card, world: int) -> Estimate:
    """Estimate what one of `world` processes needs for a recipe whose start, or teacher, is the model of `card`.

    `objective` and `settings` are those of the recipe. Seconds stay unknown.
    Errors: InvalidInput for settings that contradict each other.
    """
    run = replace(recipe.run, compile=False)
    check_shard(run, world)
    with FakeTensorMode():
        made: Objective = objective(settings, run, CPU, opened(card))
        if run.checkpointing:
            use_checkpointing(made)

        def walk(draw: int, turn: str) -> None:
            with torch.autocast(CPU.type, torch.bfloat16, enabled=run.precision != "float32"):
                loss = made.loss(draw, turn)[0]
            loss.backward()  # type: ignore[no-untyped-call]

        needs = counted(made, run, recipe.optimizer, recipe.discriminator_optimizer, walk, world, timed=False)
        shape = made.origin.batches.latents[:1].shape  # type: ignore[attr-defined]
    encoding, decoding = _coding(card, tuple(shape))
    encoder, autoencoder = 2 * TEXT_ENCODER_PARAMS, 4 * AUTOENCODER_PARAMS
    if settings.data.get("features"):
        return replace(needs, previews=max(encoder, autoencoder + decoding))
    if run.offload:
        told = {
            name: max(encoder, autoencoder + size) for name, size in (("encoding", encoding), ("previews", decoding))
        }
        return replace(needs, **told)
    return replace(needs, encoders=encoder + autoencoder, previews=decoding)


def _coding(card: Card, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the bytes that encoding a picture of latents of this shape and decoding it take beside the autoencoder."""
    # On this device parameters are ordinary ones, as the decoder's way in strips asks of large pictures.
    with torch.device("meta"):
        autoencoder = AutoencoderDC.from_config(card.autoencoder).eval().requires_grad_(False)
        latents = torch.zeros(shape)
    known = [*autoencoder.parameters(), *autoencoder.buffers()]
    there, back = Ledger(known), Ledger(known)
    with torch.no_grad():
        with back:
            picture = decoded(autoencoder, latents)
        with there:
            autoencoder.encode(picture)
    return there.peak, back.peak


def opened(card: Card) -> type[ModelOrigin]:
    """Return what a rehearsed model and its data are opened as."""

    class Rehearsed(_Rehearsed):
        def __init__(self, settings: FlowMatchingSettings, run: RunSettings, device: torch.device) -> None:
            self.settings, self.run, self.device = settings, run, device
            self.start = _Unloaded(card)  # type: ignore[assignment]
            self.control = build(ControlSettings, settings.control, "flow_matching.control")
            self.shift = settings.shift or card.flow_shift
            self.prompts = settings.prompts or ("",) * PREVIEWED
            data = build(DataSettings, settings.data, "flow_matching.data")
            side = data.size // 32 or int(settings.model.get("sample_size", card.base_size // 32))
            self.batches = _Shapes(card, run.batch_size * (2 if settings.prior else 1), side, settings)

    return Rehearsed


class _Rehearsed(ModelOrigin):
    def other(self, name: str) -> None:
        # A copy of the teacher takes as much.
        return None

    def _begun(self, transformer: SanaTransformer2DModel) -> SanaControlNetModel:
        # Tensors without values change their dtype only by being made again.
        whole = self.start.transformer(torch.float32, dict(self.settings.model))
        return SanaControlNetModel.from_transformer(whole, self.control.blocks)


class _Unloaded:
    """Stands for a `StartModel`."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def transformer(
        self, dtype: torch.dtype, changes: dict[str, Any], *, fresh: bool = False
    ) -> SanaTransformer2DModel:
        config = {**self.card.transformer.to_dict(), **changes}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return SanaTransformer2DModel.from_config(config).train()
        finally:
            torch.set_default_dtype(before)


class _Shapes:
    """Batches of the longest texts, without values."""

    def __init__(self, card: Card, count: int, side: int, settings: FlowMatchingSettings) -> None:
        config = card.transformer
        self.latents = torch.zeros(count, config.in_channels, side, side)
        self.embeds = torch.zeros(count, MAX_TOKENS, config.caption_channels)
        self.mask = torch.ones(count, MAX_TOKENS, dtype=torch.int64)
        self.weights = torch.ones(count) if settings.prior else None
        self.control = self.latents if settings.train == "controlnet" else None
        self.null = self.embeds[0]

    def batch(self, draw: int, generator: Generator) -> Batch:
        parts = {"latents": self.latents, "embeds": self.embeds, "mask": self.mask}
        return Batch(**parts, control=self.control, weights=self.weights)

    def held_out(self) -> Iterable[Batch]:
        return ()
