"""What the documented pipelines have in common: parts, loading, saving, moving, memory switches, the progress bar."""

import contextlib
import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from sana.checkpoints.folder import COMPONENTS, NO_FLOAT16, OPTIONAL, DtypeChoice, save_parts
from sana.engine.angles import note_of
from sana.engine.model_card import CARD_KEY, fitting
from sana.engine.parts import Parts, load
from sana.engine.placement import pick_device
from sana.errors import CheckpointError, InvalidInput, did_you_mean

_log = logging.getLogger(__name__)

_WITHOUT_EFFECT = ("low_cpu_mem_usage",)
"""Documented arguments of `from_pretrained` that ask for what is always done here."""


class _Part:
    """A component of a pipeline as an attribute; assigning replaces it in the pipeline's `Parts`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: "Pipeline", owner: type | None = None) -> Any:
        return self if pipeline is None else getattr(pipeline.parts, self.name)

    def __set__(self, pipeline: "Pipeline", value: Any) -> None:
        setattr(pipeline.parts, self.name, value)


class Pipeline:
    """A bundle of parts with the documented ways to load, save and place it."""

    component_names: ClassVar[tuple[str, ...]] = COMPONENTS
    """The parts of this kind of pipeline, in the constructor's order."""
    option_names: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the constructor."""
    model_cpu_offload_seq: ClassVar[str] = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents",)

    tokenizer = _Part()
    text_encoder = _Part()
    vae = _Part()
    transformer = _Part()
    controlnet = _Part()
    scheduler = _Part()

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        self.parts = Parts(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: DtypeChoice = None,
        dtype: DtypeChoice = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        device_map: torch.device | str | Mapping[str, torch.device | str] | None = None,
        quantization_config: Any = None,
        **components: Any,
    ) -> Self:
        """Load from a folder, a hub id or a short name; parts given by keyword are taken as they are.

        Args:
            torch_dtype: a dtype or its name, "auto" for the stored ones, or a mapping from part names and "default".
                float16 for all keeps text encoder and VAE in bfloat16, because they overflow; this is logged once.
            dtype: another name of `torch_dtype`.
            variant: which of several saved precisions to read, for example "fp16" or "bf16".
            device_map: a device; "balanced" spreads the parts over all GPUs, or takes the CPU if there is none; or a
                mapping from part names to devices.
            quantization_config: `Int8Config`, `BitsAndBytesConfig` or `TorchAoConfig` of sana or transformers for
                transformer and text encoder, or a mapping from part names to such.
            components: parts by name, tokenizer, text_encoder, vae, transformer, scheduler, where there is one
                controlnet; None leaves the part out. Also the further arguments of the constructor.

        Raises:
            ModelNotFound: the model, or a file of it, is neither here nor to be had (an OSError).
            CheckpointError: the files are damaged or there is no such variant (a ValueError).
            InvalidInput: an unknown argument or dtype (a ValueError).
        """
        for name in [name for name in components if name in _WITHOUT_EFFECT]:
            del components[name]
        options = {name: components.pop(name) for name in cls.option_names if name in components}
        cls._check_names("from_pretrained", components, ("torch_dtype", "variant", "revision", "local_files_only"))
        without = {name: None for name in OPTIONAL if name not in cls.component_names}
        parts = load(
            pretrained_model_name_or_path,
            device="cpu" if device_map is None else device_map,
            quantization_config=quantization_config,
            dtype=torch_dtype if torch_dtype is not None else dtype,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            use_safetensors=use_safetensors,
            **{**components, **without},
        )
        for name in OPTIONAL:
            if name in cls.component_names and name not in components and getattr(parts, name) is None:
                raise CheckpointError(f"'{parts.name}' has no {name}: pass {name}= an object, or {name}=None.")
        return cls._of(parts, options)

    @classmethod
    def from_pipe(
        cls,
        pipeline: "Pipeline",
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Self:
        """Return a pipeline of this class with the parts of another; they are shared, not copied.

        Assigning a part to one of the two leaves the other as it is. A part that this class does not use stays with the
        other pipeline alone.

        Args:
            torch_dtype, dtype: cast the parts, which the other pipeline then has so, too. Left out, nothing is cast.
            changes: parts to put in place of the other's, or that it lacks, such as `controlnet`, and further arguments
                of the constructor, such as `pag_applied_layers`; these are the other's if it has them.

        Raises:
            InvalidInput: `pipeline` is none, there is no such part or argument, or a part is missing.
        """
        if not isinstance(pipeline, Pipeline):
            raise InvalidInput(f"from_pipe needs a pipeline of sana, not a {type(pipeline).__name__}. Load one first.")
        given = {name: getattr(pipeline, name) for name in cls.option_names if hasattr(pipeline, name)}
        options = {**given, **{name: changes.pop(name) for name in cls.option_names if name in changes}}
        cls._check_names("from_pipe", changes, ("torch_dtype",))
        parts = pipeline.parts
        if parts.tokenizer is not None and parts.text_encoder is not None:
            _ = parts.prompts  # so that what was encoded for one serves both
        parts = copy.copy(parts)
        for name in OPTIONAL:
            if name not in cls.component_names:
                setattr(parts, name, None)
            elif name not in changes and getattr(parts, name) is None:
                raise InvalidInput(
                    f"{cls.__name__} needs a {name}, which {type(pipeline).__name__} has not. Pass {name}= an object."
                )
        for name, part in changes.items():
            setattr(parts, name, part)
        if "transformer" in changes:
            parts.card = fitting(parts.card, parts.transformer)
        made = cls._of(parts, options)
        cast = torch_dtype if torch_dtype is not None else dtype
        return made if cast is None else made.to(cast)

    @classmethod
    def _of(cls, parts: Parts, options: dict[str, Any]) -> Self:
        pipeline = cls(**{name: getattr(parts, name) for name in cls.component_names}, **options)
        pipeline.parts = parts
        return pipeline

    @classmethod
    def _check_names(cls, method: str, names: dict[str, Any], others: tuple[str, ...]) -> None:
        for name in names:
            if name not in cls.component_names:
                hint = did_you_mean(name, (*cls.component_names, *cls.option_names, *others))
                raise InvalidInput(f"{cls.__name__}.{method} has no argument '{name}'.{hint}")

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write all parts in the published folder layout, which other libraries load too.

        Raises:
            InvalidInput: the path is a file, or a part cannot be saved.
        """
        card = {CARD_KEY: self.parts.card.name} if self.parts.card is not None else {}
        with self.parts.whole():
            save_parts(
                save_directory,
                self.components,
                class_name=type(self).__name__,
                variant=variant,
                max_shard_size=max_shard_size,
                safe_serialization=safe_serialization,
                notes=card | note_of(self.parts.angles),
            )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, in the constructor's order; another pipeline takes them as `Pipeline(**components)`."""
        return {name: getattr(self.parts, name) for name in self.component_names}

    @property
    def device(self) -> torch.device:
        """Where the transformer lies; the loop runs there."""
        return self.parts.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer, or else of the first part that has one."""
        for name in ("transformer", "vae", "text_encoder"):
            part = getattr(self, name)
            if part is not None:
                found: torch.dtype = part.dtype
                return found
        return torch.float32

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.parts.compression

    def to(
        self,
        *places: torch.device | torch.dtype | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move and cast the models, `to("cuda")`, `to(torch.bfloat16)` or `to("cuda", torch.bfloat16)`; returns itself.

        float16 keeps text encoder and VAE in bfloat16, because they overflow; cast them one by one to insist.

        Raises:
            InvalidInput: there is no such device.
        """
        for place in places:
            if isinstance(place, torch.dtype):
                dtype = place
            else:
                device = place
        if self.parts.placement is not None:
            raise InvalidInput(
                "Memory is being saved: the parts are moved as they are used. Call `disable_offload` first."
            )
        target = None if device is None else pick_device(f"cuda:{device}" if isinstance(device, int) else device)
        softened: list[str] = []
        for name in ("text_encoder", "vae", "transformer", "controlnet"):
            part = getattr(self, name)
            overflows = part is not None and dtype == torch.float16 and name in NO_FLOAT16
            for module in part if isinstance(part, list | tuple) else [part]:
                if module is not None:
                    module.to(device=target, dtype=torch.bfloat16 if overflows else dtype)
            if overflows:
                softened.append(name)
        if softened and not silence_dtype_warnings:
            _log.warning("%s: cast to bfloat16 because float16 overflows there", " and ".join(softened))
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "auto") -> None:
        """Have each part on the device only while it is used: less memory for a little time, and the same pictures.

        Away from a GPU means in main memory. Without a GPU the weights are let go of and read again from their files.

        Args:
            gpu_id: number of the GPU.
            device: where to compute; "auto" takes a GPU if there is one.

        Raises:
            InvalidInput: there is no such device, or the switch would have no effect.
        """
        self.parts.save_memory("low", device if gpu_id is None else f"cuda:{gpu_id}")

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "auto") -> None:
        """Have single blocks on the device only while they are used: the least memory, and the most time.

        Arguments and errors as `enable_model_cpu_offload`.
        """
        self.parts.save_memory("lowest", device if gpu_id is None else f"cuda:{gpu_id}")

    def disable_offload(self) -> None:
        """Bring all parts back for good."""
        self.parts.stay()

    def compile(self, cache_dir: str | Path | None = None) -> None:
        """Let transformer and decoder run compiled from the next picture on, which takes longer for that.

        Args:
            cache_dir: where the compiled code is kept for later runs; left out, the user's cache.

        Raises:
            MissingDependency: there is no C++ compiler.
        """
        self.parts.compile(cache_dir)

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one, which needs less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode a batch of images at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles, which needs much less memory and can leave faint seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images whole."""
        self.vae.disable_tiling()

    def _using(self, *names: str, when: bool = True) -> contextlib.AbstractContextManager[None]:
        """Have those of the named parts that there are on the device of the loop."""
        there = [name for name in names if getattr(self.parts, name) is not None]
        return self.parts.using(*there) if when and there else contextlib.nullcontext()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of the progress bar (those of `tqdm`); `disable=True` switches it off."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Return a progress bar over an iterable or up to a total."""
        from tqdm.auto import tqdm

        if iterable is None and total is None:
            raise InvalidInput("The progress bar needs an `iterable` or a `total`. Give one of them.")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def __repr__(self) -> str:
        names = ", ".join(f"{name}={type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}({names})"
