"""The angles that a SANA-Sprint model draws best with, found by a search and kept in its `model_index.json`.

Without them, and where a call names others, the documented ones hold.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.checkpoints.layout import MODEL_INDEX, read_json
from sana.checkpoints.storage import write_json
from sana.errors import CheckpointError, InvalidInput
from sana.flow.schedules import MAX_ANGLE, MIDDLE_ANGLE, Grid, scm_grid

ANGLES_KEY = "_sanakit_angles"
"""Key in `model_index.json`, where other readers skip what begins with an underscore."""

Angles = Mapping[int, Sequence[float]]
"""Falling angles by number of steps, one more than there are steps; the last one is 0."""


def angles_in(folder: Path) -> dict[int, tuple[float, ...]]:
    """Return the angles that are kept in a model's folder, none for most.

    Errors: CheckpointError for entries that are no angles.
    """
    kept = read_json(folder / MODEL_INDEX).get(ANGLES_KEY, {})
    try:
        found = {int(steps): tuple(float(angle) for angle in angles) for steps, angles in kept.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(_damaged(folder, kept)) from error
    for steps, angles in found.items():
        falls = all(before > after for before, after in itertools.pairwise(angles))
        if len(angles) != steps + 1 or not falls or angles[-1] != 0 or not 0 < angles[0] <= MAX_ANGLE:
            raise CheckpointError(_damaged(folder, kept))
    return found


def _damaged(folder: Path, kept: Any) -> str:
    told = str(kept)[:80]
    return f"{ANGLES_KEY} in {folder / MODEL_INDEX} holds no angles ({told}). Remove it, or search them again."


def keep_angles(folder: Path, angles: Angles) -> None:
    """Write angles into a model's folder, beside those for other numbers of steps.

    Errors: InvalidInput for a folder that holds no model; OSError naming the file that could not be written.
    """
    if not (folder / MODEL_INDEX).is_file():
        raise InvalidInput(f"{folder} holds no {MODEL_INDEX}, so angles cannot be kept there. Name a model's folder.")
    together = {**angles_in(folder), **angles}
    write_json(folder / MODEL_INDEX, {**read_json(folder / MODEL_INDEX), **note_of(together)})


def note_of(angles: Angles) -> dict[str, Any]:
    """Return what `model_index.json` says of angles: nothing where there are none."""
    return {ANGLES_KEY: {str(steps): list(angles[steps]) for steps in sorted(angles)}} if angles else {}


def chosen(angles: Angles, steps: int, first: float | None, middle: float | None) -> Sequence[float] | None:
    """Return the kept angles for a number of steps, or None where there are none or the call names its own.

    The documented defaults count as not named.
    """
    own = first not in (None, MAX_ANGLE) or middle not in (None, MIDDLE_ANGLE)
    return None if own else angles.get(steps)


def grid_of(angles: Angles, steps: int, first: float | None = None, middle: float | None = None) -> Grid:
    """Return the grid of a run: the kept angles, those that are named, or the documented ones."""
    kept = chosen(angles, steps, first, middle)
    if kept is not None:
        return scm_grid(steps, timesteps=kept)
    return scm_grid(steps, MAX_ANGLE if first is None else first, MIDDLE_ANGLE if middle is None else middle)
