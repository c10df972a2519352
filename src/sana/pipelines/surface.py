"""Documented members that scripts touch besides the calls: configuration, places of the parts, picture conversion.

Shapes: P pictures, H W pixels.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sana.checkpoints import hub
from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.engine.images import resize_and_crop, to_pictures
from sana.engine.placement import modules_of
from sana.errors import InvalidInput
from sana.pipelines.base import Pipeline
from sana.pipelines.pictures import COLOURS, ImageInput, as_tensor, read_images

_log = logging.getLogger(__name__)


class PictureProcessor:
    """Pictures to what an autoencoder reads, and what it gives to pictures, as the pipelines do it."""

    def __init__(self, vae_scale_factor: int) -> None:
        self.vae_scale_factor = vae_scale_factor

    def preprocess(self, image: ImageInput, height: int | None = None, width: int | None = None) -> Tensor:
        """Return pictures [P, 3, H, W] from -1 to 1; a side that is not given is the picture's, cut to whole latents.

        Errors: InvalidInput for what is no picture.
        """
        step, own = self.vae_scale_factor, _size_of(image)
        size = (height or own[0] // step * step, width or own[1] // step * step)
        if min(size) < 1:
            raise InvalidInput(f"`image` has no side of {step} pixels. Give `height` and `width`.")
        items: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        tensors = [item for item in items if isinstance(item, Tensor)]
        if tensors and len(tensors) == len(items):  # to the nearest pixel, unlike in the calls
            return read_images("image", F.interpolate(as_tensor("image", tensors), size=size), size, COLOURS)
        return read_images("image", image, size, COLOURS)

    def postprocess(self, image: Tensor, output_type: str = "pil") -> Any:
        """Return decoded images [P, 3, H, W] as "pil", "np" or "pt"; "latent" returns them as they are.

        Errors: InvalidInput for something else, NonFinite for NaN and infinity.
        """
        if not isinstance(image, Tensor):
            raise InvalidInput(
                f"Input for postprocessing is in incorrect format: {type(image)}. We only support pytorch tensor."
            )
        return image if output_type == "latent" else to_pictures(image, output_type)

    @staticmethod
    def classify_height_width_bin(height: int, width: int, ratios: Mapping[str, Sequence[float]]) -> tuple[int, int]:
        """Return the (height, width) whose aspect ratio, which is its key, is nearest."""
        nearest = min(ratios, key=lambda ratio: abs(float(ratio) - height / width))
        return int(ratios[nearest][0]), int(ratios[nearest][1])

    @staticmethod
    def resize_and_crop_tensor(samples: Tensor, new_width: int, new_height: int) -> Tensor:
        """Return images [P, 3, H, W] resized to cover the size, and its centre."""
        return resize_and_crop(samples, new_height, new_width)


class DocumentedPipeline(Pipeline):
    """A pipeline with the documented members that are no call."""

    @property
    def config(self) -> dict[str, tuple[str | None, str | None]]:
        """Library and class of each part, as `model_index.json` names them; our own classes have its library there."""
        told: dict[str, tuple[str | None, str | None]] = {}
        for name, part in self.components.items():
            library = type(part).__module__.partition(".")[0]
            named = ("diffusers" if library == "sana" else library, type(part).__name__)
            told[name] = (None, None) if part is None else named
        return told

    @property
    def name_or_path(self) -> str:
        """What the model is called."""
        return self.parts.name

    @property
    def image_processor(self) -> PictureProcessor:
        """Conversion of pictures for this pipeline's autoencoder."""
        return PictureProcessor(self.vae_scale_factor)

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Where each part is while it is used."""
        placement = self.parts.placement
        found: dict[str, str] = {}
        for name, part in self.components.items():
            for module in modules_of(part):
                weight = next(module.parameters(), None)
                place = weight.device if placement is None and weight is not None else self.device
                found[name] = str(place)
        return found

    def reset_device_map(self) -> None:
        """Bring all parts to the CPU for good."""
        self.disable_offload()
        self.to("cpu")

    def remove_all_hooks(self) -> None:
        """Bring all parts back for good; another name of `disable_offload`."""
        self.disable_offload()

    def maybe_free_model_hooks(self) -> None:
        """Let go of parts that are not in use, if memory is saved; calls do that by themselves."""
        if self.parts.placement is not None:
            with self.parts.placement.using(()):
                pass

    def enable_group_offload(
        self,
        onload_device: torch.device | str = "auto",
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Have single blocks on a device only while they are used; see `enable_sequential_cpu_offload`.

        `options` tune the reference's transfers; here the next block is always read meanwhile.

        Raises:
            InvalidInput: an unknown kind or argument, another place than the CPU for what is away, no such device.
        """
        if offload_type not in ("block_level", "leaf_level"):
            raise InvalidInput(f"`offload_type` is {offload_type!r:.40}. Choose 'block_level' or 'leaf_level'.")
        unknown = sorted(set(options) - set(_GROUP_OPTIONS))
        if unknown:
            raise InvalidInput(f"enable_group_offload has no argument '{unknown[0]}'. Drop it.")
        if torch.device(offload_device).type != "cpu":
            raise InvalidInput("`offload_device` must be the CPU: weights that are away lie in main memory or files.")
        self.enable_sequential_cpu_offload(device=onload_device)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Do nothing, as documented: SANA's attention is linear and has nothing to slice; this is logged."""
        _log.warning("attention slicing has no effect: the attention of SANA needs little memory")

    def disable_attention_slicing(self) -> None:
        """Do nothing: there is no slicing."""

    def register_modules(self, **parts: Any) -> None:
        """Put parts in place of others; None leaves one out.

        Raises:
            InvalidInput: this pipeline has no such part.
        """
        self._check_names("register_modules", parts, ())
        for name, part in parts.items():
            setattr(self, name, part)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **finding: Any) -> dict[str, Any]:
        """Return the `model_index.json` of a model; `finding` and errors as `sana.checkpoints.hub.locate`."""
        located = hub.locate(pretrained_model_name_or_path, parts=("scheduler",), **finding)
        return read_json(located.folder / MODEL_INDEX)

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **finding: Any) -> str:
        """Return the folder of a model, fetching what is missing; `finding` and errors as `load_config`."""
        return str(hub.locate(pretrained_model_name, **finding).folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **saving: Any,
    ) -> str:
        """Save into a repository of the hub, made if there is none, and return the address of the commit.

        `saving` are the options of `save_pretrained`. Errors: CheckpointError if the hub does not take it.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            return hub.upload(Path(folder), repo_id, private=private, token=token, message=commit_message)

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """Return arrays [H, W, 3] or [P, H, W, 3] from 0 to 1 as PIL images."""
        array = np.asarray(images)
        return [
            Image.fromarray((one * 255).round().astype(np.uint8)) for one in (array if array.ndim == 4 else [array])
        ]


def _size_of(image: Any) -> tuple[int, int]:
    """Return (height, width) of the first picture, (0, 0) of what is none."""
    first: Any = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    shape = tuple(getattr(first, "shape", ()))
    sides = shape[-2:] if isinstance(first, Tensor) or len(shape) == 2 else shape[-3:-1]
    return (sides[0], sides[1]) if len(sides) == 2 else (0, 0)


_GROUP_OPTIONS = (
    "num_blocks_per_group",
    "non_blocking",
    "use_stream",
    "record_stream",
    "low_cpu_mem_usage",
)
