"""The two players of a Sprint distillation on a tiny teacher."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from look_checks import Checks
from sana.errors import InvalidInput
from sana.flow.schedules import MAX_ANGLE
from sana.models.discriminator import DiscriminatorHeads, LocalBatchNorm
from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.loop import Trainer
from sana.training.objectives.base import LookLeft
from sana.training.objectives.sprint import losses
from sana.training.objectives.sprint.adversarial import generator_loss, gradient_penalty, hinge_loss
from sana.training.objectives.sprint.consistency import tangent
from sana.training.objectives.sprint.losses import AdversarialLoss
from sana.training.objectives.sprint.networks import Backbone, Condition, tapped, taps_of
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.students import check_teacher, go_on, student_of
from sana.training.objectives.sprint.trigflow import Network
from tiny_model import tiny_transformer
from tiny_sprint import CPU, FakeBatches, tiny_teacher, trained

__all__ = ["tiny_teacher"]

RUN = RunSettings(steps=6, batch_size=4, precision="float32", evaluate_every=6, save_every=2, log_every=1, ema=0.5)
SETTINGS = SprintSettings(teacher="tiny", features="nowhere", taps=(0, 1), warmup_steps=4)


def test_the_players_alternate_each_with_its_own_weights(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    objective = SprintObjective(SETTINGS, RUN, CPU)
    names = {turn: {name for name, _ in objective.parameters_of(turn)} for turn in objective.turns}
    assert objective.turns == ("generator", "discriminator")
    assert all(name.startswith("heads.") for name in names["discriminator"])
    assert names["generator"] | names["discriminator"] == {name for name, _ in objective.module.named_parameters()}
    before = {name: value.clone() for name, value in objective.teacher.transformer.state_dict().items()}
    trainer = Trainer(objective, RUN, OptimizerSettings(warmup=1), tmp_path)
    old = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
    moved = []
    for report in trainer.steps():
        new = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
        moved.append({name for name in new if not torch.equal(new[name], old[name])})
        old = new
        assert ("hinge" in report.parts) is (report.step % 2 == 0)
        assert ("consistency" in report.parts) is (report.step % 2 == 1)
    for step, changed in enumerate(moved):
        turn = objective.turns[step % 2]
        assert changed
        assert changed <= names[turn]
    assert all(torch.equal(value, before[name]) for name, value in objective.teacher.transformer.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in tiny_teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in objective.teacher.transformer.parameters())
    assert report.figures is not None
    assert report.figures["distance"] > 0
    assert (tmp_path / "previews" / "00000006.png").is_file()


def test_a_stopped_run_goes_on_to_the_same_weights(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    whole, broken = trained(tmp_path / "a", SETTINGS, RUN), trained(tmp_path / "b", SETTINGS, RUN, 3)
    again = broken.objective.module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.objective.module.state_dict().items())


def test_the_warm_up_counts_the_steps_of_both_players(tiny_teacher: LinearDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def spy(network: Network, x: Tensor, t: Tensor, drift: Tensor, share: float, **more: Any) -> tuple[Tensor, Tensor]:
        shares.append(share)
        return tangent(network, x, t, drift, share, **more)

    monkeypatch.setattr(losses, "tangent", spy)
    objective = SprintObjective(SETTINGS, RUN, CPU)
    twice = SprintObjective(SETTINGS, dataclasses.replace(RUN, accumulate=2), CPU)
    for draw in (0, 1, 2, 4, 9):
        objective.loss(draw)
    for draw in (0, 1, 2, 7):
        twice.loss(draw)
    assert shares == [0, 0.25, 0.5, 1, 1, 0, 0, 0.25, 0.75]


def test_the_warm_up_goes_on_at_its_step_when_a_step_is_fewer_draws(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    for accumulate, last in ((2, 4), (1, 6)):
        run = dataclasses.replace(RUN, accumulate=accumulate)
        objective = SprintObjective(SETTINGS, run, CPU)
        trainer = Trainer(objective, run, OptimizerSettings(warmup=1), tmp_path)
        given = objective.given

        def spy(draw: int, given: Any = given) -> Any:
            found = given(draw)
            steps.append((draw, found.step))
            return found

        objective.given = spy  # type: ignore[method-assign]
        reports = trainer.steps()
        while trainer.step < last:
            next(reports)
        reports.close()  # type: ignore[attr-defined]
    assert steps == [*((draw, draw // 2) for draw in range(8)), (8, 4), (9, 5)]


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_share_of_jumps_from_pure_noise_is_a_share_and_never_an_angle(
    tiny_teacher: LinearDiT, probability: float, share: float
) -> None:
    objective = SprintObjective(dataclasses.replace(SETTINGS, max_time_probability=probability), RUN, CPU)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    loss, given = objective.two_sided[0], dataclasses.replace(objective.given(0), latents=torch.zeros(2000, 1, 1, 1))
    assert isinstance(loss, AdversarialLoss)
    loss.jump(network, given)
    assert float((seen[0] == MAX_ANGLE).float().mean()) == pytest.approx(share, abs=0.03)
    assert not bool((seen[0] == 0.5).any())


def test_true_latents_under_other_captions_are_fakes(tiny_teacher: LinearDiT) -> None:
    both = SprintObjective(SETTINGS, RUN, CPU).loss(1, "discriminator")[0]
    alone = SprintObjective(dataclasses.replace(SETTINGS, misaligned=False), RUN, CPU).loss(1, "discriminator")[0]
    assert not torch.equal(both, alone)
    with pytest.raises(InvalidInput, match="misaligned exchanges captions"):
        SprintObjective(SETTINGS, dataclasses.replace(RUN, batch_size=1), CPU)


class FewBatches(FakeBatches):
    """Batches of another size, as the last ones of a dataset are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        return Batch(
            latents=torch.randn(self.count, 4, 4, 4, generator=generator),
            embeds=torch.randn(self.count, 5, 32, generator=generator),
            mask=torch.ones(self.count, 5, dtype=torch.long),
        )


def heads_gradients(settings: SprintSettings, count: int) -> tuple[Tensor, dict[str, Tensor], int]:
    objective = SprintObjective(settings, RUN, CPU)
    objective.origin.batches = FewBatches(count)  # type: ignore[assignment]
    passes: list[int] = []
    objective.module.heads.register_forward_hook(lambda *_: passes.append(1))
    loss, _ = objective.loss(1, "discriminator")
    loss.backward()  # type: ignore[no-untyped-call]
    named = objective.module.heads.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}, len(passes)


def test_a_lone_sample_is_no_fake_under_its_own_caption(tiny_teacher: LinearDiT) -> None:
    """It is read all the same: where weights are split, the other processes wait for that."""
    loss, gradients, passes = heads_gradients(SETTINGS, 1)
    without, wanted, fewer = heads_gradients(dataclasses.replace(SETTINGS, misaligned=False), 1)
    assert torch.equal(loss, without)
    assert (passes, fewer) == (3, 2)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("turn", ["generator", "discriminator"])
def test_a_batch_of_any_size_is_told_true_from_fake(tiny_teacher: LinearDiT, turn: str) -> None:
    objective = SprintObjective(SETTINGS, RUN, CPU)
    objective.origin.batches = FewBatches(9)  # type: ignore[assignment]
    assert bool(torch.isfinite(objective.loss(1, turn)[0]))


def test_the_gradient_penalty_is_optional_and_is_the_slope_at_the_heads(tiny_teacher: LinearDiT) -> None:
    logged = SprintObjective(dataclasses.replace(SETTINGS, gradient_penalty=0.1), RUN, CPU).loss(1, "discriminator")[1]
    assert "penalty" in logged
    weight = torch.tensor([2.0, 3.0])
    penalty = gradient_penalty(lambda features: (features[0] * weight).sum(-1), [torch.randn(4, 5, 2)])
    assert float(penalty.detach()) == pytest.approx(5 * (4 + 9))


def test_the_losses_of_the_two_sides() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert float(hinge_loss(real, fake)) == 0.5 * (0.5 + 1.0)
    assert float(generator_loss(fake)) == 1.0


def test_taps_are_the_published_ones_and_reach_the_last_block_elsewhere() -> None:
    assert taps_of(20) == (2, 8, 14, 19)
    assert taps_of(28) == (2, 8, 14, 20, 27)
    assert taps_of(6)[-1] == 5
    assert taps_of(1) == (0,)


def test_tapped_blocks_are_those_of_an_ordinary_pass(tiny_teacher: LinearDiT) -> None:
    batch = FakeBatches().batch(0, torch.Generator().manual_seed(0))
    kept: list[Tensor] = []
    handle = tiny_teacher.transformer_blocks[1].register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.no_grad():
        under = Condition(batch.embeds, batch.mask)
        found = tapped(Backbone(tiny_teacher), under, batch.latents, torch.full((4,), 0.7), (0, 1))
    handle.remove()
    assert [tuple(x.shape) for x in found] == [(4, 16, 32)] * 2
    assert torch.equal(found[1], kept[0])
    modulation = tiny_teacher.modulation(torch.zeros(4))
    with pytest.raises(InvalidInput, match="blocks 0 to 1"):
        tiny_teacher.features(batch.latents, modulation, (), None, (2,))


def test_the_local_norm_whitens_groups_that_differ_by_one_sample_at_most() -> None:
    norm = LocalBatchNorm(3, 8)
    x = torch.randn(16, 3, 10, generator=torch.Generator().manual_seed(0)) * 5 + 2
    x[8:] += 100
    out = norm(x)
    for half in (out[:8], out[8:]):
        torch.testing.assert_close(half.mean((0, 2)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(half.var((0, 2), unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    for batch, sizes in ((9, (4, 5)), (11, (5, 6)), (14, (7, 7)), (1, (1,))):
        for part, group in zip(norm(x[-batch:]).split(sizes), x[-batch:].split(sizes), strict=True):
            torch.testing.assert_close(part, norm(group))


def test_heads_give_one_logit_per_token_and_see_a_circle() -> None:
    torch.manual_seed(0)
    heads = DiscriminatorHeads(8, 2).eval()
    features = [torch.randn(4, 6, 8), torch.randn(4, 6, 8)]
    logits = heads(features)
    assert logits.shape == (4, 12)
    turned = heads([x.roll(1, 1) for x in features]).view(4, 2, 6).roll(-1, 2).reshape(4, 12)
    torch.testing.assert_close(turned, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_scale": 1.0}, "no teacher yet"),
        ({"qk_norm": None}, "no teacher yet"),
        ({"guidance": True}, "distilled"),
    ],
)
def test_a_model_that_cannot_teach_is_refused(changes: dict[str, Any], message: str) -> None:
    made = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001, **changes}
    is_student = made.pop("guidance", False)
    model = tiny_transformer(**made)
    with pytest.raises(InvalidInput, match=message):
        check_teacher(student_of(model, 0) if is_student else model, "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": "nom"}, "Did you mean 'norm'"),
        ({"derivative": "backward"}, "Choose one of: forward, difference"),
        ({"guidance": ()}, "at least one scale"),
        ({"max_time_probability": 1.5708}, "no angle"),
        ({"warmup_steps": 0}, "warmup_steps must be positive"),
        ({"adversarial_weight": -1.0}, "must not be negative"),
        ({"features": ""}, "set sprint.features"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_a_look_is_left_between_the_steps_of_teacher_and_student(tiny_teacher: LinearDiT) -> None:
    one = SprintObjective(SETTINGS, RUN, CPU)
    for at in (1, 20, 21):  # the teacher's twenty steps, then the student's one
        with pytest.raises(LookLeft):
            one.evaluate(checks := Checks(leave_at=at))
        assert checks.calls == at
    for at in (1, 3, 4):  # one step, two steps, and before the pictures are decoded
        with pytest.raises(LookLeft):
            one.preview(checks := Checks(leave_at=at))
        assert checks.calls == at


class Apart(FakeBatches):
    """Held-out batches of some sizes, of two shapes in turn; it counts those that are made."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.made = sizes, 0

    def held_out(self) -> Iterator[Batch]:  # type: ignore[override]
        generator = torch.Generator().manual_seed(9)
        for number, size in enumerate(self.sizes):
            self.made += 1
            yield Batch(
                latents=torch.zeros(size, 4, *((4, 4), (2, 8))[number % 2]),
                embeds=torch.randn(size, 5, 32, generator=generator),
                mask=torch.ones(size, 5, dtype=torch.long),
            )


def test_the_distance_is_that_of_the_first_held_out_samples_in_batches_of_any_size(tiny_teacher: LinearDiT) -> None:
    def distance(*sizes: int) -> tuple[float, int, list[int]]:
        objective = SprintObjective(SETTINGS, RUN, CPU)
        objective.origin.batches = apart = Apart(*sizes)  # type: ignore[assignment]
        figure = objective.evaluate()["distance"]
        assert objective.evaluate()["distance"] == figure
        assert objective.watch._known is not None
        return figure, apart.made, [len(taught) for _, taught in objective.watch._known]

    assert distance(40, 40) == (distance(32)[0], 1, [32])
    assert distance(12, 8, 20, 5)[1:] == (3, [12, 8, 12])
    both, made, rows = distance(3, 1)
    assert (made, rows) == (2, [3, 1])
    first = distance(3)[0]
    second = math.sqrt(4 * both**2 - 3 * first**2)  # weighted by samples
    assert second != pytest.approx(first)
    assert second > 0
    objective = SprintObjective(SETTINGS, RUN, CPU)
    objective.origin.batches = Apart()  # type: ignore[assignment]
    assert objective.evaluate() == {}


def test_compiled_blocks_are_refused(tiny_teacher: LinearDiT) -> None:
    with pytest.raises(InvalidInput, match=r"run\.compile does not go with sprint"):
        SprintObjective(SETTINGS, dataclasses.replace(RUN, compile=True), CPU)


def test_without_a_tangent_nothing_pulls_at_the_student(
    tiny_teacher: LinearDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the weight that adapts to time, nor what bfloat16 rounds otherwise in the pass of the derivative."""
    monkeypatch.setitem(losses.LIMITS, "norm", torch.zeros_like)
    objective = SprintObjective(dataclasses.replace(SETTINGS, adversarial_weight=0.0, taps=()), RUN, CPU)
    nn.init.ones_(objective.module.log_variance.weight)
    with torch.autocast("cpu", torch.bfloat16):
        objective.loss(0)[0].backward()
    assert objective.module.log_variance.bias.grad is not None
    assert float(objective.module.log_variance.bias.grad.abs()) > 0
    gradients = [p.grad for p in objective.student.parameters() if p.grad is not None]
    assert gradients
    assert all(not bool(gradient.any()) for gradient in gradients)


def test_without_the_adversarial_loss_every_step_is_the_generators(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    objective = SprintObjective(dataclasses.replace(SETTINGS, adversarial_weight=0.0, taps=()), RUN, CPU)
    heads = {name: value.clone() for name, value in objective.module.heads.state_dict().items()}
    student = {name: value.clone() for name, value in objective.student.state_dict().items()}
    for report in Trainer(objective, RUN, OptimizerSettings(warmup=0), tmp_path).steps():
        assert "consistency" in report.parts
        assert not {"hinge", "adversarial"} & set(report.parts)
    assert all(torch.equal(value, heads[name]) for name, value in objective.module.heads.state_dict().items())
    assert any(not torch.equal(value, student[name]) for name, value in objective.student.state_dict().items())
    with pytest.raises(InvalidInput, match="taps has no effect with adversarial_weight = 0"):
        dataclasses.replace(SETTINGS, adversarial_weight=0.0)


def test_a_student_goes_on_from_a_distilled_model_of_its_teacher_alone(tiny_teacher: LinearDiT) -> None:
    distilled = student_of(tiny_teacher, 1)
    with torch.no_grad():
        distilled.proj_out.bias.add_(1.0)

    class Start:
        name = "distilled"

        def transformer(self, *_: Any) -> LinearDiT:
            return distilled

    student = student_of(tiny_teacher, 0)
    go_on(student, Start())  # type: ignore[arg-type]
    assert all(torch.equal(value, distilled.state_dict()[name]) for name, value in student.state_dict().items())
    distilled = tiny_teacher
    with pytest.raises(InvalidInput, match=r"distilled is no distilled model of this teacher: its \w+ is"):
        go_on(student, Start())  # type: ignore[arg-type]
