"""What the command tells about models: the table of all, the page of one, and the same as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana.apps.cli import cache
from sana.apps.cli.known import millions, terms
from sana.apps.cli.output import listed
from sana.cards import Card
from sana.checkpoints import library


def facts(card: Card) -> dict[str, Any]:
    """Return all about a known model, JSON-ready."""
    state = cache.cached(card)
    return {
        "name": card.name,
        "hub_id": card.hub_id,
        "original": card.original,
        "built_in": card.folder is not None,
        "base": card.base,
        "shared": list(card.shared),
        "here": state.complete,
        "bytes_here": state.size,
        "download_bytes": cache.download_size(card),
        "parts": dict(card.download_bytes),
        "kind": card.product,
        "pixels": card.base_size,
        "parameters": card.params,
        "control_parameters": card.control_params,
        "control": card.control,
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


def table(cards: Sequence[Card]) -> str:
    """Return the table of models."""
    rows = [("model", "pixels", "params", "steps", "languages", "download")]
    for card in cards:
        params = millions(card.params + card.control_params)
        row = (card.name, str(card.base_size), params, str(card.steps), " ".join(card.languages), _place(card))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    licences: dict[str, list[str]] = {}
    for card in cards:
        known = licences.setdefault("built in" if card.folder else "others", [])
        known += [terms(card)] if terms(card) not in known else []
    return "\n".join([*lines, "", "Licences:", *listed(licences), "", ADVICE])


def page(card: Card) -> str:
    """Return all about a known model."""
    rows: dict[str, str | Sequence[str]] = {
        "where": _where(card) if card.folder else f"huggingface.co/{card.hub_id}",
        "download": _download(card),
        "here": _here(card),
        "kind": card.product,
        "parameters": _parameters(card),
        "pixels": _sizes(card),
        "defaults": f"{card.steps} steps, guidance {card.guidance:g}, sampler {card.sampler}",
        "control": f"--control {card.control}" if card.control else "",
        "languages": ", ".join(card.languages),
        "licence": terms(card),
        "terms": card.terms,
        "limits": card.limits,
        "bias": card.bias,
        "not for": card.not_for,
        "note": card.note,
    }
    return "\n".join([card.name, *listed(rows)])


def folder_facts(name: str, folder: Path) -> dict[str, Any]:
    """Return what a model's folder says about itself, JSON-ready; nothing of it is loaded."""
    from sana.checkpoints.layout import MODEL_INDEX, index_parts, read_json

    sizes = library.part_sizes(folder)
    index = index_parts(folder)
    card = read_json(folder / MODEL_INDEX).get("_sanakit_card")
    return {
        "name": name,
        "folder": cache.tilde(folder),
        "follows": card if isinstance(card, str) else None,
        "parts": {part: {"class": entry[1], "bytes": sizes.get(part, 0)} for part, entry in index.items() if entry},
        "bytes": sum(sizes.values()),
    }


def folder_page(found: dict[str, Any]) -> str:
    """Return the page of a folder."""
    rows: dict[str, str | Sequence[str]] = {
        "where": found["folder"],
        "size": cache.said(found["bytes"]),
        "follows": found["follows"] or "",
        "parts": [f"{part}: {one['class']}, {cache.said(one['bytes'])}" for part, one in found["parts"].items()],
        **({"commit": found["commit"]} if "commit" in found else {}),
    }
    return "\n".join([found["name"], *listed(rows)])


def _place(card: Card) -> str:
    """Return the cell that says whether a model is here, or how large its download is."""
    if card.folder is not None:
        return "a toy, here"
    return "here" if cache.cached(card).complete else cache.said(cache.download_size(card))


def _where(card: Card) -> str:
    """Return where a built-in model is, and which of its parts are another's."""
    if not card.shared:
        return "built in"
    *first, last = (_CALLED.get(part, part) for part in card.shared)
    return f"built in; {', '.join(first)} and {last} are those of {card.base}"


def _download(card: Card) -> str:
    if card.folder is not None:
        return ""
    parts = {name: size for name, size in card.download_bytes.items() if name != "tokenizer"}
    sizes = ", ".join(f"{_CALLED.get(name, name)} {cache.said(size)}" for name, size in parts.items())
    shared = f"; text encoder and autoencoder are those of {card.base}" if card.base else ""
    return f"about {cache.said(cache.download_size(card))} ({sizes}){shared}"


def _here(card: Card) -> str:
    """Return how much of a model is on this computer, and where."""
    if card.hub_id is None:
        return ""
    state, held = cache.cached(card), library.find(card.hub_id, cache.folder())
    if held is None or not state.size:
        return f"no; to fetch it: sana models pull {card.name}"
    commits = ", ".join(commit[:12] for commit in held.commits)
    whole = "complete on this computer" if state.complete else f"{cache.said(state.size)} of it here"
    return f"{whole}, {cache.said(held.size)} in {cache.tilde(held.folder)}" + (
        f" (commit {commits})" if commits else ""
    )


def _parameters(card: Card) -> str:
    branch = f", and {millions(card.control_params)} of the control network" if card.control_params else ""
    return f"{millions(card.params)} (the transformer{branch})"


def _sizes(card: Card) -> str:
    if card.sizes is not None:
        return ", ".join(f"{w}x{h}" for h, w in card.sizes) + " only"
    return f"{card.base_size}x{card.base_size}, or other shapes of that area"


_CALLED = {"text_encoder": "text encoder", "vae": "autoencoder", "controlnet": "control network"}
ADVICE = """\
To draw with one: sana -m NAME "PROMPT"
Its terms and limits: sana models info NAME; to fetch it: sana models pull NAME"""
