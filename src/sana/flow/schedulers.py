"""The three documented scheduler classes as thin faces of `schedules` and `samplers`.

A scheduler keeps a position in its run; a sampler does not. The classes are for callers who hold a scheduler; the loop
takes samplers, and `SchedulerSampler` makes one of any scheduler object.

Shapes: samples and model outputs [B, C, H, W]; n steps.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.adapter import AnyScheduler, SchedulerSampler, begin_at, set_angles, set_timesteps
from sana.flow.path import SIGMA_DATA, Generators, draw_noise
from sana.flow.samplers import Prediction, dpm_order, dpm_update
from sana.flow.scheduler_base import Device, Face, SchedulerConfig, SchedulerOutput, SCMSchedulerOutput
from sana.flow.schedules import (
    MAX_ANGLE,
    MIDDLE_ANGLE,
    Grid,
    Numbers,
    custom_grid,
    flow_dpm_grid,
    flow_euler_grid,
    flow_euler_table,
    scm_angles,
    shift_sigma,
    trig_grid,
)

__all__ = [
    "SCHEDULERS",
    "AnyScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "SCMScheduler",
    "SCMSchedulerOutput",
    "SchedulerConfig",
    "SchedulerOutput",
    "SchedulerSampler",
    "begin_at",
    "set_angles",
    "set_timesteps",
]


@dataclass(eq=False)
class DPMSolverMultistepScheduler(Face):
    """DPM-Solver++ in multistep form with flow sigmas (Flow-DPM-Solver), the scheduler of all SANA models but Sprint.

    The fields are the documented ones. Those that only concern noise schedules other than flow are accepted and without
    effect; a value that would change the result and is not supported raises InvalidInput.
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: list[float] | None = None
    solver_order: int = 2
    """1, 2 or 3."""
    prediction_type: str = "flow_prediction"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    """Lowers the last but one step of third-order runs of fewer than 15 steps; the last step is always first order."""
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = True
    flow_shift: float = 1.0
    """3.0 for SANA, 6.0 at 4096 px."""
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    _choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "solver_order": (1, 2, 3),
        "prediction_type": ("flow_prediction",),
        "thresholding": (False,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "lower_order_final": (True, False),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "use_flow_sigmas": (True,),
        "final_sigmas_type": ("zero",),
        "variance_type": (None,),
        "use_dynamic_shifting": (False,),
    }
    _positive: ClassVar[tuple[str, ...]] = ("flow_shift",)

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = shift_sigma(self.timesteps / self.num_train_timesteps, self.flow_shift)
        self.sigmas: Tensor = torch.cat([levels, levels.new_zeros(1)])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
    ) -> None:
        """Make the grid of a run: of n steps, or of own timesteps or sigmas, taken as they are, with 0 appended."""
        _refuse_mu(self, mu)
        if timesteps is None and sigmas is None:
            if num_inference_steps is None:
                raise InvalidInput("Must pass exactly one of `num_inference_steps` or `timesteps`.")
            grid = flow_dpm_grid(num_inference_steps, self.flow_shift, num_train_timesteps=self.num_train_timesteps)
        else:
            grid = custom_grid(timesteps, sigmas, num_train_timesteps=self.num_train_timesteps)
            _check_count(num_inference_steps, grid)
        self._use(grid, device)
        self._history: deque[Prediction] = deque(maxlen=self.solver_order)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the sample of the next level, computed in float32 and given in the dtype of `model_output`."""
        grid, i = self._take_step(timestep)
        sigma, sigma_next = grid.sigmas[i].item(), grid.sigmas[i + 1].item()
        state = sample.float()
        self._history.appendleft((sigma, state - sigma * model_output.float()))
        order = dpm_order(
            i,
            grid.num_steps,
            self.solver_order,
            lower_order_final=self.lower_order_final,
            ends_at_zero=grid.sigmas[-1].item() == 0,
        )
        result = dpm_update(state, list(self._history)[:order], sigma_next).to(model_output.dtype)
        return SchedulerOutput(result) if return_dict else (result,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noised samples [B, ...] at the given members [B] of `timesteps`."""
        return self._noised(original_samples, noise, timesteps)


@dataclass(eq=False)
class FlowMatchEulerDiscreteScheduler(Face):
    """Euler steps for flow matching; the shift acts on the training table and again on the grid of a run.

    The fields are the documented ones; a value that would change the result and is not supported raises InvalidInput.
    """

    shift: float = 1.0
    """3.0 for SANA, 6.0 at 4096 px."""
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    _choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_dynamic_shifting": (False,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "stochastic_sampling": (False,),
    }
    _positive: ClassVar[tuple[str, ...]] = ("shift",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sigmas: Tensor = flow_euler_table(self.shift, num_train_timesteps=self.num_train_timesteps)
        self.timesteps = self.sigmas * self.num_train_timesteps
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Numbers | None = None,
        mu: float | None = None,
        timesteps: Numbers | None = None,
    ) -> None:
        """Make the grid of a run: of n steps, of own sigmas (they are shifted), or of own timesteps (sigma = t / 1000).

        The reference also shifts the sigmas of custom timesteps, so that network and solver disagree about the level,
        and warns of it; here they agree. Given both, the timesteps are what the network is told.
        """
        _refuse_mu(self, mu)
        if timesteps is None and sigmas is None:
            steps = self.num_train_timesteps if num_inference_steps is None else num_inference_steps
            grid = flow_euler_grid(steps, self.shift, num_train_timesteps=self.num_train_timesteps)
        elif sigmas is None:
            grid = custom_grid(timesteps, num_train_timesteps=self.num_train_timesteps)
        else:
            raw = custom_grid(sigmas=sigmas, truncate=False).sigmas
            levels = shift_sigma(raw, self.shift)
            told = levels[:-1] * self.num_train_timesteps if timesteps is None else custom_grid(timesteps).timesteps
            grid = Grid(sigmas=levels, timesteps=told)
        if timesteps is not None or sigmas is not None:
            _check_count(num_inference_steps, grid)
        self._use(Grid(sigmas=grid.sigmas, timesteps=grid.timesteps.float()), device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Return the sample of the next level, computed in float32 and given in the dtype of `model_output`."""
        grid, i = self._take_step(timestep)
        result = (sample.float() + (grid.sigmas[i + 1] - grid.sigmas[i]).item() * model_output.float()).to(
            model_output.dtype
        )
        return SchedulerOutput(result) if return_dict else (result,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the noised samples [B, ...] at the given members [B] of `timesteps`."""
        return self._noised(sample, noise, timestep)


@dataclass(eq=False)
class SCMScheduler(Face):
    """The consistency-model scheduler of SANA-Sprint, in TrigFlow coordinates; `timesteps` are n + 1 angles."""

    prediction_type: str = "trigflow"
    sigma_data: float = SIGMA_DATA

    _choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"prediction_type": ("trigflow",)}
    _positive: ClassVar[tuple[str, ...]] = ("sigma_data",)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Numbers | None = None,
        device: Device = None,
        max_timesteps: float | None = MAX_ANGLE,
        intermediate_timesteps: float | None = MIDDLE_ANGLE,
    ) -> None:
        """Make the angles of a run; the rules are those of `schedules.scm_angles`."""
        if num_inference_steps is not None and num_inference_steps > self.num_train_timesteps:
            raise InvalidInput(
                f"num_inference_steps={num_inference_steps} exceeds num_train_timesteps={self.num_train_timesteps}. "
                "Ask for fewer steps."
            )
        angles = scm_angles(num_inference_steps, max_timesteps, intermediate_timesteps, timesteps)
        self._use(trig_grid(angles), device)
        self.timesteps = angles.to(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        noise: Tensor | None = None,
    ) -> SCMSchedulerOutput | tuple[Tensor, Tensor]:
        """Return the sample of the next angle and the clean sample, both times sigma_data.

        Standard normal noise is drawn from `generator` in every step, also the last, unless it is given as `noise`.
        """
        _, i = self._take_step(timestep)
        here, there = self.timesteps[i], self.timesteps[i + 1]
        denoised = here.cos() * sample - here.sin() * model_output
        if noise is None:
            noise = draw_noise(model_output.shape, generator, device=model_output.device)
        result = there.cos() * denoised + there.sin() * noise * self.sigma_data
        return SCMSchedulerOutput(result, denoised) if return_dict else (result, denoised)


def _refuse_mu(scheduler: "Face", mu: float | None) -> None:
    if mu is not None:
        raise InvalidInput(
            f"{type(scheduler).__name__} takes no `mu`: dynamic shifting is not supported. Set the shift instead."
        )


def _check_count(num_inference_steps: int | None, grid: Grid) -> None:
    if num_inference_steps is not None and num_inference_steps != grid.num_steps:
        raise InvalidInput(
            f"num_inference_steps={num_inference_steps}, but {grid.num_steps} custom levels were given. "
            "Leave one of them out."
        )


SCHEDULERS: dict[
    str, type[DPMSolverMultistepScheduler] | type[FlowMatchEulerDiscreteScheduler] | type[SCMScheduler]
] = {
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    "SCMScheduler": SCMScheduler,
}
