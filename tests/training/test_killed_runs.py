"""Runs that are killed, starved of disk, locked, changed or poisoned: nothing that was learned is lost."""

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_loop import Regression, run, settings, weights
from torch import Tensor, nn

from sana.checkpoints import tensors as tensors_module
from sana.data.identity import Content
from sana.errors import InvalidInput, NonFinite, NotWritten
from sana.training import folders, loop
from sana.training.config import OptimizerSettings, Recipe, RunSettings
from sana.training.curve import read_lines
from sana.training.folders import FIXED, changed
from sana.training.loop import Trainer, TrainStep
from sana.training.start import OBJECTIVES, start
from sana.training.state import load_best, load_state

FAST = OptimizerSettings(lr=1e-2, warmup=2)


class Dropping(Regression):
    """Draws from torch's own generator, as dropout does."""

    def __init__(self, poisoned: frozenset[int] = frozenset()) -> None:
        super().__init__(poisoned)
        self.module = nn.Sequential(nn.Linear(32, 24), nn.Dropout(0.3), nn.SiLU(), nn.Linear(24, 32))


def train(folder: Path, steps: int = 20) -> None:
    trainer = Trainer(Dropping(), settings(steps=steps, save_every=2, evaluate_every=10), FAST, folder)
    list(trainer.steps())


def final(folder: Path) -> dict[str, Tensor]:
    found = load_state(folder / "states")
    assert found is not None
    assert found.step == 20
    return {f"{part}/{name}": tensor for part, tensors in found.parts.items() for name, tensor in tensors.items()}


def warm_up(folder: Path) -> None:
    """Load here, once, what every child would load; without a backward pass, whose threads a fork would lose."""
    trainer = Trainer(Dropping(), settings(), FAST, folder)
    for p in trainer.objective.module.parameters():
        p.grad = torch.zeros_like(p)
    trainer.players.move("main", 0, trainer.players.norm("main"))
    trainer._record(TrainStep(step=0, steps=1, loss=1.0, parts={}, seconds=1.0, figures=trainer._look(lambda: False)))
    trainer.save()
    trainer.close()


def killed_again_and_again(folder: Path, kills: int, seed: int, *, runs: int, places: int) -> None:
    """Kill at random moments, `kills` times and until so many runs have finished, with as many last steps seen.

    Where the machine has grown too busy for that, the moments come later, and it is tried ten times as often at most.
    """
    torch.set_num_threads(1)  # a forked process has no other threads
    warm_up(folder / "warm")
    whole = folder / "whole"
    process = os.fork()
    if process == 0:
        train(whole)
        os._exit(0)
    began = time.perf_counter()
    assert os.waitpid(process, 0)[1] == 0
    once = time.perf_counter() - began
    expected, rng = final(whole), random.Random(seed)
    done = number = finished = 0
    steps = set()
    while done < kills or ((finished < runs or len(steps) < places) and done < 10 * kills):
        place = folder / f"run-{number}"
        process = os.fork()
        if process == 0:
            train(place)
            os._exit(0)
        time.sleep(rng.random() * once * 0.8 * (1 if done < kills else 2 ** (done % 4)))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        done += os.WIFSIGNALED(status)
        found = load_state(place / "states")
        steps.add(found.step if found else 0)
        assert not list((place / "states").rglob(".*")), "orphans are swept"
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            got = final(place)
            assert got.keys() == expected.keys()
            assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
            best, first = load_best(place / "best"), load_best(whole / "best")
            assert best.facts == first.facts
            logged = {line["step"]: line["loss"] for line in read_lines(place / "metrics.jsonl") if "loss" in line}
            known = {line["step"]: line["loss"] for line in read_lines(whole / "metrics.jsonl") if "loss" in line}
            assert all(logged[step] == known[step] for step in logged)
            finished, number = finished + 1, number + 1
    assert finished >= runs
    assert len(steps) >= places


@pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")
def test_a_run_that_is_killed_anywhere_ends_bit_identical(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 15, seed=0, runs=2, places=4)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, 200, seed=1, runs=5, places=8)


@pytest.mark.parametrize(
    ("code", "first", "stride"),
    [(errno.ENOSPC, 2, 19), *(pytest.param(code, 1, 1, marks=pytest.mark.slow) for code in (errno.ENOSPC, errno.EIO))],
)
def test_a_disk_that_fails_at_the_k_th_write_costs_no_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, first: int, stride: int
) -> None:
    calls = 0
    short = {"steps": 2, "save_every": 1, "evaluate_every": 2}

    def ticking(real: Any, k: int) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k:
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return wrapped

    expected = weights(run(tmp_path / "whole", "adamw", **short))
    outcomes = set()
    for k in range(first, 400, stride):
        place = tmp_path / f"run-{k}"
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "fsync"), (os, "replace"), (os, "open"), (Path, "write_text"), (Image.Image, "save"),
                (tensors_module, "write_all"), (tensors_module, "save_file"), (shutil, "rmtree"),
            ):  # fmt: skip
                patch.setattr(owner, name, ticking(getattr(owner, name), k))
            try:
                run(place, "adamw", **short)
                outcomes.add("went on")
            except NotWritten:
                outcomes.add("stopped")
        if calls < k:
            break
        load_state(place / "states")  # whatever is there can be read
        again = weights(run(place, "adamw", **short))
        assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items()), k
    assert k < 399
    assert outcomes == {"went on", "stopped"}


def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(folders.os, "open", refuse)
    with pytest.raises(NotWritten, match="cannot be written: Read-only file system"):
        run(tmp_path / "a")


def hold(folder: Path) -> None:
    Trainer(Regression(), settings(), FAST, folder)


def test_a_second_process_is_kept_out_of_a_run(tmp_path: Path) -> None:
    first = Trainer(Regression(), settings(), FAST, tmp_path)
    with pytest.raises(InvalidInput, match=rf"is being trained by another process \(process {os.getpid()}\); wait"):
        hold(tmp_path)
    first.close()
    hold(tmp_path)


def test_a_second_process_is_kept_out_before_it_loads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("it builds the objective")

    monkeypatch.setitem(OBJECTIVES, "autoencoder", replace(OBJECTIVES["autoencoder"], objective=load))
    recipe = Recipe(objective="autoencoder", run=settings(), optimizer=FAST)
    first = Trainer(Regression(), settings(), FAST, tmp_path)
    with pytest.raises(InvalidInput, match="is being trained by another process"):
        start(recipe, tmp_path)
    first.close()
    with pytest.raises(AssertionError, match="it builds the objective"):
        start(recipe, tmp_path)
    with pytest.raises(AssertionError, match="it builds the objective"):
        start(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_who_is_refused_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    run(tmp_path, stop=5)
    with pytest.raises(InvalidInput, match=r"cannot go on with run.seed 0 -> 1; use another folder"):
        run(tmp_path, seed=1)
    assert run(tmp_path).step == 12


# --- changed settings -------------------------------------------------------------------------------------------------


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value / 2 if isinstance(value, float) else value + 1 if isinstance(value, int) else f"{value}x"


@pytest.mark.parametrize("name", [field.name for field in fields(RunSettings)])
def test_every_changed_setting_of_the_run_is_listed_or_refused(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, stop=3)
    begun = RunSettings(**{field.name: getattr(settings(), field.name) for field in fields(RunSettings)})
    tables = json.loads(json.dumps({"run": {field.name: getattr(begun, field.name) for field in fields(RunSettings)}}))
    later = {"run": {**tables["run"], name: other(tables["run"][name])}}
    if f"run.{name}" in FIXED:
        with pytest.raises(InvalidInput, match=rf"cannot go on with run\.{name} .* -> "):
            folders.check_changes(tmp_path, tables, later)
    else:
        folders.check_changes(tmp_path, tables, later)
        assert f"goes on with other settings than before: run.{name} " in caplog.text


def test_differences_are_told_and_those_of_a_model_or_of_averaging_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, stop=3)
    run(tmp_path, stop=4, steps=14, log_every=2)
    assert "run.steps 12 -> 14, run.log_every 1 -> 2" in caplog.text
    with pytest.raises(InvalidInput, match=r"run.ema 0.9 -> 0"):
        run(tmp_path, ema=0.0)
    with pytest.raises(InvalidInput, match=r'optimizer.name "muon" -> "came"'):
        run(tmp_path, "came")
    before = {"flow": {"model": {"layers": 2}, "shift": 3.0}}
    with pytest.raises(InvalidInput, match=r"flow.model.layers 2 -> 3"):
        folders.check_changes(tmp_path, before, {"flow": {"model": {"layers": 3}, "shift": 3.0}})
    assert changed(before, {"flow": {"model": {"layers": 2}, "new": 1}}) == {
        "flow.new": (None, 1),
        "flow.shift": (3.0, None),
    }


def with_data(folder: Path, stop: int, **content: Content) -> None:
    objective = Regression()
    objective.data = content
    trainer = Trainer(objective, settings(), FAST, folder)
    for step in trainer.steps():
        if step.step == stop:
            break


def test_a_run_that_goes_on_with_other_data_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twelve, others = (Content(samples=12, digest=digest) for digest in "ab")
    eleven = Content(samples=11, digest="c")
    told = f"'{tmp_path}' goes on with other data than before: "
    with_data(tmp_path, 3, data=twelve)
    with_data(tmp_path, 4, data=twelve)
    assert told not in caplog.text
    with_data(tmp_path, 5, data=eleven, prior=twelve)
    assert f"{told}regression.data 12 -> 11 samples; from here on their order is another" in caplog.text
    caplog.clear()
    with_data(tmp_path, 6, data=eleven, prior=others)
    assert f"{told}regression.prior 12 -> 12 samples of other content; from here on" in caplog.text
    caplog.clear()
    with_data(tmp_path, 7, data=eleven, prior=others)
    assert told not in caplog.text


# --- stops, refusals, the best ----------------------------------------------------------------------------------------


def test_a_stop_between_micro_batches_gives_the_step_up_and_saves_what_was(tmp_path: Path) -> None:
    trainer = Trainer(Regression(), settings(accumulate=4), FAST, tmp_path)
    asked: list[int] = []
    for _ in trainer.steps(lambda: trainer.step == 3 and bool(asked.append(1) or len(asked) > 2)):
        pass
    assert trainer.step == 3
    run(tmp_path / "whole", "adamw", accumulate=4)
    list(Trainer(Regression(), settings(accumulate=4), FAST, tmp_path).steps())
    one, two = (load_state(folder / "states") for folder in (tmp_path, tmp_path / "whole"))
    assert one is not None
    assert two is not None
    assert all(torch.equal(tensor, two.parts["module"][name]) for name, tensor in one.parts["module"].items())


@pytest.mark.parametrize("moment", ["in the step", "evaluate", "preview"])
@pytest.mark.parametrize("step", [0, 6, 12])
def test_a_stop_saves_without_a_look_and_the_look_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, step: int
) -> None:
    whole = run(tmp_path / "whole", "adamw")
    asked, looks = list[str](), list[tuple[int, str]]()
    trainer = Trainer(Regression(), settings(), FAST, tmp_path / "parts")

    def during(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            looks.append((trainer.step, name))
            asked.extend([name] if (trainer.step, name) == (step, moment) else [])
            return real(*arguments)

        return wrapped

    if moment == "in the step" and not step:
        asked.append(moment)
    for name in ("evaluate", "preview"):
        monkeypatch.setattr(trainer.objective, name, during(name, getattr(trainer.objective, name)))
    in_step = lambda: moment == "in the step" and trainer.step == step - 1  # noqa: E731
    seen = list(trainer.steps(lambda: bool(asked) or in_step()))
    assert [report.step for report in seen] == list(range(1, step + 1))
    assert not seen or (seen[-1].stopping and seen[-1].figures is None)
    assert not trainer.is_finished
    assert {name for at, name in looks if at == step} == {
        "in the step": set(), "evaluate": {"evaluate"}, "preview": {"evaluate", "preview"}
    }[moment]  # fmt: skip
    saved = load_state(tmp_path / "parts" / "states")
    assert saved is not None
    assert saved.step == step
    again = run(tmp_path / "parts", "adamw")
    assert again.is_finished
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    assert again.best == whole.best
    assert load_best(tmp_path / "parts" / "best").facts == load_best(tmp_path / "whole" / "best").facts
    told, known = (
        [(line["step"], line.get("loss"), line["held_out"]) for line in read_lines(folder / "metrics.jsonl")]
        for folder in (tmp_path / "parts", tmp_path / "whole")
    )
    assert told == known
    assert len(list((tmp_path / "parts" / "previews").iterdir())) == 3
    assert run(tmp_path / "parts", "adamw").is_finished  # a third call has nothing left to make up for


def test_too_many_refused_steps_leave_a_report(tmp_path: Path) -> None:
    trainer = Trainer(Regression(frozenset({2, 5, 6})), settings(max_non_finite=2), FAST, tmp_path)
    with pytest.raises(NonFinite, match=r"3 steps had a non-finite .* about them is in .*non-finite.json"):
        list(trainer.steps())
    told = json.loads((tmp_path / "non-finite.json").read_text())
    assert [entry["step"] for entry in told] == [2, 5, 6]
    assert [entry["draws"] for entry in told] == [[2], [5], [6]]
    assert told[0]["loss"] == "nan"
    assert told[0]["gradients"]["0.weight"] == {"not_finite": 48 * 32, "of": 48 * 32}
    assert told[0]["parameters"] == {}
    assert told[0]["seed"] == 0


def test_an_export_without_a_better_step_than_the_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    figures = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(Regression, "evaluate", lambda *_: {"held_out": next(figures)})
    trainer = Trainer(Regression(), settings(export="best"), FAST, tmp_path)
    list(trainer.steps())
    trainer.export(tmp_path / "export")
    assert "no step was better than the start, so the export is as before the training" in caplog.text


def test_the_best_weights_are_kept_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Regression, "evaluate", lambda *_: {"held_out": next(figures)})
    kept: dict[int, dict[str, Tensor]] = {}
    trainer = Trainer(Regression(), settings(export="best"), FAST, tmp_path)
    for report in trainer.steps():
        kept[report.step] = {name: value.clone() for name, value in trainer.average.values.items()}
    best = load_best(tmp_path / "best")
    assert (best.step, best.facts) == (6, {"name": "held_out", "figure": 1.0})
    assert all(torch.equal(best.parts["module"][name], value) for name, value in kept[6].items())
    live = {name: p.detach().clone() for name, p in trainer.objective.module.named_parameters()}
    trainer.export(tmp_path / "export")
    exported = torch.load(tmp_path / "export" / "weights.pt", weights_only=True)
    assert all(torch.equal(exported[name], value) for name, value in kept[6].items())
    assert all(torch.equal(p, live[name]) for name, p in trainer.objective.module.named_parameters())


@pytest.mark.parametrize(("better", "step"), [("lower", 6), ("higher", 0)])
def test_better_is_what_the_objective_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str, step: int
) -> None:
    figures = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Regression, "evaluate", lambda *_: {"held_out": next(figures)})
    monkeypatch.setattr(Regression, "better", better)
    assert run(tmp_path).best["step"] == step


def test_weights_that_could_not_be_kept_are_not_called_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a disk that is full at the best look, the best is the best of those that were kept."""
    figures = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Regression, "evaluate", lambda *_: {"held_out": next(figures)})
    keep: Callable[..., Any] = loop.save_best

    def full_at_six(folder: Path, state: Any) -> None:
        if state.step == 6:
            raise OSError(errno.ENOSPC, "No space left on device", "best")
        keep(folder, state)

    monkeypatch.setattr(loop, "save_best", full_at_six)
    trainer = run(tmp_path)
    assert "the best weights, of step 6, are not kept (No space left on device)" in caplog.text
    assert (trainer.best["step"], trainer.best["figure"]) == (12, 2.0)
    assert load_best(tmp_path / "best").step == 12


def test_a_last_state_that_cannot_be_written_is_an_error_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device (3.0 MB are needed)", "states/step-00000005")

    save: Callable[..., Any] = loop.save_state
    monkeypatch.setattr(loop, "save_state", full)
    with pytest.raises(NotWritten, match=r"Step 12 could not be saved .*3.0 MB are needed.* make room, and run it"):
        run(tmp_path)
    assert "step 5 could not be saved" in caplog.text
    monkeypatch.setattr(loop, "save_state", save)
    assert run(tmp_path).step == 12
