"""Training states on disk: killed saves, failing disks, damaged files, and the log beside them."""

import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from clock import wall_seconds
from sana.checkpoints import tensors as tensors_module
from sana.checkpoints.storage import SAVED, STAGE
from sana.data.identity import Content
from sana.errors import CheckpointError, InvalidInput
from sana.training import state as module
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.curve import append_line, draw_curve, read_series
from sana.training.loop import Trainer
from sana.training.objectives.base import MAIN, Check, trainable, unasked
from sana.training.state import State, load_state, save_state


def made(step: int, width: int = 500) -> State:
    values = {
        name: {"a": torch.full((width,), float(step)), "b": torch.tensor(step)} for name in ("module", "optimizer")
    }
    return State(step=step, parts=values, facts={"seed": 3})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nothing") is None
    assert save_state(tmp_path, made(7)) == tmp_path / "step-00000007"
    found = load_state(tmp_path)
    assert found is not None
    assert (found.step, found.facts) == (7, {"seed": 3})
    assert found.parts.keys() == made(7).parts.keys()
    assert torch.equal(found.parts["module"]["a"], made(7).parts["module"]["a"])
    assert names(tmp_path / "step-00000007") == ["module.safetensors", "optimizer.safetensors", "state.json"]


def test_states_of_the_first_release_are_still_read(tmp_path: Path) -> None:
    place = tmp_path / "step-00000004"
    place.mkdir()
    save_file({"a": torch.ones(2)}, place / "module.safetensors")
    (place / "state.json").write_text('{"step": 4, "seed": 1}')
    found = load_state(tmp_path)
    assert found is not None
    assert (found.step, found.facts) == (4, {"seed": 1})


@pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")
def test_a_save_killed_at_any_moment_leaves_whole_states(tmp_path: Path) -> None:
    rng, step = random.Random(0), 1
    once = wall_seconds(lambda: save_state(tmp_path, made(1, 200_000)))
    older = newer = number = 0
    while number < 60 or (not (older and newer) and number < 600):  # a busy machine may need more of them
        following = step + (number % 3 > 0)  # every third save repeats the step, as after a resume
        new = made(following, 200_000)  # here, since torch's threads are lost in a forked process
        process = os.fork()
        if process == 0:
            save_state(tmp_path, new)
            os._exit(0)
        time.sleep(rng.random() * 2 ** (number % 6) * once)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = load_state(tmp_path)
        assert found is not None
        assert found.step in (step, following)
        for part in ("module", "optimizer"):
            assert torch.equal(found.parts[part]["a"], torch.full((200_000,), float(found.step)))
        newer, older = newer + (found.step > step), older + (following > found.step)
        step, number = found.step, number + 1
    assert newer
    assert older
    assert not list(tmp_path.rglob(".*"))
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


def test_a_removal_that_was_killed_leaves_no_state_that_is_not_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, made(step))
    (tmp_path / "step-00000001" / "state.json").unlink()
    (tmp_path / "step-00000001" / "module.safetensors").unlink()
    save_state(tmp_path, made(3))
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 3


def test_what_killed_saves_left_is_swept(tmp_path: Path) -> None:
    save_state(tmp_path, made(1))
    (tmp_path / ".partial-00000009").mkdir()
    half = tmp_path / "step-00000002" / f"{STAGE}1-a"
    half.mkdir(parents=True)
    (half / "module.safetensors").write_bytes(b"half")
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 1
    assert names(tmp_path) == ["step-00000001"]
    done = tmp_path / "step-00000005"
    shutil.copytree(tmp_path / "step-00000001", done / SAVED)
    assert load_state(tmp_path) is not None
    assert (done / "state.json").exists(), "a save that had taken place is finished"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_the_k_th_call_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save_state(tmp_path, made(1))
    calls = 0

    def ticking(real: Any, k: int) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k:
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return wrapped

    said: list[OSError] = []
    for k in range(1, 100):
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "fsync"),
                (os, "replace"),
                (Path, "write_text"),
                (tensors_module, "write_all"),
                (tensors_module, "save_file"),
            ):
                patch.setattr(owner, name, ticking(getattr(owner, name), k))
            try:
                save_state(tmp_path, made(2))
            except OSError as error:
                said.append(error)
        found = load_state(tmp_path)
        assert found is not None
        assert torch.equal(found.parts["module"]["a"], made(found.step).parts["module"]["a"])
        if calls < k:
            break
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
    assert 10 < k < 99
    assert {error.errno for error in said} == {code}
    assert all("step-00000002" in str(error.filename) and STAGE not in str(error.filename) for error in said)


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Any] = {
    "flipped": lambda place: flip(place / "module.safetensors"),
    "cut": lambda place: os.truncate(place / "optimizer.safetensors", 900),
    "part missing": lambda place: (place / "optimizer.safetensors").unlink(),
    "part too many": lambda place: shutil.copy(place / "module.safetensors", place / "more.safetensors"),
    "facts cut": lambda place: os.truncate(place / "state.json", 10),
    "no step": lambda place: (place / "state.json").write_text("{}"),
    "later release": lambda place: (place / "state.json").write_text('{"version": 2, "step": 2}'),
    "pickle": lambda place: (place / "module.safetensors").write_bytes(b"\x80\x04K\x01."),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_set_aside_loudly_for_the_one_before(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_state(tmp_path, made(step))
    DAMAGE[kind](tmp_path / "step-00000002")
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "step-00000002 cannot be used" in caplog.text
    assert "going on from step 1" in caplog.text
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    save_state(tmp_path, made(2))
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_never_begins_anew_over_damaged_states(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        save_state(tmp_path, made(step))
        DAMAGE[kind](tmp_path / f"step-{step:08d}")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"No training state in .* can be read; the newest: .*step-00000002"
        ) as caught:
            load_state(tmp_path)
        assert caught.value.exit_code == 3


class Line:
    """The smallest objective."""

    name = "line"
    turns: tuple[str, ...] = MAIN
    better: Literal["lower", "higher"] = "lower"

    def __init__(self, width: int = 3) -> None:
        self.module: torch.nn.Module = torch.nn.Linear(width, 1)
        self.data: dict[str, Content] = {}

    def parameters_of(self, turn: str) -> list[tuple[str, torch.nn.Parameter]]:
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.module(torch.ones(1, self.module.in_features)).square().mean(), {}

    def evaluate(self, check: Check = unasked) -> dict[str, float]:
        return {"held": math.nan}

    def preview(self, check: Check = unasked) -> None:
        return None

    def export(self, folder: Path) -> None:
        return None


def trainer(folder: Path, width: int = 3) -> Trainer:
    run = RunSettings(steps=3, batch_size=1, save_every=10, log_every=1, evaluate_every=2, precision="float32")
    return Trainer(Line(width), run, OptimizerSettings(lr=1e-2, warmup=0), folder)


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    list(trainer(tmp_path).steps())
    with pytest.raises(InvalidInput, match="trained another model than this recipe describes; use another folder"):
        trainer(tmp_path, width=4)


def test_a_log_that_cannot_be_written_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: Any, data: Any) -> None:
        file.write(bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sana.training.curve.write_all", full)
    assert [report.step for report in trainer(tmp_path).steps()] == [1, 2, 3]
    assert "step 1 is not in the log" in caplog.text
    assert "metrics.jsonl: No space left on device" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"", "no half line stays behind"
    assert load_state(tmp_path / "states") is not None


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_stays_alone(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"step": 1, "loss": 2.0})
    with log.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_line(log, {"step": 3, "loss": 1.0})
    assert log.read_text().splitlines() == ['{"step": 1, "loss": 2.0}', '{"step": 2, "lo', '{"step": 3, "loss": 1.0}']
    assert [step for step, _ in read_series(log)["loss"]] == [1, 3]


def test_a_log_with_rubbish_is_drawn(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    lines = ["", "5", "null", '{"step": "x", "loss": 1}', '{"loss": 1}', '{"step": 1, "loss": 1' + "0" * 400 + "}"]
    lines += [
        '{"step": 4, "loss": NaN, "held_out": {"psnr": Infinity, "ssim": 0.5}}',
        '{"step": 5, "held_out": [1], "loss": 1}',
    ]
    log.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert read_series(log) == {"ssim": [(4, 0.5)]}
    assert draw_curve(log, "rubbish").size == (960, 420)
    log.write_text('{"step": 0, "loss": 1.0}\n')
    assert draw_curve(log, "the beginning").size == (960, 420)


def test_tensors_of_a_state_are_the_public_format(tmp_path: Path) -> None:
    save_state(tmp_path, made(1))
    assert load_file(tmp_path / "step-00000001" / "module.safetensors")["b"] == 1
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["version"] == module.VERSION
