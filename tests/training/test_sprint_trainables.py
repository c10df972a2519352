"""What of a student learns: an adapter beside a distilled model, or a control branch in front of it."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana import SanaControlNetModel
from sana.errors import InvalidInput
from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch
from sana.training.config import OptimizerSettings, RunSettings, build
from sana.training.exports import ADAPTER
from sana.training.loop import Trainer
from sana.training.objectives.sprint.networks import Backbone, Condition, network_of, tapped
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.students import student_of
from sana.training.objectives.sprint.trigflow import central_difference, forward_mode
from sana.training.trainables import ControlSettings, LoraSettings, LoraTrainable
from tiny_model import lively, tiny_transformer
from tiny_sprint import CPU, FakeBatches, FakeOrigin, tiny_teacher

__all__ = ["tiny_teacher"]

RUN = RunSettings(steps=4, batch_size=4, precision="float32", evaluate_every=4, save_every=2, log_every=1, ema=0.5)
ALL = SprintSettings(
    teacher="tiny", features="nowhere", student="distilled", taps=(0, 1), warmup_steps=4, matching_weight=0.5
)
LORA = dataclasses.replace(ALL, train="lora", lora={"rank": 2, "targets": ["to_q", "to_v", "conv_point"]})
CONTROL = dataclasses.replace(ALL, train="controlnet", control={"start": "branch", "wiring": "native"})


class ControlledBatches(FakeBatches):
    """The same with control pictures."""

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        control = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(draw + 100))
        return dataclasses.replace(super().batch(draw, generator), control=control)


class Distilled:
    """Stands for a distilled model on disk."""

    name = "distilled"

    def __init__(self, teacher: LinearDiT) -> None:
        self.made = student_of(teacher, 1)
        with torch.no_grad():
            self.made.proj_out.bias.add_(0.1)

    def transformer(self, *_: Any) -> LinearDiT:
        return copy.deepcopy(self.made)


class Origin(FakeOrigin):
    """A teacher with a control network, and a model that was distilled from it."""

    qk_norm: Any = "rms_norm_across_heads"
    control = ControlSettings()

    def __init__(self, settings: Any, *_: Any) -> None:
        super().__init__()
        self.control = build(ControlSettings, settings.control, "flow_matching.control")
        if settings.train == "controlnet":
            self.batches = ControlledBatches()

    def other(self, name: str) -> Distilled:
        return Distilled(self.teacher)

    def lora(self, table: Mapping[str, Any]) -> LoraSettings:
        return build(LoraSettings, table, "flow_matching.lora")

    def branch(self, transformer: LinearDiT) -> SanaControlNetModel:
        torch.manual_seed(5)
        plain = tiny_transformer(qk_norm=self.qk_norm, timestep_scale=0.001)
        made: SanaControlNetModel = lively(SanaControlNetModel.from_transformer(plain, 1), 2)
        for projection in (made.input_block, *made.controlnet_blocks):
            torch.nn.init.normal_(projection.weight, std=0.3)  # type: ignore[arg-type]
        made.wiring = self.control.wiring or made.wiring
        return made


def made(settings: SprintSettings, origin: type[Any] = Origin) -> SprintObjective:
    return SprintObjective(settings, RUN, CPU, origin)


def test_an_adapter_changes_nothing_at_first_and_alone_learns(tiny_teacher: LinearDiT, tmp_path: Path) -> None:
    whole, objective = made(ALL), made(LORA)
    for draw, turn in ((0, "generator"), (1, "discriminator")):
        logged, wanted = objective.loss(draw, turn)[1], whole.loss(draw, turn)[1]
        assert logged.keys() == wanted.keys()
        torch.testing.assert_close(dict(logged), dict(wanted), atol=1e-6, rtol=1e-5)
    before = copy.deepcopy(objective.student.state_dict())
    adapter = {name: value.clone() for name, value in objective.trainable.module.named_parameters()}
    own = {name for name, _ in objective.parameters_of("generator") if name.startswith("student.")}
    assert own == {f"student.{name}" for name in adapter}
    list(Trainer(objective, RUN, OptimizerSettings(warmup=0, lr=1e-2), tmp_path).steps())
    assert all(torch.equal(value, before[name]) for name, value in objective.student.state_dict().items())
    moved = [not torch.equal(value, adapter[name]) for name, value in objective.trainable.module.named_parameters()]
    assert all(moved)
    states = sorted((tmp_path / "states").iterdir())[-1] / "module.safetensors"
    assert states.stat().st_size < sum(4 * p.numel() for p in objective.module.parameters()) * 1.2 + 10_000


def test_an_adapter_is_what_its_module_holds_at_every_use(tiny_teacher: LinearDiT) -> None:
    """Where weights are split over processes, others take the place of those that were attached."""
    objective = made(LORA)
    before = {turn: objective.loss(0, turn)[0].detach() for turn in objective.turns}
    figure = objective.evaluate()
    held = objective.trainable.module._parameters
    for name, parameter in list(held.items()):
        assert parameter is not None
        held[name] = torch.nn.Parameter(parameter.detach() + 0.1)
    for turn in objective.turns:
        loss = objective.loss(0, turn)[0]
        assert not torch.equal(loss.detach(), before[turn])
        if turn == "generator":
            loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter is not None and parameter.grad is not None for parameter in held.values())
    assert objective.evaluate() != figure


def test_the_derivative_in_time_passes_through_adapter_and_branch(tiny_teacher: LinearDiT) -> None:
    for settings in (LORA, CONTROL):
        objective = made(settings)
        with torch.no_grad():
            for parameter in objective.trainable.module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        given = objective.given(0)
        under = Condition(*(None if part is None else part.double() for part in given.under))  # type: ignore[arg-type]
        under = under._replace(mask=given.under.mask)
        for part in objective.network.parts:
            part.double()
        if isinstance(objective.trainable, LoraTrainable):
            for update in objective.trainable.updates.values():
                update.down.data, update.up.data = update.down.data.double(), update.up.data.double()
        network = network_of(objective.network, under, given.guidance.double())
        t = torch.tensor([0.3, 0.8, 1.2, 1.5], dtype=torch.float64)
        along = torch.randn(4, 4, 4, 4, dtype=torch.float64), t.cos() * t.sin()
        with torch.no_grad():
            _, exact = forward_mode(network, (given.latents.double(), t), along)
            _, near = central_difference(network, (given.latents.double(), t), along, 1e-5)
        assert float((exact - near).norm() / near.norm()) < 1e-6


def test_a_branch_steers_teacher_student_and_discriminator_and_alone_learns(
    tiny_teacher: LinearDiT, tmp_path: Path
) -> None:
    objective = made(CONTROL)
    given = objective.given(0)
    assert given.under.control is not None
    other = dataclasses.replace(
        given,
        under=given.under._replace(control=-given.under.control),
        null=given.null._replace(control=-given.under.control),
    )
    generator = given.generator.get_state()
    for loss in (part for _, part in objective.losses):
        found = []
        for one in (given, other):
            one.generator.set_state(generator)
            student = network_of(objective.network, one.under, one.guidance)
            found.append(float(loss.of_generator(student, one)[0].detach()))
        assert found[0] != found[1]
    frozen = copy.deepcopy([part.state_dict() for part in objective.frozen])
    before = {name: value.clone() for name, value in objective.trainable.module.named_parameters()}
    list(Trainer(objective, RUN, OptimizerSettings(warmup=0, lr=1e-2), tmp_path).steps())
    for part, was in zip(objective.frozen, frozen, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in part.state_dict().items())
    moved = {n for n, value in objective.trainable.module.named_parameters() if not torch.equal(value, before[n])}
    assert moved
    assert all(name.startswith(("transformer_blocks.", "input_block.", "controlnet_blocks.")) for name in moved)


@pytest.mark.parametrize("wiring", ["native", "diffusers"])
def test_tapped_tokens_are_those_that_the_next_block_reads(tiny_teacher: LinearDiT, wiring: Any) -> None:
    branch = Origin.branch(object.__new__(Origin), tiny_teacher)
    branch.wiring = wiring
    backbone = Backbone(tiny_teacher, branch)
    assert backbone.told_branch == (1.0 if wiring == "native" else 1000.0)
    batch = ControlledBatches().batch(0, torch.Generator().manual_seed(0))
    under, t = Condition(batch.embeds, batch.mask, batch.control), torch.full((4,), 0.7)
    read: list[Tensor] = []
    handle = tiny_teacher.transformer_blocks[1].register_forward_pre_hook(lambda _m, given: read.append(given[0]))
    with torch.no_grad():
        found = tapped(backbone, under, batch.latents, t, (0, 1))
        network_of(backbone, under)(batch.latents, t)
        plain = tapped(Backbone(tiny_teacher), under, batch.latents, t, (0, 1))
    handle.remove()
    assert torch.equal(found[0], read[0])
    torch.testing.assert_close(read[1], read[0])
    # Outer residuals come after block 1, inner ones after block 0.
    assert torch.equal(found[0], plain[0]) is (wiring == "diffusers")
    assert not torch.equal(found[1], plain[1])


@pytest.mark.parametrize("settings", [LORA, CONTROL])
def test_what_is_exported_is_what_learnt(
    tiny_teacher: LinearDiT, settings: SprintSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoModel:
        card = None

        def __init__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr("sana.training.objectives.sprint.objective.StartModel", NoModel)
    objective = made(settings)
    objective.export(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| teacher | tiny |" in text
    assert "base_model: distilled" in text
    if settings.train == "lora":
        assert (tmp_path / ADAPTER).is_file()
        return
    assert "| joined | as in the original code" in text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_sanakit_wiring"] == "native"
    read = SanaControlNetModel.from_pretrained(tmp_path)
    assert read.wiring == "native"
    again = read.state_dict()
    for name, value in objective.trainable.module.state_dict().items():
        torch.testing.assert_close(again[name].float(), value, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "lor"}, "sprint.train is 'lor'. Did you mean 'lora'"),
        ({"lora": {"rank": 2}}, r'\[sprint.lora\] acts only with train = "lora"; it is "full"'),
        ({"train": "lora", "student": ""}, "learns something beside a distilled model: name it in sprint.student"),
        ({"train": "lora", "card": "nano-sprint"}, "sprint.card is of a whole model"),
        ({"train": "lora", "lora": {"rank": 0}}, "sprint.lora.rank must lie between 1 and 4096"),
        ({"train": "controlnet"}, "sprint.control.start names no control network"),
        ({"train": "controlnet", "control": {"start": "x", "kind": "map"}}, r"sprint.data.controls goes with \[sprint"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(tiny_teacher: LinearDiT, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        made(dataclasses.replace(ALL, **changes))


def test_a_branch_that_would_be_told_another_time_is_refused(
    tiny_teacher: LinearDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match=r"branch is told time otherwise .* wiring = \"native\""):
        made(dataclasses.replace(CONTROL, control={"start": "branch"}))
    monkeypatch.setattr(Origin, "qk_norm", None)
    with pytest.raises(InvalidInput, match="told time otherwise"):
        made(CONTROL)
