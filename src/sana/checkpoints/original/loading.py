"""Original files as models: the `.pth` of the original code, and its safetensors form, without a folder around them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana.cards import Card
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.hub import Located
from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.checkpoints.original.examine import Original, examine
from sana.checkpoints.pretrained import SanaTransformer2DModel, as_dtype
from sana.checkpoints.references import card_of_file
from sana.checkpoints.single import SINGLE_FILES, open_single


@dataclass(frozen=True, kw_only=True)
class SingleModel:
    """What a file held, and what belongs to it."""

    transformer: SanaTransformer2DModel | None = None
    controlnet: SanaControlNetModel | None = None
    vae: AutoencoderDC | None = None
    card: Card | None = None
    """The card of the model, None for weights of unknown origin."""
    base: Card | None = None
    """The card whose folder supplies the other parts, None where no published model has this architecture."""
    assumed: tuple[str, ...] = ()
    """What neither the file nor the caller told; it has been logged as a warning."""

    @property
    def parts(self) -> dict[str, Any]:
        """The models that were in the file, by part name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}


def load_single_file(
    path: str | Path,
    *,
    name: str | None = None,
    card: Card | None = None,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
    device: torch.device | str = "cpu",
    ema: bool = False,
    **told: Any,
) -> SingleModel:
    """Load all models of an original file, in evaluation mode.

    `name` is the file's name at its source (an `hf://` reference tells the card), `told` are fields of the transformer
    or autoencoder that its tensors leave open, such as `sample_size`. `dtype`: one for all, or by part name with
    "default"; "auto" is the stored one, None float32. `ema` takes averaged weights.
    Errors: ModelNotFound, CheckpointError and InvalidInput as `examine` and `Original.build`.
    """
    facts = _facts_beside(Path(path)) if card is None and card_of_file(name or str(path)) is None else {}
    found = examine(Path(path), name=name, card=card, averaged=ema, told={**facts, **told})
    return load_examined(found, dtype=dtype, device=device)


def load_examined(
    found: Original,
    *,
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
    device: torch.device | str = "cpu",
) -> SingleModel:
    """Load all models of a file that `examine` looked at; arguments and errors as `load_single_file`."""
    named = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    parts: dict[str, Any] = {}
    for part in found.models:
        wanted = named.get(part, named.get("transformer" if part == "controlnet" else "default", named.get("default")))
        chosen = found.file.dtype if wanted == "auto" else as_dtype(wanted) or torch.float32
        parts[part] = found.build(part, PARTS[part], dtype=chosen, device=device)
    return SingleModel(**parts, card=found.card, base=found.base, assumed=found.assumed)


def base_folder(located: Located) -> Path | None:
    """Return the pipeline folder that a file lies in, at most two levels up, which then supplies the other parts."""
    return _pipeline_around(located.folder)


def _pipeline_around(folder: Path) -> Path | None:
    return next((place for place in (folder, *folder.parents[:2]) if (place / MODEL_INDEX).is_file()), None)


def _facts_beside(path: Path) -> dict[str, Any]:
    """Return what the transformer in the folder around a file tells of one of its own width, and the file does not."""
    folder = _pipeline_around(path.absolute().parent)
    file = folder / "transformer" / "config.json" if folder is not None else None
    if file is None or not file.is_file() or path.suffix.lower() not in SINGLE_FILES or not path.is_file():
        return {}
    config = read_json(file)
    wide = open_single(path).entries.get("x_embedder.proj.weight")
    if wide is None or wide.shape[:1] != (config.get("cross_attention_dim"),):
        return {}
    return {name: config[name] for name in _UNSTORED if name in config}


_UNSTORED = (
    *("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"),
    *("interpolation_scale", "timestep_scale"),
)
"""What no tensor of an original file tells."""

PARTS: dict[str, type[Any]] = {
    "transformer": SanaTransformer2DModel,
    "controlnet": SanaControlNetModel,
    "vae": AutoencoderDC,
}
