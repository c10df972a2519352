"""Distribution matching: its two losses on distributions whose answers are known, and its players on a tiny teacher."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.schedules import MAX_ANGLE
from sana.models.linear_dit import LinearDiT
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.loop import Trainer
from sana.training.objectives.sprint.losses import MatchingLoss
from sana.training.objectives.sprint.matching import (
    LEVELS,
    RESUMED,
    critic_loss,
    draw_levels,
    draw_resumed,
    student_loss,
)
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.trigflow import Network, noised
from tiny_sprint import CPU, tiny_teacher, trained

__all__ = ["tiny_teacher"]

RUN = RunSettings(steps=8, batch_size=4, precision="float32", evaluate_every=8, save_every=2, log_every=1, ema=0.5)
MATCHING = SprintSettings(
    teacher="tiny", features="nowhere", consistency_weight=0.0, adversarial_weight=0.0, matching_weight=1.0
)


def gaussian(mean: float, variance: float) -> Network:
    """The exact network of a normal distribution: F = cos t E[noise | x] - sin t E[x0 | x]."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        angle = t.view(-1, 1)
        cos, sin = angle.cos(), angle.sin()
        off = (x - cos * mean) / (cos**2 * variance + sin**2)
        return cos * sin * off - sin * (mean + cos * variance * off)

    return network


def noise_and_levels(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, generator=generator), draw_levels(n, 3.0, generator)


@pytest.mark.parametrize(("own", "sign"), [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_samples_move_from_what_they_are_to_what_the_teacher_knows(own: float, sign: float) -> None:
    """A step against the gradient goes to the teacher's mean, 0; where critic and teacher agree, nowhere."""
    x0 = (own + 0.3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))).requires_grad_(True)
    student_loss(x0, *noise_and_levels(64), gaussian(0.0, 0.09), gaussian(own, 0.09)).backward()
    assert x0.grad is not None
    assert torch.equal(x0.grad.sign(), torch.full_like(x0, sign))


def test_slopes_are_in_units_of_the_distance_from_the_teachers_sample() -> None:
    """A mean of absolute values for each sample, so that near and far ones weigh alike."""
    noise, t = noise_and_levels(8)
    x0 = torch.linspace(-2, 2, 8)[:, None].requires_grad_(True)
    teacher, critic = gaussian(0.0, 0.09), gaussian(1.0, 0.25)
    student_loss(x0, noise, t, teacher, critic).backward()
    x, angle = noised(x0.detach(), noise, t), t.view(-1, 1)
    likely, own = (angle.cos() * x - angle.sin() * network(x, t) for network in (teacher, critic))
    slope = (own - likely) / (x0.detach() - likely).abs().clamp(min=0.01)
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, slope / x0.numel())


def test_the_critics_loss_is_least_at_the_distribution_of_the_samples() -> None:
    x0 = 0.7 + 0.5 * torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    noise, t = noise_and_levels(20000)
    exact = float(critic_loss(x0, noise, t, gaussian(0.7, 0.25)))
    for mean, variance in ((0.6, 0.25), (0.8, 0.25), (0.7, 0.2), (0.7, 0.31)):
        assert float(critic_loss(x0, noise, t, gaussian(mean, variance))) > exact + 1e-4
    point = torch.full((20000, 1), 0.4)
    assert float(critic_loss(point, noise, t, gaussian(0.4, 0.0))) < 1e-9


def test_angles_lie_where_they_are_said_to() -> None:
    generator = torch.Generator().manual_seed(0)
    t = draw_levels(20000, 3.0, generator)
    sigma = t.sin() / (t.sin() + t.cos())
    even = sigma / (3 - 2 * sigma)
    assert float(even.min()) == pytest.approx(LEVELS[0], abs=1e-3)
    assert float(even.max()) == pytest.approx(LEVELS[1], abs=1e-3)
    assert float(even.mean()) == pytest.approx(0.5, abs=0.01)
    resumed = draw_resumed(20000, generator)
    assert (float(resumed.min()), float(resumed.max())) == pytest.approx(RESUMED, abs=1e-3)


def test_student_and_critic_alternate_and_nothing_else_moves(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    objective = SprintObjective(MATCHING, RUN, CPU)
    assert objective.turns == ("generator", "discriminator")
    owned = {turn: {name.split(".")[0] for name, _ in objective.parameters_of(turn)} for turn in objective.turns}
    assert owned == {"generator": {"student"}, "discriminator": {"critic"}}
    trainer = Trainer(objective, RUN, OptimizerSettings(warmup=1), tmp_path)
    old = copy.deepcopy(objective.module.state_dict())
    assert all(torch.equal(old[f"critic.{name}"], value) for name, value in tiny_teacher.state_dict().items())
    for report in trainer.steps():
        new = copy.deepcopy(objective.module.state_dict())
        moved = {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])}
        assert moved == ({"student"} if report.step % 2 else {"critic"})
        assert set(report.parts) >= ({"matching"} if report.step % 2 else {"critic"})
        old = new
    still = objective.teacher.transformer.state_dict()
    assert all(torch.equal(value, still[name]) for name, value in tiny_teacher.state_dict().items())


def test_a_stopped_run_goes_on_to_the_same_weights(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    settings = dataclasses.replace(MATCHING, consistency_weight=1.0, adversarial_weight=0.5, taps=(0, 1))
    whole, broken = trained(tmp_path / "a", settings, RUN), trained(tmp_path / "b", settings, RUN, 3, 4)
    assert {"consistency", "adversarial", "matching"} <= set(whole.objective.loss(0)[1])
    assert {"hinge", "critic"} <= set(whole.objective.loss(1, "discriminator")[1])
    again = broken.objective.module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.objective.module.state_dict().items())


def test_the_generators_loss_is_the_weighted_sum(tiny_teacher: LinearDiT) -> None:
    settings = dataclasses.replace(MATCHING, consistency_weight=0.25, matching_weight=3.0)
    total, logged = SprintObjective(settings, RUN, CPU).loss(0)
    torch.testing.assert_close(total.detach(), 0.25 * logged["consistency"] + 3 * logged["matching"])


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_student_begins_with_noise_or_with_what_it_drew(
    tiny_teacher: LinearDiT, share: float, wanted: float
) -> None:
    objective = SprintObjective(dataclasses.replace(MATCHING, max_time_probability=share), RUN, CPU)
    loss = objective.two_sided[0]
    assert isinstance(loss, MatchingLoss)
    found: list[float] = []
    for draw in range(60):
        given = objective.given(draw)
        x, t = loss.begun(given)
        assert x.shape == given.latents.shape
        assert not x.requires_grad
        assert all(angle == pytest.approx(MAX_ANGLE) or RESUMED[0] <= angle <= RESUMED[1] for angle in t.tolist())
        found += (t > RESUMED[1]).float().tolist()
    assert sum(found) / len(found) == pytest.approx(wanted, abs=0.03)


def test_every_draw_takes_as_many_passes_where_weights_are_split(tiny_teacher: LinearDiT) -> None:
    """All processes gather them at once; whether one has something to draw first is a matter of its draw."""
    often = dataclasses.replace(MATCHING, max_time_probability=0.85)
    alone = SprintObjective(often, RUN, CPU)
    split = SprintObjective(often, dataclasses.replace(RUN, shard=True), CPU)
    passes: dict[str, list[int]] = {"alone": [], "split": []}
    for name, objective in (("alone", alone), ("split", split)):
        block = objective.student.transformer_blocks[0]
        block.register_forward_hook(lambda *_, name=name: passes[name].append(draw))
    for draw in range(8):
        for turn in alone.turns:
            assert torch.equal(alone.loss(draw, turn)[0], split.loss(draw, turn)[0])
    assert [passes["split"].count(draw) for draw in range(8)] == [4] * 8
    assert {passes["alone"].count(draw) for draw in range(8)} == {2, 4}
    never = SprintObjective(dataclasses.replace(often, max_time_probability=1.0), split.run, CPU)
    never.student.transformer_blocks[0].register_forward_hook(lambda *_: passes["split"].append(8))
    never.loss(0)
    assert passes["split"].count(8) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matching_weight": 0.0}, "consistency_weight, adversarial_weight and matching_weight are all 0"),
        ({"matching_weight": -1.0}, "matching_weight must not be negative"),
        ({"angle_mean": 0.5}, "angle_mean has no effect with consistency_weight = 0 and adversarial_weight = 0"),
        ({"warmup_steps": 7}, "warmup_steps has no effect with consistency_weight = 0"),
        ({"virtual_batch": 4}, "virtual_batch has no effect with adversarial_weight = 0"),
        (
            {"consistency_weight": 1.0, "matching_weight": 0.0, "max_time_probability": 0.2},
            "max_time_probability has no effect with adversarial_weight = 0 and matching_weight = 0",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        dataclasses.replace(MATCHING, **changes)


def test_the_distance_from_the_teachers_pictures_chooses_nothing() -> None:
    run = dataclasses.replace(RUN, export="best", evaluate_every=2)
    dataclasses.replace(MATCHING, consistency_weight=1.0, matching_weight=0.0).check(run)
    with pytest.raises(InvalidInput, match=r"run.export = 'best' does not go with sprint.matching_weight"):
        MATCHING.check(run)
