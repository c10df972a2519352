"""Grids, samplers, scheduler classes and the adapter against diffusers' schedulers."""

import json
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow import samplers, schedulers, schedules
from sana.flow.path import draw_noise, flow_from_trig, trig_from_flow, trig_prediction
from sana.flow.schedulers import SchedulerSampler

COUNTS = [1, 2, 3, 4, 8, 14, 15, 20, 28, 50]
SHIFTS = [1.0, 3.0, 4.0, 6.0]
SANA_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHAPE = (2, 4, 6, 6)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: float | Tensor) -> Tensor:
    """A curved stand-in for the network that depends on the state and on what it is told."""
    told = torch.as_tensor(t, dtype=torch.float32) / 1000
    return 1.2 * x - torch.tanh(2 * x + told) + 0.3 * torch.sin(9 * told)


def drive(scheduler, x: Tensor) -> Tensor:
    """Run a scheduler as the documented pipelines do."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


def told(grid: schedules.Grid) -> Callable[[Tensor, int], Tensor]:
    return lambda x, i: network(x, grid.timesteps[i])


def last(steps: samplers.Steps) -> samplers.Step:
    *_, step = steps
    return step


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).double().square().mean().sqrt() / reference.double().square().mean().sqrt()).item()


def dpm_pair(shift: float, **options):
    return (
        schedulers.DPMSolverMultistepScheduler(flow_shift=shift, **options),
        diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **SANA_DPM, **options),
    )


def euler_pair(shift: float):
    return schedulers.FlowMatchEulerDiscreteScheduler(shift=shift), diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift
    )


PAIRS = {"flow-dpm": dpm_pair, "flow-euler": euler_pair}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", PAIRS)
def test_equality(name: str, n: int, shift: float) -> None:
    """Grid exactly; sampler, face and adapter to 1e-6 relative RMS."""
    face, oracle = PAIRS[name](shift)
    grid = samplers.SAMPLERS[name].make_grid(n, shift)
    face.set_timesteps(n)
    oracle.set_timesteps(n)
    for sigmas, timesteps in ((grid.sigmas, grid.timesteps), (face.sigmas, face.timesteps)):
        assert timesteps.dtype == oracle.timesteps.dtype
        assert torch.equal(timesteps, oracle.timesteps)
        assert torch.equal(sigmas, oracle.sigmas)

    expected = drive(oracle, noise())
    assert relative(last(samplers.SAMPLERS[name].run(told(grid), noise(), grid)).latents, expected) < 1e-6
    assert relative(drive(face, noise()), expected) < 1e-6
    for scheduler in (face, oracle):
        scheduler.set_timesteps(n)
        adapter = SchedulerSampler(scheduler)
        assert torch.equal(adapter.grid.timesteps, grid.timesteps)
        assert relative(last(adapter.run(told(adapter.grid), noise())).latents, expected) < 1e-6


@pytest.mark.parametrize("n", [500, 1000])
def test_long_grids_with_repeated_integer_timesteps(n: int) -> None:
    _, oracle = dpm_pair(3.0)
    oracle.set_timesteps(n)
    grid = schedules.flow_dpm_grid(n, 3.0)
    assert torch.equal(grid.timesteps, oracle.timesteps)
    assert torch.equal(grid.sigmas, oracle.sigmas)
    assert len(grid.timesteps.unique()) < n


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 14, 15, 20])
@pytest.mark.parametrize(
    "options", [{"solver_order": 1}, {"solver_order": 3}, {"solver_order": 3, "lower_order_final": False}]
)
def test_other_orders(n: int, options: dict) -> None:
    face, oracle = dpm_pair(3.0, **options)
    face.set_timesteps(n)
    oracle.set_timesteps(n)
    assert relative(drive(face, noise()), drive(oracle, noise())) < 2e-6


@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_computed_in_float32_and_keeps_its_dtype(name: str) -> None:
    """The reference multiplies in half precision first; here only the result is rounded."""
    face, oracle = PAIRS[name](3.0)
    face.set_timesteps(8)
    oracle.set_timesteps(8)
    output, sample = network(noise(), 500).bfloat16(), noise().bfloat16()
    ours = face.step(output, face.timesteps[0], sample).prev_sample
    exact = oracle.step(output.float(), oracle.timesteps[0], sample.float()).prev_sample
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_image_to_image_starts_in_the_middle(name: str) -> None:
    results = []
    for scheduler in PAIRS[name](3.0):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        x = noise()
        for t in scheduler.timesteps[4:]:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        results.append(x)
        scheduler.set_timesteps(10)
        adapter = SchedulerSampler(scheduler, begin=4)
        results.append(last(adapter.run(told(adapter.grid), noise())).latents)
    tail = samplers.SAMPLERS[name].make_grid(10, 3.0).tail(0.6)
    results.append(last(samplers.SAMPLERS[name].run(told(tail), noise(), tail)).latents)
    assert max(relative(x, results[2]) for x in results) < 1e-6


def test_euler_custom_sigmas_are_shifted_like_the_reference() -> None:
    face, oracle = euler_pair(3.0)
    for arguments in ({"sigmas": [1.0, 0.7, 0.3]}, {"sigmas": [1.0, 0.7, 0.3], "timesteps": [999.0, 600.0, 200.0]}):
        face.set_timesteps(**arguments)
        oracle.set_timesteps(**arguments)
        assert torch.equal(face.timesteps, oracle.timesteps)
        assert torch.equal(face.sigmas, oracle.sigmas)


@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_training_table(shift: float) -> None:
    face, oracle = euler_pair(shift)
    assert torch.equal(face.sigmas, oracle.sigmas)
    assert torch.equal(face.timesteps, oracle.timesteps)
    assert (face.sigma_min, face.sigma_max) == (oracle.sigma_min, oracle.sigma_max)
    picked = face.timesteps[torch.tensor([3, 700])]
    assert torch.equal(face.scale_noise(noise(0), picked, noise(1)), oracle.scale_noise(noise(0), picked, noise(1)))


def test_dpm_add_noise() -> None:
    face, oracle = dpm_pair(3.0)
    face.set_timesteps(20)
    oracle.set_timesteps(20)
    picked = face.timesteps[torch.tensor([3, 17])]
    ours, theirs = (scheduler.add_noise(noise(0), noise(1), picked) for scheduler in (face, oracle))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


SCM_RUNS = [
    {"num_inference_steps": 1, "intermediate_timesteps": None},
    {"num_inference_steps": 2},
    {"num_inference_steps": 2, "intermediate_timesteps": 1.0, "max_timesteps": 1.56454},
    *({"num_inference_steps": n, "intermediate_timesteps": None} for n in (2, 3, 4, 8, 14, 20)),
    {
        "num_inference_steps": 3,
        "timesteps": [1.5, 1.1, 0.4, 0.0],
        "max_timesteps": None,
        "intermediate_timesteps": None,
    },
]


def scm_network(x: Tensor, level: Tensor) -> Tensor:
    return network(x, 1000 * level)


def drive_scm(scheduler, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Run a TrigFlow scheduler as the documented Sprint pipeline does; return the last sample and the result."""
    x = draw_noise(SHAPE, generator) * 0.5
    denoised = x
    for t in scheduler.timesteps[:-1]:
        level = t.sin() / (t.cos() + t.sin())
        radius = (level**2 + (1 - level) ** 2).sqrt()
        state = x / 0.5 * radius
        v = scm_network(state, level)
        output = ((1 - 2 * level) * state + (1 - 2 * level + 2 * level**2) * v) / radius * 0.5
        x, denoised = scheduler.step(output, t, x, generator=generator, return_dict=False)
    return x, denoised / 0.5


@pytest.mark.parametrize("arguments", SCM_RUNS, ids=str)
def test_scm_equality(arguments: dict) -> None:
    face, oracle = schedulers.SCMScheduler(), diffusers.SCMScheduler()
    face.set_timesteps(**arguments)
    oracle.set_timesteps(**arguments)
    assert face.timesteps.dtype == oracle.timesteps.dtype
    assert torch.equal(face.timesteps, oracle.timesteps)

    generators = [torch.Generator().manual_seed(7) for _ in range(5)]
    sample, expected = drive_scm(oracle, generators[0])
    sample_face, result_face = drive_scm(face, generators[1])
    assert torch.equal(sample_face, sample)
    assert torch.equal(result_face, expected)

    positional = [
        arguments.get(name, default)
        for name, default in (
            ("num_inference_steps", 2),
            ("max_timesteps", 1.57080),
            ("intermediate_timesteps", 1.3),
            ("timesteps", None),
        )
    ]
    grid = schedules.scm_grid(*positional)
    start = flow_from_trig(draw_noise(SHAPE, generators[2]) * 0.5, grid.sigmas[0].item())
    run = samplers.scm(
        lambda x, i: scm_network(x, grid.timesteps[i]), start, grid, lambda i: draw_noise(SHAPE, generators[2])
    )
    assert relative(last(run).x0, expected) < 2e-6

    for scheduler, generator in zip((face, oracle), generators[3:], strict=True):
        scheduler.set_timesteps(**arguments)
        adapter = SchedulerSampler(scheduler, generator=generator)
        assert torch.equal(adapter.grid.sigmas, grid.sigmas)
        start = flow_from_trig(draw_noise(SHAPE, generator) * 0.5, grid.sigmas[0].item())
        steps = adapter.run(lambda x, i: scm_network(x, grid.timesteps[i]), start)
        assert relative(last(steps).x0, expected) < 2e-6

    states = [generator.get_state() for generator in generators]
    assert all(torch.equal(state, states[0]) for state in states[1:])


def test_scm_update_in_float64_coordinates() -> None:
    """The loop's state is the reference's TrigFlow state to rounding: 3e-15 in float64."""
    grid, angles = schedules.scm_grid(4), schedules.scm_angles(4).double()
    generator = torch.Generator().manual_seed(0)
    trig = torch.randn(16, generator=generator, dtype=torch.float64) * 0.5
    levels = angles.sin() / (angles.sin() + angles.cos())
    x = flow_from_trig(trig, levels[0])
    for i in range(4):
        v, z = torch.tanh(x), torch.randn(16, generator=generator, dtype=torch.float64)
        denoised = angles[i].cos() * trig - angles[i].sin() * trig_prediction(x, v, levels[i]) * 0.5
        trig = angles[i + 1].cos() * denoised + angles[i + 1].sin() * z * 0.5
        x = (1 - levels[i + 1]) * (x - levels[i] * v) + levels[i + 1] * z
        torch.testing.assert_close(trig_from_flow(x, levels[i + 1]), trig, rtol=0, atol=3e-15)
    assert grid.num_steps == 4


def test_scm_refuses_what_the_reference_refuses() -> None:
    face, oracle = schedulers.SCMScheduler(), diffusers.SCMScheduler()
    for arguments in (
        {"num_inference_steps": 2, "timesteps": [1.5, 0.0], "max_timesteps": None, "intermediate_timesteps": None},
        {"num_inference_steps": 2, "timesteps": [1.5, 1.0, 0.0], "max_timesteps": 1.4, "intermediate_timesteps": None},
        {"num_inference_steps": 2, "max_timesteps": None},
        {"num_inference_steps": 4, "intermediate_timesteps": 1.1},
        {"num_inference_steps": 1001, "intermediate_timesteps": None},
    ):
        with pytest.raises(ValueError) as theirs:  # noqa: PT011 - the message is compared below
            oracle.set_timesteps(**arguments)
        with pytest.raises(InvalidInput) as ours:
            face.set_timesteps(**arguments)
        if arguments["num_inference_steps"] < 1001:
            assert str(ours.value) == str(theirs.value)


CLASSES = ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "SCMScheduler"]
SETTINGS = {
    "DPMSolverMultistepScheduler": {**SANA_DPM, "flow_shift": 6.0},
    "FlowMatchEulerDiscreteScheduler": {"shift": 6.0},
    "SCMScheduler": {"sigma_data": 0.25},
}


@pytest.mark.parametrize("name", CLASSES)
def test_config_files_are_interchangeable(name: str, tmp_path) -> None:
    theirs = getattr(diffusers, name)(**SETTINGS[name])
    face = schedulers.SCHEDULERS[name].from_config(json.loads(theirs.to_json_string()))
    (tmp_path / face.config_name).write_text(face.to_json_string())
    back = getattr(diffusers, name).from_pretrained(tmp_path)
    fields = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert {key: back.config[key] for key in fields} == fields
    assert {key: face.config[key] for key in fields} == fields
    assert json.loads(face.to_json_string())["_class_name"] == name
    assert schedulers.SCHEDULERS[name].from_config(theirs.config).config.items() >= fields.items()


@pytest.mark.parametrize("name", CLASSES)
def test_constructor_fields_are_the_documented_ones(name: str) -> None:
    ours, theirs = dict(schedulers.SCHEDULERS[name]().config), dict(getattr(diffusers, name)().config)
    theirs.pop("_use_default_values")
    assert list(ours) == list(theirs)
    needed_by_flow = {"prediction_type", "use_flow_sigmas"}
    assert {key for key in ours if ours[key] != theirs[key]} <= needed_by_flow


@pytest.mark.parametrize("source", CLASSES)
@pytest.mark.parametrize("target", CLASSES)
def test_conversion_carries_the_fields_the_reference_carries(source: str, target: str) -> None:
    theirs = getattr(diffusers, target).from_config(getattr(diffusers, source)(**SETTINGS[source]).config).config
    ours = schedulers.SCHEDULERS[target].from_config(schedulers.SCHEDULERS[source](**SETTINGS[source]).config).config
    needed_by_flow = {"prediction_type", "use_flow_sigmas"}
    for field in schedulers.SCHEDULERS[target]().config:
        assert ours[field] == theirs[field] or field in needed_by_flow
    for field, value in SETTINGS[source].items():
        assert ours[field] == value or field in needed_by_flow


def test_a_scheduler_this_package_does_not_have_plugs_in() -> None:
    """UniPC is of second order too: 40 of its steps nearly agree with 40 of ours, exactly with itself by hand."""
    scheduler = diffusers.UniPCMultistepScheduler(**SANA_DPM, flow_shift=3.0)
    scheduler.set_timesteps(40)
    expected = drive(scheduler, noise())
    scheduler.set_timesteps(40)
    adapter = SchedulerSampler(scheduler)
    steps = list(adapter.run(told(adapter.grid), noise()))
    assert torch.equal(steps[-1].latents, expected)
    grid = schedules.flow_dpm_grid(40, 3.0)
    assert relative(expected, last(samplers.flow_dpm(told(grid), noise(), grid)).latents) < 1e-2


def test_a_scheduler_with_two_evaluations_per_level_plugs_in() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    expected = drive(scheduler, noise())
    scheduler.set_timesteps(10)
    adapter = SchedulerSampler(scheduler)
    assert adapter.grid.num_steps == len(scheduler.timesteps) > 10
    assert torch.equal(last(adapter.run(told(adapter.grid), noise())).latents, expected)


def test_custom_levels_reach_the_schedulers_that_take_them() -> None:
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedulers.set_timesteps(oracle, sigmas=[0.9, 0.4])
    assert len(oracle.timesteps) == 2
    with pytest.raises(
        InvalidInput, match="DPMSolverMultistepScheduler's `set_timesteps` does not support custom sigmas"
    ):
        schedulers.set_timesteps(diffusers.DPMSolverMultistepScheduler(**SANA_DPM), sigmas=[0.9, 0.4])
    with pytest.raises(InvalidInput, match="Only one of `timesteps` or `sigmas` can be passed"):
        schedulers.set_timesteps(oracle, sigmas=[0.9], timesteps=[900])
