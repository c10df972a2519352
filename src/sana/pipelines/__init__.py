"""The documented pipelines: their signatures, translated into the engine's plan. They hold no loop of their own."""

from sana.pipelines.output import SanaPipelineOutput
from sana.pipelines.text_to_image import SanaPipeline

__all__ = ["SanaPipeline", "SanaPipelineOutput"]
