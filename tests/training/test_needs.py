"""What `--dry-run` tells: held against states that were made and memory that was taken."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_loop import Regression, settings
from test_optimizers import gradients, module
from torch import Tensor, nn

from sana.memory.trimming import give_back
from sana.training.config import OptimizerSettings
from sana.training.estimate import estimate, state_bytes
from sana.training.loop import Trainer
from sana.training.optimizers import OPTIMIZERS, Optimizers

M_MMAP_THRESHOLD = -3
"""glibc's own number."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_as_large_as_is_told(name: str) -> None:
    model = module()
    optimizers = Optimizers(model.named_parameters(), OptimizerSettings(name=name))
    gradients(model, 0)
    optimizers.step(1.0)
    made = sum(tensor.nbytes for tensor in optimizers.tensors().values())
    assert state_bytes(name, dict(model.named_parameters())) == pytest.approx(made, rel=0.03)


class Wide(Regression):
    """Large enough that its memory stands out from the interpreter's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(256, 4096), nn.SiLU(), nn.Linear(4096, 1024), nn.SiLU())

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(draw))
        return self.module(x).square().mean(), {}


def test_an_estimate_changes_and_writes_nothing(tmp_path: Path) -> None:
    objective = Regression()
    before = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
    found = estimate(objective, settings(), OptimizerSettings())
    assert found.weights == found.gradients == found.average == sum(p.nbytes for p in objective.module.parameters())
    assert found.optimizer == 2 * found.weights
    assert found.activations >= 4 * 8 * (32 + 48)  # the input and what comes between
    assert found.seconds > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in objective.module.named_parameters())
    assert estimate(Regression(), settings(ema=0.0), OptimizerSettings()).average == 0
    assert not list(tmp_path.iterdir())


def memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def bare_memory() -> int:
    """What this process has taken, after which every tensor is taken from the system and given back to it."""
    gc.collect()
    give_back()  # what other tests have freed would be taken again unseen
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    return memory("VmRSS")


def measure(folder: str) -> None:
    """Print what a run is told to need and what it takes; to be run in a process of its own."""
    torch.set_num_threads(1)
    before = bare_memory()
    objective = Wide()
    expected = estimate(objective, settings(), OptimizerSettings()).total
    Path("/proc/self/clear_refs").write_text("5")
    run = settings(steps=2, save_every=100, evaluate_every=100)
    trainer = Trainer(objective, run, OptimizerSettings(), Path(folder))
    trainer.save = lambda: None  # type: ignore[method-assign]
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    list(trainer.steps())
    sys.stdout.write(json.dumps([expected, memory("VmHWM") - before]))


def measured(module: str, folder: Path) -> list[float]:
    """What `measure` of a test module prints in a fresh process: what other tests freed would be taken again unseen."""
    code = f"import {module}; {module}.measure({str(folder)!r})"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of a process")
def test_the_estimate_is_within_a_factor_of_a_half_of_what_is_taken(tmp_path: Path) -> None:
    expected, taken = measured("test_needs", tmp_path)
    assert expected > 100e6
    assert 0.67 < taken / expected < 1.5, (expected, taken)
