import pytest
import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.guidance import cfg, combine, guided_steps, guided_velocity, pag_scales
from sana.flow.schedules import custom_grid, flow_dpm_grid, flow_euler_grid

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def conditional(x: Tensor, i: int) -> Tensor:
    return torch.sin(x) + i


def unconditional(x: Tensor, i: int) -> Tensor:
    return torch.cos(x) - i


def perturbed_one(x: Tensor, i: int) -> Tensor:
    return torch.tanh(x) * (i + 1)


class Batched:
    def __init__(self) -> None:
        self.guided: list[bool] = []
        self.perturbed: list[bool] = []

    def __call__(self, x: Tensor, i: int, *, guided: bool, perturbed: bool = False) -> Tensor:
        self.guided.append(guided)
        self.perturbed.append(perturbed)
        rows = [unconditional(x, i)] * guided + [conditional(x, i)] + [perturbed_one(x, i)] * perturbed
        return torch.cat(rows)


def never(x: Tensor, i: int) -> Tensor:
    raise AssertionError("the unconditional branch must not run")


def test_scale_one_is_the_conditional_and_costs_one_call() -> None:
    assert cfg(never, conditional, 1.0) is conditional
    batched = Batched()
    torch.testing.assert_close(guided_velocity(batched, 1.0)(X, 3), conditional(X, 3), rtol=0, atol=0)
    assert batched.guided == [False]


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.5])
def test_both_forms_extrapolate_from_the_unconditional(scale: float) -> None:
    expected = (1 - scale) * unconditional(X, 2) + scale * conditional(X, 2)
    torch.testing.assert_close(cfg(unconditional, conditional, scale)(X, 2), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(guided_velocity(Batched(), scale)(X, 2), expected, rtol=0, atol=1e-5)


def test_combination_commutes_with_the_recovery_of_x0() -> None:
    u, c = unconditional(X, 0), conditional(X, 0)
    torch.testing.assert_close(X - 0.7 * combine(u, c, 4.5), combine(X - 0.7 * u, X - 0.7 * c, 4.5), rtol=0, atol=1e-5)


def test_interval_has_open_ends_and_skips_the_unconditional_rows() -> None:
    grid = custom_grid(sigmas=[0.9, 0.75, 0.5, 0.25])
    active = guided_steps(grid, (0.25, 0.75))
    assert active == (False, False, True, False)
    batched = Batched()
    velocity = guided_velocity(batched, 4.5, active)
    for i in range(4):
        reference = combine(unconditional(X, i), conditional(X, i), 4.5) if active[i] else conditional(X, i)
        torch.testing.assert_close(velocity(X, i), reference, rtol=0, atol=1e-6)
        torch.testing.assert_close(cfg(unconditional, conditional, 4.5, active)(X, i), reference, rtol=0, atol=1e-6)
    assert batched.guided == list(active)


def test_whole_interval_guides_also_the_step_at_sigma_one() -> None:
    grid = flow_euler_grid(4, 3.0)
    assert grid.sigmas[0] == 1
    assert guided_steps(grid, (0.0, 1.0)) == guided_steps(grid, None) == (True,) * 4
    assert guided_steps(grid, (0.0, 0.999)) == (False, True, True, True)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.1, 1.5), (float("nan"), 1.0)])
def test_bad_intervals_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput, match="guidance interval"):
        guided_steps(flow_euler_grid(2, 3.0), interval)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_perturbed_guidance_adds_the_way_from_the_perturbed(scale: float) -> None:
    u, c, p = unconditional(X, 2), conditional(X, 2), perturbed_one(X, 2)
    batched = Batched()
    found = guided_velocity(batched, scale, None, (0.0, 0.0, 3.0))(X, 2)
    torch.testing.assert_close(found, u + scale * (c - u) + 3 * (c - p), rtol=0, atol=1e-5)
    assert (batched.guided, batched.perturbed) == ([scale != 1], [True])


def test_steps_without_strength_or_outside_the_interval_have_no_perturbed_rows() -> None:
    batched = Batched()
    velocity = guided_velocity(batched, 4.5, (True, False, True), (0.0, 3.0, 3.0))
    for i in range(3):
        velocity(X, i)
    assert batched.guided == [True, False, True]
    assert batched.perturbed == [False, False, True]
    torch.testing.assert_close(velocity(X, 0), guided_velocity(Batched(), 4.5)(X, 0), rtol=0, atol=0)


def test_strengths_fall_with_the_timestep() -> None:
    grid = flow_dpm_grid(4, 3.0)
    assert pag_scales(grid, 0.0) is None
    assert pag_scales(grid, 0.0, 0.5) is None
    assert pag_scales(grid, 3.0) == (3.0,) * 4
    told = grid.timesteps.tolist()
    assert pag_scales(grid, 3.0, 0.01) == tuple(max(3.0 - 0.01 * (1000 - t), 0.0) for t in told)
    assert pag_scales(grid, 3.0, 1.0)[1:] == (0.0, 0.0, 0.0)  # type: ignore[index]


@pytest.mark.parametrize(("scale", "adaptive"), [(-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (3.0, -0.1)])
def test_bad_strengths_are_refused(scale: float, adaptive: float) -> None:
    with pytest.raises(InvalidInput, match=r"pag_(adaptive_)?scale"):
        pag_scales(flow_dpm_grid(2, 3.0), scale, adaptive)
