"""`AutoPipelineForText2Image`: the pipeline class that a model folder names."""

from pathlib import Path
from typing import Any

from sana.checkpoints import hub
from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.engine.request import shown
from sana.errors import CheckpointError, InvalidInput
from sana.pipelines.base import Pipeline
from sana.pipelines.controlnet import SanaControlNetPipeline
from sana.pipelines.drawing import DrawingPipeline
from sana.pipelines.pag import SanaPAGPipeline
from sana.pipelines.sprint import SanaSprintPipeline
from sana.pipelines.text_to_image import SanaPipeline

_FINDING = ("revision", "cache_dir", "local_files_only", "token")


class AutoPipelineForText2Image:
    """Makes the text-to-image pipeline that suits a model; it has no instances of its own."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        enable_pag: bool | None = None,
        **options: Any,
    ) -> DrawingPipeline:
        """Load a model into a pipeline of the class that its `model_index.json` names.

        Args:
            enable_pag: True takes `SanaPAGPipeline` for a model of `SanaPipeline`, False the other way round.
            options: as `SanaPipeline.from_pretrained`; a `controlnet` makes it a `SanaControlNetPipeline`.

        Raises:
            CheckpointError: the folder names a class that is none of SANA's.
            InvalidInput: there is no class with perturbed-attention guidance for this model.
            ModelNotFound: there is no such model.
        """
        finding = {name: options[name] for name in _FINDING if name in options}
        located = hub.locate(pretrained_model_name_or_path, parts=("scheduler",), single=True, **finding)
        if located.file is None:
            name = read_json(located.folder / MODEL_INDEX).get("_class_name")
        else:
            product = located.card.product if located.card is not None else "sana"
            name = {"sprint": "SanaSprintPipeline", "controlnet": "SanaControlNetPipeline"}.get(product, "SanaPipeline")
        if name not in CLASSES:
            raise CheckpointError(
                f"{MODEL_INDEX} names the class {shown(name)}, which is none of SANA's. Known: {', '.join(CLASSES)}."
            )
        chosen = SanaControlNetPipeline if options.get("controlnet") is not None else CLASSES[name]
        return _with_pag(chosen, enable_pag).from_pretrained(pretrained_model_name_or_path, **options)

    @staticmethod
    def from_pipe(pipeline: Pipeline, *, enable_pag: bool | None = None, **options: Any) -> DrawingPipeline:
        """Return a text-to-image pipeline with the parts of another; arguments as `from_pretrained`, errors as there.

        Further options are those of `SanaPipeline.from_pipe`.
        """
        name = type(pipeline).__name__
        if name not in CLASSES:
            raise InvalidInput(f"from_pipe needs a pipeline of sana, not a {name}. Load one first.")
        chosen = SanaControlNetPipeline if options.get("controlnet") is not None else CLASSES[name]
        return _with_pag(chosen, enable_pag).from_pipe(pipeline, **options)


def _with_pag(chosen: type[DrawingPipeline], enable_pag: bool | None) -> type[DrawingPipeline]:
    if enable_pag and chosen is not SanaPAGPipeline:
        if chosen is not SanaPipeline:
            raise InvalidInput(
                f"{chosen.__name__} has no PAG, and no class with PAG runs its models. Leave `enable_pag` out."
            )
        return SanaPAGPipeline
    return SanaPipeline if chosen is SanaPAGPipeline and enable_pag is False else chosen


CLASSES: dict[str, type[DrawingPipeline]] = {
    "SanaPipeline": SanaPipeline,
    "SanaPAGPipeline": SanaPAGPipeline,
    "SanaControlNetPipeline": SanaControlNetPipeline,
    "SanaSprintPipeline": SanaSprintPipeline,
    "SanaSprintImg2ImgPipeline": SanaSprintPipeline,
}
"""The class that draws from a text alone, for each class that a folder may name."""
