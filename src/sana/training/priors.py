"""Prior preservation: pictures of the class, drawn by the model before it is trained (DreamBooth, arXiv 2208.12242)."""

import logging
from pathlib import Path

from sana.checkpoints.storage import publish
from sana.engine.generate import generate_images
from sana.engine.parts import load
from sana.engine.request import Request
from sana.training.objectives.flow_settings import PriorSettings
from sana.training.starting import StartModel

_log = logging.getLogger(__name__)


def draw_missing(start: StartModel, prior: PriorSettings, side: int, seed: int) -> None:
    """Draw the class pictures that are not there yet, squares of `side` pixels; picture i has seed `seed` + i.

    Errors: those of generation; OSError naming the file that could not be written.
    """
    folder = Path(prior.folder)
    missing = [i for i in range(prior.count) if not _place(folder, i).exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("drawing %d pictures of '%s' into %s", len(missing), prior.prompt, folder)
    parts = load(start.name, device=start.device)
    for index in missing:
        request = Request(
            prompt=prior.prompt,
            seed=seed + index,
            width=side,
            height=side,
            steps=prior.steps,
            guidance=prior.guidance,
        )
        picture = generate_images(parts, request).image
        publish(_place(folder, index), lambda beside, picture=picture: picture.save(beside, "PNG"))  # type: ignore[misc]


def _place(folder: Path, index: int) -> Path:
    return folder / f"class-{index:04d}.png"
