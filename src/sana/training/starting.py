"""The model that a training starts from: its transformer, and its encoders only when something must be encoded."""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana.cards import Card
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.folder import COMPONENTS
from sana.checkpoints.hub import locate
from sana.checkpoints.original.loading import base_folder
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.engine.parts import Parts, load
from sana.engine.placement import Placement
from sana.errors import CheckpointError, InvalidInput
from sana.flow.schedulers import SCMScheduler
from sana.text.gemma import PromptEncoder
from sana.training.config import called
from sana.training.dense_time import retime

logger = logging.getLogger(__name__)

ENCODERS = ("text_encoder", "tokenizer", "vae")
NEW_TENSORS = ("norm_q.weight", "norm_k.weight")
"""Last parts of the names of tensors that a changed configuration may add; they start at 1 and change nothing much."""


class StartModel:
    """A model by short name, folder, hub id or file."""

    def __init__(self, name: str, device: torch.device, *, offload: bool = False) -> None:
        """Nothing is loaded yet; with `offload` no more than one encoder is there at a time, and none after `rest`."""
        self.name, self.device = name, device
        self._placement = Placement("low", device) if offload else None

    def parts(self, *names: str, dtype: Any) -> Parts:
        """Load these parts alone."""
        return load(self.name, device=self.device, dtype=dtype, **_without(names))

    @functools.cached_property
    def card(self) -> Card | None:
        """The card of a known model."""
        return self._bare.card

    @property
    def is_distilled(self) -> bool:
        """Whether its pipeline draws in a few steps, as SANA-Sprint's do."""
        return isinstance(self._bare.scheduler, SCMScheduler)

    @functools.cached_property
    def flow_shift(self) -> float:
        """The shift of its noise levels."""
        return self._bare.flow_shift

    @functools.cached_property
    def _bare(self) -> Parts:
        return self.parts(dtype="card")

    def transformer(
        self, dtype: torch.dtype, changes: dict[str, Any], *, fresh: bool = False
    ) -> SanaTransformer2DModel:
        """Load the transformer, with `changes` laid over its configuration.

        With `fresh` the weights do not count and are arbitrary.
        Errors: InvalidInput for changes that the weights do not fit.
        """
        loaded: Any = self.parts("transformer", dtype={"transformer": dtype}).transformer
        if not changes:
            trained: SanaTransformer2DModel = loaded.train()
            return trained
        with called("Transformer", "flow_matching.model"):
            changed = SanaTransformer2DModel.from_config({**loaded.config.to_dict(), **changes})
        if fresh:
            return changed.to(self.device, dtype).train()
        state, wanted = loaded.state_dict(), changed.state_dict()
        for name, tensor in wanted.items():
            if name not in state and name.endswith(NEW_TENSORS):
                state[name] = torch.ones_like(tensor)
        unfit = [n for n, t in wanted.items() if n not in state or state[n].shape != t.shape]
        unfit += [n for n in state if n not in wanted]
        if unfit:
            told = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
            raise InvalidInput(
                f"flow_matching.model ({told}) does not fit the weights of {self.name}: {unfit[0]} differs. Change only"
                " sample_size, interpolation_scale, timestep_scale or qk_norm, or set fresh = true."
            )
        changed.load_state_dict(state)
        changed = changed.to(self.device, dtype).train()
        before, after = loaded.config.timestep_scale, changed.config.timestep_scale
        if before != after:
            error = retime(changed, before, after)
            logger.info("time is told on another scale; the embedding of time fits to %.1f %%", 100 * error)
        return changed

    @property
    def text_dtype(self) -> torch.dtype:
        """How the text encoder is held."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def autoencoder(self) -> AutoencoderDC:
        """The autoencoder in float32, frozen."""
        self._bring(self._autoencoder)
        return self._autoencoder

    @property
    def prompts(self) -> PromptEncoder:
        """The text encoder; one prompt at a time, so that a text has the same bits in every company."""
        self._bring(self._prompts.text_encoder)
        return self._prompts

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderDC:
        kinds = {"vae": torch.float32}
        vae: Any = load(self.home, device=self._resting, dtype=kinds, **_without(("vae",))).vae
        if vae is None:
            raise CheckpointError(f"{self.name} has no autoencoder; start from a whole model.")
        return vae.requires_grad_(False)  # type: ignore[no-any-return]

    @functools.cached_property
    def _prompts(self) -> PromptEncoder:
        kinds = {"text_encoder": self.text_dtype}
        parts = load(self.name, device=self._resting, dtype=kinds, **_without(("text_encoder", "tokenizer")))
        if parts.text_encoder is None or parts.tokenizer is None:
            raise CheckpointError(f"{self.name} has no text encoder; start from a whole model.")
        parts.text_encoder.requires_grad_(False)
        return PromptEncoder(parts.tokenizer, parts.text_encoder, max_batch=1)

    @property
    def _resting(self) -> torch.device:
        """Where encoders are loaded: in main memory those that come and go, for which there may be no room yet."""
        return self.device if self._placement is None else torch.device("cpu")

    def _bring(self, *encoders: nn.Module) -> None:
        if self._placement is not None:
            if not all(self._placement.take(encoder) for encoder in encoders):
                raise InvalidInput(
                    f"run.offload has no effect on {self.name}: on a CPU, weights are let go of and read again from"
                    " safetensors files, and its encoders come from others. Switch it off, or convert the model."
                )
            with self._placement.using(encoders):  # what is not used goes as this begins, not as it ends
                pass

    def rest(self) -> None:
        """Take the encoders off the device, where they are offloaded; they come back when they are asked for."""
        self._bring()

    def release(self) -> None:
        """Free the encoders; they are loaded again when they are asked for."""
        for name in ("_autoencoder", "_prompts"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def home(self) -> str:
        """The model that the encoders come from: this one, or that of a single file.

        Errors: CheckpointError for a file of an architecture that no published model has.
        """
        located = locate(self.name, parts=ENCODERS, single=True)
        if located.file is None:
            return self.name
        around = base_folder(located)
        if around is not None:
            return str(around)
        if self.card is None:
            raise CheckpointError(
                f"{self.name} has an architecture that no published model has, so its encoders are unknown; put it"
                " into the folder of its model."
            )
        return self.card.home

    @functools.cached_property
    def folder(self) -> Path:
        """The folder in which the encoders lie."""
        return part_folder(locate(self.home, parts=ENCODERS).folder, "vae").parent


def _without(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: None for name in COMPONENTS if name not in (*names, "scheduler")}
