"""What a pipeline returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from sana.models.outputs import ModelOutput


@dataclass
class ImagePipelineOutput(ModelOutput):
    """Pictures of a pipeline; reads by attribute, by name, by position and like the tuple of `return_dict=False`."""

    images: "list[Image] | np.ndarray[Any, np.dtype[np.float32]] | Tensor"
    """A list ("pil"), an array [B, H, W, 3] ("np"), or a tensor: [B, 3, H, W] ("pt") or [B, C, h, w] ("latent")."""


@dataclass
class SanaPipelineOutput(ImagePipelineOutput):
    """The same, under the name that all pipelines but `SanaPAGPipeline` return it by."""
