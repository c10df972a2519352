"""Sweeps: their notation, the jobs and names, and the sheet."""

import itertools
import json
from pathlib import Path

import pytest
from command import Sana
from PIL import Image

from sana.apps.cli.order import Order, parse
from sana.apps.cli.sheet import PAPER, Sheet
from sana.engine.metadata import read_metadata
from sana.errors import InvalidInput


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder, without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))


def order(*sweeps: str, prompt: str = "a fox", more: tuple[str, ...] = ("--seed", "7")) -> Order:
    return parse([prompt, *more, *(word for sweep in sweeps for word in ("--sweep", sweep))])


@pytest.mark.parametrize(
    ("sweep", "labels"),
    [
        ("steps=4,8,20", ["4", "8", "20"]),
        ("steps=4-20:8,3", ["4", "12", "20", "3"]),
        ("steps=2-4", ["2", "3", "4"]),
        ("guidance=1-2:0.25", ["1", "1.25", "1.5", "1.75", "2"]),
        ("cfg=1,4.5", ["1", "4.5"]),
        ("max-prompt-tokens=10,20", ["10", "20"]),
        ("sampler=flow-dpm, flow-euler", ["flow-dpm", "flow-euler"]),
        ("seed=3-5,9", ["3", "4", "5", "9"]),
        ("size=256,512x256,16:9", ["256", "512x256", "16:9"]),
        ("instruction=on,off", ["on", "off"]),
        ("negative_prompt=blur,grey", ["blur", "grey"]),
    ],
)
def test_values_and_ranges(sweep: str, labels: list[str]) -> None:
    (axis,) = order(sweep, more=()).axes
    assert axis.labels == labels
    assert len(axis.values) == len(labels)


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ("stesp=3", "`sweep` cannot vary 'stesp'. Did you mean 'steps'?"),
        ("count=3", "`sweep` cannot vary 'count'."),
        ("xyzzy=3", "`sweep` cannot vary 'xyzzy'. There are steps, guidance,"),
        ("prompt=a,b", "`sweep` takes no prompts. Write them into a file and give it as `prompt_file`."),
        ("steps", "`sweep` takes a field and its values, such as steps=A,B, not 'steps'."),
        ("steps=", "`sweep` takes a field and its values"),
        ("steps=3,,4", "`sweep`: steps takes a whole number, not ''."),
        ("steps=3,many", "`sweep`: steps takes a whole number, not 'many'."),
        ("steps=3,4,3", "`sweep` names a value of steps twice."),
        ("steps=9-3", "rising ranges with a step above 0, such as 4-20:4, not '9-3'."),
        ("steps=3-9:0", "rising ranges with a step above 0"),
        ("steps=1-1000", "`sweep` takes at most 100 values of a field, not 1000."),
        ("steps=1-60,61-120", "`sweep` takes at most 100 values of steps, not 120."),
        ("sampler=dpm", "`sweep`: sampler must be one of flow-dpm, flow-euler, scm, not 'dpm'. Did you mean"),
        ("seed=x", "`sweep`: seed takes a number, a range such as 1-4"),
        ("seed=random", "`sweep` takes seeds by number."),
        ("steps=0,3", "but is 0. (`steps` is set by --sweep.)"),
        ("guidance=nan,3", "`guidance` must be a number from 0 to 100 but is nan. (`guidance` is set by --sweep.)"),
    ],
)
def test_wrong_sweeps_are_one_sentence(sweep: str, sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        order(sweep, more=())
    assert sentence in str(caught.value)


def test_contradictions_and_bounds() -> None:
    for sweeps, more, sentence in [
        (("steps=3,4",), ("--steps", "3"), "`sweep` varies steps, which is also set by --steps. Drop one of them."),
        (("steps=3,4", "steps=5,6"), (), "`sweep` names steps twice. Put all its values into one."),
        (("steps=3", "cfg=1", "seed=1", "size=9"), (), "A sweep has at most 3 fields, not 4. Drop one."),
        (("steps=1-100", "cfg=1-90", "seed=1-90"), (), "These are more than 10000 pictures."),
        (("steps=3,4",), ("-o", "-"), "`output` - writes one picture, not 2."),
    ]:
        with pytest.raises(InvalidInput) as caught:
            order(*sweeps, more=more)
        assert sentence in str(caught.value)
    with pytest.raises(InvalidInput, match="`sweep` makes at most 2000 pictures, not 2100"):
        order("steps=1-70", more=("--seed", "1-30"))
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 3}')
    with pytest.raises(InvalidInput, match=r"`sweep` varies steps, which is also set by p.jsonl, line 2"):
        parse(["--prompt-file", "p.jsonl", "--sweep", "steps=4,5"])


def test_a_sweep_is_stronger_than_a_file_of_settings() -> None:
    Path("my.toml").write_text("steps = 9\nguidance = 2")
    assert [job.request.steps for job in order("steps=3,4", more=("--config", "my.toml")).jobs] == [3, 4]


def test_every_combination_has_a_name_of_its_own() -> None:
    ordered = order("steps=4,8", "guidance=1,4.5")
    assert [(job.request.steps, job.request.guidance) for job in ordered.jobs] == [(4, 1), (4, 4.5), (8, 1), (8, 4.5)]
    assert [str(file) for file in ordered.files] == [
        "a-fox-steps-4-guidance-1-7.png",
        "a-fox-steps-4-guidance-4.5-7.png",
        "a-fox-steps-8-guidance-1-7.png",
        "a-fox-steps-8-guidance-4.5-7.png",
        "a-fox-sweep-7.png",
    ]
    assert [str(f) for f in order("steps=4,8", more=("--seed", "7", "-o", "x.png")).files] == [
        "x-steps-4.png", "x-steps-8.png", "x-sweep.png"
    ]  # fmt: skip
    assert [f.name for f in order("seed=3,4", more=()).files] == ["a-fox-3.png", "a-fox-4.png", "a-fox-sweep-3.png"]
    long = order("negative_prompt=" + ",".join(f"{'word ' * 30}{i}" for i in range(3)), prompt="狐" * 200)
    names = [file.name for file in long.files]
    assert len(set(names)) == 4
    assert max(len(name.encode()) for name in names) < 255


def test_the_sheet_has_every_picture_where_its_labels_say() -> None:
    colours = {(4, 1.0): "#a00000", (4, 4.5): "#00a000", (8, 1.0): "#0000a0", (8, 4.5): "#a0a000"}
    ordered = order("steps=4,8", "guidance=1,4.5")
    sheet = Sheet(ordered)
    for job in ordered.jobs:
        sheet.add(job, 7, Image.new("RGB", (256, 256), colours[job.request.steps, job.request.guidance]))  # type: ignore[index]
    image = sheet.image("nano")
    assert image.getpixel((2, 2)) == PAPER
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for (steps, guidance), colour in colours.items():
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        points = itertools.product(range(0, image.width, 16), range(0, image.height, 16))
        found = [point for point in points if image.getpixel(point) == rgb]
        assert 200 <= len(found) <= 300
        places[(steps, int(guidance))] = min(found)
    assert places[4, 1][1] == places[8, 1][1] < places[4, 4][1] == places[8, 4][1]  # guidance goes down
    assert places[4, 1][0] == places[4, 4][0] < places[8, 1][0] == places[8, 4][0]  # steps go to the right


def test_of_three_axes_the_second_is_faster_than_the_third() -> None:
    ordered = order("steps=4,8", "guidance=1,4.5", "sampler=flow-dpm,flow-euler")
    sheet = Sheet(ordered)
    for i, job in enumerate(ordered.jobs):
        sheet.add(job, 7, Image.new("RGB", (64, 64), (20 * i + 50, 0, 0)))
    image = sheet.image("nano")
    places: dict[tuple[int, int], list[str]] = {}
    for point in itertools.product(range(0, image.width, 8), range(0, image.height, 8)):
        red, green, _ = image.getpixel(point)  # type: ignore[misc]
        if green == 0 and red >= 50:
            job = ordered.jobs[(red - 50) // 20]
            places.setdefault((point[1] // 72, point[0] // 72), list(job.point.values()))
    shown = [places[place] for place in sorted(places)]
    rows = [["1", "flow-dpm"], ["4.5", "flow-dpm"], ["1", "flow-euler"], ["4.5", "flow-euler"]]
    assert list(dict.fromkeys(tuple(values[1:]) for values in shown)) == [tuple(row) for row in rows]
    assert {tuple(values) for values in shown} == {(steps, *row) for steps in ("4", "8") for row in rows}


@pytest.mark.parametrize("prompt", ["a fox", "一只狐", "🦊", "word " * 200])
def test_one_axis_is_wrapped_and_every_prompt_has_a_title(prompt: str) -> None:
    ordered = order("steps=1-8", prompt=prompt)
    sheet = Sheet(ordered)
    for job in ordered.jobs:
        sheet.add(job, 7, Image.new("RGB", (512, 256), "#a00000"))
    image = sheet.image("nano")
    assert 6 * 256 < image.width < 6 * 300
    assert len(sheet.cells) == 8


def test_a_sweep_is_drawn_and_the_sheet_says_what_it_is(draw: Sana) -> None:
    said = draw("a fox", "--sweep", "steps=1,2", "--sweep", "guidance=1,3", "--seed", "3", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["files"] == [f"a-fox-steps-{s}-guidance-{g}-3.png" for s in (1, 2) for g in (1, 3)]
    assert document["sheet"] == "a-fox-sweep-3.png"
    assert read_metadata(document["files"][3]).request().guidance == 3
    assert read_metadata(document["sheet"]).generated
    with Image.open(document["sheet"]) as sheet:
        text = {key: str(value) for key, value in sheet.info.items()}
    assert text["Title"] == "Contact sheet of 4 generated pictures"
    assert text["Description"].startswith("a fox\nsteps: 1, 2; guidance: 1, 3\nmodel ")
    assert "exists already" in draw("a fox", "--sweep", "steps=1,2", "--sweep", "guidance=1,3", "--seed", "3").err


def test_seeds_and_prompts_become_axes_of_the_sheet_and_existing_pictures_are_kept(draw: Sana) -> None:
    Path("p.txt").write_text("a fox\n一只猫\n")
    words = ("--prompt-file", "p.txt", "--sweep", "sampler=flow-dpm,flow-euler", "--seed", "3,5", "--metadata", "none")
    said = draw(*words, "--config", str(_one_step()))
    assert said.code == 0, said.err
    sheet = Path(said.out.splitlines()[-1])
    assert sheet.name == "p-sweep-3.png"
    assert not read_metadata(sheet).generated
    before = sheet.read_bytes()
    sheet.unlink()
    Path("a-fox-sampler-flow-dpm-3.png").unlink()
    again = draw(*words, "--config", "one.toml", "--skip-existing")
    assert again.out.splitlines() == ["a-fox-sampler-flow-dpm-3.png", "p-sweep-3.png"]
    assert sheet.read_bytes() == before


def _one_step() -> Path:
    Path("one.toml").write_text("steps = 1")
    return Path("one.toml")
