"""SANA text-to-image: generate, train and evaluate.

Public names are imported on first use (PEP 562), so that `import sana` costs nothing and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana.checkpoints.autoencoder import AutoencoderDC
    from sana.checkpoints.controlnet import SanaControlNetModel
    from sana.checkpoints.pretrained import SanaTransformer2DModel
    from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
    from sana.engine.generate import generate, generate_images
    from sana.engine.images import load_image, save_png
    from sana.engine.metadata import read_metadata
    from sana.engine.parts import Parts, load
    from sana.engine.request import ControlRequest, LoraRequest, Request, Result
    from sana.memory.quantize_configs import BitsAndBytesConfig, Int8Config, TorchAoConfig
    from sana.pipelines.auto import AutoPipelineForText2Image
    from sana.pipelines.controlnet import SanaControlNetPipeline
    from sana.pipelines.image_to_image import SanaSprintImg2ImgPipeline
    from sana.pipelines.output import ImagePipelineOutput, SanaPipelineOutput
    from sana.pipelines.pag import SanaPAGPipeline
    from sana.pipelines.sprint import SanaSprintPipeline
    from sana.pipelines.text_to_image import SanaPipeline

__version__ = "0.1.0"

__all__ = [
    "AutoPipelineForText2Image",
    "AutoencoderDC",
    "BitsAndBytesConfig",
    "ControlRequest",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "ImagePipelineOutput",
    "Int8Config",
    "LoraRequest",
    "Parts",
    "Request",
    "Result",
    "SCMScheduler",
    "SanaControlNetModel",
    "SanaControlNetPipeline",
    "SanaPAGPipeline",
    "SanaPipeline",
    "SanaPipelineOutput",
    "SanaSprintImg2ImgPipeline",
    "SanaSprintPipeline",
    "SanaTransformer2DModel",
    "TorchAoConfig",
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
    "AutoPipelineForText2Image": "sana.pipelines.auto",
    "AutoencoderDC": "sana.checkpoints.autoencoder",
    "BitsAndBytesConfig": "sana.memory.quantize_configs",
    "ControlRequest": "sana.engine.request",
    "DPMSolverMultistepScheduler": "sana.checkpoints.schedulers",
    "FlowMatchEulerDiscreteScheduler": "sana.checkpoints.schedulers",
    "ImagePipelineOutput": "sana.pipelines.output",
    "Int8Config": "sana.memory.quantize_configs",
    "LoraRequest": "sana.engine.request",
    "Parts": "sana.engine.parts",
    "Request": "sana.engine.request",
    "Result": "sana.engine.request",
    "SCMScheduler": "sana.checkpoints.schedulers",
    "SanaControlNetModel": "sana.checkpoints.controlnet",
    "SanaControlNetPipeline": "sana.pipelines.controlnet",
    "SanaPAGPipeline": "sana.pipelines.pag",
    "SanaPipeline": "sana.pipelines.text_to_image",
    "SanaPipelineOutput": "sana.pipelines.output",
    "SanaSprintImg2ImgPipeline": "sana.pipelines.image_to_image",
    "SanaSprintPipeline": "sana.pipelines.sprint",
    "SanaTransformer2DModel": "sana.checkpoints.pretrained",
    "TorchAoConfig": "sana.memory.quantize_configs",
    "generate": "sana.engine.generate",
    "generate_images": "sana.engine.generate",
    "load": "sana.engine.parts",
    "load_image": "sana.engine.images",
    "read_metadata": "sana.engine.metadata",
    "save_png": "sana.engine.images",
}
