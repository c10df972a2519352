"""What the documented scheduler classes share: their config, their outputs, and the position in a run."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from sana.errors import InvalidInput, did_you_mean
from sana.flow.path import interpolate
from sana.flow.schedules import NUM_TRAIN_TIMESTEPS, Grid

logger = logging.getLogger(__name__)

Device = torch.device | str | None
_COORDINATES = ("flow_prediction", "trigflow")


class SchedulerOutput(NamedTuple):
    """Result of `step`."""

    prev_sample: Tensor
    """Sample of the next level."""


class SCMSchedulerOutput(NamedTuple):
    """Result of `SCMScheduler.step`."""

    prev_sample: Tensor
    """Sample of the next level, in TrigFlow coordinates."""
    denoised: Tensor
    """Predicted clean sample, times sigma_data."""


class SchedulerConfig(Mapping[str, Any]):
    """The settings of a scheduler, by key or by attribute, with whatever else its JSON file held."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"The scheduler config has no field '{name}'. It has: {', '.join(self.__dict__)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"The scheduler config is fixed; make another with from_config(config, {name}=...).")

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __repr__(self) -> str:
        return f"SchedulerConfig({self.__dict__})"


@dataclass(eq=False)
class Face:
    """What the three classes share: the fields are the configuration, the rest is the position in the run."""

    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS
    """Number of training levels; a timestep is this number times sigma."""

    order: ClassVar[int] = 1
    init_noise_sigma: ClassVar[float] = 1.0
    config_name: ClassVar[str] = "scheduler_config.json"
    _choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    _positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, choices in self._choices.items():
            if values[name] not in choices:
                raise InvalidInput(
                    f"{type(self).__name__} does not support {name}={values[name]!r}. "
                    f"Choose: {', '.join(map(repr, choices))}."
                )
        for name in ("num_train_timesteps", *self._positive):
            if not (isinstance(values[name], int | float) and 0 < values[name] < math.inf):
                raise InvalidInput(f"{type(self).__name__} needs a number above 0 for {name}, not {values[name]!r}.")
        self.config = SchedulerConfig(values)
        self.num_inference_steps: int | None = None
        self.sigmas: Tensor
        self.timesteps: Tensor = torch.arange(self.num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._grid: Grid | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Make a scheduler of this class from the config of any of the three, or from the content of a JSON file.

        Shared fields carry over; other keys have no effect but stay in `.config`, so that converting back loses
        nothing. `prediction_type` names the coordinates of the class, not of the model: it does not carry over between
        classes. Raises InvalidInput for an override that is no field, and for values the class does not support.
        """
        known = {field.name for field in fields(cls)}
        for name in overrides.keys() - known:
            raise InvalidInput(
                f"{cls.__name__} has no field '{name}'.{did_you_mean(name, known)} It has: {', '.join(sorted(known))}."
            )
        given = {key: value for key, value in config.items() if key not in ("_class_name", "_use_default_values")}
        if given.get("prediction_type") in _COORDINATES and config.get("_class_name") != cls.__name__:
            coordinates = cls._choices.get("prediction_type", (given["prediction_type"],))
            given["prediction_type"] = coordinates[0]
        scheduler = cls(**{key: value for key, value in {**given, **overrides}.items() if key in known})
        extras = {key: value for key, value in given.items() if key not in known}
        scheduler.config = SchedulerConfig({**scheduler.config, **extras})
        for own, other in (("shift", "flow_shift"), ("flow_shift", "shift")):
            if own in known and extras.get(other, getattr(scheduler, own)) != getattr(scheduler, own):
                # The reference does not translate between the two names either; a run then quietly lacks its shift.
                logger.warning("%s ignores %s=%s; pass %s=... to keep it.", cls.__name__, other, extras[other], own)
        return scheduler

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-ready settings with `_class_name`, as `scheduler_config.json` holds them."""
        return {"_class_name": type(self).__name__, **self.config}

    def to_json_string(self) -> str:
        """Return `to_config` as JSON text; infinities are written as `-Infinity`, as the published files do."""
        return json.dumps(self.to_config(), indent=2, sort_keys=True) + "\n"

    @property
    def step_index(self) -> int | None:
        """Index of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this step, for image-to-image."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sample unchanged: flow models take the state as it is."""
        return sample

    def __len__(self) -> int:
        return self.num_train_timesteps

    def _use(self, grid: Grid, device: Device) -> None:
        """Take a new grid and go to its start."""
        self._grid = grid
        self.num_inference_steps = grid.num_steps
        self.timesteps = grid.timesteps.to(device)
        self.sigmas = grid.sigmas
        self._step_index = None
        self._begin_index = None

    def _take_step(self, timestep: float | Tensor) -> tuple[Grid, int]:
        """Return the grid and the index of this step, and move on by one; the first step is found by its timestep."""
        if self._grid is None:
            raise InvalidInput(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler."
            )
        index = self._step_index
        if index is None:
            index = self._begin_index if self._begin_index is not None else self._index_of(timestep)
        if index >= self._grid.num_steps:
            raise InvalidInput(f"All {self._grid.num_steps} steps are done. Run 'set_timesteps' before the next image.")
        self._step_index = index + 1
        return self._grid, index

    def _index_of(self, timestep: float | Tensor) -> int:
        found = (self.timesteps == timestep).nonzero()
        if len(found) == 0:
            raise InvalidInput(
                f"Timestep {float(timestep):g} is not in this scheduler's `timesteps`. Pass one of them to `step`."
            )
        return int(found[0])

    def _noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the samples at the levels of the given members [B] of `timesteps`."""
        indices = [self._index_of(timestep) for timestep in timesteps.reshape(-1)]
        return interpolate(x0, noise, self.sigmas[indices].to(x0))
