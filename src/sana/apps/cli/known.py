"""Models as the command names them: the one it draws with by itself, and how a model is spoken of."""

from pathlib import Path

from sana.cards import CARDS, Card
from sana.errors import ModelNotFound, did_you_mean

DEFAULT_MODEL = "nano"
TASKS = ("info", "pull", "verify", "rm", "grow", "prune")
"""What `sana models` does with one of them."""
TOY = "a toy that shows that everything works, not SANA's quality"


def check_model(name: str) -> None:
    """Refuse a name that is no card, no path and no hub id; the others are found, or not, when the model is loaded.

    Raises:
        ModelNotFound: naming what is meant, perhaps.
    """
    if name not in CARDS and "/" not in name and not Path(name).expanduser().exists():
        raise no_model(name)


def no_model(name: str) -> ModelNotFound:
    """Return the error for a name that means no model."""
    return ModelNotFound(f"There is no model '{name[:80]}'.{did_you_mean(name, CARDS)} All of them: sana models")


def millions(params: int) -> str:
    """Return a number of parameters as one says it: 8.9 M, 592 M, 1.6 B."""
    size = params / 1e6
    return f"{size / 1000:.1f} B" if size >= 1000 else f"{size:.0f} M" if size >= 100 else f"{size:.1f} M"


def terms(card: Card) -> str:
    """Return the licence in a few words."""
    return card.licence + (", for research only" if card.research_only else "")
