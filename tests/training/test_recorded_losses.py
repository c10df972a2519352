"""Losses of runs that were recorded before the trainer learned about processes and turns: they stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_loop import Regression, settings
from test_objectives import AUTOENCODER, CPU, LANGUAGE, run

from sana.training.batches import generator_of
from sana.training.config import MAX_SEED, OptimizerSettings, RunSettings
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.base import Objective
from sana.training.objectives.language_model import LanguageModelObjective

# Recorded with torch 2.13.0 on an x86 CPU with AMX, one thread. Others take sums in another order: 1.4e-4 apart so far.
RECORDED: dict[str, tuple[Callable[[RunSettings], Objective], RunSettings, str, str]] = {
    "muon": (
        lambda _: Regression(),
        settings(steps=12),
        "muon",
        "0x1.dad6c4p-1 0x1.19fdc0p+0 0x1.c78834p-1 0x1.0cd27cp+0 0x1.16b636p+0 0x1.05e0f2p+0",
    ),
    "adamw, two micro-batches": (
        lambda _: Regression(),
        settings(steps=12, accumulate=2),
        "adamw",
        "0x1.03e120p+0 0x1.ef2679p-1 0x1.0bf230p+0 0x1.d7388ep-1 0x1.de012bp-1 0x1.10d8b6p+0",
    ),
    "autoencoder": (
        lambda made: AutoencoderObjective(AutoencoderSettings(model=AUTOENCODER), made, CPU),
        run(steps=6),
        "muon",
        "0x1.bd4e98p+1 0x1.c49bcap+1 0x1.6614acp+1 0x1.3750fap+1 0x1.1540580p+1 0x1.022f08p+1",
    ),
    "language model": (
        lambda made: LanguageModelObjective(LANGUAGE, made, CPU),
        run(steps=6, batch_size=4),
        "muon",
        "0x1.5142d4p+3 0x1.548b46p+3 0x1.49f810p+3 0x1.3e68e4p+3 0x1.437d88p+3 0x1.393d0ap+3",
    ),
}


def test_every_seed_and_draw_has_noise_of_its_own() -> None:
    """A date is a seed, too; small seeds have the numbers that they always had."""
    seeds = (0, 1, 20240101, 20240101 + (1 << 23), MAX_SEED)
    found = [generator_of(seed, draw).initial_seed() for seed in seeds for draw in (0, 1, 10**6)]
    assert found[:6] == [0, 1, 10**6, 1 << 40, (1 << 40) + 1, (1 << 40) + 10**6]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", RECORDED)
def test_the_losses_are_those_that_were_recorded(tmp_path: Path, name: str) -> None:
    make, settings, optimizer, recorded = RECORDED[name]
    trainer = Trainer(make(settings), settings, OptimizerSettings(name=optimizer, lr=2e-3, warmup=1), tmp_path)
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    losses = [report.loss for report in trainer.steps()][:6]
    expected = [float.fromhex(word) for word in recorded.split()]
    assert losses == pytest.approx(expected, rel=1e-3)
