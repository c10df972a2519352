"""The trainer on a small regression: exact resume, averaging, refusal of non-finite steps, atomic states."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sana.data.identity import Content
from sana.errors import InvalidInput, NonFinite
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.curve import draw_curve, read_series
from sana.training.loop import Trainer
from sana.training.objectives.base import MAIN, Check, trainable, unasked
from sana.training.optimizers import Optimizers, rate
from sana.training.state import Average, State, load_state, save_state


class Regression:
    """Learns a fixed linear map from noise that depends on the draw alone."""

    name = "regression"
    turns: tuple[str, ...] = MAIN
    better: Literal["lower", "higher"] = "lower"

    def __init__(self, poisoned: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
        self.poisoned = poisoned
        self.data: dict[str, Content] = {}

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(draw))
        loss = (self.module(x) - x.flip(1)).square().mean()
        if draw in self.poisoned:
            loss = loss * float("nan")
        return loss, {"draw": torch.tensor(float(draw))}

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        check()
        return {"held_out": float(self.loss(10**6)[0].detach())}

    def preview(self, check: Check = unasked) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save({k: v.clone() for k, v in self.module.state_dict().items()}, folder / "weights.pt")


def settings(**changes: object) -> RunSettings:
    base: dict[str, object] = {"steps": 12, "batch_size": 8, "save_every": 5, "log_every": 1, "evaluate_every": 6}
    return RunSettings(**{**base, "precision": "float32", "ema": 0.9, **changes})  # type: ignore[arg-type]


def run(folder: Path, optimizer: str = "muon", stop: int | None = None, **changes: object) -> Trainer:
    trainer = Trainer(Regression(), settings(**changes), OptimizerSettings(name=optimizer, lr=1e-2, warmup=2), folder)
    for step in trainer.steps():
        if step.step == stop:
            break
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {**trainer.objective.module.state_dict(), **{f"ema.{k}": v for k, v in trainer.average.values.items()}}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(
    tmp_path: Path, optimizer: str, accumulate: int
) -> None:
    whole = weights(run(tmp_path / "whole", optimizer, accumulate=accumulate))
    for stop in (3, 5, 9):  # before, at and after a saved state; the generator saves when it is closed
        run(tmp_path / "parts", optimizer, stop=stop, accumulate=accumulate)
    parts = weights(run(tmp_path / "parts", optimizer, accumulate=accumulate))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_a_run_that_was_killed_goes_on_from_its_last_state(tmp_path: Path) -> None:
    whole = weights(run(tmp_path / "whole"))
    trainer = Trainer(Regression(), settings(), OptimizerSettings(name="muon", lr=1e-2, warmup=2), tmp_path / "killed")
    steps = trainer.steps()
    for _ in range(8):
        next(steps)
    (tmp_path / "killed" / "states" / ".partial-00000008").mkdir()  # what a save leaves that was killed halfway
    trainer.save = lambda: None  # type: ignore[method-assign]
    steps.close()
    again = run(tmp_path / "killed")
    assert again.step == 12
    assert not list((tmp_path / "killed" / "states").glob(".partial-*"))
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in whole.items())


class Game(Regression):
    """A map and a critic that take turns; the critic has frozen weights of its own kind beside it."""

    name = "game"
    turns = ("generator", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"map": nn.Linear(32, 32), "critic": nn.Linear(32, 1), "frozen": nn.Linear(4, 4)})
        self.module["frozen"].requires_grad_(False)
        self.seen: list[tuple[int, str, tuple[str, ...]]] = []

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        part = {"generator": "map.", "discriminator": "critic."}[turn]
        return [(name, p) for name, p in self.module.named_parameters() if name.startswith(part)]

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen.append((draw, turn, tuple(name for name, _ in trainable(self.module))))
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(draw))
        score = self.module["critic"](self.module["map"](x)).mean()
        return (score.square() if turn == "generator" else (score - 1).square()), {}

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        return {"held_out": 0.0}


def game(folder: Path, stop: int | None = None, **changes: object) -> Trainer:
    first, second = OptimizerSettings(lr=1e-2, warmup=0), OptimizerSettings(name="muon", lr=1e-3, clip=0.5, warmup=0)
    trainer = Trainer(Game(), settings(**changes), first, folder, second)
    for step in trainer.steps():
        if step.step == stop:
            break
    return trainer


def test_players_take_turns_with_their_own_parameters_and_optimisers(tmp_path: Path) -> None:
    trainer = Trainer(Game(), settings(), OptimizerSettings(lr=1e-2, warmup=0), tmp_path)
    assert set(trainer.average.values) == {"map.weight", "map.bias"}
    steps = trainer.steps()
    for turn, still in (("map.", "critic."), ("critic.", "map."), ("map.", "critic.")):
        before = {name: p.detach().clone() for name, p in trainer.objective.module.named_parameters()}
        next(steps)
        moved = {n for n, p in trainer.objective.module.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert all(name.startswith(turn) for name in moved), (moved, still)
    seen = trainer.objective.seen  # type: ignore[attr-defined]
    assert [(draw, turn) for draw, turn, _ in seen] == [(0, "generator"), (1, "discriminator"), (2, "generator")]
    assert seen[0][2] == ("map.weight", "map.bias")
    assert seen[1][2] == ("critic.weight", "critic.bias")


def test_a_run_of_two_players_resumes_bit_identically(tmp_path: Path) -> None:
    whole = weights(game(tmp_path / "whole"))
    for stop in (3, 6):
        game(tmp_path / "parts", stop)
    parts = weights(game(tmp_path / "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_settings_for_a_second_player_need_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\[discriminator_optimizer\] has no effect on 'regression'"):
        Trainer(Regression(), settings(), OptimizerSettings(), tmp_path, OptimizerSettings())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns(tmp_path: Path, optimizer: str) -> None:
    before = Regression().evaluate()["held_out"]
    after = run(tmp_path, optimizer, steps=150, save_every=200, evaluate_every=150).objective.evaluate()["held_out"]
    assert after < 0.5 * before


def test_the_log_holds_every_step_and_the_held_out_figures(tmp_path: Path) -> None:
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(13))
    assert [line["step"] for line in lines if "held_out" in line] == [0, 6, 12]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == [f"{step:08d}.png" for step in (0, 6, 12)]


def test_a_non_finite_step_changes_nothing_and_too_many_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = OptimizerSettings(lr=1e-2)
    trainer = Trainer(Regression(frozenset({0})), settings(), optimizer, tmp_path / "one")
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    next(trainer.steps())
    assert trainer.refused == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "step 1 is not taken: its loss or gradient is not finite (refused so far: 1; more than 20 stop the run)"
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    broken = Trainer(Regression(frozenset(range(50))), settings(max_non_finite=3), optimizer, tmp_path / "all")
    with pytest.raises(NonFinite, match="4 steps"):
        list(broken.steps())
    assert load_state(tmp_path / "all" / "states") is not None


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, stop=5)
    with pytest.raises(InvalidInput, match="seed"):
        run(tmp_path, seed=1)


def test_the_export_holds_the_average_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    trainer.export(tmp_path / "export")
    exported = torch.load(tmp_path / "export" / "weights.pt", weights_only=True)
    assert all(torch.equal(exported[name], before[f"ema.{name}"]) for name in exported)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_states_are_whole_or_absent_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, State(step=step, parts={"module": {"a": torch.full((2,), float(step))}}, facts={}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    state = load_state(tmp_path)
    assert state is not None
    assert (state.step, state.parts["module"]["a"].tolist()) == (3, [3.0, 3.0])


def test_the_average_warms_up_and_swaps_back() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = Average(dict(module.named_parameters()), 0.999)
    start = module.weight.item()
    with torch.no_grad():
        module.weight.fill_(start + 1)
    average.update(0)  # decay min(0.999, 1 / 10)
    assert float(average.values["weight"]) == pytest.approx(start + 0.9)
    average.swap()
    assert module.weight.item() == pytest.approx(start + 0.9)
    average.swap()
    assert module.weight.item() == pytest.approx(start + 1)


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    settings = OptimizerSettings(warmup=10, decay_share=0.4)
    rates = [rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5)
    assert min(rates) == rates[99] == pytest.approx(0.025)


def test_muon_owns_inner_matrices_and_its_updates_are_orthogonal() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"conv": nn.Conv2d(32, 64, 3), "depth": nn.Conv2d(64, 64, 3, groups=64)})
    optimizers = Optimizers(module.named_parameters(), OptimizerSettings(name="muon", lr=1.0, warmup=0))
    assert len(optimizers._views) == 1
    conv = module["conv"].weight
    before = conv.detach().clone()
    (conv * torch.randn_like(conv)).sum().backward()  # type: ignore[no-untyped-call]
    optimizers.step(1.0)
    change = (before - conv.detach()).flatten(1)
    values = torch.linalg.svdvals(change)
    assert float(values.max() / values.min()) < 2.0


def test_the_curve_shows_the_last_word_on_every_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0, "held_out": {"psnr": 30.0}}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = read_series(log)
    assert series == {"loss": [(1, 4.0), (2, pytest.approx(3.8))], "psnr": [(2, 30.0)]}
    picture = draw_curve(log, "a run")
    colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert (34, 92, 208) in colours
