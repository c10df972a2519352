"""Prior preservation: pictures of the class, one's own or drawn by the model before it is trained.

Source: DreamBooth, arXiv 2208.12242.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana.checkpoints.storage import publish, write_json
from sana.data.buckets import enlargement
from sana.data.examine import check_share
from sana.data.folder import FolderSource
from sana.data.open import has_shards, open_source
from sana.data.samples import BadSample, Finding, Sample
from sana.engine.generate import generate_images
from sana.engine.parts import load
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.training.config import restated
from sana.training.dataset_batches import PRIOR, refuse_small
from sana.training.objectives.flow_settings import PriorSettings
from sana.training.starting import StartModel

NOTE = "class.json"
"""File in the folder that says how the drawn pictures there were drawn."""
_DRAWN = re.compile(r"class-(\d{4,})\.png")
_log = logging.getLogger(__name__)


def missing_numbers(start: StartModel, prior: PriorSettings, side: int) -> list[int]:
    """Return the numbers of the pictures that are still to be drawn, to have `prior.count` with those of one's own.

    Raises:
        InvalidInput: there are drawn pictures of other settings, too small ones, or too few in tars.
        BadData: too many of one's own are broken.
    """
    folder = Path(prior.folder).expanduser()
    if has_shards(folder):
        _check_enough(prior, len(open_source(folder, prompt=prior.prompt)))
        return []
    drawn, own = _listed(folder, prior, side)
    wanted = range(max(0, prior.count - own))
    if drawn:
        _check_note(folder, _note(start, prior, side))
    if len(drawn) > len(wanted):
        _log.warning(
            "'%s' holds %d pictures, more than flow_matching.prior.count asks for (%d): all of them are learnt beside;"
            " to have fewer, remove some of class-*.png",
            *(folder, own + len(drawn), prior.count),
        )
    return [i for i in wanted if i not in drawn]


def draw_missing(start: StartModel, prior: PriorSettings, side: int, seed: int) -> None:
    """Draw the class pictures that are missing, squares of `side` pixels; number i has the seed `seed` + i.

    Those that were drawn before are taken as they are, if they were drawn as the settings say now.

    Raises:
        InvalidInput: as `missing_numbers`.
        OSError: naming the file that could not be written.
        SanaError: those of generation.
    """
    missing = missing_numbers(start, prior, side)
    if not missing:
        return
    folder = Path(prior.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not any(_DRAWN.fullmatch(path.name) for path in folder.iterdir()):
        # First of all: what is there when this is killed must be known.
        write_json(folder / NOTE, {**_note(start, prior, side), "seed": seed})
    seed = _noted_seed(folder, seed)
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
        with restated(lambda words: f"The pictures for [flow_matching.prior] cannot be drawn: {words}"):
            picture = generate_images(parts, request).image
        publish(folder / f"class-{index:04d}.png", lambda beside, picture=picture: picture.save(beside, "PNG"))  # type: ignore[misc]


def _note(start: StartModel, prior: PriorSettings, side: int) -> dict[str, Any]:
    """Return what decides a class picture beside its seed."""
    drawn = {"prompt": prior.prompt, "steps": prior.steps, "guidance": prior.guidance}
    return {"model": start.name, "side": side, **drawn}


def _listed(folder: Path, prior: PriorSettings, side: int) -> tuple[set[int], int]:
    """Return the numbers of the drawn pictures in a folder, and how many others it holds, which are looked at.

    Errors: InvalidInput, BadData: as the training would refuse them after all others are drawn.
    """
    drawn = {int(found[1]) for path in folder.glob("*") if (found := _DRAWN.fullmatch(path.name))}
    if not folder.is_dir():
        return set(), 0
    source = FolderSource(folder, prompt=prior.prompt)
    own: list[Sample] = []
    broken: list[Finding] = [found for found in source.findings if found.is_broken]
    for index in range(len(source)):
        try:
            sample = source.sample(index)
        except BadSample as error:
            broken.append(error.finding)
            continue
        if not _DRAWN.fullmatch(sample.place):
            own.append(sample)
    check_share(broken, max(prior.count, len(source)), where=prior.folder)
    if prior.small == "refuse":
        small = [sample for sample in own if enlargement(sample.width, sample.height, (side, side)) > 1]
        refuse_small(small, prior.folder, side, PRIOR, f"{PRIOR}.folder")
    return drawn, len(own)


def _check_enough(prior: PriorSettings, there: int) -> None:
    if there < prior.count:
        raise InvalidInput(
            f"flow_matching.prior.count is {prior.count}, but the tars in {prior.folder} hold {there} pictures, and"
            " none are drawn into tars. Lower it, or name another folder."
        )


def _noted_seed(folder: Path, seed: int) -> int:
    """Return the seed with which drawing began, so that no picture comes twice; without a note, that of now."""
    try:
        return int(json.loads((folder / NOTE).read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return seed


def _check_note(folder: Path, told: Mapping[str, Any]) -> None:
    """Refuse drawn pictures that were drawn otherwise than is `told` now."""
    note = folder / NOTE
    advice = f"Name another flow_matching.prior.folder, or remove class-*.png and {NOTE} there to have them drawn anew"
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        different = [name for name, value in told.items() if before[name] != value]
    except FileNotFoundError:
        _log.warning("how class-*.png in '%s' were drawn is noted nowhere; they are taken as they are", folder)
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{note} cannot be read, which says how class-*.png there were drawn. {advice}.") from error
    if different:
        name = different[0]
        setting = {"model": "flow_matching.start", "side": "the size in pixels"}.get(
            name, f"flow_matching.prior.{name}"
        )
        raise InvalidInput(
            f"The class pictures in {folder} were drawn with {before[name]!r}, but {setting} is {told[name]!r} now."
            f" {advice}, or undo the change."
        )
