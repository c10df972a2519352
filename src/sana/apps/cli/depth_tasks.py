"""What `sana models` does with the depth of a model: a deeper or a shallower one, written beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.apps.cli.known import check_model, millions
from sana.apps.cli.machine import Machine
from sana.apps.cli.options import picture_keys
from sana.apps.cli.output import Terminal, listed
from sana.apps.cli.prompts import read_prompts
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from sana.engine.resizing import Resized

PROMPTS = 100
"""Prompts of the drawn world that the built-in model, and what was made of it, is ranked with."""


def grow(model: str, target: str, settings: dict[str, Any], force: bool, terminal: Terminal) -> dict[str, Any]:
    """Write a deeper model.

    Raises:
        InvalidInput: depth, strategy or settings do not fit the model.
        ModelNotFound, CheckpointError: it cannot be read.
    """
    check_model(model)
    from sana.engine.resizing import grow_model
    from sana.models.growth import STRATEGIES, Growth

    growth = Growth(**settings)
    made = grow_model(model, target, growth, force=force)
    strategy = STRATEGIES[growth.strategy]
    whole = strategy.identity and growth.gate and growth.keep in (None, made.before) and not growth.add_qk_norm
    draws = f"as {model} does, until it is trained" if whole else f"otherwise than {model}, so train it first"
    rows = {"strategy": f"{growth.strategy}: {strategy.summary}", "draws": draws}
    return _told(model, target, made, rows, {"strategy": growth.strategy}, terminal)


def prune(
    model: str, target: str, layers: int, prompts: str | None, steps: int | None, force: bool, terminal: Terminal
) -> dict[str, Any]:
    """Write a shallower model: of the blocks, those that change most while it draws.

    Raises:
        InvalidInput: the depth is none, or nothing tells what to draw.
        ModelNotFound, CheckpointError: the model cannot be read.
    """
    machine = Machine(model=model)
    texts = _texts(prompts) if prompts is not None else None
    parts, _ = machine.load(terminal)
    if texts is None:
        texts = _drawn_world(model, parts)
    from sana.engine.resizing import prune_model
    from sana.evaluation.importance import block_importance
    from sana.models.pruning import most_important

    most_important([0.0] * len(parts.transformer.transformer_blocks), layers)  # refused before minutes go into it
    with machine.in_use(parts), terminal.count(len(texts), text="ranking") as progress:
        values = block_importance(
            parts, texts, steps=steps, progress=lambda done, of: progress.move(done, of, f"ranking · {done}/{of}")
        )
    del parts
    kept = most_important(values, layers)
    made = prune_model(model, target, kept, force=force)
    removed = [index for index in range(made.before) if index not in kept]
    rows = {
        "importance": ", ".join(f"{value:.3f}" for value in values),
        "removed": f"blocks {', '.join(map(str, removed))}, ranked over {len(texts)} prompts",
        "draws": f"worse than {model}, until it is trained shortly",
    }
    facts = {"importance": values, "kept": list(kept), "prompts": len(texts)}
    return _told(model, target, made, rows, facts, terminal)


def _texts(source: str) -> Sequence[str]:
    return [str(entry.values["prompt"]) for entry in read_prompts(source, picture_keys())]


def _drawn_world(model: str, parts: Any) -> Sequence[str]:
    """Return prompts for a model that knows the drawn world.

    Raises:
        InvalidInput: it is another one, and only its user knows what it should go on drawing.
    """
    if parts.card is None or not parts.card.draws_cutouts:
        raise InvalidInput(f"What does {model} draw? Name a file with a prompt in each line, about 100: --prompts FILE")
    from sana.evaluation.prompts import TASKS, all_prompts

    return [prompt.text for prompt in all_prompts(PROMPTS // len(TASKS))]


def _told(
    model: str, target: str, made: "Resized", rows: dict[str, str], facts: dict[str, Any], terminal: Terminal
) -> dict[str, Any]:
    place = Path(target).expanduser()
    size = f"{made.before} to {made.after}, {millions(made.params)} parameters"
    terminal.result("\n".join([f"✓ {place}", *listed({"blocks": size, **rows})]), colour="green")
    sizes = {"layers_before": made.before, "layers": made.after, "params": made.params}
    return {"name": model, "target": str(place), **sizes, **facts}
