"""`sana train` and `sana evaluate`."""

import errno
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command import TINY_AUTOENCODER, Sana

from sana.apps.cli.machine import Machine
from sana.apps.cli.output import Terminal
from sana.apps.cli.recipes import plan, split_overrides
from sana.apps.cli.verbs.train import stop_requests
from sana.checkpoints import tensors
from sana.errors import InvalidInput
from sana.training.loop import Trainer, TrainStep
from sana.training.objectives import autoencoder

RECIPE = 'objective = "autoencoder"\n[run]\nsteps = 4\nbatch_size = 2\n'
SMALL = """
objective = "autoencoder"
[run]
steps = 2
batch_size = 2
precision = "float32"
"""
SMALL += TINY_AUTOENCODER


class FakeTrainer:
    """Keeps its step in a file; `at_step` is called in the middle of each."""

    at_step: Callable[[int], None] = staticmethod(lambda step: None)

    def __init__(self, recipe: Any, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        folder.mkdir(parents=True, exist_ok=True)
        saved = folder / "step"
        self.step = int(saved.read_text()) if saved.exists() else 0

    is_first = True
    data: ClassVar[dict[str, Any]] = {}
    models: ClassVar[dict[str, str]] = {}

    @property
    def is_finished(self) -> bool:
        return self.step >= int(self.recipe.run.steps)

    def steps(self, stop: Callable[[], bool]) -> Iterator[TrainStep]:
        total = self.recipe.run.steps
        try:
            while self.step < total and not stop():
                type(self).at_step(self.step + 1)
                self.step += 1
                figures = {"psnr": 20.5} if self.step == total else None
                seconds, samples = 0.5, self.recipe.run.batch_size
                yield TrainStep(
                    step=self.step,
                    steps=total,
                    loss=1 / self.step,
                    parts={},
                    seconds=seconds,
                    samples=samples,
                    figures=figures,
                )
        finally:
            (self.folder / "step").write_text(str(self.step))

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text(str(self.step))


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTrainer]:
    """Every trainer that is started, all fake."""
    made: list[FakeTrainer] = []

    def start(recipe: Any, folder: Path) -> FakeTrainer:
        made.append(FakeTrainer(recipe, folder))
        return made[-1]

    monkeypatch.setattr("sana.training.start.start", start)
    monkeypatch.setattr(FakeTrainer, "at_step", staticmethod(lambda step: None))
    return made


def write(name: str, text: str = RECIPE) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def test_recipes_run_one_after_the_other_and_are_exported(
    sana: Sana, trainers: list[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.apps.cli.output.SHORTEST_SILENCE", 0.0)
    first, second = write("recipes/toy/1-a.toml"), write("recipes/toy/2-b.toml")
    said = sana("train", first, second)
    assert said.code == 0
    assert said.out == "runs/toy/1-a/export\nruns/toy/2-b/export\n"
    assert Path("runs/toy/1-a/export/weights").read_text() == "4"
    assert "1-a · step 2/4 · loss 0.5000 · 4 images/s" in said.err
    assert "left" in said.err
    assert "1-a · step 4 · held out: psnr 20.5" in said.err


def test_steps_are_told_as_they_happen(sana: Sana) -> None:
    said = sana("train", write("recipes/toy/small.toml", SMALL), "--events")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in said.out.splitlines()]
    assert [line["event"] for line in lines] == ["step", "step", "done"]
    assert [(line["recipe"], line["step"], line["of"]) for line in lines[:-1]] == [("small", 1, 2), ("small", 2, 2)]
    assert all(line["loss"] > 0 for line in lines[:-1])
    assert lines[1]["held_out"]["psnr"] > 0


def test_a_finished_stage_is_not_trained_again(sana: Sana, trainers: list[FakeTrainer]) -> None:
    path = write("recipes/toy/a.toml")
    sana("train", path)
    said = sana("train", path)
    assert (said.code, said.out) == (0, "runs/toy/a/export\n")
    assert "a: finished before" in said.err
    assert len(trainers) == 1
    changed = sana("train", path, "--run.batch_size", "3", "--json")
    assert "trained with other settings" in json.loads(changed.out)["warnings"][0]
    assert len(trainers) == 1
    longer = sana("train", path, "--run.steps", "6")
    assert "going on at step 4 of 6" in longer.err
    assert Path("runs/toy/a/export/weights").read_text() == "6"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_is_a_link_or_open_to_all_is_told(
    sana: Sana, trainers: list[FakeTrainer], tmp_path: Path
) -> None:
    path = write("a.toml")
    Path("there").mkdir()
    Path("here").symlink_to("there")
    linked = sana("train", path, "-o", "here")
    assert linked.code == 0
    assert f"here is a link; the training goes to {tmp_path / 'there'}." in linked.err
    assert "Every user" not in linked.err
    Path("elsewhere").mkdir()
    Path("runs").mkdir()
    Path("runs/a").symlink_to("../elsewhere")
    assert f"runs/a is a link; the training goes to {tmp_path / 'elsewhere'}." in sana("train", path, "-o", "runs").err
    for place, mode, told in (("there", 0o777, True), ("there/a", 0o777, True), ("there", 0o1777, False)):
        Path(place).chmod(mode)
        warning = f"warning: Every user of this computer can replace files in {tmp_path / place}."
        assert (warning in sana("train", path, "-o", "there").err) is told
        Path(place).chmod(0o755)


def test_output_names_the_folder_of_the_runs(sana: Sana, trainers: list[FakeTrainer]) -> None:
    assert sana("train", write("a.toml"), "-o", "elsewhere").out == "elsewhere/a/export\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    sana: Sana, trainers: list[FakeTrainer], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    path = write("recipes/toy/a.toml")
    before = signal.getsignal(number)
    monkeypatch.setattr(
        FakeTrainer, "at_step", staticmethod(lambda step: os.kill(os.getpid(), number) if step == 2 else None)
    )
    said = sana("train", path, "--run.batch_size", "2")
    assert said.code == code
    assert said.out == ""
    assert said.err.splitlines()[-1] == (
        "sana: Interrupted. a is saved at step 2 of 4. To go on: sana train recipes/toy/a.toml --run.batch_size 2"
    )
    assert Path("runs/toy/a/step").read_text() == "2"
    assert signal.getsignal(number) == before
    monkeypatch.setattr(FakeTrainer, "at_step", staticmethod(lambda step: None))
    assert "going on at step 2 of 4" in sana("train", path).err


def test_a_signal_in_the_last_step_still_stops_before_the_next_recipe(
    sana: Sana, trainers: list[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write("recipes/toy/a.toml"), write("recipes/toy/b.toml")
    stop = staticmethod(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None)
    monkeypatch.setattr(FakeTrainer, "at_step", stop)
    said = sana("train", *paths)
    assert said.code == 130
    assert "a is finished. To go on" in said.err
    assert Path("runs/toy/a/export").is_dir()
    assert len(trainers) == 1


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_requests() as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_overrides_are_taken_out_of_the_command_line() -> None:
    words = ["a.toml", "--run.steps", "3", "-q", "--flow_matching.shift=2.5", "--run.log-every", "-1"]
    rest, overrides = split_overrides(words)
    assert rest == ["a.toml", "-q"]
    assert overrides == {"run.steps": "3", "flow_matching.shift": "2.5", "run.log_every": "-1"}
    with pytest.raises(InvalidInput, match=r"--run\.steps needs a value"):
        split_overrides(["--run.steps"])


def test_an_override_reaches_the_recipes_it_concerns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = write("a.toml")
    two = write("b.toml", RECIPE.replace('"autoencoder"', '"language_model"'))
    stages = plan([one, two], {"run.steps": "9", "autoencoder.thing_weight": "2.0"}, None)
    assert [stage.recipe.run.steps for stage in stages] == [9, 9]
    assert [dict(stage.recipe.settings) for stage in stages] == [{"thing_weight": 2.0}, {}]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "Which recipe?"),
        (("nowhere.toml",), 3, "There is no recipe at 'nowhere.toml'."),
        (("a.toml", "nowhere.toml"), 3, "There is no recipe at 'nowhere.toml'."),
        (("a.toml", "a.toml"), 2, "Two of the recipes would be trained in"),
        (("a.toml", "--run.stps", "3"), 2, "run has no setting 'stps'. Did you mean 'steps'?"),
        (("a.toml", "--rum.steps", "3"), 2, "unknown table [rum]. Did you mean 'run'?"),
        (("a.toml", "--run.steps", "0"), 2, "run.steps must be at least 1"),
        (("a.toml", "--run.steps", "0"), 2, "sana: --run.steps: run.steps must be at least 1"),
        (("a.toml", "--autoencoder.thing", "3"), 2, "--autoencoder.thing: autoencoder has no setting 'thing'."),
        (("a.toml", "--run.steps"), 2, "--run.steps needs a value."),
        (("a.toml", "--steps", "3"), 2, "There is no option --steps."),
    ],
)
def test_nothing_is_trained_when_something_is_wrong(
    sana: Sana, trainers: list[FakeTrainer], words: tuple[str, ...], code: int, sentence: str
) -> None:
    write("a.toml")
    said = sana("train", *words)
    assert said.code == code
    assert sentence in said.err
    assert said.out == ""
    assert trainers == []
    assert not Path("runs").exists()


def test_a_real_recipe_end_to_end(sana: Sana) -> None:
    from sana import AutoencoderDC

    said = sana("train", write("recipes/toy/small.toml", SMALL), "--json")
    assert said.code == 0, said.err
    stage = json.loads(said.out)["stages"][0]
    assert AutoencoderDC.from_pretrained(stage["export"]).config.latent_channels == 8
    assert "held out:" in said.err


def test_a_run_whose_end_cannot_be_noted_is_finished_by_the_next_call(
    sana: Sana, trainers: list[FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    path = write("recipes/toy/a.toml")
    with monkeypatch.context() as patch:
        patch.setattr("sana.checkpoints.storage.os.replace", refuse)
        said = sana("train", path)
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines()[-1] == (
        "sana: a is exported, but runs/toy/a/finished.json could not be written (Input/output error). Make room, and "
        "run it again to finish it."
    )
    assert sorted(os.listdir("runs/toy/a")) == ["export", "step"]
    assert "going on at step 4 of 4" in sana("train", path).err
    assert "a: finished before" in sana("train", path).err


@pytest.mark.parametrize(
    ("code", "stride"),
    [(errno.ENOSPC, 13), *(pytest.param(code, 1, marks=pytest.mark.slow) for code in (errno.ENOSPC, errno.EIO))],
)
def test_a_disk_that_fails_at_the_k_th_write_of_the_export_stops_with_a_sentence_and_the_next_call_exports(
    sana: Sana, monkeypatch: pytest.MonkeyPatch, code: int, stride: int
) -> None:
    monkeypatch.setattr(autoencoder, "SCALED_PICTURES", 2)
    path, stage = write("recipes/toy/small.toml", SMALL), Path("runs/toy/small")
    assert sana("train", path).code == 0
    whole = {file.name: file.read_bytes() for file in (stage / "export").iterdir()}
    saved = {file: file.read_bytes() for file in (stage / "states").rglob("*.*")}
    calls, real_export, said = 0, Trainer.export, Counter[str]()

    def ticking(real: Any, k: int) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return wrapped

    for k in range(1, 400, stride):
        shutil.rmtree(stage / "export")
        (stage / "finished.json").unlink()
        calls = 0
        with monkeypatch.context() as patch:

            def export(trainer: Trainer, folder: Path, k: int = k, patch: pytest.MonkeyPatch = patch) -> None:
                for owner, name in (
                    (os, "fsync"), (os, "replace"), (os, "rename"), (os, "open"), (os, "mkdir"), (Path, "write_text"),
                    (tensors, "write_all"), (tensors, "save_file"), (shutil, "rmtree"),
                ):  # fmt: skip
                    patch.setattr(owner, name, ticking(getattr(owner, name), k))
                real_export(trainer, folder)

            patch.setattr(Trainer, "export", export)
            failed = sana("train", path)
        if calls < k:
            assert failed.code == 0
            break
        if failed.code:  # where what a save leaves cannot be removed, it goes on
            last = failed.err.splitlines()[-1]
            of_export = re.fullmatch(
                rf"sana: The export of '{stage}' could not be written \(\S+: {os.strerror(code)}.*\)\. "
                r"Step 2 is saved: make room, and run it again to export it\.", last
            )  # fmt: skip
            of_note = f"sana: small is exported, but {stage}/finished.json could not be written ({os.strerror(code)}). "
            assert of_export or last == f"{of_note}Make room, and run it again to finish it.", (k, last)
            said["export" if of_export else "note"] += 1
            assert failed.code == 1
            assert {file: file.read_bytes() for file in (stage / "states").rglob("*.*")} == saved
        again = sana("train", path)
        assert again.code == 0, again.err
        assert {file.name: file.read_bytes() for file in (stage / "export").iterdir()} == whole
        assert (stage / "finished.json").is_file()
        assert not [file.name for file in stage.iterdir() if ".saving-" in file.name]
    assert k < 399
    assert said["export"] >= 2
    assert stride > 1 or said["note"]


def test_a_dry_run_tells_memory_and_time_and_trains_nothing(sana: Sana) -> None:
    said = sana("train", write("recipes/toy/small.toml", SMALL), "--dry-run", "--json")
    assert said.code == 0, said.err
    (told,) = json.loads(said.out)["stages"]
    parts = [told[kind] for kind in ("weights", "frozen", "gradients", "optimizer", "average", "activations")]
    assert told["total"] == sum(parts)
    assert told["optimizer"] == 2 * told["gradients"]
    assert told["seconds"] > 0
    assert not Path("runs").exists()
    table = sana("train", "recipes/toy/small.toml", "--dry-run").out.splitlines()
    assert re.fullmatch(r"small: 0\.\d\d GiB at most, beside the program itself; .+ for \d+ steps", table[0])
    assert [line.split(" GiB  ")[1].split()[0] for line in table[1:]] == [
        "weights", "states", "averaged", "gradients", "activations"
    ]  # fmt: skip


def test_a_dry_run_of_what_cannot_run_here_tells_how_long_a_step_takes_at_least_and_about(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.training.estimate import SHARE, Estimate

    bare = {"frozen": 0, "gradients": 1, "optimizer": 1, "average": 0, "activations": 1}
    step = 2 / SHARE
    needs = Estimate(weights=1 << 30, **bare, flop=3 * 10**12, rate=1.5e12, seconds=4 * step)
    monkeypatch.setattr("sana.training.start.estimated", lambda *_: needs)
    said = sana("train", write("recipes/toy/a.toml"), "--dry-run", "--json")
    (told,) = json.loads(said.out)["stages"]
    assert (told["flop"], told["rate"], told["seconds"]) == (3 * 10**12, 1.5e12, 4 * step)
    assert (told["least_step_seconds"], told["step_seconds"]) == (2.0, step)
    lines = sana("train", "recipes/toy/a.toml", "--dry-run").out.splitlines()
    assert lines[0].endswith("; about 32 s for 4 steps")
    assert lines[-1].strip() == (
        "3.0 TFLOP a step: at least 2.0 s by the rate of a bare product here, 1.5 TFLOP/s; about 8.0 s by 25% of it,"
        " which training steps reach on a CPU"
    )


def test_evaluate_prints_the_table_and_writes_the_report(
    sana: Sana, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.apps.cli.output.SHORTEST_SILENCE", 0.0)
    measure = ("evaluate", "autoencoder", "-m", str(tiny_folder), "--scenes", "4", "--batch-size", "2")
    said = sana(*measure, "-o", "a.json", "--sheet", "a.png")
    assert said.code == 0, said.err
    assert "| restored pictures |" in said.out
    assert " 50 % · autoencoder · 2/4 pictures" in said.err
    assert json.loads(Path("a.json").read_text())["metric"] == "autoencoder"
    assert Path("a.png").exists()
    refused = sana(*measure, "-o", "a.json")
    assert refused.code == 2
    assert "a.json exists already" in refused.err
    document = json.loads(sana(*measure, "--json", "-q").out)
    assert document["metric"] == "autoencoder"
    assert document["files"] == []


def test_a_metric_loads_only_what_it_needs(tiny_folder: Path) -> None:
    parts, seconds = Machine(model=str(tiny_folder)).load(Terminal(quiet=True), ("vae",))
    assert (parts.text_encoder, parts.transformer, parts.tokenizer) == (None, None, None)
    assert parts.vae is not None
    assert seconds > 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "One of: geneval, control, autoencoder."),
        (("genval",), 2, "There is no metric 'genval'. Did you mean 'geneval'?"),
        (("geneval", "x"), 2, "one thing at a time"),
        (("geneval", "--seed", "x"), 2, "--seed takes a whole number"),
        (("geneval", "-m", "sana-2"), 3, "There is no model 'sana-2'."),
        (("geneval", "-o", "a.txt"), 2, "a.txt does not end in .json"),
        (("geneval", "--steps", "1,x"), 2, "--steps takes a number or a list such as 1,2,4, not '1,x'."),
        (("geneval", "--steps", "1,2,1"), 2, "--steps names a number twice in '1,2,1'."),
        (("geneval", "--scenes", "3"), 2, "--scenes has no effect on geneval. Drop it."),
        (("geneval", "--controlnet", "x"), 2, "--controlnet has no effect on geneval. Drop it."),
        (("control", "--against", "a.json"), 2, "--against has no effect on control. Drop it."),
        (("geneval", "--against", "no.json"), 2, "There is no file no.json to compare with. Check the name."),
        (("control", "--steps", "1,2"), 2, "--steps must be one number to measure control."),
        (("control", "--control", "depth"), 2, "--control must be one of canny, scribble, ink, not 'depth'."),
        (
            ("control",),
            2,
            "nano comes without a control network, so it follows no picture. Take a model that has one, or",
        ),
        (("control",), 2, " or name one with --controlnet."),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_evaluate_refuses_what_cannot_be(sana: Sana, words: tuple[str, ...], code: int, sentence: str) -> None:
    said = sana("evaluate", *words)
    assert said.code == code
    assert sentence in said.err
