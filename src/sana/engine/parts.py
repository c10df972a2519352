"""The loaded parts of a model, held together, and the way from a name to them."""

import dataclasses
import logging
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sana
from sana.cards import CARDS, Card
from sana.checkpoints import hub
from sana.checkpoints.folder import COMPONENTS, DtypeChoice, load_parts
from sana.checkpoints.hub import Located, is_built_in
from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.engine.compilation import compile_modules, is_compiled
from sana.engine.fingerprint import fingerprint
from sana.errors import CheckpointError, InvalidInput, did_you_mean
from sana.text.gemma import PromptEncoder

_log = logging.getLogger(__name__)

CARD_KEY = "_sanakit_card"
"""Key of `model_index.json` that names the card of a model; other readers skip it because of the underscore."""


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
    card: Card | None = None
    """The card of a known model, None for a folder of unknown origin."""
    name: str = "unnamed"
    """What the model is called in messages and metadata; never a path."""
    commit: str | None = None
    """Commit of the hub repository that the files came from."""
    _prompts: PromptEncoder | None = field(default=None, init=False, repr=False)

    @property
    def components(self) -> dict[str, Any]:
        """The five parts by name."""
        return {name: getattr(self, name) for name in COMPONENTS}

    def require(self, *names: str) -> None:
        """Raise InvalidInput unless all the named parts are there."""
        for name in names:
            if getattr(self, name) is None:
                raise InvalidInput(f"The pipeline has no {name}, which this call needs. Load it, or assign one.")

    @property
    def device(self) -> torch.device:
        """Where the transformer lies, or else any other part; the loop runs there."""
        for name in ("transformer", "vae", "text_encoder"):
            part = getattr(self, name)
            if part is not None:
                weight: torch.Tensor = next(part.parameters())
                return weight.device
        return torch.device("cpu")

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
        return float(config.get("flow_shift", config.get("shift", self.effective_card.flow_shift)))

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
        """Let transformer and decoder run compiled from the next picture on, which takes longer for that.

        Measured for the 0.6B transformer: see `sana.engine.compilation`, which also says what is kept in `cache_dir`.

        Raises:
            MissingDependency: there is no C++ compiler.
        """
        compile_modules(self.transformer, self.vae, cache_dir)

    def describe(self) -> dict[str, str]:
        """Return what goes into the metadata of a picture: model, dtypes, device and versions; no path and no user.

        `weights` names the weights in use (see `fingerprint`), whatever files they came from; `compiled` is there only
        where it is so.
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
            **({"compiled": "yes"} if is_compiled(self.transformer) or is_compiled(self.vae) else {}),
            "threads": str(torch.get_num_threads()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "sanakit": sana.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def load(
    model: str | Path,
    *,
    device: torch.device | str = "auto",
    dtype: DtypeChoice = "card",
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    use_safetensors: bool | None = None,
    **components: Any,
) -> Parts:
    """Load a model by short name, folder or hub id.

    Args:
        device: "auto" takes a GPU if there is one.
        dtype: "card" takes what the model's card recommends, but float32 for transformer and VAE on a CPU that does
            not multiply bfloat16 in hardware; otherwise anything that `load_parts` takes: a dtype or its name, "auto"
            (as stored), or a mapping from part names.
        components: parts taken as they are instead of being loaded.

    Raises:
        ModelNotFound: the model, or a file of it, is neither here nor to be had.
        CheckpointError: the files are damaged or describe something else.
        InvalidInput: an argument is unknown or impossible.
    """
    place = pick_device(device)
    located = hub.locate(
        model,
        parts=tuple(name for name in COMPONENTS if name not in components) if components else None,
        variant=variant,
        use_safetensors=use_safetensors,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    card = located.card or card_in(located.folder)
    loaded = load_parts(
        located.folder,
        torch_dtype=recommended_dtypes(card, place) if dtype == "card" else dtype,
        variant=located.variant,
        use_safetensors=use_safetensors,
        device=place,
        **components,
    )
    return Parts(
        **{part: loaded.get(part) for part in COMPONENTS},
        card=fitting(card, loaded["transformer"]),
        name=_name(located, str(model), card),
        commit=located.commit,
    )


def _name(located: Located, model: str, card: Card | None) -> str:
    """Return what a model is called: a card's name only for the very model of the card, not for one that follows it."""
    if located.commit is not None:
        return located.card.name if located.card is not None else model
    if card is not None and is_built_in(located.folder, card):
        return card.name
    folder = located.folder.resolve()
    return folder.name if folder.name not in CARDS else f"{folder.parent.name}/{folder.name}"


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device of that name; "auto" and "balanced" take a GPU if there is one, else the CPU.

    Raises:
        InvalidInput: there is no such device.
    """
    if device in ("auto", "balanced"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"`device` {str(device)!r} cannot be used ({str(error).splitlines()[0]}). Use 'cpu'."
        ) from error
    return place


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


def card_in(folder: Path) -> Card | None:
    """Return the card that the `model_index.json` of a folder names, or None.

    Raises:
        CheckpointError: it names a card that this version does not know.
    """
    name = read_json(folder / MODEL_INDEX).get(CARD_KEY)
    if name is None:
        return None
    if name not in CARDS:
        hint = did_you_mean(str(name), CARDS)
        raise CheckpointError(
            f"{MODEL_INDEX} names the card {name!r}, which this version does not know.{hint} Update sanakit."
        )
    return CARDS[name]


def fitting(card: Card | None, transformer: Any) -> Card | None:
    """Return the card if the transformer has the architecture it describes, else None: its rules would mislead."""
    if card is None or transformer is None:
        return card
    given = getattr(transformer, "config", None)
    if given is not None and all(given[key] == value for key, value in _architecture(card).items()):
        return card
    _log.warning(
        "the transformer is not the one of the card %s; the card's limits and defaults are not used", card.name
    )
    return None


def _architecture(card: Card) -> dict[str, Any]:
    return {f.name: getattr(card.transformer, f.name) for f in dataclasses.fields(card.transformer)}
