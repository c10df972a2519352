"""Flow matching of a linear DiT on precomputed latents and captions.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width.

Loss: the mean square of v(x_sigma, 1000 sigma, text) - (noise - x0), with x_sigma = (1 - sigma) x0 + sigma noise
and sigma drawn by `flow.density` (arXiv 2410.10629, section 2; Lipman et al. 2023). A read-out of a middle block
must name the kind and colour under every latent cell (representation alignment, Yu et al. 2024, with the drawn
world's labels): it tells the network early which words belong where, and is thrown away.
"""

import contextlib
import functools
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana.checkpoints.folder import save_parts
from sana.config import TransformerConfig
from sana.data import cutouts
from sana.data.cutout_shapes import KINDS
from sana.engine.model_card import CARD_KEY
from sana.flow.density import sample_levels
from sana.flow.guidance import combine
from sana.flow.samplers import flow_dpm
from sana.flow.schedulers import DPMSolverMultistepScheduler
from sana.flow.schedules import flow_dpm_grid
from sana.models.linear_dit import LinearDiT
from sana.text.gemma import PromptEncoder
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training.config import RunSettings
from sana.training.features import Features, FeatureStore, load_text
from sana.training.objectives.base import MAIN, trainable

HELD_OUT = 256
HELD_OUT_SIGMAS = (0.5, 0.7, 0.85, 0.95)
PREVIEW_PROMPTS = (
    "a red fish above a yellow boat", "three blue hearts", "一只紫色的猫在一棵绿色的树的左边", "🟠🌙 ⬆️ 🟤🏠",
    "a pink flower and a blue star", "four green mushrooms", "a photo of a yellow sun",
    "a brown cat, a red umbrella and a blue house",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlowMatchingSettings:
    """The `[flow_matching]` table of a recipe."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig`."""
    autoencoder: str = ""
    """Folder of the autoencoder that makes the latents; relative to the run's folder, like the next two."""
    text: str = ""
    """Folder that holds `text_encoder` and `tokenizer`."""
    features: str = ""
    """Folder of the precomputed features; what is missing there is computed first."""
    scenes: int = 49152
    captions: int = 3
    dropout: float = 0.1
    """Share of the samples that see the unconditional text."""
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    label_weight: float = 0.1
    label_block: int = 4
    card: str = ""
    """Name of the card that the exported pipeline shall carry."""
    caption_gain: float = 0.1
    """First weight of the caption norm."""


class _Trained(nn.Module):
    """The transformer and the read-out that training throws away."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = LinearDiT(config)
        self.label_head = nn.Linear(config.inner_dim, len(KINDS) + len(cutouts.COLOURS) + 2)


class FlowMatchingObjective:
    """Velocity prediction under captions of the drawn world."""

    name = "flow_matching"
    turns = MAIN
    better: Literal["lower", "higher"] = "lower"

    def __init__(self, settings: FlowMatchingSettings, run: RunSettings, device: torch.device) -> None:
        """Compute the missing features, read them all, and build the transformer."""
        self.settings, self.run, self.device = settings, run, device
        self.store = FeatureStore(
            Path(settings.features),
            Path(settings.autoencoder),
            Path(settings.text),
            settings.scenes,
            settings.captions,
            run.seed,
        )
        for _ in self.store.compute():
            pass
        self.features: Features = self.store.read()
        # One width for all batches: compiled code is made once, and the attention to a few words is cheap.
        self._width = math.ceil(int(self.features.lengths.max()) / 8) * 8
        self._null = self.store.null().to(device)
        torch.manual_seed(run.seed)
        config = TransformerConfig.from_dict(settings.model)
        self.module = _Trained(config).to(device)
        self.module.transformer.init_weights(
            torch.Generator(device).manual_seed(run.seed), caption_norm_scale=settings.caption_gain, zero_output=True
        )
        self._middle: Tensor | None = None
        self.module.transformer.transformer_blocks[settings.label_block - 1].register_forward_hook(self._keep_middle)
        if run.compile:
            for block in self.module.transformer.transformer_blocks:
                block.compile()
        self._training = len(self.features.latents) - HELD_OUT
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def _keep_middle(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._middle = output

    def _indices(self, draw: int) -> Tensor:
        """Scene numbers of micro-batch `draw`: each epoch is a fresh order of all training scenes."""
        size = self.run.batch_size
        epoch, position = divmod(draw, self._training // size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.run.seed + epoch)
            self._order = (epoch, torch.randperm(self._training, generator=generator))
        return self._order[1][position * size : (position + 1) * size]

    def _text(self, scenes: Tensor, which: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, E] and mask [B, T] of one caption of each scene; dropped ones see the null text."""
        starts, lengths = self.features.starts[scenes, which], self.features.lengths[scenes, which]
        lengths = torch.where(dropped, torch.ones_like(lengths), lengths)
        columns = torch.arange(self._width)[None]
        mask = columns < lengths[:, None]
        rows = (starts[:, None] + columns).clamp_(max=len(self.features.text) - 1)
        embeds = self.features.text[rows].to(self.device, torch.float32)
        mask = mask.to(self.device)
        embeds[dropped.to(self.device), :1] = self._null
        return embeds * mask[..., None], mask.long()

    def _velocity_loss(
        self, x0: Tensor, noise: Tensor, sigmas: Tensor, timesteps: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Mean square error of the velocity per sample [B]."""
        sigma = sigmas.view(-1, 1, 1, 1).to(self.device)
        x = (1 - sigma) * x0 + sigma * noise
        # On CPUs the fused kernel's backward pass is the slowest part of the network; the plain formula is not.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext():
            predicted: Tensor = self.module.transformer(
                x, text[0], timesteps.to(self.device, torch.float32), encoder_attention_mask=text[1]
            )[0]
        return (predicted.float() - (noise - x0)).square().mean((1, 2, 3))

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """All that is not frozen."""
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw`."""
        generator = torch.Generator().manual_seed((self.run.seed << 40) + draw)
        scenes = self._indices(draw)
        size = len(scenes)
        which = torch.randint(self.settings.captions, (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < self.settings.dropout
        levels = sample_levels(
            size, self.settings.shift, generator, mean=self.settings.logit_mean, std=self.settings.logit_std
        )
        x0 = self.features.latents[scenes].to(self.device, torch.float32)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        each = self._velocity_loss(x0, noise, levels.sigmas, levels.timesteps, self._text(scenes, which, dropped))
        velocity = each.mean()
        assert self._middle is not None
        scores = self.module.label_head(self._middle).float()
        labels = self.features.labels[scenes].to(self.device, torch.long).flatten(2)
        kinds, colours = scores.split([len(KINDS) + 1, len(cutouts.COLOURS) + 1], dim=2)
        reading = F.cross_entropy(kinds.flatten(0, 1), labels[:, 0].flatten()) + F.cross_entropy(
            colours.flatten(0, 1), labels[:, 1].flatten()
        )
        total = velocity + self.settings.label_weight * reading
        return total, {"velocity": velocity.detach(), "labels": reading.detach()}

    def evaluate(self) -> Mapping[str, float]:
        """Velocity loss at fixed levels on scenes kept apart, with the right captions and with captions of other
        scenes.

        The gap between the two is the cheapest sign that the text is read.
        """
        scenes = torch.arange(self._training, self._training + HELD_OUT)
        x0 = self.features.latents[scenes].to(self.device, torch.float32)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        sigmas = torch.tensor(HELD_OUT_SIGMAS).repeat_interleave(HELD_OUT // len(HELD_OUT_SIGMAS))
        timesteps = (1000 * sigmas).long()
        never, first = torch.zeros(HELD_OUT, dtype=torch.bool), torch.zeros(HELD_OUT, dtype=torch.long)
        matched = self._velocity_loss(x0, noise, sigmas, timesteps, self._text(scenes, first, never)).mean()
        others = self._text(scenes.roll(1), first, never)
        shuffled = self._velocity_loss(x0, noise, sigmas, timesteps, others).mean()
        return {"matched": float(matched), "gap": float(shuffled - matched)}

    @functools.cached_property
    def _viewing(self) -> tuple[Tensor, Tensor, Any]:
        """Encoded preview prompts and the autoencoder."""
        from sana.checkpoints.autoencoder import AutoencoderDC

        encoded = PromptEncoder(*load_text(self.store.text)).encode(PREVIEW_PROMPTS, COMPLEX_HUMAN_INSTRUCTION)
        autoencoder = AutoencoderDC.from_pretrained(self.store.autoencoder, torch_dtype=torch.float32).to(self.device)
        return encoded.embeds.to(self.device), encoded.mask.to(self.device), autoencoder

    def preview(self) -> Image.Image:
        """The preview prompts, drawn with guidance 3 in 20 steps from a fixed seed."""
        embeds, mask, autoencoder = self._viewing
        count = len(PREVIEW_PROMPTS)
        null = F.pad(self._null, (0, 0, 0, embeds.shape[1] - 1)).expand(count, -1, -1)
        texts = torch.cat([null, embeds])
        masks = torch.cat([F.pad(torch.ones(count, 1, dtype=mask.dtype), (0, mask.shape[1] - 1)).to(mask.device), mask])
        grid = flow_dpm_grid(20, self.settings.shift)

        def velocity(x: Tensor, i: int) -> Tensor:
            times = grid.timesteps[i].to(self.device, torch.float32).expand(2 * count)
            both: Tensor = self.module.transformer(torch.cat([x, x]), texts, times, encoder_attention_mask=masks)[0]
            unconditional, conditional = both.float().chunk(2)
            return combine(unconditional, conditional, 3.0)

        x = torch.randn((count, *self.features.latents.shape[1:]), generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        for step in flow_dpm(velocity, x, grid):
            x = step.latents
        pictures = autoencoder.decode(x / autoencoder.config.scaling_factor).sample
        rows = pictures.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).view(2, count // 2, *pictures.shape[1:])
        return Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).cpu().numpy())

    def export(self, folder: Path) -> None:
        """Write a whole pipeline in half precision: the transformer with the encoders it was trained under."""
        from sana.checkpoints.autoencoder import AutoencoderDC
        from sana.checkpoints.pretrained import SanaTransformer2DModel

        finished = SanaTransformer2DModel.from_config(self.module.transformer.config)
        finished.load_state_dict(self.module.transformer.state_dict())
        tokenizer, text_encoder = load_text(self.store.text)
        parts = {
            "scheduler": DPMSolverMultistepScheduler(flow_shift=self.settings.shift),
            "text_encoder": text_encoder.half(),
            "tokenizer": tokenizer,
            "transformer": finished.half(),
            "vae": AutoencoderDC.from_pretrained(self.store.autoencoder, torch_dtype=torch.float16),
        }
        save_parts(folder, parts, notes={CARD_KEY: self.settings.card} if self.settings.card else None)
        # The library adds facts of this machine to the file; the one that was trained with says all.
        shutil.copy(self.store.text / "tokenizer" / "tokenizer_config.json", folder / "tokenizer")
