"""The scheduler classes and the adapter on their own; equality with the reference is in tests/parity."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from gaussian_flow import GaussianFlow, last, rms
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.samplers import SAMPLERS, flow_dpm
from sana.flow.schedulers import (
    SCHEDULERS,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerSampler,
    SCMScheduler,
    set_timesteps,
)
from sana.flow.schedules import custom_grid

FLOW = GaussianFlow()
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_common_surface(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert scheduler.scale_model_input(X, 5) is X
    assert scheduler.step_index is None
    scheduler.set_timesteps(2)
    assert scheduler.num_inference_steps == 2
    assert len(scheduler.sigmas) == 3
    result = scheduler.step(X, scheduler.timesteps[0], X, generator=torch.Generator().manual_seed(0))
    assert scheduler.step_index == 1
    assert result[0] is result.prev_sample
    plain = scheduler.step(X, scheduler.timesteps[1], X, return_dict=False)
    assert type(plain) is tuple
    with pytest.raises(InvalidInput, match="All 2 steps are done"):
        scheduler.step(X, scheduler.timesteps[1], X)


def test_scm_returns_the_clean_sample_too() -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(1)
    result = scheduler.step(X, scheduler.timesteps[0], X)
    torch.testing.assert_close(result.denoised, -X, rtol=0, atol=1e-5)
    torch.testing.assert_close(result[1], result.prev_sample, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stepping_needs_timesteps_first(name: str) -> None:
    with pytest.raises(InvalidInput, match="you need to run 'set_timesteps'"):
        SCHEDULERS[name]().step(X, 999, X)


def test_a_foreign_timestep_is_named() -> None:
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0)
    scheduler.set_timesteps(4)
    with pytest.raises(InvalidInput, match="Timestep 123 is not in"):
        scheduler.step(X, 123, X)


def test_step_takes_numbers_and_tensors() -> None:
    results = []
    for convert in (int, float, torch.tensor):
        scheduler = DPMSolverMultistepScheduler(flow_shift=3.0)
        scheduler.set_timesteps(4)
        results.append(scheduler.step(X, convert(int(scheduler.timesteps[0])), X).prev_sample)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("make", [DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_custom_timesteps_mean_the_level_they_say(make) -> None:
    scheduler = make()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.1, 0.0])
    with pytest.raises(InvalidInput, match="num_inference_steps=4, but 3 custom levels"):
        scheduler.set_timesteps(4, timesteps=[900, 500, 100])
    with pytest.raises(InvalidInput, match="must fall"):
        scheduler.set_timesteps(timesteps=[100, 500])


def test_dpm_takes_custom_sigmas_unshifted() -> None:
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9999, 0.5])
    assert scheduler.timesteps.tolist() == [999, 500]
    assert scheduler.sigmas.tolist() == pytest.approx([0.9999, 0.5, 0.0])
    with pytest.raises(InvalidInput, match="exactly one of"):
        scheduler.set_timesteps()


def test_dynamic_shift_is_refused() -> None:
    for scheduler in (DPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(InvalidInput, match="takes no `mu`"):
            scheduler.set_timesteps(4, mu=1.0)


@pytest.mark.parametrize(
    ("make", "field", "value", "choices"),
    [
        (DPMSolverMultistepScheduler, "algorithm_type", "sde-dpmsolver++", "'dpmsolver\\+\\+'"),
        (DPMSolverMultistepScheduler, "prediction_type", "epsilon", "'flow_prediction'"),
        (DPMSolverMultistepScheduler, "thresholding", True, "False"),
        (DPMSolverMultistepScheduler, "solver_order", 4, "1, 2, 3"),
        (DPMSolverMultistepScheduler, "solver_type", "heun", "'midpoint'"),
        (DPMSolverMultistepScheduler, "final_sigmas_type", "sigma_min", "'zero'"),
        (DPMSolverMultistepScheduler, "use_karras_sigmas", True, "False"),
        (DPMSolverMultistepScheduler, "use_flow_sigmas", False, "True"),
        (FlowMatchEulerDiscreteScheduler, "use_dynamic_shifting", True, "False"),
        (FlowMatchEulerDiscreteScheduler, "stochastic_sampling", True, "False"),
        (SCMScheduler, "prediction_type", "epsilon", "'trigflow'"),
    ],
)
def test_unsupported_values_name_field_value_and_choices(make, field: str, value: object, choices: str) -> None:
    with pytest.raises(
        InvalidInput,
        match=f"{make.__name__} does not support {field}={value!r}. Choose: {choices}".replace("++'. C", "\\+\\+'. C"),
    ):
        make(**{field: value})
    with pytest.raises(InvalidInput, match=field):
        make.from_config({field: value})


def test_numbers_must_be_above_zero() -> None:
    with pytest.raises(InvalidInput, match="flow_shift, not 0"):
        DPMSolverMultistepScheduler(flow_shift=0)
    with pytest.raises(InvalidInput, match="shift, not inf"):
        FlowMatchEulerDiscreteScheduler(shift=math.inf)
    with pytest.raises(InvalidInput, match="num_train_timesteps, not '1000'"):
        SCMScheduler(num_train_timesteps="1000")  # type: ignore[arg-type]


def test_config_is_a_mapping_with_attributes_and_is_fixed() -> None:
    config = DPMSolverMultistepScheduler(flow_shift=3.0).config
    assert config.flow_shift == config["flow_shift"] == dict(config)["flow_shift"] == 3.0
    assert config.get("missing") is None
    assert config.lambda_min_clipped == -math.inf
    with pytest.raises(AttributeError, match="no field 'missing'"):
        _ = config.missing
    with pytest.raises(AttributeError, match="from_config"):
        config.flow_shift = 6.0


def test_unknown_keys_of_a_file_survive_the_round_trip() -> None:
    text = '{"_class_name": "SCMScheduler", "_diffusers_version": "0.33", "note": [1], "sigma_data": 0.5}'
    scheduler = SCMScheduler.from_config(json.loads(text))
    assert scheduler.config.note == [1]
    assert json.loads(scheduler.to_json_string()) == {
        **json.loads(text),
        "num_train_timesteps": 1000,
        "prediction_type": "trigflow",
    }


def test_published_file_with_its_bare_infinity_is_read_and_written() -> None:
    text = '{"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0, "lambda_min_clipped": -Infinity}'
    scheduler = DPMSolverMultistepScheduler.from_config(json.loads(text))
    assert '"lambda_min_clipped": -Infinity' in scheduler.to_json_string()
    assert DPMSolverMultistepScheduler.from_config(json.loads(scheduler.to_json_string())).config == scheduler.config


@pytest.mark.parametrize("first", SCHEDULERS)
@pytest.mark.parametrize("second", SCHEDULERS)
def test_conversion_there_and_back_loses_nothing(first: str, second: str) -> None:
    options = {"flow_shift": 3.0} if "DPM" in first else {"shift": 3.0} if "Euler" in first else {"sigma_data": 0.3}
    scheduler = SCHEDULERS[first](**options)
    back = SCHEDULERS[first].from_config(SCHEDULERS[second].from_config(scheduler.config).config)
    assert {key: back.config[key] for key in scheduler.config} == dict(scheduler.config)


def test_a_shift_that_gets_lost_in_conversion_is_said(caplog) -> None:
    config = DPMSolverMultistepScheduler(flow_shift=3.0).config
    with caplog.at_level(logging.WARNING):
        assert FlowMatchEulerDiscreteScheduler.from_config(config).shift == 1.0
    assert "ignores flow_shift=3.0; pass shift=..." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert FlowMatchEulerDiscreteScheduler.from_config(config, shift=3.0).shift == 3.0
        SCMScheduler.from_config(config)
    assert caplog.text == ""


def test_a_misspelt_override_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no field 'flow_shfit'. Did you mean 'flow_shift'\?"):
        DPMSolverMultistepScheduler.from_config({}, flow_shfit=3.0)


@pytest.mark.parametrize(
    ("name", "make"), [("flow-dpm", DPMSolverMultistepScheduler), ("flow-euler", FlowMatchEulerDiscreteScheduler)]
)
def test_adapter_and_sampler_look_the_same_to_the_loop(name: str, make) -> None:
    scheduler = make(**{"flow_shift" if name == "flow-dpm" else "shift": 3.0})
    scheduler.set_timesteps(6)
    bound, adapter = SAMPLERS[name].on(SAMPLERS[name].make_grid(6, 3.0)), SchedulerSampler(scheduler)
    assert torch.equal(bound.grid.sigmas, adapter.grid.sigmas)
    pairs = zip(bound.run(FLOW.on(bound.grid), X), adapter.run(FLOW.on(adapter.grid), X), strict=True)
    for ours, theirs in pairs:
        assert (ours.index, ours.sigma, ours.sigma_next, ours.timestep) == (
            theirs.index,
            theirs.sigma,
            theirs.sigma_next,
            theirs.timestep,
        )
        torch.testing.assert_close(theirs.latents, ours.latents, rtol=0, atol=1e-6)
        torch.testing.assert_close(theirs.x0, ours.x0, rtol=0, atol=1e-6)


def test_adapter_honours_sent_latents() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(2)
    steps = SchedulerSampler(scheduler).run(lambda x, i: torch.zeros_like(x), X)
    next(steps)
    torch.testing.assert_close(steps.send(X + 5).latents, X + 5, rtol=0, atol=0)


def test_adapter_hands_noise_to_the_scheduler() -> None:
    results = []
    for noise in (lambda i: torch.full_like(X, float(i)), None):
        scheduler = SCMScheduler()
        scheduler.set_timesteps(2)
        sampler = SchedulerSampler(scheduler, generator=torch.Generator().manual_seed(1))
        results.append(last(sampler.run(FLOW.on(sampler.grid), X, noise)))
    bound = SAMPLERS["scm"].on(SAMPLERS["scm"].make_grid(2, 1.0))
    direct = last(bound.run(FLOW.on(bound.grid), X, lambda i: torch.full_like(X, float(i))))
    torch.testing.assert_close(results[0], direct, rtol=0, atol=1e-6)
    assert rms(results[1] - direct) > 1e-2


def test_adapter_refuses_a_scheduler_in_the_middle_of_a_run() -> None:
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0)
    scheduler.set_timesteps(4)
    sampler = SchedulerSampler(scheduler)
    next(sampler.run(FLOW.on(sampler.grid), X))
    with pytest.raises(InvalidInput, match=r"in the middle of a run. Call set_timesteps first"):
        sampler.run(FLOW.on(sampler.grid), X)
    with pytest.raises(InvalidInput, match="has 4 steps; it cannot start at step 4"):
        SchedulerSampler(scheduler, begin=4)


class HandMade:
    """The least a user's own scheduler may be: no config, no sigmas, no begin index, results as an object."""

    def set_timesteps(self, num_inference_steps: int, device: object = None) -> None:
        self.timesteps = [1000 - 1000 * k // num_inference_steps for k in range(num_inference_steps)]
        self.size = 1 / num_inference_steps

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=sample - self.size * model_output)


def test_a_hand_made_scheduler_plugs_in() -> None:
    scheduler = HandMade()
    set_timesteps(scheduler, 200)
    sampler = SchedulerSampler(scheduler)
    assert sampler.grid.timesteps.dtype == torch.int64
    x = FLOW.start(1.0, 64)
    grid = custom_grid(timesteps=list(range(1000, 0, -5)))
    assert torch.equal(sampler.grid.sigmas, grid.sigmas)
    torch.testing.assert_close(
        last(sampler.run(FLOW.on(grid), x)), last(flow_dpm(FLOW.on(grid), x, grid, order=1)), rtol=0, atol=1e-5
    )
    with pytest.raises(InvalidInput, match="HandMade's `set_timesteps` does not support custom timestep schedules"):
        set_timesteps(scheduler, timesteps=[900, 100])
