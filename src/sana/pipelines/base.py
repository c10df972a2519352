"""What the documented pipelines have in common: parts, loading, saving, moving, memory switches, the progress bar."""

import logging
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from sana.checkpoints.folder import COMPONENTS, NO_FLOAT16, DtypeChoice, save_parts
from sana.engine.parts import CARD_KEY, Parts, load, pick_device
from sana.errors import InvalidInput, did_you_mean

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

    model_cpu_offload_seq: ClassVar[str] = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents",)

    tokenizer = _Part()
    text_encoder = _Part()
    vae = _Part()
    transformer = _Part()
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
        device_map: torch.device | str | None = None,
        **components: Any,
    ) -> Self:
        """Load from a folder, a hub id or a short name; parts given by keyword are taken as they are.

        Args:
            torch_dtype: a dtype or its name, "auto" for the stored ones, or a mapping from part names and "default".
                float16 for all keeps text encoder and VAE in bfloat16, because they overflow; this is logged once.
            dtype: another name of `torch_dtype`.
            variant: which of several saved precisions to read, for example "fp16" or "bf16".
            device_map: the one device to load to; "balanced" and "auto" take a GPU if there is one.
            components: tokenizer, text_encoder, vae, transformer or scheduler; None leaves the part out.

        Raises:
            ModelNotFound: the model, or a file of it, is neither here nor to be had (an OSError).
            CheckpointError: the files are damaged or there is no such variant (a ValueError).
            InvalidInput: an unknown argument or dtype (a ValueError).
        """
        for name in [name for name in components if name in _WITHOUT_EFFECT]:
            del components[name]
        for name in components:
            if name not in COMPONENTS:
                hint = did_you_mean(name, (*COMPONENTS, "torch_dtype", "variant", "revision", "local_files_only"))
                raise InvalidInput(f"{cls.__name__}.from_pretrained has no argument '{name}'.{hint}")
        parts = load(
            pretrained_model_name_or_path,
            device="cpu" if device_map is None else pick_device(device_map),
            dtype=torch_dtype if torch_dtype is not None else dtype,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            use_safetensors=use_safetensors,
            **components,
        )
        pipeline = cls(**parts.components)
        pipeline.parts = parts
        return pipeline

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
        save_parts(
            save_directory,
            self.components,
            class_name=type(self).__name__,
            variant=variant,
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
            notes={CARD_KEY: self.parts.card.name} if self.parts.card is not None else None,
        )

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, in the constructor's order; another pipeline takes them as `Pipeline(**components)`."""
        return self.parts.components

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
        target = None if device is None else pick_device(f"cuda:{device}" if isinstance(device, int) else device)
        softened: list[str] = []
        for name in ("text_encoder", "vae", "transformer"):
            part = getattr(self, name)
            if part is None:
                continue
            overflows = dtype == torch.float16 and name in NO_FLOAT16
            part.to(device=target, dtype=torch.bfloat16 if overflows else dtype)
            if overflows:
                softened.append(name)
        if softened and not silence_dtype_warnings:
            _log.warning("%s: cast to bfloat16 because float16 overflows there", " and ".join(softened))
        return self

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
