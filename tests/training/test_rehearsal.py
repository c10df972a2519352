"""What published sizes will need, told from their configurations: held against models with weights."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_needs import bare_memory, measured, memory

from sana.apps.cli.recipes import split_overrides
from sana.card import AUTOENCODER_PARAMS, TEXT_ENCODER_PARAMS
from sana.cards import CARDS
from sana.errors import InvalidInput
from sana.nn import caption_attention, linear_attention, mixffn
from sana.training.config import Recipe, load_recipe
from sana.training.estimate import SHARE, Estimate, counted, state_bytes
from sana.training.loop import Trainer
from sana.training.players import use_checkpointing
from sana.training.rehearsal import card_of, opened, rehearse
from sana.training.start import OBJECTIVES, estimated, settings_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NANO = CARDS["nano"]
TEACHER = replace(NANO, transformer=replace(NANO.transformer, timestep_scale=0.001))
PUBLISHED = sorted(ROOT.glob("recipes/sana-*/*.toml")) + sorted(ROOT.glob("recipes/autoencoder/*.toml"))
LEARNERS = (caption_attention, linear_attention, mixffn)
"""Modules with a way of their own to learn on CPUs."""
MOST = 32e9 / 2**30
"""GiB of the 32 GB that the original states."""


def on_nano(kind: str, **changes: str) -> Recipe:
    table = "sprint" if kind == "sprint" else "flow_matching"
    name = "teacher" if kind == "sprint" else "start"
    overrides = {f"{table}.{name}": "nano", f"{table}.data.size": "256", "run.batch_size": "4", "run.accumulate": "1"}
    overrides |= {"flow_matching.control.blocks": "2"} if kind == "controlnet" else {}
    return load_recipe(ROOT / "recipes" / "sana-1.6b" / f"{kind}.toml", overrides | changes)


def rehearsed(recipe: Recipe, world: int = 1) -> Estimate:
    card = TEACHER if recipe.objective == "sprint" else NANO
    return rehearse(recipe, OBJECTIVES[recipe.objective].objective, settings_of(recipe), card, world)


def with_values(recipe: Recipe) -> Any:
    card = TEACHER if recipe.objective == "sprint" else NANO
    made = OBJECTIVES[recipe.objective].objective(settings_of(recipe), recipe.run, CPU, opened(card))
    if recipe.run.checkpointing:
        use_checkpointing(made)
    return made


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways that accelerators take, too, in place of those that only a CPU takes."""
    for module in LEARNERS:
        monkeypatch.setattr(module, "learning", lambda *_: False)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("finetune", {}),
        ("lora", {}),
        ("dreambooth", {}),
        ("controlnet", {}),
        ("sprint", {}),
        ("sprint", {"sprint.matching_weight": "1.0", "sprint.max_time_probability": "0.6"}),
    ],
)
def test_tensors_without_values_need_what_those_with_values_need(
    kind: str, changes: dict[str, str], as_elsewhere: None
) -> None:
    recipe = on_nano(kind, **changes)
    made = with_values(recipe)

    def walk(draw: int, turn: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = made.loss(draw, turn)[0]
        loss.backward()

    real = counted(made, recipe.run, recipe.optimizer, recipe.discriminator_optimizer, walk, 1, timed=False)
    told = rehearsed(recipe)
    assert replace(told, encoders=0, previews=0) == real
    assert real.activations > 1e6
    assert real.flop > 1e9


def measure(folder: str) -> None:
    """Print what a run of nano is told to need and what it takes; to be run in a process of its own."""
    for module in LEARNERS:
        module.learning = lambda *_: False  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    recipe = on_nano("finetune", **{"run.batch_size": "32", "optimizer.name": "adamw", "run.precision": "float32"})
    expected = replace(rehearsed(recipe), encoders=0, previews=0).total
    before = bare_memory()
    made = with_values(recipe)
    Path("/proc/self/clear_refs").write_text("5")
    trainer = Trainer(made, replace(recipe.run, steps=2), recipe.optimizer, Path(folder))
    trainer.save, trainer._look = lambda: None, lambda stop: {}  # type: ignore[method-assign]
    list(trainer.steps())
    sys.stdout.write(json.dumps([expected, memory("VmHWM") - before]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of a process")
def test_a_run_of_nano_takes_what_is_told(tmp_path: Path) -> None:
    expected, taken = measured("test_rehearsal", tmp_path)
    assert expected > 100e6
    assert 0.67 < taken / expected < 1.5, (expected, taken)


def test_each_part_is_what_its_setting_makes_it() -> None:
    full, size = rehearsed(on_nano("finetune")), NANO.params
    assert (full.weights, full.gradients, full.average, full.frozen) == (4 * size, 4 * size, 4 * size, 0)
    assert full.seconds is None
    assert full.encoders == 0
    assert full.previews >= 2 * TEXT_ENCODER_PARAMS
    bare = rehearsed(on_nano("finetune", **{"run.ema": "0.0", "flow_matching.data.features": ""}))
    assert (bare.average, bare.encoders) == (0, 2 * TEXT_ENCODER_PARAMS + 4 * AUTOENCODER_PARAMS)
    states = {
        name: rehearsed(on_nano("finetune", **{"optimizer.name": name})).optimizer
        for name in ("adamw", "muon", "came", "adamw8bit")
    }
    assert states["adamw"] == 8 * size
    assert states["adamw8bit"] < states["came"] < states["muon"] < states["adamw"]
    kept = rehearsed(on_nano("finetune", **{"run.checkpointing": "false"}))
    assert kept.activations > 1.5 * full.activations
    lora = rehearsed(on_nano("lora"))
    assert lora.frozen == 2 * size
    assert lora.weights < 0.1 * lora.frozen
    with_prior = rehearsed(on_nano("dreambooth", **{"run.batch_size": "4"}))
    assert with_prior.activations > 1.7 * lora.activations


def test_encoders_that_come_and_go_count_while_they_encode_and_no_longer() -> None:
    kept = rehearsed(on_nano("lora", **{"flow_matching.data.features": ""}))
    spared = rehearsed(on_nano("lora", **{"flow_matching.data.features": "", "run.offload": "true"}))
    larger = max(2 * TEXT_ENCODER_PARAMS, 4 * AUTOENCODER_PARAMS)
    assert (kept.encoding, spared.encoders) == (0, 0)
    assert larger <= spared.encoding < kept.encoders
    assert spared.previews >= larger
    assert spared.total < kept.total
    assert replace(spared, encoding=0, previews=kept.previews, encoders=kept.encoders) == kept


def test_accumulated_gradients_are_there_while_the_next_micro_batch_runs() -> None:
    once, again = (rehearsed(on_nano("finetune", **{"run.accumulate": count})) for count in ("1", "4"))
    assert once.gradients == again.gradients
    assert again.flop == 4 * once.flop
    assert again.activations > once.activations


def test_processes_split_what_is_split_and_copies_have_buckets() -> None:
    one = rehearsed(on_nano("finetune", **{"optimizer.name": "adamw"}))
    copies = rehearsed(on_nano("finetune", **{"optimizer.name": "adamw"}), world=4)
    assert copies == replace(one, gradients=2 * one.gradients)
    split = rehearsed(on_nano("finetune", **{"optimizer.name": "adamw", "run.shard": "true"}), world=4)
    for kind in ("weights", "gradients", "optimizer", "average"):
        assert getattr(split, kind) == -(-getattr(one, kind) // 4)
    assert split.activations > one.activations
    adapter = {"optimizer.name": "adamw", "flow_matching.base_dtype": "bfloat16"}
    base, quarter = (
        rehearsed(on_nano("lora", **adapter, **{"run.shard": shard}), world=4).frozen for shard in ("false", "true")
    )
    assert quarter == -(-base // 4)
    with pytest.raises(InvalidInput, match="over several processes, but there is one"):
        rehearsed(on_nano("finetune", **{"run.shard": "true"}))
    with pytest.raises(InvalidInput, match=r"run.shard needs optimizer.name = 'adamw'; came reads"):
        rehearsed(on_nano("finetune", **{"run.shard": "true"}), world=2)


TWO_PLAYERS = ("sprint", "sprint-controlnet")
"""Recipes of distillations, whose discriminator has an optimiser of its own."""


def documented(kind: str) -> dict[str, str]:
    """What docs/training.md lays over a recipe on several nodes."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^torchrun --nnodes .+ -m sana\.apps\.cli train RECIPE\.toml (.+)$", text, re.MULTILINE)
    (second,) = re.findall(r"have a second optimiser: there, add `(.+?)`", text)
    rest, overrides = split_overrides(shlex.split(f"{line} {second}" if kind in TWO_PLAYERS else line))
    assert not rest
    return overrides


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_documented_command_line_gives_every_recipe_an_optimiser_that_goes_with_split_weights(path: Path) -> None:
    recipe = load_recipe(path, documented(path.stem))
    settings_of(recipe)
    assert recipe.run.shard
    assert {one.name for one in (recipe.optimizer, recipe.discriminator_optimizer) if one is not None} == {"adamw"}


@pytest.mark.parametrize("kind", ["finetune", "lora", "controlnet", "sprint"])
def test_recipes_split_by_the_documented_command_line_need_less_on_each_of_sixteen(kind: str) -> None:
    with pytest.raises(InvalidInput, match=r"remove run\.shard"):
        rehearsed(on_nano(kind, **{"run.shard": "true"}), world=16)
    split = rehearsed(on_nano(kind, **documented(kind)), world=16)
    whole = rehearsed(on_nano(kind, **documented(kind) | {"run.shard": "false"}), world=16)
    assert split.weights + split.frozen < 0.07 * (whole.weights + whole.frozen)
    assert split.optimizer < 0.07 * whole.optimizer


def test_the_turn_that_needs_more_counts_and_the_states_of_both() -> None:
    recipe = on_nano("sprint")
    told = rehearsed(recipe)
    assert told.frozen == 2 * NANO.params
    assert told.gradients > 4 * NANO.params  # the generator's, with its embedder of guidance
    assert told.optimizer > state_bytes("came", dict(with_values(recipe).parameters_of("generator")))


def test_models_are_known_by_name_repository_and_file() -> None:
    card = CARDS["sana-1.6b-1024-fp16"]
    assert card_of("sana-1.6b-1024-fp16") is card_of(str(card.hub_id)) is card_of(str(card.original)) is card
    assert card_of("some/folder") is card_of("") is None


def exports() -> dict[Path, Recipe]:
    return {Path("runs/autoencoder") / path.stem / "export": load_recipe(path) for path in PUBLISHED}


def test_an_autoencoder_that_nothing_trains_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"autoencoder.start is not there yet: runs/autoencoder/full/export\. Name"):
        estimated(load_recipe(ROOT / "recipes/autoencoder/latent.toml"), Path("runs/autoencoder/latent"))


def test_a_branch_is_rehearsed_as_the_recipe_joins_it() -> None:
    for told, wiring in (({}, "diffusers"), ({"flow_matching.control.wiring": "native"}, "native")):
        assert with_values(on_nano("controlnet", **told)).trainable.network.wiring == wiring


def stated(path: Path) -> float:
    lines = [line for line in path.read_text().splitlines() if line.startswith("# Memory: ")]
    (line,) = lines
    assert line.endswith(" GiB, by --dry-run."), line
    return float(line.split()[2])


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_states_its_memory_within_the_originals(path: Path) -> None:
    assert 0 < stated(path) <= MOST


@pytest.mark.slow
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_a_recipe_states_is_what_a_dry_run_tells(path: Path) -> None:
    recipe = load_recipe(path, {"run.precision": "bf16"})
    told = estimated(recipe, Path("runs") / path.parent.name / path.stem, exports())
    size = told.total / 2**30
    assert stated(path) == pytest.approx(size, abs=0.051 if size >= 1 else 0.0051)
    assert told.flop > 0
    assert told.seconds is not None
    if path.parent.name != "autoencoder":
        assert told.seconds == pytest.approx(recipe.run.steps * told.flop / (SHARE * (told.rate or 0)))


def stated_beside() -> list[tuple[str, float]]:
    """The counterparts of the original's commands on one GPU, with the GiB that stand beside them."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `configs/.+` \| `(recipes/.+)` \| ([\d.]+) GiB \|$", page, flags=re.MULTILINE)
    return [(command, float(gib)) for command, gib in rows]


def test_all_three_of_the_originals_commands_are_stated_beside() -> None:
    assert len(stated_beside()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("command", "gib"), stated_beside(), ids=["folder-512", "finetune-1024", "webdataset-512"])
def test_the_originals_commands_stay_within_its_memory(command: str, gib: float) -> None:
    (path,), overrides = split_overrides(shlex.split(command))
    told = estimated(load_recipe(ROOT / path, {**overrides, "run.precision": "bf16"}), Path("runs"))
    assert told.total <= 32e9
    assert gib == pytest.approx(told.total / 2**30, abs=0.051)
