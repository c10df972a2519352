"""Flow matching of a linear DiT: from nothing or from a model, all of it or a part beside it, on any data.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width.

Loss: the mean square of v(x_sigma, 1000 sigma, text) - (noise - x0), with x_sigma = (1 - sigma) x0 + sigma noise
and sigma drawn by `flow.density` (arXiv 2410.10629, section 2; Lipman et al. 2023). In the drawn world a read-out of a
middle block must name the kind and colour under every latent cell (representation alignment, Yu et al. 2024, with the
world's own labels): it tells the network early which words belong where, and is thrown away.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sana.config import TransformerConfig
from sana.data import cutouts
from sana.data.cutout_shapes import KINDS
from sana.data.identity import Content
from sana.errors import InvalidInput
from sana.flow.density import NoiseLevels, loss_weights, sample_levels, sample_sigmas
from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch, generator_of
from sana.training.config import RunSettings, called
from sana.training.objectives.base import MAIN, Check, trainable, unasked
from sana.training.objectives.flow_settings import FlowMatchingSettings, check_carried
from sana.training.origins import ModelOrigin, Origin, ScratchOrigin
from sana.training.previews import PreviewSheet
from sana.training.trainables import FullTrainable, Trainable

HELD_OUT_SIGMAS = (0.5, 0.7, 0.85, 0.95)
LABELS = (len(KINDS) + 1, len(cutouts.COLOURS) + 1)


class _Trained(nn.Module):
    """The transformer and the read-out that training throws away."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = LinearDiT(config)
        self.label_head = nn.Linear(config.inner_dim, sum(LABELS))


class FlowMatchingObjective:
    """Velocity prediction under captions."""

    name = "flow_matching"
    turns = MAIN
    better: Literal["lower", "higher"] = "lower"

    def __init__(
        self,
        settings: FlowMatchingSettings,
        run: RunSettings,
        device: torch.device,
        opened: type[ModelOrigin] = ModelOrigin,
    ) -> None:
        """Load or build the transformer and open the data; features that the recipe names are computed first.

        `opened` is what a model and its data are opened as.
        """
        self.settings, self.run, self.device = settings, run, device
        self._middle: Tensor | None = None
        self._sheet: PreviewSheet | None = None
        self.origin: Origin
        self.trainable: Trainable
        self.module: nn.Module
        self.frozen: tuple[nn.Module, ...] = ()
        """What gradients pass through although it does not learn, outside of `module`."""
        if settings.start:
            self.origin = origin = opened(settings, run, device)
            self.trainable = origin.trainable()
            self.module = self.trainable.module
            self.frozen = () if settings.train == "full" else (self.trainable.transformer,)
        else:
            self.origin = ScratchOrigin(settings, run, device)
            self.module = trained = self._build()
            self.trainable = FullTrainable(trained.transformer)
        if run.compile:
            for block in self.trainable.transformer.transformer_blocks:
                block.compile()
        # Models with a time of their own scale, such as SANA-Sprint's teachers, are told it without truncation.
        self._dense = self.trainable.transformer.config.timestep_scale != 1

    def _build(self) -> _Trained:
        settings, seed = self.settings, self.run.seed
        torch.manual_seed(seed)
        with called("Transformer", "flow_matching.model"):
            config = TransformerConfig.from_dict(settings.model)
        check_carried(settings.card, config, "flow_matching")
        if not 1 <= settings.label_block <= config.num_layers:
            told = f"flow_matching.label_block is {settings.label_block}"
            raise InvalidInput(f"{told}; the model has {config.num_layers} blocks.")
        trained = _Trained(config).to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        trained.transformer.init_weights(generator, caption_norm_scale=settings.caption_gain, zero_output=True)
        trained.transformer.transformer_blocks[settings.label_block - 1].register_forward_hook(self._keep_middle)
        return trained

    def _keep_middle(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._middle = output

    @property
    def data(self) -> Mapping[str, Content]:
        """The pictures, and those of the prior."""
        return self.origin.content

    def parameters_of(self, turn: str) -> Sequence[tuple[str, nn.Parameter]]:
        """Everything that learns."""
        return trainable(self.module)

    def _levels(self, count: int, generator: torch.Generator) -> NoiseLevels:
        """Noise levels, and the times that belong to them before the transformer's own factor."""
        settings = self.settings
        options: dict[str, Any] = {
            "density": settings.density,
            "mean": settings.logit_mean,
            "std": settings.logit_std,
        }
        shift = self.origin.shift
        if self._dense:
            sigmas = sample_sigmas(count, shift, generator, **options)
            return NoiseLevels(sigmas=sigmas, timesteps=1000 * sigmas)
        return sample_levels(count, shift, generator, **options)

    def _errors(self, batch: Batch, noise: Tensor, levels: NoiseLevels) -> Tensor:
        """Mean square error of the velocity per sample [B]."""
        sigma = levels.sigmas.view(-1, 1, 1, 1).to(self.device)
        x = (1 - sigma) * batch.latents + sigma * noise
        told = levels.timesteps.to(self.device, torch.float32) * self.trainable.transformer.config.timestep_scale
        predicted = self.trainable.velocity(x, batch, told)
        return (predicted.float() - (noise - batch.latents)).square().mean((1, 2, 3))

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw`."""
        generator = generator_of(self.run.seed, draw)
        batch = self.origin.batches.batch(draw, generator)
        levels = self._levels(len(batch.latents), generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(self.device)
        each = self._errors(batch, noise, levels)
        if self.settings.weighting != "none":
            each = each * loss_weights(self.settings.weighting, levels.sigmas, self.settings.snr_gamma).to(each)
        velocity = (each if batch.weights is None else each * batch.weights).mean()
        if self._middle is None:
            return velocity, {"velocity": velocity.detach()}
        assert batch.labels is not None
        scores = self.module.label_head(self._middle).float()  # type: ignore[operator]
        labels = batch.labels.flatten(2)
        kinds, colours = scores.split(LABELS, dim=2)
        reading = F.cross_entropy(kinds.flatten(0, 1), labels[:, 0].flatten()) + F.cross_entropy(
            colours.flatten(0, 1), labels[:, 1].flatten()
        )
        total = velocity + self.settings.label_weight * reading
        return total, {"velocity": velocity.detach(), "labels": reading.detach()}

    @torch.no_grad()
    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        """Velocity loss at fixed levels on samples kept apart, with the right captions and with captions of others.

        The gap between the two is the cheapest sign that the text is read; where a single sample is kept, there is
        none.
        """
        matched, misread, count, generator = 0.0, 0.0, 0, torch.Generator().manual_seed(1)
        lone = False
        for batch in self.origin.batches.held_out():
            check()
            size = len(batch.latents)
            noise = torch.randn(batch.latents.shape, generator=generator).to(self.device)
            levels = _spread(HELD_OUT_SIGMAS, size)
            matched += float(self._errors(batch, noise, levels).sum())
            misread += float(self._errors(batch.misread(), noise, levels).sum())
            count, lone = count + size, lone or size == 1
        if not count:
            return {}
        figures = {"matched": matched / count}
        return figures if lone else {**figures, "gap": (misread - matched) / count}

    def preview(self, check: Check = unasked) -> Image.Image | None:
        """The preview prompts, drawn in 20 steps from a fixed seed."""
        if self._sheet is None:
            self._sheet = PreviewSheet(self.origin, self.settings.preview_guidance)
        return self._sheet.draw(self.trainable, check)

    def export(self, folder: Path) -> None:
        """Write what was trained, as the loaders read it."""
        self.origin.write(self.trainable, folder)


def _spread(sigmas: Sequence[float], count: int) -> NoiseLevels:
    """Return the fixed levels for `count` samples: in equal shares where that is possible, else in turn."""
    each = torch.tensor(sigmas)
    chosen = each.repeat_interleave(count // len(each)) if count % len(each) == 0 else each.repeat(count)[:count]
    return NoiseLevels(sigmas=chosen, timesteps=(1000 * chosen).long())
