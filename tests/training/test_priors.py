"""The pictures of a class: which are drawn, which are one's own, and what is said where settings have changed."""

import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana.data.open import open_source
from sana.errors import BadData, InvalidInput
from sana.training import priors
from sana.training.objectives.flow_settings import PriorSettings
from sana.training.priors import NOTE, draw_missing
from sana.training.starting import StartModel

Draw = Callable[..., list[int]]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Draw what is missing, and return the seeds of what was drawn."""
    seeds: list[int] = []

    def generated(parts: Any, request: Any) -> Any:
        seeds.append(request.seed)
        return types.SimpleNamespace(image=Image.new("RGB", (request.width, request.height)))

    monkeypatch.setattr(priors, "generate_images", generated)
    monkeypatch.setattr(priors, "load", lambda *_, **__: None)

    def drawn(side: int = 64, model: str = "nano", seed: int = 100, **changes: Any) -> list[int]:
        settings = PriorSettings(**{"prompt": "a dog", "folder": str(tmp_path / "class"), "count": 4, **changes})
        before = len(seeds)
        draw_missing(StartModel(model, torch.device("cpu")), settings, side, seed)
        return seeds[before:]

    return drawn


def own(folder: Path, *names: str, side: int = 64) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (side, side), "red").save(folder / name)


def test_what_is_missing_is_drawn_and_no_more(draw: Draw, tmp_path: Path) -> None:
    assert draw() == [100, 101, 102, 103]
    assert draw() == []
    (tmp_path / "class" / "class-0002.png").unlink()
    assert draw() == [102]
    assert draw(count=6) == [104, 105]
    assert len(open_source(tmp_path / "class", prompt="a dog")) == 6


def test_pictures_of_ones_own_count(draw: Draw, tmp_path: Path) -> None:
    own(tmp_path / "class", "mine.png", "other.jpg")
    assert draw() == [100, 101]
    assert draw() == []
    own(tmp_path / "class", "third.webp")
    assert draw(count=5) == []
    assert draw(count=6) == [102]


def test_enough_of_ones_own_are_all_there_is(draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own(tmp_path / "class", *(f"{number}.png" for number in range(9)))
    assert draw() == []
    assert not (tmp_path / "class" / NOTE).exists()
    assert not caplog.records


def test_more_drawn_ones_than_are_asked_for_are_told(draw: Draw, caplog: pytest.LogCaptureFixture) -> None:
    draw()
    assert draw(count=3) == []
    assert "holds 4 pictures, more than flow_matching.prior.count asks for (3): all of them are learnt" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a cat"}, r"drawn with 'a dog', but flow_matching\.prior\.prompt is 'a cat' now\. Name another"),
        ({"steps": 5}, r"drawn with 20, but flow_matching\.prior\.steps is 5 now"),
        ({"guidance": 1.0}, r"drawn with 4\.5, but flow_matching\.prior\.guidance is 1\.0 now"),
        ({"side": 128}, r"drawn with 64, but the size in pixels is 128 now"),
        ({"model": "nano-sprint"}, r"drawn with 'nano', but flow_matching\.start is 'nano-sprint' now"),
    ],
)
def test_pictures_of_other_settings_are_not_taken_for_those_of_now(
    draw: Draw, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    draw(count=2)
    with pytest.raises(InvalidInput, match=sentence):
        draw(**changes)
    assert len(list((tmp_path / "class").glob("class-*.png"))) == 2
    assert draw(folder=str(tmp_path / "elsewhere"), **changes) == [100, 101, 102, 103]


def test_a_note_that_is_gone_or_broken_is_told(draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(count=2)
    note = tmp_path / "class" / NOTE
    note.unlink()
    assert draw(count=3, steps=7) == [102]
    assert "how class-*.png in" in caplog.text
    assert not note.exists()
    note.write_text("{")
    with pytest.raises(InvalidInput, match=r"class\.json cannot be read.*remove class-\*\.png and class\.json there"):
        draw()


def test_a_stop_in_the_middle_leaves_what_the_next_run_goes_on_from(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = priors.generate_images

    def stopped(parts: Any, request: Any) -> Any:
        if request.seed == 101:
            raise KeyboardInterrupt
        return generate(parts, request)

    with monkeypatch.context() as patch:
        patch.setattr(priors, "generate_images", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw()
    assert json.loads((tmp_path / "class" / NOTE).read_text())["prompt"] == "a dog"
    assert draw() == [101, 102, 103]


def test_pictures_of_ones_own_are_looked_at_before_any_is_drawn(draw: Draw, tmp_path: Path) -> None:
    own(tmp_path / "class", "mine.png", side=32)
    sentence = r"flow_matching\.prior\.folder: 1 pictures of .*class are smaller .* set flow_matching\.prior\.small to"
    with pytest.raises(InvalidInput, match=sentence):
        draw()
    assert draw(small="skip", count=2) == [100]
    (tmp_path / "class" / "broken.png").write_bytes(b"junk")
    with pytest.raises(BadData, match=r"1 of 4 samples in .*class are broken .* The first: broken\.png"):
        draw(small="skip")


def test_what_is_drawn_later_goes_on_with_the_seed_of_what_was_drawn_first(draw: Draw, tmp_path: Path) -> None:
    draw(count=2)
    (tmp_path / "class" / "class-0000.png").unlink()
    assert draw(count=3, seed=101) == [100, 102]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "a [trigger] dog"}, r"flow_matching\.prior\.prompt has \[trigger\] in it, which a class has not"),
        ({"folder": ""}, r"flow_matching\.prior\.folder is empty; name a folder"),
        ({"guidance": -3.0}, r"flow_matching\.prior\.guidance must lie from 0 to 100, but is -3\.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        PriorSettings(**{"prompt": "a dog", "folder": "f", **changes})


def test_tars_of_class_pictures_are_taken_as_they_are(draw: Draw, tmp_path: Path) -> None:
    import tarfile

    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    (tmp_path / "class").mkdir()
    with tarfile.open(tmp_path / "class" / "0.tar", "w") as tar:
        for number in range(2):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    assert draw(count=2) == []
    with pytest.raises(InvalidInput, match=r"flow_matching\.prior\.count is 4, but the tars in .* hold 2 pictures"):
        draw()
