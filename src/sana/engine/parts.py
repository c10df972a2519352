"""The loaded parts of a model, held together, and the way from a name to them."""

import dataclasses
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sana
from sana.cards import CARDS, Card
from sana.checkpoints import hub
from sana.checkpoints.built_in import is_built_in
from sana.checkpoints.folder import COMPONENTS, OPTIONAL, DtypeChoice, load_parts
from sana.checkpoints.hub import Located
from sana.checkpoints.original.loading import base_folder, load_single_file
from sana.engine.adapters import Adapters
from sana.engine.angles import Angles, angles_in
from sana.engine.compilation import compile_modules, is_compiled
from sana.engine.fingerprint import fingerprint
from sana.engine.model_card import card_in, fitting
from sana.engine.placement import WEIGHTED, Placement, modules_of, offload, pick_device, spread
from sana.engine.sparing import Plan, check_memory, sparing
from sana.errors import CheckpointError, InvalidInput
from sana.memory.quantize import noted, quantize
from sana.memory.quantize_configs import for_parts, name_of
from sana.text.gemma import PromptEncoder


@dataclass
class _Placing:
    """Holds what several bundles of the same parts share."""

    current: Placement | None = None


@dataclass(kw_only=True)
class Parts:
    """What makes pictures: the five documented components and the card that describes them.

    A part may be replaced by assignment; what was cached from the old one is dropped.
    """

    tokenizer: Any = None
    text_encoder: Any = None
    vae: Any = None
    transformer: Any = None
    scheduler: Any = None
    controlnet: Any = None
    """A control network, several of them in a list, or None."""
    controlnet_name: str | None = None
    """What a control network that did not come with the model is called; never a path."""
    card: Card | None = None
    """The card of a known model, None for a folder of unknown origin."""
    name: str = "unnamed"
    """What the model is called in messages and metadata; never a path."""
    commit: str | None = None
    """Commit of the hub repository that the files came from."""
    angles: Angles = field(default_factory=dict)
    """Angles that come with a SANA-Sprint model, by number of steps; mostly none."""
    _placing: _Placing = field(default_factory=_Placing, init=False, repr=False)
    _prompts: PromptEncoder | None = field(default=None, init=False, repr=False)

    @property
    def components(self) -> dict[str, Any]:
        """The five parts by name."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def placement(self) -> Placement | None:
        """What brings the parts to the device while they are used; None where they always are there.

        Copies of these parts have the same one: the weights are the same, too.
        """
        return self._placing.current

    @placement.setter
    def placement(self, value: Placement | None) -> None:
        self._placing.current = value

    @property
    def controlnets(self) -> list[Any]:
        """The control networks."""
        given = self.controlnet if isinstance(self.controlnet, list | tuple) else [self.controlnet]
        return [network for network in given if network is not None]

    def require(self, *names: str) -> None:
        """Raise InvalidInput unless all the named parts are there."""
        for name in names:
            if getattr(self, name) is None:
                raise InvalidInput(f"The pipeline has no {name}, which this call needs. Load it, or assign one.")

    @property
    def device(self) -> torch.device:
        """Where the transformer lies while it is used, or else any other part; the loop runs there."""
        if self.placement is not None:
            return self.placement.device
        for name in ("transformer", "vae", "text_encoder"):
            part = getattr(self, name)
            if part is not None:
                weight: torch.Tensor = next(part.parameters())
                return weight.device
        return torch.device("cpu")

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Have the named parts on the device of the loop inside the `with` block; a model may have no controlnet."""
        self.require(*(name for name in names if name not in OPTIONAL))
        if self.placement is None:
            yield
        else:
            with self.placement.using([one for name in names for one in modules_of(getattr(self, name))]):
                yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights in memory inside the `with` block, whatever the memory mode is, for saving them."""
        if self.placement is None:
            yield
        else:
            with self.placement.whole([one for name in WEIGHTED for one in modules_of(getattr(self, name))]):
                yield

    def save_memory(self, mode: str, device: torch.device | str = "auto") -> None:
        """Let parts be there only while they are used: "low" whole ones, "lowest" single blocks; see `placement`.

        Errors: InvalidInput for an unknown mode or device, and where the mode would have no effect.
        """
        offload(self, mode, pick_device(device))

    def stay(self) -> None:
        """Bring all parts to the device for good; undoes `save_memory`."""
        if self.placement is not None:
            self.placement.end()
            self.placement = None

    @property
    def adapters(self) -> Adapters:
        """The adapters of the transformer: load, strengths, fuse, remove."""
        self.require("transformer")
        return Adapters(self.transformer)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def prompts(self) -> PromptEncoder:
        """The encoder of prompts; it keeps the instruction's prefix and the default negative prompt between calls."""
        self.require("tokenizer", "text_encoder")
        known = self._prompts
        if known is None or known.tokenizer is not self.tokenizer or known.text_encoder is not self.text_encoder:
            known = self._prompts = PromptEncoder(self.tokenizer, self.text_encoder)
        return known

    @property
    def flow_shift(self) -> float:
        """The shift of the sigma grid, as the scheduler's configuration holds it."""
        config = getattr(self.scheduler, "config", {})
        told = config.get("flow_shift", config.get("shift"))
        return float(self.effective_card.flow_shift if told is None else told)

    @property
    def effective_card(self) -> Card:
        """The model's card; for a folder of unknown origin that of the nearest published model, with its own size."""
        if self.card is not None:
            return self.card
        self.require("transformer")
        config = self.transformer.config
        base = "sana-sprint-1.6b-1024" if config.guidance_embeds else "sana-1.6b-1024"
        size = config.sample_size * self.compression
        return dataclasses.replace(CARDS[base], name=self.name, hub_id="", base_size=size, sizes=None, folder=None)

    @property
    def compression(self) -> int:
        """Image pixels per latent pixel along one side."""
        if self.vae is None:
            return 32
        return 1 << (len(self.vae.config.encoder_block_out_channels) - 1)

    def compile(self, cache_dir: str | Path | None = None) -> None:
        """Let transformer, control network and decoder run compiled from the next picture on, which takes longer.

        Measured for the 0.6B transformer: see `sana.engine.compilation`, which also says what is kept in `cache_dir`.

        Raises:
            MissingDependency: there is no C++ compiler.
        """
        if self.placement is not None:
            raise InvalidInput("Compiled parts must stay in memory. Drop the memory mode, or do not compile.")
        compile_modules(self.transformer, self.vae, cache_dir, self.controlnets)

    def describe(self) -> dict[str, str]:
        """Return what goes into the metadata of a picture: model, dtypes, device and versions; no path and no user.

        `weights` names the weights in use (see `fingerprint`), whatever files they came from; `quantized`, `compiled`
        and what concerns a control network are there only where it is so.
        """
        dtypes = {
            name: str(getattr(self, name).dtype).removeprefix("torch.")
            for name in ("transformer", "text_encoder", "vae")
        }
        device = self.device
        return {
            "name": self.name,
            **({"commit": self.commit} if self.commit else {}),
            **{f"{name}_dtype": dtype for name, dtype in dtypes.items()},
            "weights": fingerprint(*(getattr(self, name) for name in dtypes)),
            **self._describe_quantized(),
            **({"controlnet": self.controlnet_name} if self.controlnet_name else {}),
            **({"controlnet_weights": fingerprint(*self.controlnets)} if self.controlnets else {}),
            **({"compiled": "yes"} if is_compiled(self.transformer) or is_compiled(self.vae) else {}),
            "threads": str(torch.get_num_threads()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "sanakit": sana.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _describe_quantized(self) -> dict[str, str]:
        configs = {name: noted(getattr(self, name)) for name in ("transformer", "text_encoder")}
        kinds = {name: name_of(config) for name, config in configs.items() if config is not None}
        if len(kinds) == len(configs) and len(set(kinds.values())) == 1:
            return {"quantized": kinds["transformer"]}
        return {"quantized": ", ".join(f"{name} {kind}" for name, kind in kinds.items())} if kinds else {}


def load(
    model: str | Path,
    *,
    device: torch.device | str | Mapping[str, torch.device | str] = "auto",
    dtype: DtypeChoice = "card",
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    use_safetensors: bool | None = None,
    quantization_config: Any = None,
    memory: str | None = None,
    max_memory: int | None = None,
    plan: Plan | None = None,
    **components: Any,
) -> Parts:
    """Load a model by short name, folder, hub id, or one file of the original layout.

    Args:
        model: a file is a path or `hf://organisation/repository/path`; the other parts come from the folder around it
            or from the published model.
        device: "auto" takes a GPU if there is one, "balanced" all of them; or a mapping from part names.
        dtype: "card" takes what the model's card recommends, but float32 for transformer and VAE on a CPU that does
            not multiply bfloat16 in hardware; otherwise anything that `load_parts` takes: a dtype or its name, "auto"
            (as stored), or a mapping from part names.
        quantization_config: see `memory.quantize_configs`: one for transformer and text encoder, or by part names.
        memory: None has all parts on the device all the time, "low" and "lowest" save memory (see `placement`), "auto"
            takes the first of these with which `plan` fits into the free memory.
        max_memory: bytes of the device that "auto" may count on, in place of what is free.
        plan: what "auto" is to make room for; None means one picture of the model's own size.
        components: parts taken as they are instead of being loaded.

    Raises:
        ModelNotFound: the model, or a file of it, is neither here nor to be had.
        CheckpointError: the files are damaged or describe something else.
        InvalidInput: an argument is unknown or impossible.
    """
    check_memory(memory, max_memory, plan)
    places = spread(device, (*COMPONENTS, *OPTIONAL))
    where: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    located = hub.locate(
        model,
        parts=tuple(name for name in COMPONENTS if name not in components) if components else None,
        optional=tuple(name for name in OPTIONAL if name not in components),
        variant=variant,
        use_safetensors=use_safetensors,
        revision=revision,
        single=True,
        **where,
    )
    if located.file is not None:
        more = {"memory": memory, "max_memory": max_memory, "plan": plan, "quantization_config": quantization_config}
        return _from_file(located, device, dtype, components, {**where, **more})
    card = located.card or card_in(located.folder)
    files: dict[str, Any] = {"variant": located.variant, "use_safetensors": use_safetensors}
    files["torch_dtype"] = recommended_dtypes(card, places["transformer"]) if dtype == "card" else dtype
    files["quantization_config"] = quantization_config

    def read(to: Any) -> Parts:
        loaded = load_parts(located.folder, device=to, **files, **components)
        return Parts(
            **{part: loaded.get(part) for part in (*COMPONENTS, *OPTIONAL)},
            card=fitting(card, loaded["transformer"]),
            name=_name(located, str(model), card),
            commit=located.commit,
            angles=angles_in(located.folder),
        )

    return read(places) if memory is None else sparing(read, memory, max_memory, places, plan)


def _from_file(
    located: Located, device: Any, dtype: DtypeChoice, components: dict[str, Any], options: dict[str, Any]
) -> Parts:
    """Load the network of an original file, and what belongs to it from a folder."""
    assert located.file is not None
    place = spread(device, ("transformer",))["transformer"]
    quantized = for_parts(options["quantization_config"])
    chosen = recommended_dtypes(located.card, place) if dtype == "card" else dtype
    single = load_single_file(located.file, name=located.name, card=located.card, dtype=chosen, device=place)
    found = {"transformer": single.transformer, "controlnet": single.controlnet}
    networks = {name: network for name, network in found.items() if network is not None}
    if "transformer" not in networks:
        raise CheckpointError(f"{located.file} holds no transformer. Name the model it belongs to, and load it there.")
    for name, network in networks.items():
        if name in quantized:
            quantize(network, quantized.pop(name))
    folder: Any = base_folder(located) or (single.base.name if single.base is not None else None)
    if folder is None:
        raise CheckpointError(
            f"{located.file} has an architecture that no published model has, so its text encoder is unknown. Put it"
            f" into the folder of its model, or name that: sana convert {located.file.name} OUT --base MODEL"
        )
    options = {**options, "quantization_config": quantized or None}
    parts = load(folder, device=device, dtype=dtype, **{**options, **networks, **components})
    parts.card = fitting(single.card, parts.transformer) if single.card is not None else parts.card
    parts.name, parts.commit = Path(located.name or located.file.name).name, located.commit
    return parts


def _name(located: Located, model: str, card: Card | None) -> str:
    """Return what a model is called: a card's name only for the very model of the card, not for one that follows it."""
    if located.commit is not None:
        return located.card.name if located.card is not None else model
    if card is not None and is_built_in(located.folder, card):
        return card.name
    folder = located.folder.resolve()
    return folder.name if folder.name not in CARDS else f"{folder.parent.name}/{folder.name}"


def recommended_dtypes(card: Card | None, device: torch.device) -> DtypeChoice:
    """Return the dtype of each part: the card's, or as stored without one.

    On a CPU, transformer and VAE take float32 unless the card says bfloat16 and the CPU is fast in it; a model without
    a card is float32 there.
    """
    if device.type != "cpu":
        return {"default": "auto"} if card is None else dict(card.dtypes)
    if card is None:
        return None
    fast = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
    big = {part: card.dtypes[part] if card.dtypes[part] in fast else "float32" for part in ("transformer", "vae")}
    return {**card.dtypes, **big}


def multiplies_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware, with AMX or AVX512-BF16; elsewhere float32 is faster."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
