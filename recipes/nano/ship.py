"""Puts a built-in model into the package, and prints the golden values to keep for it.

    python recipes/nano/ship.py nano-controlnet runs/nano/4-controlnet/export
    python recipes/nano/ship.py nano-sprint runs/nano/5-sprint/export
    python recipes/nano/ship.py nano-sprint          # only the golden values of what is there

What a model shares with another is left out; transformer and control network are kept in half precision. The entry that
is printed goes into `GOLDEN` of `sana/engine/golden.py`.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sana.cards import CARDS, Card
from sana.checkpoints.built_in import folder_of
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.folder import save_parts
from sana.checkpoints.layout import MODEL_INDEX
from sana.engine.angles import note_of
from sana.engine.golden import GOLDEN, Golden, observe
from sana.engine.model_card import CARD_KEY
from sana.engine.parts import Parts, load

STORED = {"default": "auto", "transformer": "float16", "text_encoder": "auto", "vae": "auto"}
CLASSES = {"sprint": "SanaSprintPipeline", "controlnet": "SanaControlNetPipeline"}
PROMPT, SEED, MOST_STEPS = "a red fish above a yellow boat", 7, 6
NUMBERS, BYTES = 10, 24
"""Values in a line of an entry."""


def ship(card: Card, export: Path) -> Path:
    """Put what `export` holds, a whole model or a control network alone, into the package, in place of what was there.

    Errors: as `load` and `save_parts`.
    """
    parts = _parts(card, export)
    wanted = {**parts.components, **({"controlnet": parts.controlnet} if card.controlnet is not None else {})}
    target = folder_of(card)
    with tempfile.TemporaryDirectory(dir=target.parent) as stage:
        made = Path(stage) / target.name
        kind = CLASSES.get(card.product, "SanaPipeline")
        save_parts(made, wanted, class_name=kind, notes={CARD_KEY: card.name} | note_of(parts.angles))
        for name in card.shared:
            shutil.rmtree(made / name)
        made.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def _parts(card: Card, export: Path) -> Parts:
    if (export / MODEL_INDEX).is_file():
        return load(export, device="cpu", dtype=STORED)
    branch = SanaControlNetModel.from_pretrained(export, torch_dtype="float16")
    return load(str(card.base), device="cpu", dtype=STORED, controlnet=branch)


def golden(card: Card) -> Golden:
    """Return what a built-in model gives in float32, here and now, for the request that is kept or a usual one."""
    kept = GOLDEN.get(card.name)
    usual = {"prompt": PROMPT, "seed": SEED, "steps": min(card.steps, MOST_STEPS)}
    return observe(load(card.name, device="cpu", dtype="float32"), usual if kept is None else kept.request)


def entry(name: str, kept: Golden) -> str:
    """Return golden values as the lines of `GOLDEN` that hold them."""
    request = str(dict(kept.request)).replace("'", '"')
    latents = [str(value) for value in kept.latents]
    numbers = [", ".join(latents[i : i + NUMBERS]) for i in range(0, len(latents), NUMBERS)]
    pixels = [kept.pixels[i : i + BYTES].hex() for i in range(0, len(kept.pixels), BYTES)]
    lines = [
        f'    "{name}": Golden(',
        f"        request={request},",
        f"        tokens={kept.tokens},",
        "        latents=(",
        *(f"            {line}," for line in numbers),
        "        ),",
        "        pixels=bytes.fromhex(",
        *(f'            "{line}"' for line in pixels),
        "        ),",
        "    ),",
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    """Carry out what the words say."""
    built_in = [name for name, card in CARDS.items() if card.folder is not None]
    if not 1 <= len(words) <= 2 or words[0] not in built_in:
        sys.stderr.write(f"usage: python recipes/nano/ship.py {'|'.join(built_in)} [EXPORT]\n")
        return 2
    card = CARDS[words[0]]
    if len(words) == 2:
        folder = ship(card, Path(words[1]))
        size: Any = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        sys.stderr.write(f"{folder}: {size / 1e6:.2f} MB\n")
    sys.stdout.write(entry(card.name, golden(card)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
