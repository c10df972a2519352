"""`sana train --demo`: the recipe in the package, on the pictures beside it."""

import importlib.resources
import shlex
from pathlib import Path

from sana.errors import ModelNotFound

NAME = "palms"
ADAPTER = "pytorch_lora_weights.safetensors"
PROMPT = "an orange palm tree left of a red house"


def demo() -> tuple[str, dict[str, str]]:
    """Return the path of the recipe, and the override that tells it where its pictures are in this installation.

    Raises:
        ModelNotFound: the pictures are not part of this installation.
    """
    folder = Path(str(importlib.resources.files("sana"))) / "assets" / "demo"
    if not (folder / NAME).is_dir():
        raise ModelNotFound("The pictures of the demo are not part of this installation: install it again.")
    return str(folder / f"{NAME}.toml"), {"flow_matching.data.path": str(folder / NAME)}


def next_steps(export: Path) -> list[str]:
    """What to type next: the same prompt without and with what was learnt."""
    order = f'  sana "{PROMPT}" --seed 2'
    return [
        "Now look at what it learnt:",
        f"{order} -o before.png",
        f"{order} --lora {shlex.quote(str(export / ADAPTER))} -o after.png",
    ]
