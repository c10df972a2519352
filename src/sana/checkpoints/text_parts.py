"""Tokenizer and text encoder: classes of transformers, but found, read, checked and saved like the other parts.

Only classes named here are ever loaded, from local files and without code from the folder. Of the encoder, transformers
never sees the folder: it would also follow adapters, pickled shards and hub names that lie there. transformers is
imported when it is needed.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.checkpoints.bounds import check_config, check_no_code
from sana.checkpoints.foreign import first_line
from sana.checkpoints.layout import Weights, find_weights, part_of, read_json
from sana.checkpoints.origins import remember
from sana.checkpoints.storage import Leftovers, write_json
from sana.checkpoints.weights import (
    Stored,
    as_read,
    check_names,
    inspect,
    on_meta,
    outdated,
    read_state,
    write_weights,
)
from sana.errors import CheckpointError, ModelNotFound
from sana.memory.quantize import Reading, entry, prepare, refuse_quantized, split
from sana.memory.quantize_configs import ENTRY

TEXT_ENCODERS = ("Gemma2Model", "Gemma2ForCausalLM")
TOKENIZERS = ("GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "AutoTokenizer")

MAX_TOKENIZER = 1 << 27
"""Bytes of the largest file of a tokenizer; Gemma's has a quarter of it."""

_HEAD = "lm_head.weight"
_BASE = "model."
"""What the names of the encoder's tensors begin with in a model that also has a head."""


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Load a tokenizer.

    Errors: CheckpointError naming the folder; the cause is what transformers raised.
    """
    import transformers

    config = folder / part_of("tokenizer").config
    check_no_code(read_json(config), config)
    vocabulary = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not vocabulary:
        text = f"There is no tokenizer.json in {folder}, so there are no words"
        raise ModelNotFound(f"{text}: download or copy the folder again.")
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size > MAX_TOKENIZER:
            text = f"{path} has more than {MAX_TOKENIZER >> 20} MB, which no tokenizer's has"
            raise CheckpointError(f"{text}: do not use this model.")
    name = "AutoTokenizer" if class_name in ("PreTrainedTokenizerFast", "TokenizersBackend") else class_name
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the foreign library raises for bad files
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded ({first_line(error)}).") from error


def check_vocabulary(tokenizer: Any, text_encoder: Any, folder: Path) -> None:
    """Refuse a tokenizer whose words the text encoder does not have, or far too few of them.

    Errors: CheckpointError with both numbers.
    """
    words, rows = len(tokenizer), text_encoder.get_input_embeddings().weight.shape[0]
    if words > rows or words < rows - max(1024, rows // 8):  # tables are padded, but not by that much
        text = f"The tokenizer in {folder} has {words} tokens and the text encoder {rows}"
        raise CheckpointError(f"{text}: they belong to different models, copy both from the same one.")


def load_text_encoder(
    folder: Path,
    class_name: str,
    *,
    dtype: torch.dtype,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    device: torch.device | str = "cpu",
    quantization: Any = None,
) -> Any:
    """Load a text encoder strictly, in evaluation mode; `quantization` and the device "meta" as in `load_into`.

    Errors: ModelNotFound and CheckpointError as for our own models: no file, damaged file, missing, unexpected,
    misshapen or non-finite tensors, a configuration that asks for code or absurd sizes.
    """
    import transformers

    stored_as, values = split(read_json(folder / "config.json"))
    weights = find_weights(folder, part_of("text_encoder"), variant, use_safetensors)
    stored = inspect(weights)
    check_config(values, folder / "config.json", num_tensors=len(stored))
    model_class = getattr(transformers, class_name)
    try:
        config = model_class.config_class(**_known_fields(values, model_class.config_class))
        with on_meta():
            skeleton = model_class(config)
    except Exception as error:  # whatever the foreign library raises for bad values
        text = f"{folder / 'config.json'} describes no text encoder that can be built ({first_line(error)})"
        raise CheckpointError(f"{text}: copy the folder again.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    renamed = {name: _renamed(name, shapes) for name in stored}
    if stored_as is not None:
        prepare(skeleton, {renamed[name]: one.dtype for name, one in stored.items()}, stored_as)
        if quantization is not None:
            refuse_quantized(skeleton)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings and _HEAD not in stored:
        expected.pop(_HEAD, None)  # it is the table of the embeddings once more
    check_names(expected, {renamed[name]: entry for name, entry in stored.items()}, str(folder))
    files = {name: stored_name for stored_name, name in renamed.items() if name != stored_name}
    if quantization is not None or stored_as is not None or torch.device(device).type == "meta":
        known = {renamed[name]: entry for name, entry in stored.items()}
        where: dict[str, Any] = {"dtype": dtype, "device": device, "files": files}
        return _assembled(skeleton, config, weights, known, quantization=quantization, **where)
    state = {renamed[name]: tensor for name, tensor in read_state(weights, dtype=dtype, device=device).items()}
    with no_progress_bars():
        model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    remember(model, weights, dtype, files=files)
    return model.to(device).eval()


def _assembled(
    model: Any,
    config: Any,
    weights: Weights,
    stored: Mapping[str, Stored],
    *,
    quantization: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    files: Mapping[str, str],
) -> Any:
    """Fill a model built on the meta device without the help of transformers, which reads plain tensors only."""
    reading = None if quantization is None else Reading(model, quantization, dtype, device)
    if torch.device(device).type == "meta":
        if reading is not None:
            reading.skeleton()
        as_read(model, stored, dtype)
        constants_at: torch.device | str = "cpu"
    else:
        back = {name: file for file, name in files.items()}

        def take(name: str, tensor: Tensor) -> bool:
            return reading is not None and reading.take(back.get(name, name), tensor)

        found = read_state(weights, dtype=dtype, device=device, take=take)
        state = {back.get(name, name): tensor for name, tensor in found.items()}
        model.load_state_dict(state, assign=True, strict=False)  # the names have been compared
        constants_at = device
    _give_constants(model, config, constants_at)
    model.tie_weights()
    if reading is None:
        remember(model, weights, dtype, files=files)
    else:
        reading.done()
        remember(model, weights, dtype, files=files, quantization=reading.config, targets=reading.targets)
    return model.eval()


def _give_constants(model: Any, config: Any, device: torch.device | str) -> None:
    """Give a model built on the meta device the constants that no file holds, from a small one of its kind."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.intermediate_size, small.pad_token_id = 1, 8, 8, 0
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    constants = dict(type(model)(small).named_buffers())
    for name, buffer in tuple(model.named_buffers()):
        if buffer.is_meta and name in constants:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = constants[name].to(device)


def write_text_encoder(model: Any, stage: Path, folder: Path, **options: Any) -> Leftovers:
    """Write a model of `TEXT_ENCODERS` into `stage`; return what tells which files of `folder` it makes useless.

    `options` are those of `write_weights`; the format is always safetensors.
    """
    quantized = entry(model)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(stage)
    if quantized is not None:
        write_json(stage / "config.json", {**read_json(stage / "config.json"), ENTRY: quantized})
    if model.can_generate():
        model.generation_config.save_pretrained(stage)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop(_HEAD, None)
    part = part_of("text_encoder")
    written = write_weights(state, stage, part, **options)
    return partial(outdated, folder, part, options.get("variant"), "safetensors", written)


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


def _known_fields(values: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Return the fields that describe the architecture; others could name kernels, adapters or files elsewhere."""
    known = config_class().to_dict()
    names = {*known, "torch_dtype", "architectures", "head_dim", "rope_theta", "rope_scaling"}
    return {name: value for name, value in values.items() if name in names and not name.startswith("_")}


def _renamed(name: str, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name that a tensor has in the wanted class; files of the class with and without a head differ."""
    if name in expected:
        return name
    other = name.removeprefix(_BASE) if name.startswith(_BASE) else _BASE + name
    return other if other in expected else name
