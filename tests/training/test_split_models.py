"""Two gloo processes with models split over them: each objective learns as one process does with the same batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_objectives import AUTOENCODER
from test_processes import beside, losses, state
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.folder import save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.data import cutouts
from sana.errors import NonFinite
from sana.flow.schedulers import SCMScheduler
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.drawn_features import scene_of
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.base import Objective
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.students import student_of
from tiny_model import make_tiny_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
FIRST = OptimizerSettings(lr=1e-2, warmup=1)
SECOND = OptimizerSettings(lr=3e-3, clip=0.5, warmup=0)
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"train": "lora", "lora": {"rank": 2, "targets": ["to_q", "to_v", "to_out.0", "conv_point"], "dora": True}},
    "controlnet": {"train": "controlnet", "control": {"kind": "canny", "blocks": 1}},
    "matching": {"adversarial_weight": 0.0, "matching_weight": 1.0, "warmup_steps": 4},
    "adapter": {
        "train": "lora",
        "lora": {"rank": 2, "targets": ["to_q", "to_v", "conv_point"], "dora": True},
        "adversarial_weight": 0.0,
        "matching_weight": 1.0,
        "warmup_steps": 4,
        "max_time_probability": 0.85,  # a process may have nothing to draw first, while the other has
    },
    "restoring": {"phase": "full"},
    "refining": {"phase": "refine"},
    "adversarial": {"taps": (0, 1), "virtual_batch": 2, "warmup_steps": 4},
}
DISTILLED = ("matching", "adapter", "adversarial")
AUTOENCODERS = ("restoring", "refining")


def settings(**changes: Any) -> RunSettings:
    base: dict[str, Any] = {"steps": 4, "batch_size": 2, "log_every": 1, "save_every": 100, "evaluate_every": 100}
    return RunSettings(**{**base, "precision": "float32", "ema": 0.9, "device": "cpu", **changes})


def built(kind: str, place: Path, run: RunSettings) -> Objective:
    if kind in AUTOENCODERS:
        return AutoencoderObjective(AutoencoderSettings(start=str(place / "vae"), size=64, **KINDS[kind]), run, CPU)
    data = {"path": str(place / "pictures"), "size": 256, "held_out": 2}
    if kind in DISTILLED:
        begun = str(place / "distilled") if kind == "adapter" else ""
        teacher = str(place / "model")
        told = SprintSettings(teacher=teacher, student=begun, data=data, prompts=("a fox",), **KINDS[kind])
        return SprintObjective(told, run, CPU)
    flow = FlowMatchingSettings(start=str(place / "model"), data=data, prompts=("a fox",), **KINDS[kind])
    return FlowMatchingObjective(flow, run, CPU)


def trainer_of(kind: str, place: Path, folder: Path, **changes: Any) -> Trainer:
    run = settings(**changes)
    second = SECOND if kind in (*DISTILLED, "refining") else None
    make: Callable[[], Objective] = lambda: built(kind, place, run)  # noqa: E731, one expression
    return Trainer(make(), run, FIRST, folder, second, rebuild=make)


def train(kind: str, place: Path, folder: Path, stop: int | None = None, **changes: Any) -> Trainer:
    trainer = trainer_of(kind, place, folder, **changes)
    for _ in trainer.steps(lambda: stop is not None and trainer.step + 1 >= stop):
        pass
    return trainer


def poisoned(rank: int, place: Path, folder: Path) -> None:
    trainer = trainer_of("full", place, folder, shard=True, max_non_finite=0)
    loss = trainer.objective.loss

    def broken(draw: int, turn: str = "main") -> Any:
        found, logged = loss(draw, turn)
        return (found * float("nan") if draw == 3 else found), logged  # the second process's, in step 1

    trainer.objective.loss = broken  # type: ignore[method-assign]
    steps = trainer.steps()
    next(steps)
    before = trainer.players.weights()
    with pytest.raises(NonFinite, match="1 steps had a non-finite"):
        next(steps)
    assert (trainer.refused, trainer.step) == (1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.players.weights().items())


def all_are_split(trainer: Trainer) -> None:
    frozen: tuple[Any, ...] = getattr(trainer.objective, "frozen", ())
    for part in (trainer.objective.module, *frozen):
        assert all(isinstance(p, DTensor) for p in part.parameters())


def of_two(rank: int, folder: Path) -> None:
    for kind in ("full", "lora", "matching", "adapter"):
        split = train(kind, folder, folder / kind, shard=True)
        all_are_split(split)
        split.export(folder / kind / "export")
    train("full", folder, folder / "resumed", stop=2, shard=True)
    poisoned(rank, folder, folder / "poisoned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, a model as if it was distilled from it, and a few pictures."""
    folder = tmp_path_factory.mktemp("split")
    parts = make_tiny_parts(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    save_parts(folder / "model", parts.components)
    student = student_of(parts.transformer, 1)
    distilled = SanaTransformer2DModel.from_config(student.config)
    distilled.load_state_dict(student.state_dict())
    save_parts(folder / "distilled", {**parts.components, "transformer": distilled, "scheduler": SCMScheduler()})
    (folder / "pictures").mkdir()
    for number in range(8):
        Image.fromarray(cutouts.render(scene_of(3, number))).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(f"thing number {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pair(place: Path) -> Path:
    """What two processes made, once for all tests."""
    multiprocessing.spawn(beside, args=(of_two, place), nprocs=2)  # type: ignore[no-untyped-call]
    return place


def exported(folder: Path) -> dict[str, Tensor]:
    (file,) = [file for file in folder.rglob("*.safetensors") if "vae" not in str(file) and "text" not in str(file)]
    found: dict[str, Tensor] = load_file(file)
    return found


def walk_as(found: Path, alone: Path, but: tuple[str, ...] = ()) -> None:
    assert losses(found) == pytest.approx(losses(alone), abs=1e-5), found
    whole, split = state(alone), state(found)
    assert split.keys() == whole.keys()
    assert any(name.startswith("ema/") for name in whole)
    for key, tensor in whole.items():
        if key.endswith(but):
            continue
        torch.testing.assert_close(split[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{found.name} {key}")


@pytest.mark.parametrize("kind", ["full", "lora", "matching", "adapter"])
def test_a_model_split_over_two_processes_walks_as_one(kind: str, pair: Path, tmp_path: Path) -> None:
    alone = train(kind, pair, tmp_path / "alone", accumulate=2)
    alone.export(tmp_path / "export")
    walk_as(pair / kind, tmp_path / "alone")
    assert len(set(losses(pair / kind))) == 4
    begun = built(kind, pair, settings()).module.state_dict()
    assert any(not torch.equal(tensor, begun[name]) for name, tensor in alone.average.tensors().items())
    ours, theirs = exported(pair / kind / "export"), exported(tmp_path / "export")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_one_process_goes_on_with_a_model_that_was_split(pair: Path, tmp_path: Path) -> None:
    train("full", pair, pair / "resumed", accumulate=2)
    train("full", pair, tmp_path / "alone", accumulate=2)
    walk_as(pair / "resumed", tmp_path / "alone")


def of_two_more(rank: int, folder: Path) -> None:
    place = folder.parent
    all_are_split(train("controlnet", place, folder / "controlnet", shard=True))
    for kind in AUTOENCODERS:
        split = train(kind, place, folder / kind, shard=True)
        all_are_split(split)
        split.export(folder / kind / "export")
    train("full", place, folder / "checkpointed", shard=True, checkpointing=True)
    train("adversarial", place, folder / "copied")
    all_are_split(train("adversarial", place, folder / "split", shard=True))
    # Of six pictures, one process has five and the other the last one.
    train("adversarial", place, folder / "copied-short", batch_size=5)
    train("adversarial", place, folder / "split-short", batch_size=5, shard=True)
    train("matching", place, folder / "halted", stop=2, shard=True)
    train("matching", place, folder / "halted", shard=True)


@pytest.mark.slow
def test_branches_checkpoints_heads_and_resumed_players_walk_as_one_too(place: Path, tmp_path: Path) -> None:
    more = place / "more"
    more.mkdir()
    torch.manual_seed(0)
    AutoencoderDC.from_config(AUTOENCODER, scaling_factor=0.5).save_pretrained(place / "vae")
    multiprocessing.spawn(beside, args=(of_two_more, more), nprocs=2)  # type: ignore[no-untyped-call]
    for kind in AUTOENCODERS:
        train(kind, place, tmp_path / kind, accumulate=2).export(tmp_path / kind / "export")
        walk_as(more / kind, tmp_path / kind)
        ours, theirs = (load_file(folder / kind / "export" / WEIGHTS) for folder in (more, tmp_path))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=f"{kind} {name}")
    for kind, found in (("controlnet", "controlnet"), ("full", "checkpointed"), ("matching", "halted")):
        train(kind, place, tmp_path / kind, accumulate=2)
        walk_as(more / found, tmp_path / kind)
    # One process would not do: the heads' spectral norm goes a step further in each of its passes.
    # A norm takes these biases out again: their gradient is rounding, of which AdamW makes whole steps.
    walk_as(more / "split", more / "copied", but=("point.bias", "around.bias"))
    assert losses(more / "split-short") == pytest.approx(losses(more / "copied-short"), abs=1e-5)
