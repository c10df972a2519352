"""`--dry-run`: what an order will draw and about what it costs, without drawing, downloading or writing anything."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana.apps.cli import cache
from sana.apps.cli.controlnets import card_of
from sana.apps.cli.machine import SMALL_MODEL
from sana.apps.cli.order import Order
from sana.apps.cli.output import Terminal, duration, printable
from sana.apps.cli.sizing import Sizing
from sana.apps.cli.values import runs_of, seeds_text
from sana.cards import CARDS, Card
from sana.checkpoints.built_in import part_folder
from sana.config import AutoencoderConfig, TransformerConfig
from sana.engine import estimate
from sana.engine.estimate import TextShape
from sana.engine.request import ResolvedRequest
from sana.errors import CheckpointError, InvalidInput

MOST_SHOWN = 5
"""Files and jobs that are listed one by one."""
LOAD_SECONDS, LOAD_RATE = 2.0, 1e9
"""Of loading: for the libraries, and bytes a second from a disk that has been read before."""
PARTS = ("text_encoder", "transformer", "vae")


def tell(order: Order, terminal: Terminal) -> int:
    """Print settings, files and the estimate."""
    card = _card(order)
    requests = [request.resolve(card) for request in order.fitted(card)]
    dtypes, device = _machine(order, card)
    from sana.engine.placement import pick_device

    sizing = Sizing.of(order.machine, card, requests, dtypes, _text_shape(order), pick_device(device))
    times = _times(order, sizing)
    nearest = None if sizing.fits else sizing.nearest()
    facts = {
        "memory_bytes": sizing.bytes,
        "memory_mode": sizing.mode,
        "fits": sizing.fits,
        "nearest_that_fits": None if nearest is None else {"flags": nearest[0], "memory_bytes": nearest[1]},
        "free_memory_bytes": sizing.limit,
        "download_bytes": _to_download(card) + _network_to_download(order),
        "free_disk_bytes": cache.free_bytes(order.files[0].parent),
        "free_cache_bytes": cache.free_bytes(cache.folder()),
    }
    drawn = estimate.drawn(card, requests[0])
    document = {
        "dry_run": True,
        "model": card.name,
        "dtypes": dtypes,
        "device": device,
        "settings": requests[0].to_dict(),
        "drawn": {"width": drawn[1], "height": drawn[0]},
        "jobs": [{"settings": r.to_dict(), "seeds": list(j.seeds)} for j, r in zip(order.jobs, requests, strict=True)],
        "seeds": order.seeds,
        "files": [str(file) for file in order.files],
        "estimate": {"seconds": {name: round(value, 3) for name, value in times.items()}, **facts},
        "warnings": terminal.warnings,
    }
    terminal.document(document)
    terminal.result(printable(_page(order, card, requests, document, times)))
    return 0


def _page(order: Order, card: Card, requests: list[ResolvedRequest], facts: Mapping[str, Any], times: Any) -> str:
    first, cost, drawn = requests[0], facts["estimate"], facts["drawn"]
    asked, made = f"{first.width}x{first.height}", f"{drawn['width']}x{drawn['height']}"
    count, prompts = len(order.seeds), len({r.prompt for r in requests})
    kinds = dict.fromkeys(facts["dtypes"].values())
    precision = ", ".join(f"{part.replace('_', ' ')} {name}" for part, name in facts["dtypes"].items())
    download, free = cost["download_bytes"], cost["free_cache_bytes"]
    rows = {
        "model": f"{card.name}, {next(iter(kinds)) if len(kinds) == 1 else precision}, on {facts['device']}",
        "prompt": first.prompt if prompts == 1 else f"{prompts} prompts, the first: {first.prompt}",
        "negative": first.negative_prompt,
        "size": asked if asked == made else f"{asked}, drawn at {made} and resized",
        "steps": f"{first.steps}",
        "guidance": f"{first.guidance:g}",
        "sampler": first.sampler,
        **{axis.field.replace("_", " "): ", ".join(axis.labels) for axis in order.axes},
        "seeds": seeds_text(list(dict.fromkeys(order.seeds))) + (" (drawn for this run)" if order.drew_seed else ""),
        "best of": ", ".join(dict.fromkeys(f"{job.best_of} candidates" for job in order.jobs if job.best_of)),
        "files": _files(order),
        "time": f"about {duration(times['all'])}"
        + (f", {duration(times['all'] / count)} a picture" if count > 1 else "")
        + f"; and {duration(times['load'])} to load",
        "memory": f"about {cache.said(cost['memory_bytes'])}{_how(cost['memory_mode'])}"
        + (f"; --max-vram {order.machine.max_vram}" if order.machine.max_vram else _of(cost["free_memory_bytes"])),
        "fits": _fitting(cost),
        "download": f"about {cache.said(download)}{_of(free)}" if download else "nothing",
        "disk": f"{cache.said(cost['free_disk_bytes'])} free for the pictures",
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items() if value]
    return "\n".join([*lines, "Nothing was drawn, downloaded or written."])


def _how(mode: str | None) -> str:
    return "" if mode is None else f" with --memory {mode}"


def _fitting(cost: Mapping[str, Any]) -> str:
    """Say nothing where it fits, else what would."""
    if cost["fits"]:
        return ""
    nearest = cost["nearest_that_fits"]
    if nearest is None:
        return "not on this machine, with no setting"
    return f"not like this; with {nearest['flags']} (about {cache.said(nearest['memory_bytes'])})"


def _of(free: int | None) -> str:
    return "" if free is None else f"; {cache.said(free)} are free"


def _files(order: Order) -> str:
    names = [str(file) for file in order.files]
    if len(names) <= MOST_SHOWN:
        return ", ".join(names)
    return f"{len(names)}: {', '.join(names[: MOST_SHOWN - 2])}, … {names[-1]}"


def _times(order: Order, sizing: Sizing) -> dict[str, float]:
    """Return seconds by stage and in all: text once for each prompt, the rest for each batch."""
    import torch

    jobs = sizing.stages()
    before = torch.get_num_threads()
    torch.set_num_threads(order.machine.threads or (1 if sizing.card.params < SMALL_MODEL else before))
    try:
        rates = estimate.measure(str(sizing.device), [stage.dtype for stage in jobs[0]])
    finally:
        torch.set_num_threads(before)
    times = {stage.name: 0.0 for job in jobs for stage in job}
    prompts: set[str] = set()
    for job, request, parts in zip(order.jobs, sizing.requests, jobs, strict=True):
        counts = [job.best_of] if job.best_of else [len(run) for run in runs_of(job.seeds)]
        batches = sum(-(-count // request.batch_size) for count in counts)
        for stage in parts:
            often = batches if stage.name != "text" else int(request.prompt not in prompts)
            times[stage.name] += often * estimate.seconds(stage, rates, sizing.mode, LOAD_RATE)
        prompts.add(request.prompt)
    weights = sum({stage.part: stage.weights for stage in jobs[0]}.values())
    return {**times, "all": sum(times.values()), "load": LOAD_SECONDS + weights / LOAD_RATE}


def _machine(order: Order, card: Card) -> tuple[dict[str, str], str]:
    """Return the dtype of each part, and the device."""
    from sana.engine.parts import recommended_dtypes
    from sana.engine.placement import pick_device

    device = pick_device(order.machine.device)
    chosen = order.machine.dtype
    if chosen == "auto":
        recommended = recommended_dtypes(card, device)
        table = recommended if isinstance(recommended, Mapping) else {}
        names = {part: str(table.get(part, "float32")).removeprefix("torch.") for part in PARTS}
        return {part: name if name in estimate.BYTES else "float32" for part, name in names.items()}, str(device)
    half = {"text_encoder": "bfloat16", "vae": "bfloat16"} if chosen == "float16" else {}
    return {**dict.fromkeys(PARTS, chosen), **half}, str(device)


def _card(order: Order) -> Card:
    """Return the card of the model, or for a folder one with what its configuration files say.

    Raises:
        InvalidInput: the model is known by its hub id only, so that nothing is known of it before it is downloaded.
        CheckpointError: the folder holds no model.
    """
    machine = order.machine
    known = machine.card or next((card for card in CARDS.values() if card.hub_id == machine.model), None)
    if known is not None:
        return known
    if machine.folder is None:
        raise InvalidInput(f"Nothing is known of {machine.model} before it is downloaded. Drop `dry_run`.")
    transformer = TransformerConfig.from_dict(_config(machine.folder, "transformer"))
    vae = AutoencoderConfig.from_dict(_config(machine.folder, "vae"))
    base = CARDS["sana-sprint-1.6b-1024" if transformer.guidance_embeds else "sana-1.6b-1024"]
    named = CARDS.get(str(_json(machine.folder / "model_index.json").get("_sanakit_card")))
    size = transformer.sample_size * vae.spatial_compression_ratio
    params = _params(transformer)
    from sana.engine.model_card import at_depth

    base = (at_depth(named, transformer, params) if named is not None else None) or base
    return dataclasses.replace(
        base,
        name=machine.folder.name,
        transformer=transformer,
        autoencoder=vae,
        params=params,
        base_size=size,
        hub_id=None,
        sizes=base.sizes if base is named else None,
    )


def _params(c: TransformerConfig) -> int:
    """Return about how many weights a transformer has."""
    d, hidden = c.inner_dim, int(c.mlp_ratio * c.inner_dim)
    layer = 8 * d * d + 3 * d * hidden + 18 * hidden
    return c.num_layers * layer + d * (c.caption_channels + 9 * d + 2 * c.in_channels * c.patch_size**2)


def _text_shape(order: Order) -> TextShape | None:
    folder = order.machine.built_in or order.machine.folder
    if folder is None:
        return None
    config = _config(folder, "text_encoder")
    names = {f.name for f in dataclasses.fields(TextShape)} & set(config)
    return TextShape(**{name: config[name] for name in names if type(config[name]) is int})


def _config(folder: Path, part: str) -> dict[str, Any]:
    return _json(part_folder(folder, part) / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is missing or no JSON, so nothing can be said about this model. Restore it.")
    return content


def _to_download(card: Card) -> int:
    state = cache.cached(card)
    return 0 if state.complete else max(cache.download_size(card) - state.size, 0)


def _network_to_download(order: Order) -> int:
    """Return how many bytes of a control network beside the model are not here."""
    name = order.machine.controlnet
    card = card_of(name) if name is not None else None
    if card is None:
        return 0
    own = ("controlnet", "transformer") if card.is_single_file else ("controlnet",)  # one file has both
    state = cache.cached(card, own)
    return 0 if state.complete else max(cache.download_size(card, own) - state.size, 0)
