"""Two gloo processes: they walk as one, split weights, resume each other's runs, and stop when one is gone."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from test_loop import Game, Regression, game, settings
from torch import Tensor, multiprocessing, nn

from sana.checkpoints.tensors import read_tensors
from sana.errors import InvalidInput, NonFinite, ProcessLost
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.curve import read_lines
from sana.training.loop import Trainer
from sana.training.objectives.base import trainable
from sana.training.state import load_state

ADAMW = OptimizerSettings(lr=1e-2, warmup=2)


class Blocks(Regression):
    """A stack of blocks, which are split one by one, beside what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.ModuleDict(
            {
                "first": nn.Linear(32, 31),  # rows that two processes cannot share evenly
                "blocks": nn.ModuleList([nn.Sequential(nn.Linear(31, 31), nn.SiLU()) for _ in range(2)]),
                "last": nn.Linear(31, 32),
                "frozen": nn.Linear(32, 32),
            }
        )
        self.module["frozen"].requires_grad_(False)

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(draw))
        y = self.module["first"](x)
        for block in self.module["blocks"]:
            y = y + block(y)
        return (self.module["last"](y) + self.module["frozen"](x) - x.flip(1)).square().mean(), {}


def blocks(folder: Path, stop: int | None = None, **changes: object) -> Trainer:
    trainer = Trainer(Blocks(), settings(**changes), ADAMW, folder, rebuild=Blocks)
    for step in trainer.steps(lambda: stop is not None and trainer.step + 1 >= stop):
        assert step.stopping == (step.step == stop)
    return trainer


def join(rank: int, folder: Path, timeout: float = 60.0, world: int = 2) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    from datetime import timedelta

    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )


def leave() -> None:
    torch.distributed.barrier()  # who leaves while the other still listens is ended by gloo
    torch.distributed.destroy_process_group()


def beside(rank: int, task: Callable[[int, Path], None], folder: Path, world: int = 2) -> None:
    join(rank, folder, world=world)
    task(rank, folder)
    leave()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


def state(folder: Path) -> dict[str, Tensor]:
    found = load_state(folder / "states")
    assert found is not None
    return {f"{part}/{name}": tensor for part, tensors in found.parts.items() for name, tensor in tensors.items()}


def poisoned(rank: int, folder: Path) -> None:
    draws = frozenset({3}) if rank == 1 else frozenset()  # draw 3 is the second process's, in step 1
    trainer = Trainer(Regression(draws), settings(steps=3, max_non_finite=0), ADAMW, folder)
    steps = trainer.steps()
    next(steps)
    before = {name: p.detach().clone() for name, p in trainer.objective.module.named_parameters()}
    with pytest.raises(NonFinite, match="1 steps had a non-finite"):
        next(steps)
    assert trainer.refused == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.objective.module.named_parameters())


def stopped(rank: int, folder: Path) -> None:
    trainer = Trainer(Regression(), settings(), ADAMW, folder)
    seen = [report.step for report in trainer.steps(lambda: rank == 1 and trainer.step == 4)]
    assert seen == [1, 2, 3, 4, 5]


def left(rank: int, folder: Path, **changes: object) -> None:
    """The second process is asked to stop while all evaluate at step 6."""
    trainer = Trainer(Blocks(), settings(**changes), ADAMW, folder, rebuild=Blocks)
    seen = list(trainer.steps(lambda: rank == 1 and trainer.step == 6))
    assert [report.step for report in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].stopping
    assert seen[-1].figures is None
    assert not trainer.is_finished
    assert blocks(folder, **changes).is_finished


def players(folder: Path, **changes: object) -> None:
    """A generator and a discriminator, each with AdamW of its own settings."""
    first, second = OptimizerSettings(lr=1e-2, warmup=0), OptimizerSettings(lr=1e-3, clip=0.5, warmup=0)
    trainer = Trainer(Game(), settings(**changes), first, folder, second, rebuild=Game)
    assert all(step.loss > 0 for step in trainer.steps())
    assert {turn for _, turn, _ in trainer.objective.seen} == {"generator", "discriminator"}  # type: ignore[attr-defined]


def all_of_it(rank: int, folder: Path) -> None:
    blocks(folder / "copies")
    blocks(folder / "micro", accumulate=2)
    game(folder / "game")
    players(folder / "players copied")
    players(folder / "players split", shard=True)
    split = blocks(folder / "split", shard=True)
    split.export(folder / "split" / "export")
    blocks(folder / "resumed", stop=5, shard=True)
    blocks(folder / "resumed", shard=True)
    blocks(folder / "begun by two", stop=5)
    blocks(folder / "begun by one")
    poisoned(rank, folder / "poisoned")
    stopped(rank, folder / "stopped")
    left(rank, folder / "left")
    left(rank, folder / "left split", shard=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, once for all tests; one run was begun here, and one is ended here."""
    folder = tmp_path_factory.mktemp("pair")
    blocks(folder / "begun by one", stop=5, accumulate=2)
    multiprocessing.spawn(beside, args=(all_of_it, folder), nprocs=2)  # type: ignore[no-untyped-call]
    blocks(folder / "begun by two", accumulate=2)
    return folder


def test_two_processes_walk_as_one(tmp_path: Path, pair: Path) -> None:
    one = blocks(tmp_path / "one", accumulate=2)
    blocks(tmp_path / "four", accumulate=4)
    game(tmp_path / "game alone", accumulate=2)
    whole, expected = state(tmp_path / "one"), losses(tmp_path / "one")
    for name in ("copies", "split", "resumed", "begun by two", "begun by one", "left", "left split"):
        assert losses(pair / name) == pytest.approx(expected, abs=1e-5), name
        found = state(pair / name)
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
    for two, alone in (("micro", "four"), ("game", "game alone")):
        assert losses(pair / two) == pytest.approx(losses(tmp_path / alone), abs=1e-5), two
    split, resumed = state(pair / "split"), state(pair / "resumed")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in split.items())
    left = state(pair / "left split")
    assert all(torch.equal(tensor, left[key]) for key, tensor in split.items())
    assert [line["step"] for line in read_lines(pair / "left" / "metrics.jsonl") if line["held_out"]] == [0, 6, 12]
    exported = torch.load(pair / "split" / "export" / "weights.pt", weights_only=True)
    torch.testing.assert_close(exported["first.weight"], one.average.values["first.weight"], rtol=1e-3, atol=2e-5)
    assert torch.equal(exported["frozen.weight"], one.objective.module["frozen"].weight)  # type: ignore[index]
    best = dict(read_tensors(pair / "split" / "best" / "module.safetensors"))
    assert best["first.weight"].shape == (31, 32)


def test_two_players_whose_weights_are_split_walk_as_one(tmp_path: Path, pair: Path) -> None:
    players(tmp_path / "alone", accumulate=2)
    whole, expected = state(tmp_path / "alone"), losses(tmp_path / "alone")
    assert expected[0] != expected[-1]
    for name in ("players copied", "players split"):
        assert losses(pair / name) == pytest.approx(expected, abs=1e-5), name
        found = state(pair / name)
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")


def by_four(rank: int, folder: Path) -> None:
    blocks(folder / "copies")
    blocks(folder / "split", shard=True)
    blocks(folder / "from two")
    blocks(folder / "to one", stop=5)
    seen = game(folder / "order").objective.seen  # type: ignore[attr-defined]
    (folder / f"draws-{rank}").write_text(json.dumps([draw for draw, _, _ in seen]))


def by_two(rank: int, folder: Path) -> None:
    blocks(folder / "from two", stop=5, accumulate=2)


@pytest.mark.slow
def test_four_processes_walk_as_one_and_go_on_with_the_runs_of_two(tmp_path: Path) -> None:
    for name, task, world in (("two", by_two, 2), ("four", by_four, 4)):
        (tmp_path / name).mkdir()
        if world == 4:
            (tmp_path / "two" / "from two").rename(tmp_path / "four" / "from two")
        multiprocessing.spawn(beside, args=(task, tmp_path / name, world), nprocs=world)  # type: ignore[no-untyped-call]
    four = tmp_path / "four"
    blocks(four / "to one", accumulate=4)
    blocks(tmp_path / "one", accumulate=4)
    whole, expected = state(tmp_path / "one"), losses(tmp_path / "one")
    for name in ("copies", "split", "from two", "to one"):
        assert losses(four / name) == pytest.approx(expected, abs=1e-5), name
        for key, tensor in state(four / name).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
    draws = [json.loads((four / f"draws-{rank}").read_text()) for rank in range(4)]
    assert [draw for step in zip(*draws, strict=True) for draw in step] == list(range(4 * len(draws[0])))


def test_a_non_finite_loss_of_one_process_is_refused_by_all(pair: Path) -> None:
    (told,) = json.loads((pair / "poisoned" / "non-finite.json").read_text())
    assert (told["step"], told["draws"], told["processes"]) == (1, [2, 3], [1])
    assert "weight" in "".join(told["gradients"])


def test_a_stop_asked_of_one_process_ends_all_after_the_same_step_saved(pair: Path) -> None:
    found = load_state(pair / "stopped" / "states")
    assert found is not None
    assert found.step == 5


def one_dies(rank: int, how: str, folder: str) -> None:
    join(rank, Path(folder), timeout=3.0)
    trainer = Trainer(Regression(), settings(steps=500, timeout=3.0), ADAMW, Path(folder) / "run")
    began = time.monotonic()
    try:
        for report in trainer.steps():
            if rank == 1 and report.step == 4:
                if how == "dies":
                    os._exit(0)
                time.sleep(30)
    except ProcessLost as error:
        (Path(folder) / "said").write_text(f"{time.monotonic() - began:.1f} {error.exit_code} {error}")
        os._exit(0)


@pytest.mark.parametrize("how", ["dies", pytest.param("stalls", marks=pytest.mark.slow)])
def test_when_a_process_is_gone_or_silent_the_others_stop_with_a_sentence(tmp_path: Path, how: str) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=one_dies, args=(rank, how, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    workers[0].join(300)
    workers[1].kill()
    said = (tmp_path / "said").read_text()
    assert "75 Process 0 of 2 stops: another one has ended, or was silent for 3.0 s (run.timeout)." in said
    assert "Run the same command again to go on from the last state." in said
    assert float(said.split()[0]) < 25


def test_split_weights_need_company_and_adamw(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="over several processes, but there is one; start them with torchrun"):
        Trainer(Blocks(), settings(shard=True), ADAMW, tmp_path, rebuild=Blocks)
    muon = OptimizerSettings(name="muon")
    with pytest.raises(InvalidInput, match=r"run.shard needs optimizer.name = 'adamw'; muon reads whole matrices"):
        Trainer(Blocks(), settings(shard=True), muon, tmp_path, rebuild=Blocks)
    with pytest.raises(InvalidInput, match=r"run.shard needs discriminator_optimizer.name = 'adamw'; muon reads"):
        Trainer(Game(), settings(shard=True), ADAMW, tmp_path, muon, rebuild=Game)
    with pytest.raises(InvalidInput, match="give `rebuild`"):
        Trainer(Blocks(), settings(shard=True), ADAMW, tmp_path)


def test_a_device_that_is_not_there_is_named() -> None:
    from sana.training.processes import device_of

    with pytest.raises(InvalidInput, match=r"run.device must be auto, cpu, cuda or mps, but is 'gpu'"):
        device_of(RunSettings(steps=1, batch_size=1, device="gpu"))
    if not torch.accelerator.is_available():
        with pytest.raises(InvalidInput, match=r"run.device is 'cuda', but this computer has no such device"):
            device_of(RunSettings(steps=1, batch_size=1, device="cuda"))
    assert device_of(RunSettings(steps=1, batch_size=1, device="cpu")).type == "cpu"
