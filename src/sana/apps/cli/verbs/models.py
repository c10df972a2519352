"""`sana models`: the table of known models, or everything about one."""

from collections.abc import Sequence
from typing import Any

from sana.apps.cli import arguments, cache
from sana.apps.cli.known import millions, no_model, terms
from sana.apps.cli.output import Terminal, listed
from sana.cards import CARDS, Card
from sana.errors import InvalidInput

USAGE = "sana models [NAME] [options]"
DESCRIPTION = "List the models that -m knows by name, or tell all about one of them. Loads and downloads nothing."


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Print the table, or the card of the model that is named."""
    names, _ = arguments.read(words, (), usage=USAGE, description=DESCRIPTION)
    if len(names) > 1:
        raise InvalidInput("`sana models` tells about one model at a time; name one, or none for the table.")
    if names and names[0] not in CARDS:
        raise no_model(names[0])
    chosen = [CARDS[name] for name in names] or list(CARDS.values())
    terminal.document({"models": [_facts(card) for card in chosen]})
    terminal.result(_sheet(chosen[0]) if names else _table(chosen))
    return 0


def _facts(card: Card) -> dict[str, Any]:
    state = cache.cached(card)
    return {
        "name": card.name,
        "hub_id": card.hub_id,
        "built_in": card.folder is not None,
        "here": state.complete,
        "bytes_here": state.size,
        "download_bytes": cache.download_size(card),
        "kind": card.product,
        "pixels": card.base_size,
        "parameters": card.params,
        "steps": card.steps,
        "guidance": card.guidance,
        "sampler": card.sampler,
        "languages": list(card.languages),
        "licence": card.licence,
        "terms": list(card.terms),
        "research_only": card.research_only,
        "limits": list(card.limits),
        "bias": card.bias,
        "not_for": card.not_for,
        "note": card.note,
    }


def _table(cards: Sequence[Card]) -> str:
    rows = [("model", "pixels", "params", "steps", "languages", "download")]
    for card in cards:
        size, languages = str(card.base_size), " ".join(card.languages)
        rows.append((card.name, size, millions(card.params), str(card.steps), languages, _place(card)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    licences = dict.fromkeys(f"{'built in' if card.folder else 'others'}: {terms(card)}" for card in cards)
    advice = 'Draw with one: sana -m NAME "PROMPT". Limits, bias and terms: sana models NAME'
    return "\n".join([*lines, "", "Licences:", *(f"  {text}" for text in licences), advice])


def _place(card: Card) -> str:
    """Return the cell that says whether a model is here, or how large its download is."""
    if card.folder is not None:
        return "built in, a toy"
    return "here" if cache.cached(card).complete else cache.said(cache.download_size(card))


def _sheet(card: Card) -> str:
    rows: dict[str, str | Sequence[str]] = {
        "where": "built in" if card.folder else f"huggingface.co/{card.hub_id}",
        "download": _download(card),
        "kind": card.product,
        "parameters": f"{millions(card.params)} (the transformer)",
        "pixels": _sizes(card),
        "defaults": f"{card.steps} steps, guidance {card.guidance:g}, sampler {card.sampler}",
        "languages": ", ".join(card.languages),
        "licence": terms(card),
        "terms": card.terms,
        "limits": card.limits,
        "bias": card.bias,
        "not for": card.not_for,
        "note": card.note,
    }
    return "\n".join([card.name, *listed(rows)])


def _download(card: Card) -> str:
    if card.folder is not None:
        return ""
    parts = {name.replace("_", " "): size for name, size in card.download_bytes.items() if name != "tokenizer"}
    parts["autoencoder"] = parts.pop("vae")
    sizes = ", ".join(f"{name} {cache.said(size)}" for name, size in parts.items())
    state = cache.cached(card)
    here = (
        "complete on this computer" if state.complete else f"{cache.said(state.size)} of it here" if state.size else ""
    )
    return f"about {cache.said(cache.download_size(card))} ({sizes}){'; ' + here if here else ''}"


def _sizes(card: Card) -> str:
    if card.sizes is not None:
        return ", ".join(f"{w}x{h}" for h, w in card.sizes) + " only"
    return f"{card.base_size}x{card.base_size}, or other shapes of that area"
