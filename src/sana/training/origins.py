"""Where a flow-matching run comes from: from nothing in the drawn world, or from a model, on any data.

An origin gives the batches, the noise shift, the encoders for previews, and writes what was trained.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.folder import save_parts
from sana.checkpoints.layout import read_json
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.data.captions import PLACEHOLDER
from sana.data.identity import Content
from sana.engine.model_card import CARD_KEY
from sana.errors import InvalidInput
from sana.flow.schedulers import DPMSolverMultistepScheduler
from sana.text.gemma import PromptEncoder
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training import exports
from sana.training.batches import Batch, Batches, collated
from sana.training.config import RunSettings, about, build
from sana.training.dataset_batches import PRIOR, Control, DatasetBatches, PriorBatches
from sana.training.dataset_features import Encoders
from sana.training.drawn_batches import DrawnBatches
from sana.training.drawn_features import FeatureStore, load_text
from sana.training.objectives.flow_settings import (
    DataSettings,
    FlowMatchingSettings,
    PriorSettings,
    check_carried,
    table,
)
from sana.training.priors import draw_missing
from sana.training.starting import StartModel
from sana.training.trainables import (
    ControlSettings,
    ControlTrainable,
    FullTrainable,
    LoraSettings,
    LoraTrainable,
    Trainable,
    check_blocks,
)

DRAWN_PROMPTS = (
    "a red fish above a yellow boat", "three blue hearts", "一只紫色的猫在一棵绿色的树的左边", "🟠🌙 ⬆️ 🟤🏠",
    "a pink flower and a blue star", "four green mushrooms", "a photo of a yellow sun",
    "a brown cat, a red umbrella and a blue house",
)  # fmt: skip


class Origin(Protocol):
    """See the module."""

    batches: Batches
    shift: float
    prompts: tuple[str, ...]

    @property
    def content(self) -> Mapping[str, Content]:
        """What tells the data sets of the batches from others; nothing of the drawn world, which settings describe."""
        ...

    def preview_batch(self) -> Batch | None:
        """The preview prompts with latents of the right shape (their values do not count), or None without prompts."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of latents as batches hold them."""
        ...

    def write(self, trainable: Trainable, folder: Path) -> None:
        """Write what was trained, as the loaders read it."""
        ...


class ScratchOrigin:
    """The drawn world with the encoders of former stages."""

    def __init__(self, settings: FlowMatchingSettings, run: RunSettings, device: torch.device) -> None:
        """Compute the missing features and read them all."""
        self.settings, self.device = settings, device
        self.store = FeatureStore(
            Path(settings.features),
            Path(settings.autoencoder),
            Path(settings.text),
            settings.scenes,
            settings.captions,
            run.seed,
            terse=settings.terse,
        )
        self.batches: Batches = DrawnBatches(
            self.store, batch_size=run.batch_size, seed=run.seed, dropout=settings.dropout, device=device
        )
        self.shift = settings.shift or 1.0
        self.prompts = settings.prompts or DRAWN_PROMPTS

    @property
    def content(self) -> Mapping[str, Content]:
        """See `Origin`."""
        return {}

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderDC:
        return AutoencoderDC.from_pretrained(self.store.autoencoder, torch_dtype=torch.float32).to(self.device)

    def preview_batch(self) -> Batch:
        """See `Origin`."""
        encoded = PromptEncoder(*load_text(self.store.text)).encode(self.prompts, COMPLEX_HUMAN_INSTRUCTION)
        like = next(iter(self.batches.held_out())).latents[:1].expand(len(self.prompts), -1, -1, -1)
        return Batch(latents=like, embeds=encoded.embeds.to(self.device), mask=encoded.mask.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """See `Origin`."""
        return decoded(self._autoencoder, latents)

    def write(self, trainable: Trainable, folder: Path) -> None:
        """Write a whole pipeline in half precision: the transformer with the encoders it was trained under."""
        finished = SanaTransformer2DModel.from_config(trainable.transformer.config)
        finished.load_state_dict(trainable.transformer.state_dict())
        tokenizer, text_encoder = load_text(self.store.text)
        parts = {
            "scheduler": DPMSolverMultistepScheduler(flow_shift=self.shift),
            "text_encoder": text_encoder.half(),
            "tokenizer": tokenizer,
            "transformer": finished.half(),
            "vae": AutoencoderDC.from_pretrained(self.store.autoencoder, torch_dtype=torch.float16),
        }
        card = self.settings.card
        save_parts(folder, parts, notes={CARD_KEY: card} if card else None)
        # The library adds facts of this machine to the file; the one that was trained with says all.
        shutil.copy(self.store.text / "tokenizer" / "tokenizer_config.json", folder / "tokenizer")


class ModelOrigin:
    """A model, its encoders, and pictures with captions or the drawn world."""

    def __init__(
        self, settings: FlowMatchingSettings, run: RunSettings, device: torch.device, *, prepare: bool = True
    ) -> None:
        """Open the data; features that the settings name are computed first, unless `prepare` is off.

        Raises:
            ModelNotFound, CheckpointError: the model is not to be had, or broken.
            InvalidInput: the settings do not fit the model or the data.
        """
        self.settings, self.run, self.device, self._prepare = settings, run, device, prepare
        self.start = StartModel(settings.start, device, offload=run.offload)
        self.control = build(ControlSettings, settings.control, "flow_matching.control")
        with about("flow_matching.start"):
            is_distilled = self.start.is_distilled
        if is_distilled:
            raise _distilled(settings.start)
        self.shift = settings.shift or self.start.flow_shift
        self.encoders = Encoders(self.start)
        self.batches: Batches = self._dataset() if settings.data else self._drawn()
        shown = self.batches.first_captions(4) if isinstance(self.batches, DatasetBatches) else DRAWN_PROMPTS
        self.prompts = self._called(settings.prompts) or shown

    @property
    def content(self) -> Mapping[str, Content]:
        """See `Origin`."""
        if isinstance(self.batches, PriorBatches):
            return {"data": self.batches.instance.content, "prior": self.batches.prior.content}
        return {"data": self.batches.content} if isinstance(self.batches, DatasetBatches) else {}

    def _called(self, prompts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the prompts of the recipe with the trigger of the data in its place."""
        trigger = str(self.settings.data.get("trigger", ""))
        if not trigger and any(PLACEHOLDER in prompt for prompt in prompts):
            raise InvalidInput(
                f"flow_matching.prompts has {PLACEHOLDER} in it: set flow_matching.data.trigger to what it stands for."
            )
        return tuple(prompt.replace(PLACEHOLDER, trigger) for prompt in prompts)

    def _dataset(self) -> Batches:
        settings = self.settings
        data = build(DataSettings, settings.data, "flow_matching.data")
        side = data.size or self._side()
        control = Control(kind=self.control.kind, dropout=self.control.dropout)
        options: dict[str, Any] = {"batch_size": self.run.batch_size, "seed": self.run.seed, "side": side}
        options |= {"dropout": settings.dropout, "device": self.device, "prepare": self._prepare}
        options["control"] = control if settings.train == "controlnet" else None
        batches = DatasetBatches(data, self.encoders, **options)
        prior = table(PriorSettings, settings, "prior")
        if prior is None:
            return batches
        known = self._class_data(prior, data, side)
        return PriorBatches(batches, DatasetBatches(known, self.encoders, table=PRIOR, **options), prior.weight)

    def _class_data(self, prior: PriorSettings, data: DataSettings, side: int) -> DataSettings:
        """Draw the class pictures that are missing, and return what describes all of them; `data` is of the others."""
        draw_missing(self.start, prior, side, self.run.seed)
        return DataSettings(
            path=prior.folder, square=True, caption=prior.prompt, features=data.features, small=prior.small
        )

    def _side(self) -> int:
        """The size in pixels of the model that is trained."""
        if "sample_size" in self.settings.model:
            return 32 * int(self.settings.model["sample_size"])
        card = self.start.card
        if card is not None:
            return card.base_size
        config = read_json(self.start.folder / "transformer" / "config.json")
        return int(config.get("sample_size", 32)) * 32

    def _drawn(self) -> DrawnBatches:
        settings, folder = self.settings, self.start.folder
        if not settings.features:
            raise InvalidInput(
                "The drawn world needs a folder for its features: set flow_matching.features; or name pictures in"
                " [flow_matching.data]."
            )
        store = FeatureStore(
            Path(settings.features),
            folder / "vae",
            folder,
            settings.scenes,
            settings.captions,
            self.run.seed,
            self.control.kind if settings.train == "controlnet" else "",
            settings.terse,
        )
        return DrawnBatches(
            store,
            batch_size=self.run.batch_size,
            seed=self.run.seed,
            dropout=settings.dropout,
            device=self.device,
            control_dropout=self.control.dropout,
        )

    def trainable(self) -> Trainable:
        """Load the transformer and make of it what learns.

        Errors: InvalidInput for a model that is distilled.
        """
        settings = self.settings
        dtype = torch.bfloat16 if settings.base_dtype == "bfloat16" else torch.float32
        transformer = self.start.transformer(dtype, dict(settings.model), fresh=settings.fresh)
        if transformer.config.guidance_embeds:
            raise _distilled(settings.start)
        check_carried(settings.card, transformer.config, "flow_matching")
        if settings.train == "lora":
            return LoraTrainable(transformer, self.lora(settings.lora), self.run.seed)
        if settings.train == "controlnet":
            return ControlTrainable(transformer, self.branch(transformer))
        if settings.fresh:
            generator = torch.Generator(self.device).manual_seed(self.run.seed)
            transformer.init_weights(generator, caption_norm_scale=settings.caption_gain, zero_output=True)
        return FullTrainable(transformer)

    def lora(self, table: Mapping[str, Any]) -> LoraSettings:
        """Return the settings of an adapter, called by the trigger that the data have.

        Errors: InvalidInput for one that they do not have.
        """
        settings = build(LoraSettings, table, "flow_matching.lora")
        called = str(self.settings.data.get("trigger", ""))
        if not settings.trigger:
            return dataclasses.replace(settings, trigger=called)
        batches = self.batches.instance if isinstance(self.batches, PriorBatches) else self.batches
        if isinstance(batches, DrawnBatches):
            raise InvalidInput("flow_matching.lora.trigger has no effect on the drawn world, which does not say it.")
        if isinstance(batches, DatasetBatches) and not batches.says(settings.trigger):
            raise InvalidInput(
                f"flow_matching.lora.trigger is '{settings.trigger}', but no caption of {batches.settings.path} says"
                " it, so nothing would learn it. Set flow_matching.data.trigger, which puts it into every caption."
            )
        return settings

    def other(self, name: str) -> StartModel | None:
        """Return another model of the same kind, to go on from, or None where weights do not count."""
        return StartModel(name, self.device)

    def branch(self, transformer: SanaTransformer2DModel) -> SanaControlNetModel:
        """Return the control network that the settings begin with, or a new one for the transformer, joined as told."""
        network = self._begun(transformer)
        network.wiring = self.control.wiring or network.wiring
        return network

    def _begun(self, transformer: SanaTransformer2DModel) -> SanaControlNetModel:
        if self.control.start:
            with about("flow_matching.control.start"):
                begun = SanaControlNetModel.from_pretrained(self.control.start, torch_dtype=torch.float32)
            return begun.to(self.device)
        check_blocks(self.control.blocks, transformer)
        return SanaControlNetModel.from_transformer(transformer, self.control.blocks).float()

    def preview_batch(self) -> Batch | None:
        """See `Origin`; under a control branch, with the controls of held-out samples."""
        rows = [self.encoders.text(prompt) for prompt in self.prompts]
        self._make_room()
        if not rows:
            return None
        embeds, mask = collated(rows)
        like = next(iter(self.batches.held_out()))
        which = torch.arange(len(rows)) % len(like.latents)
        return Batch(
            latents=like.latents[which],
            embeds=embeds.to(self.device),
            mask=mask.to(self.device),
            control=None if like.control is None else like.control[which],
        )

    def decode(self, latents: Tensor) -> Tensor:
        """See `Origin`; one picture after the other, since they are as large as the model's."""
        pictures = torch.cat([decoded(self.start.autoencoder, one) for one in torch.split(latents, 1)])
        self._make_room()
        return pictures

    def _make_room(self) -> None:
        """Free the encoders where features were computed before: they are asked for only when pictures are shown."""
        if self.settings.data.get("features"):
            self.start.release()
        else:
            self.start.rest()

    def write(self, trainable: Trainable, folder: Path) -> None:
        """Write what was trained, with a model card."""
        settings, run = self.settings, self.run
        facts = {
            "trained": settings.train,
            "steps": str(run.steps),
            "batch size": str(run.batch_size * run.accumulate),
            "data": str(settings.data.get("path", "the drawn world")),
            "flow shift": f"{self.shift:g}",
            **({exports.CONTROL: self.control.kind} if settings.train == "controlnet" else {}),
        }
        trigger = str(settings.data.get("trigger", ""))
        exports.write(trainable, settings.start, self.start.card, facts, folder, settings.card, trigger)


def _distilled(name: str) -> InvalidInput:
    return InvalidInput(
        f"{name} is distilled to one to four steps, and flow matching would undo that. Start from its teacher;"
        " adapters and control branches of the teacher fit it, too."
    )


def decoded(autoencoder: AutoencoderDC, latents: Tensor) -> Tensor:
    """Return pictures [B, 3, H, W] of scaled latents."""
    pictures: Tensor = autoencoder.decode(latents / autoencoder.config.scaling_factor)[0]
    return pictures
