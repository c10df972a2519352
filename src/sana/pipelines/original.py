"""The pipelines of the original SANA code, for people who come from there: a YAML, then a `.pth`, then a tensor.

    from sana.pipelines.original import SanaPipeline, save_image

    sana = SanaPipeline("configs/sana_config/1024ms/Sana_1600M_img1024.yaml")
    sana.from_pretrained("hf://Efficient-Large-Model/Sana_1600M_1024px_BF16/checkpoints/Sana_1600M_1024px_BF16.pth")
    image = sana(prompt="a cyberpunk cat", height=1024, width=1024, pag_guidance_scale=2.0)
    save_image(image, "output/sana.png", nrow=1, normalize=True, value_range=(-1, 1))

They are thin faces of this package's own pipelines and so of its one loop, and give its numbers. Where the original
differs, it is not followed: its instruction has double quotes around two words where the published folders have single
ones; it reads the negative prompt under the prompt's mask; of several prompts it returns the first picture only. What
is followed: the shift of the YAML, and that perturbed-attention guidance acts above 1.

Shapes: B prompts, n images per prompt, H W pixels.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sana.checkpoints import hub
from sana.checkpoints.folder import DtypeChoice
from sana.checkpoints.original.architecture import KNOWN_BY_CARD
from sana.checkpoints.original.examine import Original, examine
from sana.checkpoints.original.loading import base_folder, load_examined
from sana.checkpoints.original.settings import OriginalConfig, read_original_config
from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from sana.engine.parts import Parts, load, recommended_dtypes
from sana.engine.placement import pick_device
from sana.errors import CheckpointError, InvalidInput
from sana.pipelines.base import Pipeline
from sana.pipelines.pag import SanaPAGPipeline
from sana.pipelines.sprint import SanaSprintPipeline as SprintPipeline
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

_log = logging.getLogger(__name__)


class _Facade:
    """What both faces share: settings from a YAML, weights from a file."""

    product: ClassVar[type[Pipeline]]
    guidance_embeds: ClassVar[bool]

    def __init__(
        self,
        config: str | Path,
        *,
        base: str | Path | None = None,
        device: torch.device | str = "auto",
        dtype: DtypeChoice = "card",
    ) -> None:
        """Read the settings; nothing is loaded or downloaded yet.

        Args:
            config: a YAML file of the original code; of a published one its name will do.
            base: model whose text encoder and autoencoder are used; left out, those that belong to the weights.
            device: "auto" takes a GPU if there is one.
            dtype: precision of the parts; "card" takes what suits model and device.

        Raises:
            ModelNotFound: there is no such file.
            CheckpointError: it is no configuration of an image model.
            InvalidInput: it is that of another kind of model.
        """
        self.config: OriginalConfig = read_original_config(config)
        if self.config.transformer.guidance_embeds != self.guidance_embeds:
            other = "SanaPipeline" if self.guidance_embeds else "SanaSprintPipeline"
            raise InvalidInput(f"'{config}' describes a model for {other}; use that.")
        for remark in self.config.remarks:
            _log.warning("%s: %s", config, remark)
        self.base, self.device, self.dtype = base, pick_device(device), dtype
        self.pipe: Any = None
        """The pipeline that draws, once weights are loaded."""

    def from_pretrained(
        self,
        model_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        """Load the weights: `hf://organisation/repository/path/file.pth`, of which that file alone is fetched, a path
        to a `.pth` or `.safetensors`, a folder, a hub id or a short name.

        Raises:
            ModelNotFound: the weights, or the parts beside them, are neither here nor to be had.
            CheckpointError: they are damaged, or not those of the configuration.
        """
        where: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        located = hub.locate(model_path, revision=revision, single=True, **where)
        if located.file is None:
            parts = load(model_path, device=self.device, dtype=self.dtype, revision=revision, **where)
        else:
            open_fields = {name: getattr(self.config.transformer, name) for name in KNOWN_BY_CARD}
            try:
                found = examine(located.file, name=located.name, card=located.card, told=open_fields)
            except CheckpointError:  # by itself the file may say what is wrong: it is another model
                found = examine(located.file, name=located.name, card=located.card)
            if "transformer" not in found.models:
                raise CheckpointError(f"{model_path} holds an autoencoder, not the weights of SANA.")
            self._check_model(model_path, found.models["transformer"].config)
            parts = self._assembled(found, base_folder(located), where)
        self._check_model(model_path, parts.transformer.config)
        parts.scheduler = self._scheduler()
        self.pipe = self.product(**parts.components)
        self.pipe.parts = parts

    def _check_model(self, model_path: str | Path, found: Any) -> None:
        """Refuse weights of another model, before anything of them is built; errors as `from_pretrained`."""
        here, there = found.to_dict(), self.config.transformer.to_dict()
        wrong = next((name for name in there if here.get(name) != there[name]), None)
        if wrong is not None:
            reason = f"its {wrong} is {here.get(wrong)}, there it is {there[wrong]}"
            raise CheckpointError(f"{model_path} is not the model of the configuration: {reason}. Use its own YAML.")

    def _assembled(self, found: Original, folder: Path | None, where: dict[str, Any]) -> Parts:
        """Return the weights of a file with the parts of a folder around it, or of the published model."""
        card = self.config.card()
        dtypes = recommended_dtypes(found.card or card, self.device) if self.dtype == "card" else self.dtype
        single = load_examined(found, dtype=dtypes, device=self.device)
        others = self.base or folder or (found.base.name if found.base else card.home)
        return load(others, device=self.device, dtype=dtypes, transformer=single.transformer, **where)

    def _scheduler(self) -> Any:
        shift = self.config.flow_shift
        if self.config.sampler == "scm":
            return SCMScheduler()
        if self.config.sampler == "flow-euler":
            return FlowMatchEulerDiscreteScheduler(shift=shift)
        return DPMSolverMultistepScheduler(flow_shift=shift)

    def _instruction(self) -> Sequence[str] | None:
        """Return the lines of the YAML; for the published ones, whose quotes differ, those of the folders."""
        lines = self.config.instruction
        if lines is not None and [line.replace('"', "'") for line in lines] == list(COMPLEX_HUMAN_INSTRUCTION):
            return COMPLEX_HUMAN_INSTRUCTION
        return lines

    def _drawn(self, prompt: str | list[str], **arguments: Any) -> Tensor:
        if self.pipe is None:
            raise InvalidInput("No weights are loaded yet. Call from_pretrained on this pipeline first.")
        if isinstance(prompt, tuple):  # the documented Sprint example has a comma too many
            prompt = list(prompt)
        result = self.pipe(
            prompt=prompt,
            output_type="pt",
            max_sequence_length=self.config.max_length,
            complex_human_instruction=self._instruction(),
            **arguments,
        )
        images: Tensor = result.images
        return images.float() * 2 - 1


class SanaPipeline(_Facade):
    """Text to image, `app.sana_pipeline.SanaPipeline` of the original code."""

    product = SanaPAGPipeline
    guidance_embeds = False

    def from_pretrained(self, model_path: str | Path, **options: Any) -> None:
        """Load the weights; arguments and errors as described for both pipelines."""
        super().from_pretrained(model_path, **options)
        self.pipe.set_pag_applied_layers(list(self.config.pag_layers or self.config.card().pag_layers))

    def __call__(
        self,
        prompt: str | list[str],
        height: int = 1024,
        width: int = 1024,
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        pag_guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        use_resolution_binning: bool = True,
    ) -> Tensor:
        """Draw pictures as a tensor [B n, 3, H, W] in -1..1; perturbed-attention guidance acts above 1.

        Raises:
            InvalidInput: no weights are loaded, or an argument is impossible.
        """
        return self._drawn(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            pag_scale=pag_guidance_scale if pag_guidance_scale > 1 else 0.0,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            use_resolution_binning=use_resolution_binning,
        )


class SanaSprintPipeline(_Facade):
    """One to four steps, `app.sana_sprint_pipeline.SanaSprintPipeline` of the original code."""

    product = SprintPipeline
    guidance_embeds = True

    def __call__(
        self,
        prompt: str | list[str],
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 2,
        guidance_scale: float = 4.5,
        max_timesteps: float | None = 1.57080,
        intermediate_timesteps: float | None = 1.3,
        timesteps: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        use_resolution_binning: bool = True,
    ) -> Tensor:
        """Draw pictures as a tensor [B n, 3, H, W] in -1..1; errors as `SanaPipeline`."""
        return self._drawn(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_timesteps=max_timesteps,
            intermediate_timesteps=intermediate_timesteps,
            timesteps=timesteps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            use_resolution_binning=use_resolution_binning,
        )


def save_image(
    tensor: Tensor,
    fp: str | Path,
    nrow: int = 8,
    padding: int = 2,
    normalize: bool = False,
    value_range: tuple[float, float] | None = None,
) -> None:
    """Save pictures [n, 3, H, W] or one [3, H, W] as one file, in rows of `nrow`, as `torchvision.utils.save_image`.

    `normalize` maps `value_range`, or else the values' own range, to 0..1. The folder is made if it is not there.
    Errors: InvalidInput for a tensor that is no picture, and for no pictures in a row.
    """
    from PIL import Image

    batch = tensor[None] if tensor.ndim == 3 else tensor
    if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
        raise InvalidInput(f"A picture has the shape [3, H, W] or [n, 3, H, W], not {list(tensor.shape)}.")
    if nrow < 1 or padding < 0:
        raise InvalidInput(f"nrow is {nrow} and padding {padding}; they must be at least 1 and 0.")
    batch = batch.detach().float().cpu()
    if not bool(batch.isfinite().all()):
        raise InvalidInput("The picture holds NaN or infinity. Draw it again, in float32 or bfloat16.")
    if normalize:
        low, high = value_range or (float(batch.min()), float(batch.max()))
        batch = (batch.clamp(low, high) - low) / max(high - low, 1e-5)
    columns = min(nrow, len(batch))
    rows, (height, width) = math.ceil(len(batch) / columns), batch.shape[-2:]
    gap = padding if len(batch) > 1 else 0
    sheet = torch.zeros(3, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for index, picture in enumerate(batch):
        top, left = (gap + (size + gap) * at for at, size in zip(divmod(index, columns), (height, width), strict=True))
        sheet[:, top : top + height, left : left + width] = picture
    Path(fp).parent.mkdir(parents=True, exist_ok=True)
    pixels = sheet.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(fp)
