"""The public scheduler classes: those of `flow.schedulers`, plus loading and saving of `scheduler_config.json`."""

from pathlib import Path
from typing import Any, Self

from sana.checkpoints import hub
from sana.checkpoints.built_in import part_folder
from sana.checkpoints.layout import LAYOUT_VERSION, part_of, read_json
from sana.checkpoints.storage import recover, write_json
from sana.errors import CheckpointError, InvalidInput
from sana.flow import schedulers as flow
from sana.flow.scheduler_base import Face

_FILE = part_of("scheduler").config


class SchedulerFiles(Face):
    """From and to folders."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **where: Any
    ) -> Self:
        """Load the settings from a folder, a short name or a hub id; `where` are arguments of `hub.locate`.

        Without `subfolder` the file is looked for in the folder itself, then in its `scheduler`. Settings of another
        class are converted as `from_config` does.
        Errors: ModelNotFound; CheckpointError for settings that the class does not support.
        """
        root = hub.locate(pretrained_model_name_or_path, parts=(subfolder or "scheduler",), **where).folder
        folder = part_folder(root, subfolder) if subfolder else root
        if not subfolder and not (folder / _FILE).is_file():
            folder = part_folder(root, "scheduler")
        return cls.from_folder(folder)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Load the settings from the folder that the file lies in; errors as `from_pretrained`."""
        recover(folder)
        config = read_json(folder / _FILE)
        try:
            return cls.from_config(config)
        except (InvalidInput, TypeError) as error:
            raise CheckpointError(f"{folder / _FILE} cannot be used: {error}") from error

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json`; infinities are written as `-Infinity`, as in the published files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _FILE, {**self.to_config(), "_diffusers_version": LAYOUT_VERSION})


class DPMSolverMultistepScheduler(SchedulerFiles, flow.DPMSolverMultistepScheduler):
    """Flow-DPM-Solver, loadable; see `flow.schedulers`."""


class FlowMatchEulerDiscreteScheduler(SchedulerFiles, flow.FlowMatchEulerDiscreteScheduler):
    """Euler steps for flow matching, loadable; see `flow.schedulers`."""


class SCMScheduler(SchedulerFiles, flow.SCMScheduler):
    """The scheduler of SANA-Sprint, loadable; see `flow.schedulers`."""


SCHEDULERS: dict[str, type[SchedulerFiles]] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "SCMScheduler": SCMScheduler,
}
