"""Depth of a picture by a network of transformers.

Shapes: H W pixels, h w what the network is given.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sana.checkpoints.text_parts import no_progress_bars
from sana.errors import CheckpointError, ModelNotFound

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
"""24.8 million parameters, Apache 2.0; bright is near, as control networks have it."""
SHORT_SIDE = 518
"""Pixels of the short side that the network was trained on."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_depth(model: str | Path | None = None, *, local_files_only: bool = False) -> Any:
    """Return a depth network: the usual one, or that of a folder or hub id, downloaded on first use.

    Raises:
        ModelNotFound: it is neither here nor to be had.
        CheckpointError: it is of another kind.
    """
    from transformers import AutoModelForDepthEstimation

    name = str(model or DEPTH_MODEL)
    try:
        with no_progress_bars():
            network = AutoModelForDepthEstimation.from_pretrained(
                name, local_files_only=local_files_only, use_safetensors=True, dtype=torch.float32
            )
    except OSError as error:
        raise ModelNotFound(
            f"The kind 'depth' needs the model {name}, which is neither here nor to be had. Go online once, or give a"
            " finished depth picture with the kind 'map'."
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} is no depth model that transformers can load. Name another one.") from error
    return network.eval()


@torch.no_grad()
def estimate(network: Any, pixels_HW3: NDArray[np.uint8], short_side: int = SHORT_SIDE) -> NDArray[np.float32]:
    """Return the depth of a picture, [H, W, 3] from 0 to 255 -> [H, W] from 0, farthest, to 1, nearest."""
    config = network.config
    step = int(getattr(getattr(config, "backbone_config", None) or config, "patch_size", None) or 32)
    height, width = pixels_HW3.shape[:2]
    factor = short_side / min(height, width)
    size = [max(step, round(side * factor / step) * step) for side in (height, width)]
    picture = torch.from_numpy(pixels_HW3.copy()).permute(2, 0, 1)[None].float() / 255
    picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    found = network(pixel_values=(picture - mean) / deviation).predicted_depth[:, None]
    found = F.interpolate(found, size=(height, width), mode="bicubic", align_corners=False)[0, 0]
    low, high = found.min(), found.max()
    depth: NDArray[np.float32] = ((found - low) / (high - low).clamp_min(1e-6)).numpy()
    return depth
