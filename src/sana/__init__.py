"""SANA text-to-image: generate, train and evaluate.

Public names are imported on first use (PEP 562), so that `import sana` costs nothing and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana.checkpoints.pretrained import AutoencoderDC, SanaTransformer2DModel
    from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
    from sana.engine.generate import generate, generate_images
    from sana.engine.images import load_image, save_png
    from sana.engine.metadata import read_metadata
    from sana.engine.parts import Parts, load
    from sana.engine.request import Request, Result
    from sana.pipelines import SanaPipeline, SanaPipelineOutput

__version__ = "0.1.0"

__all__ = [
    "AutoencoderDC",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "Parts",
    "Request",
    "Result",
    "SCMScheduler",
    "SanaPipeline",
    "SanaPipelineOutput",
    "SanaTransformer2DModel",
    "generate",
    "generate_images",
    "load",
    "load_image",
    "read_metadata",
    "save_png",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_HOMES = {
    "AutoencoderDC": "sana.checkpoints.pretrained",
    "DPMSolverMultistepScheduler": "sana.checkpoints.schedulers",
    "FlowMatchEulerDiscreteScheduler": "sana.checkpoints.schedulers",
    "Parts": "sana.engine.parts",
    "Request": "sana.engine.request",
    "Result": "sana.engine.request",
    "SCMScheduler": "sana.checkpoints.schedulers",
    "SanaPipeline": "sana.pipelines",
    "SanaPipelineOutput": "sana.pipelines",
    "SanaTransformer2DModel": "sana.checkpoints.pretrained",
    "generate": "sana.engine.generate",
    "generate_images": "sana.engine.generate",
    "load": "sana.engine.parts",
    "load_image": "sana.engine.images",
    "read_metadata": "sana.engine.metadata",
    "save_png": "sana.engine.images",
}
