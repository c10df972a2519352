import math

import numpy as np
import pytest
import torch

from sana.errors import InvalidInput
from sana.flow.path import sigma_from_angle
from sana.flow.schedules import (
    Grid,
    custom_grid,
    flow_dpm_grid,
    flow_euler_grid,
    flow_euler_table,
    scm_angles,
    scm_grid,
    shift_sigma,
    tail_levels,
)


def test_published_timesteps_of_twenty_steps() -> None:
    shift_3 = [999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136]
    shift_6 = [999, 991, 981, 971, 959, 947, 933, 917, 899, 879, 856, 830, 799, 763, 719, 666, 599, 513, 399, 239]
    assert flow_dpm_grid(20, 3.0).timesteps.tolist() == shift_3
    assert flow_dpm_grid(20, 6.0).timesteps.tolist() == shift_6


def test_published_euler_grid_is_shifted_twice() -> None:
    grid = flow_euler_grid(20, 3.0)
    told = grid.timesteps.tolist()
    assert told[:3] == pytest.approx([1000, 981.87, 962.39], abs=0.01)
    assert told[-2:] == pytest.approx([149.79, 8.93], abs=0.01)
    assert shift_sigma(0.001, 3.0) * 1000 == pytest.approx(2.99, abs=0.01)


def test_timesteps_are_not_what_the_sigmas_would_give() -> None:
    """Why a grid carries its timesteps: truncating 1000 sigma again misses the published integer now and then."""
    grids = [flow_dpm_grid(n, shift) for n in range(1, 61) for shift in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)]
    missed = sum(not torch.equal((grid.sigmas[:-1] * 1000).long(), grid.timesteps) for grid in grids)
    assert missed >= 20


@pytest.mark.parametrize("make", [flow_dpm_grid, flow_euler_grid])
@pytest.mark.parametrize("n", [1, 2, 20, 500])
def test_grids_fall_from_noise_to_zero(make, n: int) -> None:
    grid = make(n, 3.0)
    assert grid.num_steps == n
    assert grid.sigmas.dtype == torch.float32
    assert grid.sigmas[-1] == 0
    assert (grid.sigmas.diff() < 0).all()
    assert grid.sigmas[0] > 0.999


def test_shift_moves_the_logit() -> None:
    sigma = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(sigma, 3.0).logit(), sigma.logit() + math.log(3), rtol=0, atol=1e-13)
    torch.testing.assert_close(shift_sigma(sigma, 1.0), sigma, rtol=0, atol=1e-16)


def test_euler_table_ends() -> None:
    table = flow_euler_table(3.0)
    assert len(table) == 1000
    assert table[0] == 1
    assert table[-1].item() == pytest.approx(0.002994012, abs=1e-8)


def test_scm_angles_of_the_documented_step_counts() -> None:
    assert scm_angles(1).tolist() == pytest.approx([1.57080, 0])
    assert scm_angles(2).tolist() == pytest.approx([1.57080, 1.3, 0])
    assert scm_angles(2, intermediate_timesteps=None).tolist() == pytest.approx([1.57080, 0.78540, 0], abs=1e-5)
    assert scm_angles(4).tolist() == pytest.approx([1.5708, 1.1781, 0.7854, 0.3927, 0], abs=1e-6)
    assert scm_angles(None, timesteps=[1.5, 1.0, 0.2, 0.0]).tolist() == pytest.approx([1.5, 1.0, 0.2, 0.0])


def test_scm_grid_tells_the_network_the_level() -> None:
    grid = scm_grid(2)
    angles = scm_angles(2)
    torch.testing.assert_close(grid.sigmas, angles.sin() / (angles.sin() + angles.cos()), rtol=0, atol=0)
    torch.testing.assert_close(grid.timesteps, grid.sigmas[:-1], rtol=0, atol=0)
    assert grid.sigmas[0] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 3, "timesteps": [1.5, 1.0, 0.0]}, "must be of length"),
        (
            {"num_steps": 2, "timesteps": [1.5, 1.0, 0.0], "max_timesteps": 1.4},
            "`max_timesteps` should not be provided",
        ),
        ({"num_steps": 2, "max_timesteps": None}, "either `timesteps` or `max_timesteps`"),
        ({"num_steps": 4, "intermediate_timesteps": 1.0}, "not supported when num_inference_steps != 2"),
        ({"num_steps": 2, "timesteps": [1.0, 1.5, 0.0]}, "must fall"),
        ({"num_steps": 2, "max_timesteps": 1.2}, "`intermediate_timesteps` must fall"),
        ({"num_steps": 0}, "at least 1"),
        ({"num_steps": None}, "at least 1"),
    ],
)
def test_scm_contradictions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        scm_angles(**arguments)


def test_custom_timesteps_are_kept_and_divided() -> None:
    grid = custom_grid(timesteps=[999, 500, 20])
    assert grid.timesteps.dtype == torch.int64
    assert grid.timesteps.tolist() == [999, 500, 20]
    assert grid.sigmas.tolist() == pytest.approx([0.999, 0.5, 0.02, 0.0])
    real = custom_grid(timesteps=torch.tensor([999.5, 20.25]))
    assert real.timesteps.tolist() == [999.5, 20.25]
    assert real.sigmas.tolist() == pytest.approx([0.9995, 0.02025, 0.0])


def test_custom_sigmas_truncate_like_the_solver_or_stay_real() -> None:
    assert custom_grid(sigmas=[0.9996, 0.5, 0.02]).timesteps.tolist() == [999, 500, 20]
    assert custom_grid(sigmas=[0.9996, 0.5], truncate=False).timesteps.tolist() == pytest.approx([999.6, 500])
    with_end = custom_grid(sigmas=np.array([0.9, 0.4, 0.0]))
    assert with_end.sigmas.tolist() == pytest.approx([0.9, 0.4, 0.0])


def test_custom_sigmas_find_every_whole_timestep() -> None:
    whole = torch.arange(1000, 0, -1)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(custom_grid(sigmas=whole.to(dtype) / 1000).timesteps, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [900, 900, 10]}, "must fall"),
        ({"sigmas": [0.2, 0.5]}, "must fall"),
        ({"sigmas": [1.2, 0.5]}, "between 0 and 1"),
        ({"sigmas": [0.5, -0.1]}, "must fall|between 0 and 1"),
        ({"sigmas": [0.0]}, "only the end"),
        ({"sigmas": []}, "list of numbers"),
        ({"sigmas": [math.nan]}, "finite"),
        ({"timesteps": ["a"]}, "list of numbers"),
        ({"timesteps": [10], "sigmas": [0.1]}, "Only one of `timesteps` or `sigmas`"),
        ({}, "either `timesteps` or `sigmas`"),
    ],
)
def test_bad_custom_levels_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        custom_grid(**arguments)


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, True])
@pytest.mark.parametrize("make", [flow_dpm_grid, flow_euler_grid])
def test_bad_step_counts_are_refused(make, steps) -> None:
    with pytest.raises(InvalidInput, match="number of steps"):
        make(steps, 3.0)


@pytest.mark.parametrize("shift", [0.0, -3.0, math.inf, math.nan])
def test_bad_shifts_are_refused(shift: float) -> None:
    with pytest.raises(InvalidInput, match="flow shift"):
        flow_dpm_grid(4, shift)
    with pytest.raises(InvalidInput, match="flow shift"):
        flow_euler_grid(4, shift)


def test_grid_checks_what_it_is_given() -> None:
    sigmas, timesteps = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([999, 500])
    Grid(sigmas=sigmas, timesteps=timesteps)
    for bad, message in [
        ({"sigmas": sigmas[:2]}, "one sigma more"),
        ({"sigmas": sigmas[None]}, "one sigma more"),
        ({"sigmas": sigmas.double()}, "float32"),
        ({"timesteps": timesteps.int()}, "int64 or float32"),
        ({"sigmas": sigmas.flip(0)}, "must fall"),
        ({"sigmas": sigmas * 2}, "between 0 and 1"),
        ({"sigmas": torch.tensor([1.0, math.nan, 0.0])}, "finite"),
        ({"sigmas": sigmas.to("meta")}, "CPU"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            Grid(**{"sigmas": sigmas, "timesteps": timesteps, **bad})


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_tail_within_the_first_step_starts_between_its_ends(steps: int) -> None:
    """Where the reference would start from pure noise, the start moves evenly from the second level to the first."""
    angles = scm_angles(steps)
    for strength in (1 - 0.9 / steps, 1 - 0.5 / steps, 1 - 1e-3 / steps):
        share = steps * (1 - strength)
        start = (1 - share) * angles[0] + share * angles[1]
        skipped, left = tail_levels(angles, strength)
        assert skipped == 0
        assert left[1:].tolist() == angles[1:].tolist()
        assert left[0].item() == pytest.approx(start.item(), abs=1e-6)
        tail = scm_grid(steps).tail(strength)
        assert tail.num_steps == steps
        assert tail.sigmas[0].item() == pytest.approx(sigma_from_angle(start).item(), abs=1e-6)
        assert torch.equal(tail.timesteps, tail.sigmas[:-1])
        for make in (flow_dpm_grid, flow_euler_grid):
            grid = make(steps, 3.0)
            tail = grid.tail(strength)
            level = (1 - share) * grid.sigmas[0] + share * grid.sigmas[1]
            assert tail.sigmas[0].item() == pytest.approx(level.item(), abs=1e-6)
            assert tail.sigmas[1:].tolist() == grid.sigmas[1:].tolist()
            assert -1e-3 < 1000 * tail.sigmas[0].item() - tail.timesteps[0].item() < 1
    assert scm_grid(steps).tail(1.0).sigmas.tolist() == scm_grid(steps).sigmas.tolist()
    assert angles.tolist() == scm_angles(steps).tolist()


def test_tail_is_the_documented_image_to_image_rule() -> None:
    grid = flow_dpm_grid(20, 3.0)
    assert grid.tail(1.0).timesteps.tolist() == grid.timesteps.tolist()
    assert grid.tail(0.6).timesteps.tolist() == grid.timesteps.tolist()[8:]
    assert grid.tail(0.6).sigmas.tolist() == grid.sigmas.tolist()[8:]
    assert scm_grid(2).tail(0.6).num_steps == 2
    assert scm_grid(2).tail(0.5).num_steps == 1
    assert scm_grid(2, 1.0, 0.5).tail(0.9).sigmas.tolist() == scm_grid(2, 1.0, 0.5).sigmas.tolist(), "no pure noise"
    with pytest.raises(InvalidInput, match=r"strength parameter: 0\.0, no step is left"):
        grid.tail(0.0)
    with pytest.raises(InvalidInput, match=r"The value of strength should in \[0.0, 1.0\] but is 1.2"):
        grid.tail(1.2)
