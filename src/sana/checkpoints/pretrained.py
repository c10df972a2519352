"""What the public model classes share, loading, saving and a readable configuration; and the transformer's class."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from sana.checkpoints import hub
from sana.checkpoints.bounds import check_config
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.layout import LAYOUT_VERSION, MODEL_INDEX, ROOT, Weights, find_weights, part_of, read_json
from sana.checkpoints.original.examine import examine, examine_tensors
from sana.checkpoints.original.settings import open_fields
from sana.checkpoints.storage import Leftovers, recover, saving, warn_if_open_to_all, write_json
from sana.checkpoints.weights import (
    MAX_SHARD_SIZE,
    Stored,
    inspect,
    load_into,
    on_meta,
    outdated,
    stored_dtype,
    write_weights,
)
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.errors import CheckpointError, InvalidInput, did_you_mean
from sana.memory.quantize import entry, prepare, quantize, refuse_quantized, split
from sana.memory.quantize_configs import ENTRY
from sana.models.linear_dit import LinearDiT

_WITHOUT_EFFECT = ("low_cpu_mem_usage", "disable_mmap")
"""Documented arguments of `from_pretrained` that ask for what is always done here."""

_PART_NAMES = {TransformerConfig: "transformer", AutoencoderConfig: "vae", ControlNetConfig: "controlnet"}
"""Configuration -> what its model is called among the parts of a pipeline."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_log = logging.getLogger(__name__)


class FieldMapping(Mapping[str, Any]):
    """Lets a configuration be read like a dict too: `config["sample_size"]`, `dict(config)`, `"qk_norm" in config`."""

    def __getitem__(self, key: str) -> Any:
        if key not in self._names():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cast(Any, self)))


class TransformerSettings(TransformerConfig, FieldMapping):
    """`SanaTransformer2DModel.config`."""


def as_dtype(value: torch.dtype | str | None, name: str = "torch_dtype") -> torch.dtype | None:
    """Turn a dtype or its name into a dtype; None and "auto" ("as stored") give None.

    Errors: InvalidInput naming the choices.
    """
    if value is None or value == "auto":
        return None
    found = _DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise InvalidInput(f"{name} is {value!r}; choose 'auto' or one of {', '.join(_DTYPES)}.")
    return found


def one_device(device_map: torch.device | str | None) -> torch.device:
    """Return the device that `device_map` names; None is the CPU.

    Errors: InvalidInput for a placement over several devices.
    """
    try:
        return torch.device(device_map or "cpu")
    except RuntimeError as error:
        raise InvalidInput(f"device_map is {device_map!r}; name one device such as 'cpu' or 'cuda:0'.") from error


def reject_unknown(call: str, unknown: Sequence[str], known: Sequence[str]) -> None:
    """Raise InvalidInput for the first argument that `call` does not know."""
    if unknown:
        raise InvalidInput(f"{call} has no argument '{unknown[0]}'.{did_you_mean(unknown[0], known)}")


class PretrainedMixin(nn.Module):
    """From and to folders in the published layout, for a module that is built from a configuration."""

    config_type: ClassVar[type[TransformerConfig] | type[ControlNetConfig] | type[AutoencoderConfig]]
    config: TransformerConfig | ControlNetConfig | AutoencoderConfig

    def __init__(self, **fields: Any) -> None:
        """Build with random weights from the configuration's fields, by keyword; missing ones take their default.

        Errors: InvalidInput for an unknown field, a wrong type or a contradiction.
        """
        names = tuple(field.name for field in dataclasses.fields(self.config_type))
        unknown = [name for name in fields if name not in names and not name.startswith("_")]
        reject_unknown(type(self).__name__, unknown, names)
        config = self.config_type.from_dict(fields)
        super().__init__(config)
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters."""
        return next(tensor.dtype for tensor in self.parameters() if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count the parameters."""
        return sum(tensor.numel() for tensor in self.parameters() if tensor.requires_grad or not only_trainable)

    @classmethod
    def load_config(cls, folder: str | Path, *, subfolder: str | None = None, **where: Any) -> dict[str, Any]:
        """Return the `config.json` of a model as a dict; `where` are the arguments of `from_pretrained`."""
        located = hub.locate(folder, parts=(subfolder or ROOT,), **where)
        return read_json(inside(located.folder, subfolder) / "config.json")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | TransformerConfig | ControlNetConfig | AutoencoderConfig, **changes: Any
    ) -> Self:
        """Build with random weights from a mapping or another model's `.config`; unknown keys warn.

        Errors: InvalidInput naming the field.
        """
        values = config if isinstance(config, Mapping) else config.to_dict()
        known = cls.config_type.from_dict(values)
        return cls(**{**known.to_dict(), **changes})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | torch.device | None = None,
        quantization_config: Any = None,
        **unused: Any,
    ) -> Self:
        """Load from a folder, a short name or a hub id, strictly, in evaluation mode.

        `torch_dtype` (or `dtype`): a dtype or its name, "auto" for the stored one, None for float32. `device_map`: the
        one device to load to. `quantization_config`: "int8", one of the classes of `memory.quantize_configs`, or of
        transformers with the same meaning; the weights are quantised one by one while they are read.
        Errors: ModelNotFound (an OSError) and CheckpointError (a ValueError), naming what is missing or wrong;
        InvalidInput for an unknown argument.
        """
        unknown = [name for name in unused if name not in _WITHOUT_EFFECT]
        reject_unknown(f"{cls.__name__}.from_pretrained", unknown, tuple(cls.from_pretrained.__annotations__))
        device = one_device(device_map)
        wanted = torch_dtype if torch_dtype is not None else dtype
        located = hub.locate(
            pretrained_model_name_or_path,
            parts=(subfolder or ROOT,),
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
            endpoint=endpoint,
        )
        folder = inside(located.folder, subfolder)
        config = _read_config(folder)
        weights = find_weights(folder, part_of(subfolder or ROOT), located.variant, use_safetensors)
        stored = inspect(weights)
        chosen = stored_dtype(stored) if wanted == "auto" else as_dtype(wanted) or torch.float32
        return cls.from_weights(config, weights, stored, dtype=chosen, device=device, quantization=quantization_config)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path | Mapping[str, Any],
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        original_config: str | Path | Mapping[str, Any] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        config_revision: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | None = None,
        quantization_config: Any = None,
        ema: bool = False,
        **told: Any,
    ) -> Self:
        """Load the original file of a model, strictly, in evaluation mode; its tensors tell the architecture.

        The file is a path, `hf://organisation/repository/path`, its web address, or a mapping of its tensors; `.pth`
        and safetensors. `config` is a folder, hub id or mapping whose configuration is taken instead of the inferred
        one (`subfolder`: where in it), `original_config` a YAML of the original code, for what tensors leave open.
        `told` are single fields of that kind: `sample_size=16`. `ema` takes averaged weights. Other arguments as
        `from_pretrained`.
        Errors: ModelNotFound and CheckpointError naming what is missing or wrong; InvalidInput for an unknown argument.
        """
        told = {name: value for name, value in told.items() if name not in _WITHOUT_EFFECT}
        names = (*(field.name for field in dataclasses.fields(cls.config_type)), *cls.from_single_file.__annotations__)
        reject_unknown(f"{cls.__name__}.from_single_file", [name for name in told if name not in names], names)
        part = next(part for base, part in _PART_NAMES.items() if issubclass(cls.config_type, base))
        where: dict[str, Any] = {"local_files_only": local_files_only, "token": token, "endpoint": endpoint}
        where |= {"cache_dir": cache_dir, "force_download": force_download}
        if config is not None and original_config is not None:
            raise InvalidInput("Both config and original_config were given; pass one of them.")
        if isinstance(config, str | Path):
            config = cls.load_config(config, subfolder=subfolder or part, revision=config_revision, **where)
        if config is not None:
            told = {**cls.config_type.from_dict(config).to_dict(), **told}
        elif original_config is not None and part != "vae":
            told = {**open_fields(original_config), **told}
        source = pretrained_model_link_or_path_or_dict
        if isinstance(source, Mapping):
            found = examine_tensors(source, told=told)
        else:
            located = hub.locate(source, parts=(ROOT,), revision=revision, single=True, **where)
            if located.file is None:
                raise InvalidInput(f"'{source}' is no single file; load it with {cls.__name__}.from_pretrained.")
            found = examine(located.file, name=located.name, card=located.card, averaged=ema, told=told)
        wanted = torch_dtype if torch_dtype is not None else dtype
        chosen = found.file.dtype if wanted == "auto" else as_dtype(wanted) or torch.float32
        model = found.build(part, cls, dtype=chosen, device=one_device(device_map if device is None else device))
        if quantization_config is not None:
            quantize(model, quantization_config)
        return model

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Weights,
        stored: Mapping[str, Stored],
        *,
        dtype: torch.dtype | None,
        device: torch.device | str = "cpu",
        quantization: Any = None,
    ) -> Self:
        """Build from a `config.json` and inspected weights: on the meta device first, so memory holds one copy.

        Errors: CheckpointError when the configuration is unusable or the tensors do not fit it.
        """
        where = weights.folder / "config.json"
        stored_as, config = split(config)
        check_config(config, where, num_tensors=len(stored), classes=[base.__name__ for base in cls.__mro__])
        try:
            with on_meta():
                model = cls.from_config(config)
        except (InvalidInput, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{where} describes no model that can be built: {error}") from error
        if stored_as is not None:
            prepare(model, {name: one.dtype for name, one in stored.items()}, stored_as)
            if quantization is not None:
                refuse_quantized(model)
        load_into(model, weights, stored, dtype=dtype, device=device, quantization=quantization)
        _log.info("loaded %s from %s in %s", cls.__name__, weights.folder, dtype)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        safe_serialization: bool = True,
        is_main_process: bool = True,
    ) -> None:
        """Write `config.json` and the weights, all at once: a killed save leaves what was there before.

        Errors: InvalidInput for a path that is a file; NonFinite for weights with NaN; OSError naming the file.
        """
        if not is_main_process:
            return
        entry(self)  # what cannot be saved is refused before a file is made
        folder = Path(save_directory)
        leftovers: list[Leftovers] = []
        with saving(folder, leftovers) as stage:
            options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
            leftovers.append(self.write_files(stage, folder, safe_serialization=safe_serialization, **options))

    def notes(self) -> dict[str, Any]:
        """Return what `config.json` tells beside the configuration, under names that begin with an underscore."""
        return {}

    def write_files(
        self,
        stage: Path,
        folder: Path,
        *,
        variant: str | None,
        max_shard_size: int | str,
        safe_serialization: bool,
    ) -> Leftovers:
        """Write the files of `save_pretrained` into `stage`; return what tells which of `folder` they make useless."""
        options: dict[str, Any] = {"variant": variant, "max_shard_size": max_shard_size}
        quantized = entry(self)
        part, suffix = part_of(ROOT), "safetensors" if safe_serialization else "bin"
        written = write_weights(self.state_dict(), stage, part, safe_serialization=safe_serialization, **options)
        header = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        extra = {} if quantized is None else {ENTRY: quantized}
        write_json(stage / "config.json", {**header, **self.config.to_dict(), **extra, **self.notes()})
        return partial(outdated, folder, part, variant, suffix, written)


class GradientCheckpointing:
    """The documented switches of a model whose blocks can be computed again instead of kept."""

    gradient_checkpointing: bool

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass."""
        self.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.gradient_checkpointing


class SanaTransformer2DModel(GradientCheckpointing, PretrainedMixin, LinearDiT):
    """SANA's linear diffusion transformer; see `LinearDiT` for its inputs and `TransformerConfig` for its fields."""

    config_type = TransformerSettings
    config: TransformerSettings


def inside(folder: Path, subfolder: str | None) -> Path:
    """Return a part's folder, shared or not, with an interrupted save finished.

    Errors: InvalidInput for a `subfolder` that leads out of the folder.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise InvalidInput(f"subfolder is {subfolder!r}; it must name a folder inside the model's.")
    place = part_folder(folder, subfolder or ROOT)
    recover(folder)
    recover(place)
    if place.is_dir():
        warn_if_open_to_all(place)
    return place


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / MODEL_INDEX).is_file() and not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder} is the folder of a pipeline; pass subfolder='transformer' or subfolder='vae'.")
    return read_json(folder / "config.json")
