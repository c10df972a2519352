"""Captions and scores beside pictures: what is written is what the readers read, and nothing else changes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dataset_files import make_folder, make_shards, make_tar, picture_bytes
from sana.data.captions import probabilities
from sana.data.open import open_source
from sana.data.samples import BadSample, Caption
from sana.errors import BadData, InvalidInput
from sana.training.labelling import work
from sana.training.labelling.files import captions_in, checked_name, open_labels
from sana.training.labelling.work import caption_names, captioned, scored, to_caption, to_score

NAMES = ("Seer", "Seer-2")


class Seer:
    """Describes a picture by its size, twice; counts what it was shown, and may stop working."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.shown, self.breaks_after = 0, breaks_after

    def describe(self, pictures: Sequence[Any], salt: str = "") -> list[list[str]]:
        if self.breaks_after is not None and self.shown >= self.breaks_after:
            raise RuntimeError("out of order")
        self.shown += len(pictures)
        return [[f"{one.width} wide", f"{one.height} high"] for one in pictures]

    def scores(self, pictures: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[len(text) + 0.123456 for text in own] for own in texts]


def caption(path: Path, seer: Seer | None = None, *, again: bool = False, batch_size: int = 2) -> list[Any]:
    labels = open_labels(path)
    plan = to_caption(labels, NAMES, again=again)
    return list(captioned(labels, plan, seer or Seer(), NAMES, batch_size))


def score(path: Path, *, again: bool = False) -> list[Any]:
    labels = open_labels(path)
    return list(scored(labels, to_score(labels, again=again), Seer(), 2, again=again))


def read(path: Path) -> list[tuple[Caption, ...]]:
    source = open_source(path)
    assert [finding for finding in source.findings if finding.is_broken] == []
    return [source.sample(index).captions for index in range(len(source))]


@pytest.fixture(params=["folder", "tar", "shards"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "folder":
        return make_folder(tmp_path / "data", 5)
    make_shards(tmp_path / "data", 2, 3)
    return tmp_path / "data" / "00000.tar" if request.param == "tar" else tmp_path / "data"


def test_captions_and_scores_are_read_back(data: Path) -> None:
    before = read(data)
    steps = caption(data)
    assert (steps[-1].done, sum(step.made for step in steps)) == (len(before), 2 * len(before))
    for old, new in zip(before, read(data), strict=True):
        assert {*old} <= {*new}
        written = {one.name: one.text for one in new if one.name in NAMES}
        assert written == {"Seer": "80 wide", "Seer-2": "72 high"}
        assert len(new) == 3
    score(data)
    found = read(data)
    for old, new in zip(before, found, strict=True):
        assert {one.text for one in old} <= {one.text for one in new}
        assert len(new) == 3
        assert all(one.score == round(len(one.text) + 0.123456, 4) for one in new)
        assert abs(sum(probabilities(new)) - 1) < 1e-9
    assert score(data) == caption(data) == []
    assert read(data) == found


def test_the_files_beside_a_tar_are_those_of_the_original_code(tmp_path: Path) -> None:
    make_shards(tmp_path, 2, 2)
    tars = {file.name: file.read_bytes() for file in tmp_path.glob("*.tar")}
    caption(tmp_path)
    score(tmp_path)
    beside = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("0*.json")}
    assert beside["00001_Seer.json"] == {f"00000{i}": {"Seer": "80 wide"} for i in (2, 3)}
    assert beside["00000_Seer-2_clip_score.json"] == {f"00000{i}": {"Seer-2": 7.1235} for i in (0, 1)}
    assert beside["00000_prompt_clip_score.json"]["000000"] == {"prompt": round(16.123456, 4)}
    assert len(beside) == 2 * (2 + 3)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.tar")} == tars


def test_pictures_without_captions_get_some_and_names_of_folders_are_no_captions(tmp_path: Path) -> None:
    for name in ("3_sks dog", "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture_bytes(1))
    labels = open_labels(tmp_path)
    assert [captions_in(labels, index) for index in range(2)] == [(), ()]
    assert score(tmp_path) == []
    caption(tmp_path)
    assert [[one.text for one in captions] for captions in read(tmp_path)] == [["80 wide", "72 high"]] * 2
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["3_sks dog/a.png", "plain/a.png"]


def test_lines_of_others_and_their_other_keys_stay(tmp_path: Path) -> None:
    make_folder(tmp_path, 4)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(picture_bytes(9))
    foreign = b'{"file_name": "gone.png", "text": "not there"}\r\n'
    told = {"file_name": "./001.png", "text": "one  text", "weight": 3, "id": 7, "captions": {"man": "by hand"}}
    (tmp_path / "metadata.jsonl").write_bytes(foreign + b"\n" + json.dumps(told).encode())  # no end of line
    beside = {"file_name": "x.png", "caption": "an x", "score": 31.5}
    (tmp_path / "sub" / "metadata.jsonl").write_text(json.dumps(beside) + "\n")
    labels = open_labels(tmp_path)
    list(captioned(labels, to_caption(labels, NAMES, again=False), Seer(), NAMES, 3))
    labels = open_labels(tmp_path)
    list(scored(labels, to_score(labels, again=False), Seer(), 3, again=False))
    lines = (tmp_path / "metadata.jsonl").read_bytes().split(b"\n")
    assert lines[:2] == [foreign[:-1], b""]
    assert json.loads(lines[2]) == {
        "file_name": "./001.png",
        "id": 7,
        "text": "one  text",
        "weight": 3.0,
        "score": 8.1235,
        "captions": [
            {"text": "by hand", "name": "man", "score": 7.1235},
            {"text": "80 wide", "name": "Seer", "score": 7.1235},
            {"text": "72 high", "name": "Seer-2", "score": 7.1235},
            {"text": "picture number 1", "name": "prompt", "score": 16.1235},
        ],
    }
    (record,) = map(json.loads, (tmp_path / "sub" / "metadata.jsonl").read_text().splitlines())
    assert (record["caption"], record["score"], len(record["captions"])) == ("an x", 31.5, 2)
    source = open_source(tmp_path)
    assert len(source.sample(1).captions) == 5
    assert source.sample(4).captions[0].score == 31.5


def test_what_is_there_is_made_again_when_asked(data: Path) -> None:
    caption(data)
    score(data)
    first = read(data)

    class Other(Seer):
        def describe(self, pictures: Sequence[Any], salt: str = "") -> list[list[str]]:
            return [["a new text", "another"] for _ in pictures]

    caption(data, Other(), again=True)
    second = read(data)
    assert [len(captions) for captions in second] == [len(captions) for captions in first]
    assert all({one.text for one in captions if one.name in NAMES} == {"a new text", "another"} for captions in second)
    score(data, again=True)
    assert all(one.score == round(len(one.text) + 0.123456, 4) for captions in read(data) for one in captions)


def test_work_that_breaks_is_kept_and_goes_on_where_it_was(data: Path) -> None:
    count = len(open_source(data))
    with pytest.raises(RuntimeError, match="out of order"):
        caption(data, Seer(breaks_after=2))
    assert sum(any(one.name == "Seer" for one in captions) for captions in read(data)) == 2
    second = Seer()
    caption(data, second)
    assert second.shown == count - 2
    assert all({*NAMES} <= {one.name for one in captions} for captions in read(data))


def test_closing_it_early_saves_and_saving_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, 6)
    monkeypatch.setattr(work, "SAVED_EVERY", 0.0)
    labels = open_labels(tmp_path)
    steps = captioned(labels, to_caption(labels, NAMES, again=False), Seer(), NAMES, 2)
    next(steps)
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(work, "SAVED_EVERY", 1000.0)
    next(steps)
    steps.close()
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 4
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_broken_pictures_and_empty_answers_are_told_and_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    data = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(data[:70])  # the header is whole
    (tmp_path / "003.png").write_bytes(b"no picture")
    (tmp_path / "003.txt").write_text("text")

    class Silent(Seer):
        def describe(self, pictures: Sequence[Any], salt: str = "") -> list[list[str]]:
            return [["  ", "12"] for _ in pictures]  # a number beside a tar would be read as a score

    labels = open_labels(tmp_path)
    plan = to_caption(labels, NAMES, again=False)
    assert [finding.place for finding in plan.faults] == ["003.png"]
    steps = list(captioned(labels, plan, Silent(), NAMES, 2))
    told = {finding.place: finding.text for step in steps for finding in step.faults}
    assert told["000.png"] == told["002.png"] == "The model wrote no words about it."
    assert "001.png" in told
    assert not (tmp_path / "metadata.jsonl").exists()
    assert len(caption(tmp_path)[-1].faults) == 0


def test_captions_of_one_name_in_a_tar_are_not_scored_since_scores_go_by_name(tmp_path: Path) -> None:
    members = {"a.png": picture_bytes(1), "a.json": json.dumps({"captions": ["one", "two"]}).encode()}
    tar = make_tar(tmp_path / "s.tar", members)
    (step,) = score(tar)
    assert "Several of its captions are named prompt, and scores beside a tar go by name." in step.faults[0].text
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"000000": "text"}'])
def test_a_broken_file_beside_a_tar_is_not_written_over(tmp_path: Path, content: str) -> None:
    make_shards(tmp_path, 1, 1)
    file = tmp_path / "00000_Seer.json"
    file.write_text(content)
    with pytest.raises(BadData, match=r"00000_Seer.json.* remove it") as caught:
        caption(tmp_path)
    assert not isinstance(caught.value, BadSample)
    assert file.read_text() == content


def test_a_picture_that_is_named_twice_is_told_with_file_and_line(tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    line = '{"file_name": "000.png", "text": "x"}\n'
    (tmp_path / "metadata.jsonl").write_text(line + line)
    with pytest.raises(BadData, match=r"metadata.jsonl:2: 000.png is named twice in the metadata. Join its lines"):
        open_labels(tmp_path)


@pytest.mark.parametrize("name", ["", "prompt", "a/b", "x_clip_score", ".x", "a b"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"A captioner cannot be called .* Give a name that has letters"):
        checked_name(name)
    assert caption_names("Intern-VL2.5", 3) == ("Intern-VL2.5", "Intern-VL2.5-2", "Intern-VL2.5-3")


def test_a_batch_has_at_least_one_picture(tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    with pytest.raises(InvalidInput, match="`batch_size` must be at least 1 but is 0"):
        caption(tmp_path, batch_size=0)
