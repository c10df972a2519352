"""The documented LoRA methods of the pipelines, over the adapters of the engine."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sana.checkpoints.lora.files import PICKLED_NAME, WEIGHT_NAME, read_tensors_of
from sana.checkpoints.lora.writing import save_tensors
from sana.engine.adapter_strengths import LoraReport, Strength
from sana.engine.adapters import Adapters
from sana.engine.request import shown
from sana.errors import InvalidInput, did_you_mean

_log = logging.getLogger(__name__)

_FINDING = (
    "token",
    "endpoint",
    "weight_name",
    "subfolder",
    "revision",
    "cache_dir",
    "local_files_only",
    "force_download",
    "token",
    "endpoint",
)
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "return_lora_metadata")
"""Documented arguments of `load_lora_weights` that ask for what is always done here."""


class TooLate(InvalidInput, RuntimeError):
    """Something that must come before the first adapter is loaded."""


class LoraMixin:
    """LoRA and DoRA adapters of the transformer: from and to files, with strengths, fused, and per call.

    The text encoder has none. Adapters belong to the transformer: pipelines that share it share them.
    """

    transformer: Any

    _lora_loadable_modules: ClassVar[tuple[str, ...]] = ("transformer",)
    _lora_scale: float = 1.0

    @property
    def adapters(self) -> Adapters:
        """The adapters of the transformer, with more ways to use them than the methods here."""
        if self.transformer is None:
            raise InvalidInput("The pipeline has no transformer, which adapters need. Load it, or assign one.")
        return Adapters(self.transformer)

    @property
    def lora_scale(self) -> float:
        """Scale of the adapters in the current or last call, `attention_kwargs={"scale": s}`."""
        return self._lora_scale

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are merged into the weights."""
        return len(self.fused_loras)

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are merged into the weights."""
        return set() if self.transformer is None else set(self.adapters.fused)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> LoraReport:
        """Load an adapter and let it act alone; `set_adapters` lets several act. Returns what it matched.

        Args:
            pretrained_model_name_or_path_or_dict: file, folder, hub id or tensors, as written by this library,
                diffusers, PEFT, kohya or ComfyUI.
            adapter_name: what to call it, else "default_0", "default_1", ...
            hotswap: put it in the place of the loaded adapter of that name, as strong as that.
            kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `local_files_only`, `force_download`, `token`;
                `use_safetensors=False` allows pickled files, which are read without running anything in them;
                `metadata` are settings in PEFT's words for tensors that bring none.

        Raises:
            ModelNotFound: there is no such adapter (an OSError).
            CheckpointError: it is damaged, of another kind or for another model (a ValueError); nothing has changed.
            InvalidInput: the name is taken, or an argument unknown (a ValueError).
        """
        options = _finding("load_lora_weights", kwargs, extra=("metadata",))
        if "metadata" in options:
            options["config"] = options.pop("metadata")
        return self.adapters.load(pretrained_model_name_or_path_or_dict, adapter_name, hotswap=hotswap, **options)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Return the tensors of an adapter file as they are named there; no model is needed.

        `return_lora_metadata=True` adds its settings in PEFT's words, or None. Other arguments are those of
        `load_lora_weights`. Errors: as there.
        """
        options = _finding("lora_state_dict", dict(kwargs))
        tensors, config = read_tensors_of(pretrained_model_name_or_path_or_dict, **options)
        return (tensors, config or None) if kwargs.get("return_lora_metadata") else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Mapping[str, Tensor],
        transformer: nn.Module,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> LoraReport:
        """Load the tensors of an adapter into a transformer; `_pipeline` and `low_cpu_mem_usage` change nothing.

        Errors: as `load_lora_weights`.
        """
        return Adapters(transformer).load(state_dict, adapter_name, hotswap=hotswap, config=metadata)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], object] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an adapter, `pipe.adapters.parameters(name)` for example, as `pytorch_lora_weights.safetensors`.

        Raises:
            InvalidInput: nothing to save, the path is a file, or settings for a pickled file (a ValueError).
            NonFinite: a tensor holds NaN or infinity.
        """
        if not transformer_lora_layers:
            raise InvalidInput("There is nothing to save. Pass the tensors as `transformer_lora_layers`.")
        if transformer_lora_adapter_metadata and not safe_serialization:
            text = "`transformer_lora_adapter_metadata` has no place in a pickled file"
            raise InvalidInput(f"{text}. Leave safe_serialization on, or the metadata out.")
        if os.path.isfile(save_directory):
            raise InvalidInput(f"'{save_directory}' is a file; give a folder to save to.")
        if not is_main_process:
            return
        layers = transformer_lora_layers
        named = layers.state_dict() if isinstance(layers, nn.Module) else layers
        tensors = {f"transformer.{name}": tensor for name, tensor in named.items()}
        path = Path(save_directory, weight_name or (WEIGHT_NAME if safe_serialization else PICKLED_NAME))
        if save_function is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_function(tensors, str(path))
        else:
            save_tensors(path, tensors, transformer_lora_adapter_metadata, pickled=not safe_serialization)

    def unload_lora_weights(self) -> None:
        """Forget all adapters; the weights are bit by bit as before. Fused ones stay in the weights for good."""
        self.adapters.clear()

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Merge adapters, None: the active ones, into the weights, which saves their time in each step.

        `safe_fusing` is always on: weights that would not be finite are refused and nothing is changed.

        Raises:
            InvalidInput: an unknown component or name, or nothing to fuse (a ValueError).
        """
        _check_components("fuse_lora", components, kwargs)
        self.adapters.fuse(adapter_names, lora_scale)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """Take the fused adapters out of the weights, which are then bit by bit as before.

        Raises:
            InvalidInput: an unknown component (a ValueError).
        """
        _check_components("unfuse_lora", components, kwargs)
        if not self.adapters.fused:
            warnings.warn("No adapter is fused, so there is nothing to take out of the weights.", stacklevel=2)
        self.adapters.unfuse()

    def set_adapters(
        self,
        adapter_names: Sequence[str] | str,
        adapter_weights: float | Mapping[str, Any] | Sequence[float | Mapping[str, Any] | None] | None = None,
    ) -> None:
        """Let these adapters act, each with its weight (1 without).

        A weight is a number, or `{"transformer": w}` in which w is a number or weights by parts of layer names, such as
        `{"transformer_blocks.3": 0.5, "attn2": 0.0}`; layers that are not named take 1.

        Raises:
            InvalidInput: a name is unknown, or the counts differ (a ValueError).
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str):
            weights = list(adapter_weights)
        else:
            weights = [adapter_weights] * len(names)
        if len(names) != len(weights):
            text = f"Length of adapter names {len(names)} is not equal to the length of the weights {len(weights)}"
            raise InvalidInput(f"{text}. Give one weight for each adapter, or one for all.")
        self.adapters.set({name: _strength(weight) for name, weight in zip(names, weights, strict=True)})

    def disable_lora(self) -> None:
        """Let no adapter act until `enable_lora`."""
        self.adapters.disable()

    def enable_lora(self) -> None:
        """Let the active adapters act again."""
        self.adapters.enable()

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Forget these adapters.

        Raises:
            InvalidInput: a name is unknown, or the adapter is fused (a ValueError); none is forgotten then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.adapters.remove(*names)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters, also while they are disabled."""
        return [] if self.transformer is None else list(self.adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded adapters by component."""
        names = [] if self.transformer is None else list(self.adapters.names)
        return {"transformer": names} if names else {}

    def set_lora_device(self, adapter_names: Sequence[str], device: torch.device | str | int) -> None:
        """Keep adapters on a device; those on another one than the transformer still act.

        Raises:
            InvalidInput: a name is unknown (a ValueError).
        """
        self.adapters.move([adapter_names] if isinstance(adapter_names, str) else adapter_names, device)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Make room for adapters up to a rank, so that compiled code serves them all; call it before the first.

        Raises:
            TooLate: an adapter is loaded and `check_compiled` is "error" (a RuntimeError).
            InvalidInput: another value than "error", "warn" or "ignore" (a ValueError).
        """
        if check_compiled not in ("error", "warn", "ignore"):
            text = f"check_compiled should be one of 'error', 'warn', or 'ignore', got {shown(check_compiled)}"
            raise InvalidInput(f"{text}. Choose one of them.")
        if self.adapters.names and check_compiled != "ignore":
            text = "Call `enable_lora_hotswap` before loading the first adapter"
            if check_compiled == "error":
                raise TooLate(f"{text}: what is compiled now is compiled anew.")
            warnings.warn(f"{text}: what is compiled now is compiled anew.", stacklevel=2)
        self.adapters.share_compiled(target_rank)

    @contextlib.contextmanager
    def adapter_scale(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Let the adapters act with the documented `attention_kwargs={"scale": s}` of one call.

        The block must hold everything that runs the transformer, the predictor's making too.
        Errors: InvalidInput for a scale that is no finite number.
        """
        told = dict(attention_kwargs or {})
        scale = told.pop("scale", 1.0)
        adapters = Adapters(self.transformer) if self.transformer is not None else None
        known = adapters is not None and bool(adapters.names or adapters.fused)
        if attention_kwargs and (told or not known):
            reason = "no adapter is loaded" if not known else "only 'scale' has a meaning"
            ignored = attention_kwargs if not known else told
            warnings.warn(f"`attention_kwargs` {shown(ignored)} is ignored: {reason}.", stacklevel=6)
        if adapters is None or not known:
            yield
            return
        with adapters.using(None, scale):
            self._lora_scale = float(scale)
            yield


def _strength(weight: float | Mapping[str, Any] | None) -> Strength:
    """Return the strength in one of `set_adapters`' weights; other parts than the transformer are told and ignored."""
    if weight is None:
        return 1.0
    if not isinstance(weight, Mapping):
        return weight
    others = sorted(set(weight) - {"transformer"})
    if others:
        told = f"`adapter_weights` name {', '.join(map(shown, others[:3]))}, which takes no adapters; ignored"
        warnings.warn(f"{told}. Put weights of layers under 'transformer'.", stacklevel=4)
    inner = weight.get("transformer")
    return 1.0 if inner is None else inner


def _check_components(call: str, components: Sequence[str], unknown: Mapping[str, Any]) -> None:
    if unknown:
        hint = did_you_mean(next(iter(unknown)), ("components", "lora_scale", "safe_fusing", "adapter_names"))
        raise InvalidInput(f"{call} has no argument '{next(iter(unknown))}'.{hint}")
    if isinstance(components, str) or not components:
        raise InvalidInput("`components` must be a list with at least one name. Only 'transformer' takes adapters.")
    for name in components:
        if name not in LoraMixin._lora_loadable_modules:
            raise InvalidInput(f"`components` names {shown(name)}. Only 'transformer' takes adapters.")


def _finding(call: str, options: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments that find a file.

    Errors: InvalidInput for one that is unknown.
    """
    known = (*_FINDING, *_WITHOUT_EFFECT, *extra, "use_safetensors")
    for name in options:
        if name not in known:
            raise InvalidInput(f"{call} has no argument '{name}'.{did_you_mean(name, known)}")
    taken = {name: value for name, value in options.items() if name in (*_FINDING, *extra) and value is not None}
    return {**taken, "allow_pickle": True} if options.get("use_safetensors") is False else taken
