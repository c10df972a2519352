"""The model and the machine it runs on: the flags that choose them, and the loading."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli import cache
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.known import DEFAULT_MODEL, TOY, check_model, millions, terms
from sana.apps.cli.output import Terminal, listed
from sana.apps.cli.values import bytes_of, read_bytes, read_device
from sana.cards import CARDS, FULL, Card
from sana.checkpoints.built_in import folder_of
from sana.errors import InvalidInput, OutOfMemory, SanaError

if TYPE_CHECKING:
    from sana.engine.parts import Parts
    from sana.engine.request import Request

MAX_THREADS = 1024
SMALL_MODEL = 50_000_000
"""Below this many parameters a second thread costs more than it brings."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Which model draws, and on what."""

    model: Annotated[str, Spelling(short="-m", value="MODEL")] = DEFAULT_MODEL
    """A name from `sana models`, a hub id, or a folder."""
    device: Annotated[str, Spelling(value="auto|cpu|cuda[:N]|mps", read=read_device)] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto is what the model's card recommends, float16 is for the transformer only."""
    threads: int | None = None
    """CPU threads; left out, a small model gets one and others get all."""
    controlnet: Annotated[str | None, Spelling(value="MODEL")] = None
    """Control network for --control, where the model comes without one: a name, a hub id, a folder or a file."""
    memory: Literal["auto", "low", "lowest"] = "auto"
    """low: parts of the model are there only while they work; lowest: block by block; auto: as little as need be."""
    max_vram: Annotated[str | None, Spelling(value="8GB", read=read_bytes)] = None
    """Memory that --memory auto may count on, of the GPU or else of the computer, in place of what is free."""
    quantize: Literal[
        "none", "int8", "bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8", "torchao-fp8", "torchao-int4"
    ] = "none"
    """Keep the weights of transformer and text encoder in fewer bits; all but int8 need a further package."""
    compile: bool = False
    """Translate the model for this computer: minutes at first, kept for later runs, then faster pictures."""

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise InvalidInput(f"`threads` must be a whole number from 1 to {MAX_THREADS} but is {self.threads}.")
        if self.max_vram is not None and self.memory != "auto":
            raise InvalidInput(
                f"`max_vram` has no effect with `memory` {self.memory}; it guides auto. Drop one of them."
            )
        if self.compile and self.memory != "auto":
            raise InvalidInput(
                f"`compile` needs the whole model in memory, `memory` {self.memory} not. Drop one of them."
            )

    @property
    def memory_mode(self) -> str | None:
        """How the parts are kept; None: all the time, as compiled code needs and the small built-in model can have."""
        spare = self.compile or (self.built_in is not None and self.max_vram is None)
        return None if self.memory == "auto" and spare else self.memory

    @property
    def card(self) -> Card | None:
        """The card of a model that was named by it; a folder may hold any model, which shows when it is loaded."""
        return None if self.folder is not None else CARDS.get(self.model)

    @property
    def folder(self) -> Path | None:
        """The folder that was named, if it is one; it goes before a model of that name, but not before the built-in."""
        path = Path(self.model).expanduser()
        return path if self.model.strip() and self.built_in is None and path.is_dir() else None

    @property
    def built_in(self) -> Path | None:
        """The folder of a built-in model, if one was named."""
        card = CARDS.get(self.model)
        return folder_of(card) if card is not None and card.folder is not None else None

    @property
    def source(self) -> str:
        """The model as a later command finds it from anywhere, but for paths that would name the user."""
        if self.folder is None:
            return self.model
        path, home = self.folder.resolve(), Path("~").expanduser().resolve()
        if path.is_relative_to(home) and path != home:
            return f"~/{path.relative_to(home)}"
        return path.name if home.name in path.parts else str(path)

    def load(
        self,
        terminal: Terminal,
        only: Collection[str] | None = None,
        drawing: "Sequence[Request] | Callable[[Card], Sequence[Request]]" = (),
    ) -> tuple["Parts", float]:
        """Load the model, or only some parts of it, and tell how many seconds it took.

        Args:
            only: these parts and no others.
            drawing: what will be drawn, or what tells it by the card: --memory auto makes room for that.
        """
        began = time.perf_counter()
        terminal.event("loading", model=self.source)
        self._warn_of_namesakes(terminal)
        self._introduce_unnamed(terminal)
        if (self.built_in or self.folder) is not None:
            bar: contextlib.AbstractContextManager[Any] = terminal.count(1, text=f"loading {self.model}")
        else:  # the hub library draws its own
            bar = hub_bars(shown=not terminal.quiet and sys.stderr.isatty())
        with bar, out_of_memory_told():
            from sana.checkpoints.folder import COMPONENTS
            from sana.engine.parts import load

            dtype: Any = "card" if self.dtype == "auto" else self.dtype
            if dtype == "float16":  # text encoder and autoencoder overflow in it
                dtype = {"default": "float16", "text_encoder": "bfloat16", "vae": "bfloat16"}
            unused = () if only is None else set(COMPONENTS) - {*only, "scheduler"}
            absent: dict[str, Any] = dict.fromkeys(unused)
            variant = self._variant(set(COMPONENTS) - set(absent))
            if variant is not None:
                terminal.warn(f"{self.model} has no plain weights; its variant {variant} is loaded.")
            place = self.built_in or self.model
            with _cpu_threads(self.threads or (1 if self.built_in is not None else None)):
                sparing = self._sparing(only, drawing)
                parts = load(place, device=self.device, dtype=dtype, variant=variant, **sparing, **absent)
            self._tell_of_memory(parts, terminal)
            if self.controlnet is not None and (only is None or "controlnet" in only):
                from sana.apps.cli.controlnets import attach

                attach(parts, self.controlnet, terminal)
            if self.compile:
                parts.compile()
                pays = "is too small for --compile to pay" if self.built_in is not None else "is compiled"
                terminal.say(f"{self.model} {pays}; the first picture of a size takes longer for that.")
        seconds = time.perf_counter() - began
        terminal.event("loaded", model=parts.name, device=parts.device.type, seconds=round(seconds, 4))
        return parts, seconds

    def _sparing(self, only: Collection[str] | None, drawing: Any) -> dict[str, Any]:
        """Return the arguments of `load` that save memory."""
        from sana.apps.cli.controlnets import shape  # which imports this module
        from sana.engine.sparing import Plan

        mode = self.memory_mode
        if mode == "auto" and only is not None:
            mode = None
        limit = None if self.max_vram is None or mode is None else bytes_of(self.max_vram)
        config = None if self.quantize == "none" or only == ("vae",) else self.quantize
        plan = None
        if mode == "auto":
            plan = Plan(requests=drawing, controlnet=shape(self.controlnet) if self.controlnet is not None else None)
        return {"memory": mode, "max_memory": limit, "plan": plan, "quantization_config": config}

    def _tell_of_memory(self, parts: "Parts", terminal: Terminal) -> None:
        if self.memory == "auto" and parts.placement is not None:
            how = "part by part" if parts.placement.mode == "low" else "block by block"
            room = f"--max-vram {self.max_vram}" if self.max_vram else "the free memory"
            terminal.say(f"{self.model} does not fit into {room} at once, so it is loaded {how} as it is needed.")

    def _warn_of_namesakes(self, terminal: Terminal) -> None:
        """Say which of two things of one name is taken: a folder here, or a model that is known by it."""
        if self.model not in CARDS or not Path(self.model).is_dir():
            return
        if self.built_in is not None:
            terminal.say(f"There is a folder {self.model} here too. For the model in it: -m ./{self.model}")
        else:
            terminal.say(f"{self.model} is taken from the folder of that name here, not from the hub.")

    def _introduce_unnamed(self, terminal: Terminal) -> None:
        """Tell the terms of a published model that was named by its hub id, of which the plain files are loaded."""
        card = next((card for card in CARDS.values() if card.hub_id == self.model), None)
        if card is not None and self.folder is None:
            stored = FULL if card.variant is not None else card.dtypes
            introduce(dataclasses.replace(card, name=self.model, variant=None, dtypes=stored), terminal)

    def _variant(self, needed: Collection[str]) -> str | None:
        """Return the variant of the weights in a folder that has no others."""
        from sana.checkpoints.layout import MODEL_INDEX, index_parts, sole_variant

        if self.folder is None or not (self.folder / MODEL_INDEX).is_file():
            return None
        present = [name for name, entry in index_parts(self.folder).items() if entry is not None and name in needed]
        return sole_variant(self.folder, present)

    @contextlib.contextmanager
    def in_use(self, parts: "Parts") -> Iterator[None]:
        """Set the number of CPU threads for the length of a `with` block."""
        network = parts.transformer if parts.transformer is not None else parts.vae
        small = sum(weight.numel() for weight in network.parameters()) < SMALL_MODEL
        with _cpu_threads(self.threads or (1 if small else None)), out_of_memory_told():
            yield


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads, or with those there are, for the length of a `with` block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def introduce(card: Card, terminal: Terminal, name: str | None = None, parts: Collection[str] | None = None) -> None:
    """Say once what the user should know about a model before waiting for it.

    Args:
        name: another name than the card's means a model that follows the card.
        parts: those that will be loaded; None means all.

    Raises:
        ModelNotFound: it would have to be downloaded, and the disk has no room for it.
    """
    if card.hub_id in terminal.introduced:
        return
    facts = f"{millions(card.params)} parameters, {card.base_size} px"
    if name is not None and name != card.name:
        remark = f": {TOY}" if card.folder is not None else f", {terms(card)}"
        terminal.say(f"{name} has the architecture and the limits of {card.name} ({facts}){remark}.")
    elif card.folder is not None:
        which = "the built-in model" if card.base is None else "a built-in model"
        terminal.say(f"{card.name} is {which} ({facts}): {TOY}. For others: sana models")
    elif card.hub_id:
        terminal.introduced.add(card.hub_id)
        if cache.is_offline() or cache.cached(card, parts).complete:
            terminal.say(f"{card.name} is huggingface.co/{card.hub_id} ({facts}; {terms(card)}).")
        else:
            _announce(card, terminal, parts)


def _announce(card: Card, terminal: Terminal, parts: Collection[str] | None) -> None:
    """Say what a download brings, how large it is and on which terms, and check that there is room for it."""
    size, here = cache.download_size(card, parts), cache.cached(card, parts).size
    begun = f", of which {cache.said(here)} are here" if here else ""
    free = cache.said(cache.free_bytes(cache.folder()))
    place = cache.host() if card.name == card.hub_id else f"{cache.host()}/{card.hub_id}"
    terminal.say(f"{card.name} must be downloaded first, from {place}:")
    rows = {
        "size": f"about {cache.said(size)}{begun}; {free} are free in {cache.tilde(cache.folder())}",
        "licence": terms(card),
        "limits": "; ".join(card.limits),
        "bias": card.bias,
        "not for": card.not_for,
    }
    for line in listed(rows):
        terminal.say(line)
    cache.check_space(card, parts)


@contextlib.contextmanager
def hub_bars(*, shown: bool) -> Iterator[None]:
    """Let the hub library show its bars, or not, for the length of a `with` block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn the many forms of running out of memory into one error.

    Raises:
        OutOfMemory: instead of any of them.
    """
    try:
        yield
    except SanaError:
        raise
    except (RuntimeError, MemoryError) as error:
        from sana.engine.decode import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("The memory is full. Lower --batch-size or --size, or use a smaller model.") from error


MACHINE = Group(title="the model", options=Machine)
RECORDED = dataclasses.replace(MACHINE, title="the model; left out, what the file says", defaults=False)
"""For a file that says with which model, and how, it was made."""
