"""The log, sent elsewhere too: TensorBoard and Weights & Biases."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sana.checkpoints.storage import publish
from sana.errors import InvalidInput, MissingDependency

WANDB_ID = "wandb-id"
"""File in the folder of a run with the id of its run at Weights & Biases."""


class Tracker(Protocol):
    """Where figures and pictures can be sent."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        ...

    def picture(self, step: int, picture: Image.Image) -> None:
        """Send a preview."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class TensorBoard:
    """Event files in the run's folder, below `tensorboard`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the event file.

        Errors: MissingDependency naming the extra.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Send a preview."""
        self._writer.add_image("preview", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flush the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `sanakit`; the library's own settings say where it goes, and whether at all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the run, which a resumed training in the same folder continues.

        Errors: MissingDependency naming the extra; InvalidInput where the library does not open one; OSError when the
        run's id cannot be kept.
        """
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._library: Any = wandb
        known = _kept_id(folder / WANDB_ID)
        try:
            self._run = wandb.init(
                project="sanakit",
                name=folder.name,
                id=known,
                dir=str(folder),
                config=dict(settings),
                resume="allow",
                allow_val_change=True,  # a run may go on with other settings
            )
        except wandb.errors.Error as error:  # no login, or no answer
            told = " ".join(str(error).split())[:160].rstrip(".")
            raise InvalidInput(
                f"run.report names wandb, which refuses: {told}. Log in with `wandb login`, set WANDB_MODE=offline to"
                " keep its log on this disk, or take it out."
            ) from error

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Send the figures of a step."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Send a preview."""
        self._run.log({"preview": self._library.Image(picture)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _kept_id(file: Path) -> str:
    """Return the id in a file, or a new one that is then kept there."""
    known = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if known:
        return known
    made = secrets.token_hex(8)
    publish(file, lambda beside: beside.write_text(made, encoding="utf-8"))
    return made


def _missing(name: str) -> MissingDependency:
    return MissingDependency(f"run.report = ['{name}'] needs: pip install 'sanakit[{name}]'.")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
