import itertools
import math

import pytest
import torch
from gaussian_flow import GaussianFlow, last, rms
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.adapter import SchedulerSampler
from sana.flow.samplers import SAMPLERS, dpm_order, dpm_update, find_sampler, flow_dpm, flow_euler, scm
from sana.flow.schedulers import SCMScheduler
from sana.flow.schedules import Grid, custom_grid, flow_dpm_grid, scm_grid

FLOW = GaussianFlow()
ODE_SAMPLERS = [sampler for sampler in SAMPLERS.values() if sampler.order]


def uniform_lambda_grid(n: int) -> Grid:
    """Even steps in log signal-to-noise from sigma 0.95 to 0.05, away from both singular ends."""
    lambdas = torch.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), n + 1, dtype=torch.float64)
    sigmas = torch.sigmoid(-lambdas).float()
    return Grid(sigmas=sigmas, timesteps=sigmas[:-1] * 1000)


def error(run, grid: Grid, flow: GaussianFlow = FLOW, **options) -> float:
    start, end = grid.sigmas[0].item(), grid.sigmas[-1].item()
    x = flow.start(start)
    return rms(last(run(flow.on(grid), x, grid, **options)) - flow.exact(x, start, end)) / flow.std


@pytest.mark.parametrize("sampler", ODE_SAMPLERS, ids=lambda sampler: sampler.name)
def test_order_of_convergence_on_an_exact_gaussian_flow(sampler) -> None:
    errors = [error(sampler.run, uniform_lambda_grid(n)) for n in (20, 40, 80, 160)]
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(sampler.order, abs=0.05)
    assert min(rates) > sampler.order - 0.15


def test_published_errors_on_the_uniform_lambda_grid() -> None:
    """Absolute RMS for data N(0.3, 0.5^2): algorithms S2.1."""
    grids = [uniform_lambda_grid(n) for n in (20, 40, 80, 160)]
    second = [error(flow_dpm, grid) * FLOW.std for grid in grids]
    first = [error(flow_euler, grid) * FLOW.std for grid in grids]
    assert second == pytest.approx([2.23e-3, 5.89e-4, 1.50e-4, 3.76e-5], rel=0.02)
    assert first == pytest.approx([3.35e-2, 1.71e-2, 8.61e-3, 4.33e-3], rel=0.02)


@pytest.mark.parametrize("order", [1, 2])
def test_local_order_of_the_solver(order: int) -> None:
    """One step with exact predictions behind it errs by O(h^(order + 1))."""
    x = FLOW.start(0.5, 64)

    def local_error(h: float) -> float:
        levels = [1 / (1 + math.exp(-k * h)) for k in range(order)]
        path = [FLOW.exact(x, 0.5, sigma) for sigma in levels]
        history = [(s, at - s * FLOW.velocity(at, s)) for s, at in zip(levels, path, strict=True)]
        there = 1 / (1 + math.exp(h))
        return rms(dpm_update(x, history, there) - FLOW.exact(x, 0.5, there))

    assert math.log2(local_error(0.02) / local_error(0.01)) == pytest.approx(order + 1, abs=0.1)


TABLE = {
    4: (0.317, 0.254, 0.573, 0.566),
    8: (0.170, 0.0332, 0.318, 0.265),
    10: (0.138, 0.0059, 0.259, 0.185),
    14: (0.100, 0.0100, 0.190, 0.0919),
    20: (0.0712, 0.0110, 0.136, 0.0299),
    28: (0.0513, 0.0080, 0.0990, 0.0015),
    50: (0.0291, 0.0035, 0.0566, 0.0092),
}


@pytest.mark.parametrize("n", TABLE)
def test_table_of_final_errors(n: int) -> None:
    """Euler and 2M on the DPM grid, shifts 1 and 3, from the exact marginal: algorithms S2.4, printed to 2-3 digits."""
    measured = [error(run, flow_dpm_grid(n, shift)) for shift in (1.0, 3.0) for run in (flow_euler, flow_dpm)]
    for value, printed in zip(measured, TABLE[n], strict=True):
        assert value == pytest.approx(printed, rel=0.02, abs=6e-5)


def test_one_step_returns_the_first_prediction() -> None:
    """S2.2, for every sampler."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for sampler in SAMPLERS.values():
        grid = sampler.make_grid(1, 3.0)
        v = torch.tanh(x)
        steps = list(sampler.run(lambda x, i: torch.tanh(x), x, grid, lambda i: torch.zeros(2, 3, 4, 4)))
        assert len(steps) == 1
        expected = x - grid.sigmas[0] * v
        torch.testing.assert_close(steps[0].x0, expected, rtol=0, atol=1e-6)
        if sampler.name != "flow-euler":
            torch.testing.assert_close(steps[0].latents, steps[0].x0, rtol=0, atol=0)
        torch.testing.assert_close(steps[0].latents, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_velocity_of_a_fixed_x0_ends_there_whatever_the_steps(sampler, n: int) -> None:
    """S2.3: all predictions agree, so every order and every number of steps lands on the same point."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    grid = sampler.make_grid(n, 3.0)
    sigmas = grid.sigmas.tolist()
    x = (1 - sigmas[0]) * x0 + sigmas[0] * noise
    result = last(sampler.run(lambda x, i: (x - x0) / sigmas[i], x, grid, lambda i: noise))
    torch.testing.assert_close(result, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 20])
def test_first_order_solver_is_euler(n: int) -> None:
    """S2.5: also in float32."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    grid = flow_dpm_grid(n, 3.0)

    def velocity(x: Tensor, i: int) -> Tensor:
        return torch.sin(2 * x) + 0.1 * i

    solved, euler = last(flow_dpm(velocity, x, grid, order=1)), last(flow_euler(velocity, x, grid))
    assert rms(solved - euler) / rms(euler) < 1e-6


def test_second_order_uses_the_previous_prediction() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    grid = flow_dpm_grid(4, 3.0)
    assert rms(last(flow_dpm(FLOW.on(grid), x, grid)) - last(flow_euler(FLOW.on(grid), x, grid))) > 1e-3


def test_orders_of_a_run() -> None:
    def orders(n: int, order: int, *, lower: bool = True, zero: bool = True) -> list[int]:
        return [dpm_order(i, n, order, lower_order_final=lower, ends_at_zero=zero) for i in range(n)]

    assert orders(1, 2) == [1]
    assert orders(4, 2) == [1, 2, 2, 1]
    assert orders(5, 3) == [1, 2, 3, 2, 1]
    assert orders(5, 3, lower=False) == [1, 2, 3, 3, 1]
    assert orders(15, 3)[-3:] == [3, 3, 1]
    assert orders(3, 2, zero=False) == [1, 2, 2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_starting_at_sigma_one_and_repeating_a_level_stay_finite(order: int) -> None:
    start = custom_grid(sigmas=[1.0, 0.9, 0.6, 0.3])
    repeated = Grid(sigmas=torch.tensor([1.0, 0.8, 0.8, 0.5, 0.5, 0.0]), timesteps=torch.arange(5))
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for grid in (start, repeated):
        assert torch.isfinite(last(flow_dpm(FLOW.on(grid), x, grid, order=order))).all()


def test_steps_describe_the_run() -> None:
    grid = flow_dpm_grid(3, 3.0)
    x = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    steps = list(flow_euler(FLOW.on(grid), x, grid))
    assert [step.index for step in steps] == [0, 1, 2]
    assert {step.num_steps for step in steps} == {3}
    assert [step.timestep for step in steps] == grid.timesteps.tolist()
    assert [step.sigma for step in steps] == grid.sigmas.tolist()[:-1]
    assert [step.sigma_next for step in steps] == grid.sigmas.tolist()[1:]
    for before, after in itertools.pairwise(steps):
        v = FLOW.velocity(before.latents, after.sigma)
        torch.testing.assert_close(after.x0, before.latents - after.sigma * v)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=lambda sampler: sampler.name)
def test_sent_latents_replace_the_state(sampler) -> None:
    grid = sampler.make_grid(3, 3.0)
    seen: list[Tensor] = []

    def velocity(x: Tensor, i: int) -> Tensor:
        seen.append(x)
        return x

    def noise(i: int) -> Tensor:
        return torch.zeros(2, 2)

    replacement = torch.full((2, 2), 7.0)
    steps = sampler.on(grid).run(velocity, torch.ones(2, 2), noise)
    next(steps)
    second = steps.send(replacement)
    assert second.index == 1
    torch.testing.assert_close(seen[1], replacement, rtol=0, atol=0)
    with pytest.raises(InvalidInput, match=r"keep the shape \[2, 2\], but have \[3\]"):
        steps.send(torch.ones(3))


def test_sending_the_same_latents_changes_nothing() -> None:
    grid = flow_dpm_grid(6, 3.0)
    x = FLOW.start(grid.sigmas[0].item(), 32)
    plain = last(flow_dpm(FLOW.on(grid), x, grid))
    steps = flow_dpm(FLOW.on(grid), x, grid)
    step = next(steps)
    for _ in range(5):
        step = steps.send(step.latents.clone())
    torch.testing.assert_close(step.latents, plain, rtol=0, atol=0)


def test_state_is_float32_whatever_the_network_returns() -> None:
    grid = flow_dpm_grid(3, 3.0)
    steps = list(flow_dpm(lambda x, i: x.bfloat16(), torch.ones(4, dtype=torch.bfloat16), grid))
    assert {step.latents.dtype for step in steps} == {torch.float32}


def test_the_network_is_called_only_when_the_next_step_is_asked_for() -> None:
    calls: list[int] = []

    def velocity(x: Tensor, i: int) -> Tensor:
        calls.append(i)
        return x

    steps = flow_euler(velocity, torch.ones(2), flow_dpm_grid(5, 3.0))
    assert calls == []
    next(steps)
    next(steps)
    steps.close()
    assert calls == [0, 1]


def test_scm_renoises_its_prediction_and_draws_in_every_step() -> None:
    grid = scm_grid(4)
    drawn: list[int] = []
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    noises = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return noises[i]

    steps = list(scm(FLOW.on(grid), x, grid, noise))
    assert drawn == [0, 1, 2, 3]
    for step in steps:
        expected = (1 - step.sigma_next) * step.x0 + step.sigma_next * noises[step.index]
        torch.testing.assert_close(step.latents, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[-1].latents, steps[-1].x0, rtol=0, atol=0)


def test_scm_without_noise_is_refused_before_the_first_step() -> None:
    with pytest.raises(InvalidInput, match="draws new noise"):
        scm(lambda x, i: x, torch.ones(2), scm_grid(2))


def test_bad_order_is_refused() -> None:
    with pytest.raises(InvalidInput, match="order 1, 2 or 3, not 4"):
        flow_dpm(lambda x, i: x, torch.ones(2), flow_dpm_grid(2), order=4)


def test_samplers_are_found_by_name() -> None:
    assert list(SAMPLERS) == ["flow-dpm", "flow-euler", "scm"]
    assert all(name == sampler.name and find_sampler(name) is sampler for name, sampler in SAMPLERS.items())
    with pytest.raises(
        InvalidInput, match=r"'flow-dmp'. Did you mean 'flow-dpm'\? Choose one of: flow-dpm, flow-euler, scm"
    ):
        find_sampler("flow-dmp")


@pytest.mark.parametrize(
    ("n", "shift", "run", "printed"),
    [
        (20, 1.0, flow_euler, 0.0357),
        (20, 1.0, flow_dpm, 0.0035),
        (50, 3.0, flow_euler, 0.0215),
        (50, 3.0, flow_dpm, 0.0029),
    ],
)
def test_bimodal_errors(n: int, shift: float, run, printed: float) -> None:
    """RMS to a fine reference for two Gaussians at +-1.5 with std 0.25: algorithms section 2.3."""

    def on(grid: Grid):
        sigmas = grid.sigmas.tolist()

        def velocity(x: Tensor, i: int) -> Tensor:
            s = sigmas[i]
            variance = (1 - s) ** 2 * 0.0625 + s**2
            centre = (1 - s) * 1.5
            weight = torch.sigmoid(2 * centre * x / variance)
            slope = (s - (1 - s) * 0.0625) / variance
            upper, lower = -1.5 + slope * (x - centre), 1.5 + slope * (x + centre)
            return weight * upper + (1 - weight) * lower

        return velocity

    grid = flow_dpm_grid(n, shift)
    fine = Grid(sigmas=torch.linspace(grid.sigmas[0].item(), 0, 2001), timesteps=torch.zeros(2000))
    x = GaussianFlow(0.0, 1.0).start(1.0, 2000)
    assert rms(last(run(on(grid), x, grid)) - last(flow_dpm(on(fine), x, fine))) == pytest.approx(printed, rel=0.1)


def test_a_run_of_angles_begins_with_the_noise_as_the_trigflow_state() -> None:
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = scm_grid(2, timesteps=[1.2, 0.5, 0.0])
    first = find_sampler("scm").on(grid).first(noise)
    torch.testing.assert_close(first, noise / (math.sin(1.2) + math.cos(1.2)), rtol=1e-6, atol=0)
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2, timesteps=[1.2, 0.5, 0.0], max_timesteps=None, intermediate_timesteps=None)
    torch.testing.assert_close(first, SchedulerSampler(scheduler).first(noise), rtol=1e-6, atol=0)
    assert find_sampler("flow-dpm").on(flow_dpm_grid(4, 3.0)).first(noise) is noise
