"""`sana train` as others start and stop it: a signal in the middle of a step, and several processes of accelerate's."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import SMALL

from sana.training.curve import read_lines
from sana.training.state import load_state

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROMISED = 30
"""Seconds in which a run is saved after it was asked to stop."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
NANO = f"""
objective = "flow_matching"
[run]
steps = 100000
batch_size = 32
accumulate = 4
log_every = 1
[flow_matching]
start = "nano"
[flow_matching.data]
path = "{ROOT / "examples" / "data" / "pictures"}"
size = 256
"""


def test_a_run_that_is_asked_to_stop_in_the_middle_of_a_step_is_saved_soon(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "nano.toml", tmp_path / "runs" / "nano"
    recipe.write_text(NANO)
    command = [sys.executable, "-m", "sana", "train", str(recipe), "-o", str(tmp_path / "runs")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        begun = time.monotonic()
        while not any(line["step"] >= 2 for line in metrics(folder)):
            assert run.poll() is None
            assert time.monotonic() - begun < 120, "no second step"
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        said = run.communicate(timeout=4 * PROMISED)[1]
        assert time.monotonic() - asked < PROMISED
    finally:
        run.kill()
    assert run.returncode == 75, said
    saved = load_state(folder / "states")
    assert saved is not None
    told = re.search(r"nano is saved at step (\d+) of 100000\. To go on: sana train", said)
    assert told
    assert saved.step == int(told[1]) >= 2


def metrics(folder: Path) -> list[dict[str, float]]:
    return read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []


def tiny_recipe(model: Path, steps: int) -> str:
    """All weights of a tiny model on the pictures of the examples, at a rate that knows no end."""
    return f"""
objective = "flow_matching"
[run]
steps = {steps}
batch_size = 2
ema = 0.9
save_every = 3
log_every = 1
evaluate_every = 50
[optimizer]
lr = 1e-3
schedule = "constant"
[flow_matching]
start = "{model}"
prompts = ["a red fish"]
[flow_matching.data]
path = "{ROOT / "examples" / "data" / "pictures"}"
size = 256
"""


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def last_step(folder: Path) -> int:
    return max((int(line["step"]) for line in metrics(folder)), default=0)


def test_a_command_that_is_killed_again_and_again_exports_the_same_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    recipe, rng = tmp_path / "tiny.toml", random.Random(0)
    recipe.write_text(tiny_recipe(tiny_folder, 120))
    command = [sys.executable, "-m", "sana", "train", str(recipe), "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], env=ENVIRONMENT, capture_output=True, timeout=400, check=True)
    folder, saved = tmp_path / "killed" / "tiny", [0]
    for _ in range(4):
        run = subprocess.Popen([*command, str(folder.parent)], stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        try:
            begun, before = time.monotonic(), last_step(folder)
            while last_step(folder) < before + 4:
                assert run.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() - begun < 300, "no further step"
                time.sleep(0.01)
            time.sleep(0.3 * rng.random())
            run.kill()
            assert run.wait() == -signal.SIGKILL
        finally:
            run.kill()
        found = load_state(folder / "states")
        saved.append(0 if found is None else found.step)
    assert saved[-1] < 120
    assert saved == sorted(set(saved)), "each went on from what the last one had saved"
    done = subprocess.run(
        [*command, str(folder.parent)], env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=True
    )
    assert f"tiny: going on at step {saved[-1]} of 120" in done.stderr
    expected = digests(tmp_path / "whole" / "tiny" / "export")
    assert "transformer/diffusion_pytorch_model.safetensors" in expected
    assert digests(folder / "export") == expected


def test_of_commands_that_are_started_at_once_in_one_folder_one_trains(tmp_path: Path, tiny_folder: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe(tiny_folder, 100_000))
    command = [sys.executable, "-m", "sana", "train", str(recipe), "-q", "-o"]
    runs = [
        subprocess.Popen([*command, str(tmp_path / "shared")], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(3)
    ]
    folder = tmp_path / "shared" / "tiny"
    try:
        begun = time.monotonic()
        while sum(run.poll() is None for run in runs) > 1 or last_step(folder) < 5:
            assert time.monotonic() - begun < 400, "more than one trains, or none"
            time.sleep(0.05)
        (first,) = (run for run in runs if run.poll() is None)
        first.send_signal(signal.SIGTERM)
        told = {run.pid: run.communicate(timeout=4 * PROMISED)[1].splitlines() for run in runs}
    finally:
        for run in runs:
            run.kill()
    assert first.returncode == 75
    for run in runs:
        if run is not first:
            assert run.returncode == 2
            (sentence,) = told[run.pid]
            assert sentence == (
                f"sana: '{folder}' is being trained by another process (process {first.pid}); wait for it, stop it, or"
                " choose another folder."
            )
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    state = load_state(folder / "states")
    assert state is not None
    alone = [*command, str(tmp_path / "alone"), "--run.steps", str(state.step)]
    subprocess.run(alone, env=ENVIRONMENT, capture_output=True, timeout=400, check=True)
    other = load_state(tmp_path / "alone" / "tiny" / "states")
    assert other is not None
    assert other.step == state.step
    assert all(torch.equal(tensor, other.parts["module"][name]) for name, tensor in state.parts["module"].items())


def test_accelerate_launches_two_processes_that_walk_as_one(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL.replace("[run]", "[run]\nlog_every = 1"))
    # With --cpu accelerate starts one process whatever the number; its other launcher asks for no GPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    words = ["sana.apps.cli", "train", str(recipe), "-o"]
    for start, place, more in ((launch, "two", []), ([sys.executable, "-m"], "one", ["--run.accumulate", "2"])):
        line = [*start, *words, str(tmp_path / place), *more]
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(tmp_path / place / "small" / "export")]  # one of them speaks
        assert done.stderr.count("preparing") == 1
        assert "Grad strides" not in done.stderr
    losses = [[line["loss"] for line in metrics(tmp_path / at / "small") if "loss" in line] for at in ("two", "one")]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    settings = json.loads((tmp_path / "two" / "small" / "finished.json").read_text())
    assert settings["run"]["accumulate"] == 1


def test_torchruns_restart_goes_on_from_the_last_state_after_a_process_was_killed(tmp_path: Path) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL.replace("steps = 2", "steps = 24\nsave_every = 4\nlog_every = 1"))
    words = ["sana.apps.cli", "train", str(recipe), "-o"]
    # As the documents say: without the variable, the new processes may find the addresses of the dead ones.
    environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["--max-restarts", "1", "--monitor-interval", "0.5", "-m", *words, str(tmp_path / "two")]
    folder = tmp_path / "two" / "small"
    with (tmp_path / "said.txt").open("w+") as said:
        run = subprocess.Popen(launch, stderr=said, stdout=said, env=environment)
        try:
            begun = time.monotonic()
            while not any(line["step"] >= 6 for line in metrics(folder)):
                assert run.poll() is None
                assert time.monotonic() - begun < 120, "no sixth step"
                time.sleep(0.1)
            second = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[1]
            os.kill(int(second), signal.SIGKILL)
            assert run.wait(timeout=600) == 0, (tmp_path / "said.txt").read_text()
        finally:
            run.kill()
        text = (tmp_path / "said.txt").read_text()
    assert "another one has ended" in text
    assert re.search(r"small: going on at step (4|8|12|16|20) of 24", text)
    alone = [sys.executable, "-m", *words, str(tmp_path / "one"), "--run.accumulate", "2"]
    subprocess.run(alone, capture_output=True, env=ENVIRONMENT, timeout=600, check=True)
    last = [
        {line["step"]: line["loss"] for line in metrics(tmp_path / at / "small") if "loss" in line}
        for at in ("two", "one")
    ]
    assert list(last[0]) == list(range(1, 25))
    assert last[0] == pytest.approx(last[1], abs=1e-4)
