"""Tokenizer and text encoder: made by transformers, but found, checked and reported like the other parts.

Only classes named here are ever loaded, from local files and without code from the folder. transformers is imported
when it is needed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sana.checkpoints.layout import find_weights, part_of, read_json
from sana.checkpoints.weights import inspect, is_finite
from sana.errors import CheckpointError

TEXT_ENCODERS = ("Gemma2Model", "Gemma2ForCausalLM")
TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer")


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Load a tokenizer.

    Errors: CheckpointError naming the folder; the cause is what transformers raised.
    """
    import transformers

    read_json(folder / part_of("tokenizer").config)
    name = "AutoTokenizer" if class_name in ("PreTrainedTokenizerFast", "TokenizersBackend") else class_name
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the foreign library raises for bad files
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded ({_first_line(error)}).") from error


def load_text_encoder(
    folder: Path,
    class_name: str,
    *,
    dtype: torch.dtype,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a text encoder strictly, in evaluation mode.

    Errors: ModelNotFound and CheckpointError as for our own models: no file, damaged file, missing, unexpected,
    misshapen or non-finite tensors.
    """
    import transformers

    read_json(folder / "config.json")
    weights = find_weights(folder, part_of("text_encoder"), variant, use_safetensors)
    inspect(weights)
    try:
        with no_progress_bars():
            model, info = getattr(transformers, class_name).from_pretrained(
                folder,
                dtype=dtype,
                variant=variant,
                use_safetensors=not weights.files[0].endswith(".bin"),
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the foreign library raises for bad files
        raise CheckpointError(f"The text encoder in {folder} cannot be loaded ({_first_line(error)}).") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for found in sorted(map(str, info[kind])):
            what = kind.removesuffix("_keys").replace("mismatched", "misshapen")
            raise CheckpointError(f"The tensors in {folder} do not fit its config.json: {what}, first '{found}'.")
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"Tensor '{name}' in {folder} holds NaN or infinity when read in {kind}.")
    return model.to(device).eval()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars, which only an application may do."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
