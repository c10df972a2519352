"""The documented pipelines: their signatures, translated into the engine's plan. They hold no loop of their own."""

from sana.pipelines.auto import AutoPipelineForText2Image
from sana.pipelines.controlnet import SanaControlNetPipeline
from sana.pipelines.image_to_image import SanaSprintImg2ImgPipeline
from sana.pipelines.output import ImagePipelineOutput, SanaPipelineOutput
from sana.pipelines.pag import SanaPAGPipeline
from sana.pipelines.sprint import SanaSprintPipeline
from sana.pipelines.text_to_image import SanaPipeline

__all__ = [
    "AutoPipelineForText2Image",
    "ImagePipelineOutput",
    "SanaControlNetPipeline",
    "SanaPAGPipeline",
    "SanaPipeline",
    "SanaPipelineOutput",
    "SanaSprintImg2ImgPipeline",
    "SanaSprintPipeline",
]
