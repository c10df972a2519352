"""`sana dataset caption`, `score` and `features` from the command line, on tiny models from folders."""

import json
import shutil
from pathlib import Path

import pytest
from command import Sana
from PIL import Image

from dataset_files import make_folder, make_shards
from sana.data.open import open_source
from tiny_onlookers import save_clip, save_describer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(save_describer(folder / "tiny-seer")), str(save_clip(folder / "tiny-clip"))


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_pictures_are_described_scored_and_read(sana: Sana, tmp_path: Path, models: tuple[str, str], kind: str) -> None:
    seer, clip = models
    (make_folder if kind == "folder" else make_shards)(tmp_path / "data")
    ask = ("dataset", "caption", "data", "-m", seer, "--prompt", "describe it", "--prompt", "the picture", "--json")
    said = sana(*ask, "--max-tokens", "5", "--batch-size", "4")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["names"], told["made"], told["done_before"]) == (["tiny-seer", "tiny-seer-2"], 12, 0)
    assert (told["pictures"], told["left_out"], told["warnings"]) == (6, [], [])
    again = json.loads(sana(*ask).out)
    assert (again["made"], again["done_before"]) == (0, 6)
    scored = sana("dataset", "score", "data", "-m", clip)
    assert scored.code == 0, scored.err
    assert scored.out == "18 scores in data\n"
    source = open_source("data")
    for index in range(len(source)):
        captions = source.sample(index).captions
        assert {one.name for one in captions} == {"prompt", "tiny-seer", "tiny-seer-2"}
        assert all(one.score is not None and 0 <= one.score <= 100 for one in captions)
    assert sana("dataset", "score", "data", "-m", clip).out == "0 scores in data\n"


def test_what_is_left_out_is_told(sana: Sana, tmp_path: Path, models: tuple[str, str]) -> None:
    make_folder(tmp_path / "data", 8)
    for number in range(7):
        (tmp_path / "data" / f"00{number}.png").write_bytes(b"no picture")
    said = sana("dataset", "score", "data", "-m", models[1])
    assert said.code == 0
    assert said.err.count("warning: left out: 00") == 5
    assert "warning: left out: 2 more (--json lists them)" in said.err
    assert len(json.loads(sana("dataset", "score", "data", "-m", models[1], "--json").out)["left_out"]) == 7


def test_ctrl_c_saves_and_says_how_to_go_on(
    sana: Sana, tmp_path: Path, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.evaluation.clip_score import ClipScorer

    make_folder(tmp_path / "data", 3)
    scores = ClipScorer.scores
    calls = []

    def interrupted(self: ClipScorer, *given: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scores(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipScorer, "scores", interrupted)
    said = sana("dataset", "score", "data", "-m", models[1], "--batch-size", "1")
    assert said.code == 130
    command = f"sana dataset score data -m {models[1]} --batch-size 1"
    assert f"1 of 3 pictures are done and saved. To go on: {command}" in said.err
    assert len((tmp_path / "data" / "metadata.jsonl").read_text().splitlines()) == 1


def test_a_batch_that_does_not_fit_is_told(
    sana: Sana, tmp_path: Path, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from sana.evaluation.clip_score import ClipScorer

    make_folder(tmp_path / "data", 1)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClipScorer, "scores", fail)
    said = sana("dataset", "score", "data", "-m", models[1])
    assert (said.code, "Take a smaller --batch-size." in said.err) == (4, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("captoin",), "`sana dataset` does not know 'captoin'. Did you mean 'caption'?"),
        (("caption",), "Name one data set. For example: sana dataset caption my-pictures"),
        (("score", "a", "b"), "Name one data set. For example: sana dataset score my-pictures"),
        (("caption", "data"), "Which model? For example: -m "),
        (("caption", "data", "-m", "x/y", "--seed", "1"), "--seed has no effect at --temperature 0."),
        (("caption", "data", "-m", "x/y", "--samples", "2"), "Several `samples` of a prompt are all the same"),
        (("caption", "data", "-m", "x/prompt"), "A captioner cannot be called 'prompt'."),
        (("caption", "data", "-m", "nobody"), "There is no model 'nobody'. Give a folder, or a hub id"),
        (("score", "data", "--offline"), "cannot be fetched offline"),
        (("score", "data", "--batch-size", "0"), "--batch-size must be at least 1 but is 0."),
        (("score", "nowhere"), "There is no file or folder nowhere."),
        (("features",), "Which recipe? For example: sana dataset features my.toml"),
        (("features", "no.toml"), "There is no recipe at 'no.toml'."),
        (("features", "no.toml", "--shard", "3/2"), "--shard takes a share such as 1/8"),
    ],
)
def test_what_cannot_be_done_is_told(sana: Sana, tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    make_folder(tmp_path / "data", 1)
    said = sana("dataset", *words)
    assert said.code in (2, 3)
    assert sentence in said.err
    assert len(said.err.strip().splitlines()) <= 2


def test_help_names_the_tasks_and_their_options(sana: Sana) -> None:
    said = sana("dataset", "--help")
    assert said.code == 0
    assert all(task in said.out for task in ("caption", "score", "features"))
    assert "--temperature" in sana("dataset", "caption", "--help").out


def test_features_of_a_recipe_are_computed_in_shares(sana: Sana, tmp_path: Path) -> None:
    make_folder(tmp_path / "data", 3, (300, 300))
    for file in (tmp_path / "data").glob("*.png"):
        with Image.open(file) as picture:
            picture.convert("RGB").save(file)
    text = (
        'objective = "flow_matching"\n[run]\nsteps = 3\nbatch_size = 2\ndevice = "cpu"\n'
        '[flow_matching]\nstart = "nano"\ntrain = "lora"\n[flow_matching.data]\npath = "data"\nfeatures = "store"\n'
    )
    (tmp_path / "my.toml").write_text(text)
    said = sana("dataset", "features", "my.toml", "--shard", "1/2", "--json")
    assert said.code == 0, said.err
    first = {told["kind"]: told for told in json.loads(said.out)["features"]}
    assert {kind: (told["items"], told["computed"], told["missing"]) for kind, told in first.items()} == {
        "latents": (3, 1, 0),
        "texts": (4, 0, 1),
    }
    said = sana("dataset", "features", "my.toml")
    assert said.code == 0, said.err
    assert said.out.splitlines() == [told["folder"] for told in first.values()]
    assert "texts: 4 in 1 files, 1 of them new" in said.err
    assert sorted(file.name for file in Path(first["texts"]["folder"]).iterdir()) == [
        "00000.safetensors",
        "features.json",
    ]
    events = [json.loads(line) for line in sana("dataset", "features", "my.toml", "--events").out.splitlines()]
    assert [told["event"] for told in events] == ["done"]
    assert [told["computed"] for told in events[-1]["features"]] == [0, 0]
    shutil.rmtree("store")
    events = [json.loads(line) for line in sana("dataset", "features", "my.toml", "--events").out.splitlines()]
    assert [told["event"] for told in events] == ["shard", "shard", "done"]
