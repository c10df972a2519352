"""The model and the machine it runs on: the flags that choose them, and the loading."""

import contextlib
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.models import DEFAULT_MODEL, TOY, check_model, millions
from sana.apps.cli.output import Terminal
from sana.apps.cli.values import read_device
from sana.cards import CARDS, Card
from sana.errors import InvalidInput, OutOfMemory, SanaError

if TYPE_CHECKING:
    from sana.engine.parts import Parts

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

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise InvalidInput(f"`threads` must be a whole number from 1 to {MAX_THREADS} but is {self.threads}.")

    @property
    def card(self) -> Card | None:
        """The card of a model that was named by it; a folder may hold any model, which shows when it is loaded."""
        return None if self.folder is not None else CARDS.get(self.model)

    @property
    def folder(self) -> Path | None:
        """The folder that was named, if it is one; a folder goes before a model of that name."""
        path = Path(self.model).expanduser()
        return path if self.model.strip() and path.is_dir() else None

    @property
    def source(self) -> str:
        """The model as a later command finds it from anywhere; the home folder stays a tilde, to name no user."""
        if self.folder is None:
            return self.model
        path, home = self.folder.resolve(), Path("~").expanduser().resolve()
        return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)

    def load(self, terminal: Terminal, only: Collection[str] | None = None) -> tuple["Parts", float]:
        """Load the model, or only some parts of it, and tell how many seconds it took."""
        began = time.perf_counter()
        card = self.card
        if (card is not None and card.folder is not None) or self.folder is not None:
            bar: contextlib.AbstractContextManager[Any] = terminal.count(1, text=f"loading {self.model}")
        else:  # the hub library draws its own
            bar = _hub_bars(shown=not terminal.quiet and sys.stderr.isatty())
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
            parts = load(self.model, device=self.device, dtype=dtype, variant=variant, **absent)
        return parts, time.perf_counter() - began

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
        import torch

        before = torch.get_num_threads()
        network = parts.transformer if parts.transformer is not None else parts.vae
        small = sum(weight.numel() for weight in network.parameters()) < SMALL_MODEL
        torch.set_num_threads(self.threads or (1 if small else before))
        try:
            with out_of_memory_told():
                yield
        finally:
            torch.set_num_threads(before)


def introduce(card: Card, terminal: Terminal, name: str | None = None) -> None:
    """Say what the user should know about a model before waiting for it; another `name` than the card's: a follower."""
    facts = f"{millions(card.params)} parameters, {card.base_size} px"
    if name is not None and name != card.name:
        remark = f": {TOY}" if card.folder is not None else f", {card.licence}"
        terminal.say(f"{name} has the architecture and the limits of {card.name} ({facts}){remark}.")
    elif card.folder is not None:
        terminal.say(f"{card.name} is the built-in model ({facts}): {TOY}. For others: sana models")
    elif card.hub_id:
        terms = f"{card.licence}{', research only' if card.research_only else ''}"
        terminal.say(f"{card.name} comes from huggingface.co/{card.hub_id} ({terms}); missing files are downloaded.")


@contextlib.contextmanager
def _hub_bars(*, shown: bool) -> Iterator[None]:
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
