"""`sana models`: the table of known models, or everything about one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana.apps.cli import arguments
from sana.apps.cli.output import Terminal
from sana.cards import CARDS, Card
from sana.errors import InvalidInput, ModelNotFound, did_you_mean

USAGE = "sana models [NAME] [options]"
DESCRIPTION = "List the models that -m knows by name, or tell all about one of them. Loads and downloads nothing."


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Print the table, or the card of the model that is named."""
    names, _ = arguments.read(words, (), usage=USAGE, description=DESCRIPTION)
    if len(names) > 1:
        raise InvalidInput("`sana models` tells about one model at a time; name one, or none for the table.")
    if names and names[0] not in CARDS:
        raise _no_model(names[0])
    chosen = [CARDS[name] for name in names] or list(CARDS.values())
    terminal.document({"models": [_facts(card) for card in chosen]})
    terminal.result(_sheet(chosen[0]) if names else _table(chosen))
    return 0


def check_model(name: str) -> None:
    """Refuse a name that is no card, no path and no hub id; the others are found, or not, when the model is loaded.

    Raises:
        ModelNotFound: naming what is meant, perhaps.
    """
    if name not in CARDS and "/" not in name and not Path(name).expanduser().exists():
        raise _no_model(name)


def _no_model(name: str) -> ModelNotFound:
    longer = next((f" Did you mean '{card}'?" for card in CARDS if name and card.startswith(name)), "")
    return ModelNotFound(f"There is no model '{name}'.{longer or did_you_mean(name, CARDS)} All of them: sana models")


def millions(params: int) -> str:
    """Return a number of parameters as one says it: 8.9 M, 592 M, 1.6 B."""
    size = params / 1e6
    return f"{size / 1000:.1f} B" if size >= 1000 else f"{size:.0f} M" if size >= 100 else f"{size:.1f} M"


def _facts(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "hub_id": card.hub_id,
        "built_in": card.folder is not None,
        "kind": card.product,
        "pixels": card.base_size,
        "parameters": card.params,
        "steps": card.steps,
        "guidance": card.guidance,
        "sampler": card.sampler,
        "languages": list(card.languages),
        "licence": card.licence,
        "research_only": card.research_only,
        "note": card.note,
    }


def _table(cards: Sequence[Card]) -> str:
    rows = [("model", "pixels", "parameters", "steps", "languages", "")]
    for card in cards:
        remark = "built in, a toy" if card.folder else "research only" if card.research_only else ""
        size, languages = str(card.base_size), " ".join(card.languages)
        rows.append((card.name, size, millions(card.params), str(card.steps), languages, remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    terms = dict.fromkeys(f"{'built in' if card.folder else 'the others'}: {card.licence}" for card in cards)
    advice = 'Draw with one: sana -m NAME "PROMPT". More about one: sana models NAME'
    return "\n".join([*lines, "", f"Licences: {'; '.join(terms)}.", advice])


def _sheet(card: Card) -> str:
    facts = {
        "where": "built in" if card.folder else f"huggingface.co/{card.hub_id}",
        "kind": card.product,
        "parameters": f"{millions(card.params)} (the transformer)",
        "pixels": _sizes(card),
        "defaults": f"{card.steps} steps, guidance {card.guidance:g}, sampler {card.sampler}",
        "languages": ", ".join(card.languages),
        "licence": card.licence + (", research only" if card.research_only else ""),
        "note": card.note,
    }
    return "\n".join([card.name, *(f"  {name:<11} {value}" for name, value in facts.items() if value)])


def _sizes(card: Card) -> str:
    if card.sizes is not None:
        return ", ".join(f"{w}x{h}" for h, w in card.sizes) + " only"
    return f"{card.base_size}x{card.base_size}, or other shapes of that area"


DEFAULT_MODEL = "nano"
TOY = "a toy that shows that everything works, not SANA's quality"
