"""`sana edit`, --control, --lora and --pag: how they are read, that they reach the engine, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Sana
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sana.apps.cli import main
from sana.apps.cli.joined import join, split
from sana.apps.cli.notation import (
    CONTROL_WORDS,
    LORA_WORDS,
    PAG_SCALE,
    PAG_WORDS,
    control_text,
    lora_text,
    outpaint_text,
    read_control,
    read_lora,
    read_outpaint,
    read_pag,
)
from sana.apps.cli.order import Order, parse
from sana.apps.cli.roads import EDIT
from sana.engine import generate as engine
from sana.engine.attachments import CONTROL_KINDS, ControlRequest, LoraRequest
from sana.engine.metadata import read_metadata

TAKERS = {"--control": CONTROL_WORDS, "--lora": LORA_WORDS, "--pag": PAG_WORDS}
paths = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: text.strip() and text != "." and "://" not in text
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, a mask and an adapter's name, without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
    Image.new("RGB", (64, 96), "red").save("boat.png")
    Image.new("L", (64, 96), 255).save("mask.png")
    Path("style.safetensors").touch()
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the requests that reach the engine."""
    requests: list[Any] = []
    original = engine.generate

    def generate(parts: Any, request: Any, **others: Any) -> Iterator[Any]:
        requests.append(request)
        return (yield from original(parts, request, **others))

    monkeypatch.setattr(engine, "generate", generate)
    return requests


def edit(*words: str) -> Order:
    return parse(words, EDIT)


@pytest.mark.parametrize(
    ("line", "joined"),
    [
        (["a", "--control", "canny", "b.png", "0.5"], ["a", "--control=canny b.png 0.5"]),
        (["--control", "canny", "b c.png", "a fox"], ["--control=canny 'b c.png'", "a fox"]),
        (["--control", "map", "b.png", "0.5@0-1", "x"], ["--control=map b.png 0.5@0-1", "x"]),
        (["--lora", "a.safetensors", "3 red foxes"], ["--lora=a.safetensors", "3 red foxes"]),
        (["--lora", "a", "-0.5", "--lora", "b"], ["--lora=a -0.5", "--lora=b"]),
        (["--pag", "a fox"], ["--pag=", "a fox"]),
        (["--pag", "2", "a fox"], ["--pag=2", "a fox"]),
        (["a fox", "--pag", "-s", "7"], ["a fox", "--pag=", "-s", "7"]),
        (["--pag=2", "3d"], ["--pag=2", "3d"]),
        (["--pag", "3d"], ["--pag=", "3d"]),
    ],
)
def test_words_behind_a_flag_become_one(line: list[str], joined: list[str]) -> None:
    assert join(line, TAKERS) == joined


@given(st.sampled_from(CONTROL_KINDS), paths, st.floats(0, 10), st.floats(0, 0.5), st.floats(0.5001, 1))
def test_a_control_is_written_as_it_is_read(kind: Any, path: str, scale: float, start: float, end: float) -> None:
    scale, start, end = (float(f"{value:.12f}") for value in (scale, start, end))
    control = ControlRequest(kind=kind, image=path, scale=scale, start=start, end=end)
    assert read_control(control_text(control)) == control


@given(paths, st.floats(-10, 10))
def test_an_adapter_is_written_as_it_is_read(path: str, scale: float) -> None:
    lora = LoraRequest(source=path, scale=float(f"{scale:.12f}"))
    assert read_lora(lora_text(lora)) == lora


def test_notations() -> None:
    assert read_control("canny a.png") == ControlRequest(kind="canny", image="a.png")
    assert read_control("Soft_Edge 'a b.png' @0.2-0.5") == ControlRequest(
        kind="soft-edge", image="a b.png", start=0.2, end=0.5
    )
    assert [read_outpaint(text) for text in ("64", "1,2,3,4", "right=256", "top=8, left=4")] == [
        (64, 64, 64, 64), (1, 2, 3, 4), (0, 0, 256, 0), (4, 8, 0, 0)
    ]  # fmt: skip
    assert read_outpaint(outpaint_text((1, 0, 3, 4))) == (1, 0, 3, 4)
    assert (read_pag(""), read_pag("2")) == (PAG_SCALE, 2.0)
    assert split("a 'b c'") == ["a", "b c"]


def test_words_become_a_request(here: Path) -> None:
    line = "boat.png boat --mask mask.png --feather 4 --outpaint right=32 --pag --control canny boat.png 0.5@0-0.5"
    order = edit(*line.split(), "--lora", "style.safetensors", "0.7", "-s", "3")
    request = order.request
    assert (request.image, request.mask, request.feather) == ("boat.png", "mask.png", 4)
    assert request.outpaint == (0, 0, 32, 0)
    assert request.controls == (ControlRequest(kind="canny", image="boat.png", scale=0.5, end=0.5),)
    assert request.loras == (LoraRequest(source="style.safetensors", scale=0.7),)
    assert request.pag_scale == PAG_SCALE
    assert {"image", "mask", "feather", "outpaint", "controls", "loras", "pag_scale"} <= order.jobs[0].given
    generated = parse(["a boat", "--pag", "1", "--lora", "style.safetensors", "--pag-layers", "a.1,a.2"]).request
    assert (generated.image, generated.pag_scale, generated.pag_layers) == (None, 1.0, ("a.1", "a.2"))


def test_the_same_in_files_variables_and_lines(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.toml").write_text(
        'image = "boat.png"\noutpaint = "right=32"\npag = 2\nlora = ["style.safetensors 0.7"]\n'
        'control = [["canny", "boat.png", 0.5], {kind = "map", image = "boat.png", scale = 0.2}]\n'
    )
    request = edit("a boat", "--config", "s.toml").request
    assert (request.image, request.outpaint, request.pag_scale) == ("boat.png", (0, 0, 32, 0), 2.0)
    assert [(c.kind, c.scale) for c in request.controls] == [("canny", 0.5), ("map", 0.2)]
    assert request.loras[0].scale == 0.7
    lines = [
        {"prompt": "a", "image": "boat.png", "strength": 0.5, "outpaint": [1, 2, 3, 4]},
        {"prompt": "b", "control": "canny boat.png", "lora": [["style.safetensors", 0.5]], "pag": 1},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = (job.request for job in parse(["--prompt-file", "p.jsonl"]).jobs)
    assert (first.strength, first.outpaint) == (0.5, (1, 2, 3, 4))
    assert (second.controls[0].kind, second.loras[0].scale, second.pag_scale) == ("canny", 0.5, 1.0)
    Path("p.csv").write_text("prompt,image,strength,lora\nc,boat.png,0.4,style.safetensors 2\n")
    (job,) = parse(["--prompt-file", "p.csv"]).jobs
    assert (job.request.strength, job.request.loras[0].scale) == (0.4, 2.0)
    monkeypatch.setenv("SANA_LORA", "style.safetensors 0.5;style.safetensors")
    monkeypatch.setenv("SANA_OUTPAINT", "8")
    monkeypatch.setenv("SANA_STEPS", "")
    request = edit("boat.png", "a boat").request
    assert [lora.scale for lora in request.loras] == [0.5, 1.0]
    assert request.outpaint == (8, 8, 8, 8)
    assert request.steps is None, "an empty variable is unset"


def test_settings_for_edits_do_not_hold_where_there_is_no_picture(here: Path) -> None:
    Path("s.toml").write_text("strength = 0.5\nfeather = 3\n")
    assert parse(["a boat", "--config", "s.toml"]).request.strength is None
    assert edit("boat.png", "a boat", "--config", "s.toml").request.strength == 0.5


def test_a_printed_configuration_edits_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["boat.png", "a boat", "--strength", "0.4", "--lora", "style.safetensors", "-s", "3", "--outpaint", "8"]
    assert main(["edit", *words, "--print-config"]) == 0
    Path("s.toml").write_text(capsys.readouterr().out)
    assert edit("--config", "s.toml").request == edit(*words).request


def test_one_word_is_the_picture_or_the_prompt(here: Path) -> None:
    Path("s.toml").write_text('image = "boat.png"\n')
    Path("t.toml").write_text('prompt = "a boat"\n')
    assert edit("a fox", "--config", "s.toml").request.prompt == "a fox"
    assert edit("boat.png", "--config", "t.toml").request.image == "boat.png"
    assert edit("a fox", "--image", "boat.png").request.image == "boat.png"


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        (["edit", "boat.png"], 2, "What should the picture show when it is changed?"),
        (["edit", "a boat"], 2, "Which picture? For example: sana edit PICTURE"),
        (["edit", "a boat", "boat.png"], 2, 'The picture comes first: sana edit boat.png "a boat"'),
        (["edit", "boat.png", "a", "boat"], 2, "Put the prompt in quotes"),
        (["edit", "none.png", "a boat"], 3, "There is no file none.png for the image."),
        (["edit", "boat.png", "x", "--mask", "none.png"], 3, "There is no file none.png for the mask."),
        (["edit", "boat.png", "x", "--strength", "0"], 2, "--strength 0 would give the picture back as it is."),
        (["edit", "boat.png", "x", "--strength", "nan"], 2, "--strength must be a number from 0 to 1 but is nan."),
        (["edit", "boat.png", "x", "--feather", "3"], 2, "--feather has no effect without --mask or --outpaint."),
        (["edit", "boat.png", "x", "--outpaint", "1,2"], 2, "--outpaint takes pixels: 64 for all sides"),
        (["edit", "boat.png", "x", "--outpaint", "rihgt=3"], 2, "Did you mean 'right'?"),
        (["edit", "boat.png", "x", "--outpaint", "left=1,left=2"], 2, "takes each of left, top, right, bottom once"),
        (["edit", "boat.png", "x", "--outpaint", "99999"], 2, "--outpaint must be a whole number from 0 to 16384"),
        (["x", "--strength", "0.5"], 2, 'is there: sana edit PICTURE.png "PROMPT" --strength 0.6'),
        (["x", "--image=boat.png"], 2, "--image is about a picture that is there"),
        (["x", "--control", "canny"], 2, f"--control needs a type ({', '.join(CONTROL_KINDS)}) and a pi"),
        (["x", "--control", "cany", "boat.png"], 2, "not 'cany'. Did you mean 'canny'?"),
        (["x", "--control", "canny", "none.png"], 3, "There is no file none.png for the control image."),
        (["x", "--control", "canny", "boat.png", "11"], 2, "--control is wrong: scale must be a number from 0 to 10"),
        (["x", "--control=canny boat.png 1@0.5-0.2"], 2, "--control is wrong: "),
        (["x", "--control=canny 'boat.png"], 2, "--control cannot be read (no closing quotation)"),
        (["x", "--lora"], 2, "--lora needs a file."),
        (["x", "--lora", "none.safetensors"], 3, "There is no file none.safetensors for --lora. Check the name."),
        (["x", "--lora", "style.safetensors", "nan"], 2, "--lora is wrong: scale must be a number from -10 to 10"),
        (["x", "--lora", "https://a.b/c"], 2, "is an address, which is not fetched"),
        (["x", "--pag", "-1"], 2, "--pag must be a number from 0 to 100 but is -1.0."),
        (["x", "--pag-layers", "a.1"], 2, "--pag-layers has no effect without --pag."),
        (["x", "--pag-layers", ","], 2, "--pag-layers takes names of layers"),
        (["x", "--max-timesteps", "1.5"], 2, "--max-timesteps is for SANA-Sprint models only, and nano is none."),
        (["x", "--pag", "-m", "sana-sprint-0.6b-1024"], 2, "is guided from within and has no PAG. Drop --pag."),
        (["x", "-n", "y", "-m", "sana-sprint-0.6b-1024"], 2, "has no negative prompt. Drop it."),
        (["x", "--sweep", "strength=0.5,1"], 2, "--strength needs a picture that it is about."),
        (["x", "--controlnet", "nano"], 2, "--controlnet has no effect without --control."),
        (["x", "--controlnet", "nano", "--control", "map", "boat.png"], 2, "nano has no control network. Those that"),
        (["x", "--control", "map", "boat.png"], 2, "nano has no control network for --control. Name one with --con"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, sentence: str
) -> None:
    assert main([*line, "--dry-run"] if "--controlnet" not in line else line) == code
    said = capsys.readouterr()
    assert said.out == ""
    (error,) = [row for row in said.err.splitlines() if row.startswith("sana: ")]
    assert sentence in error
    assert "`" not in error.replace("`sana edit`", "")


def test_an_edit_reaches_the_engine_and_its_record_names_no_path(draw: Sana, calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (256, 256), "red").save("deep/boat.png")
    line = ["edit", "deep/boat.png", "a fox", "--sweep", "strength=0.5,1", "--seed", "3", "-o", "out/"]
    said = draw(*line, "--json")
    assert said.code == 0, said.err
    assert [request.strength for request in calls] == [0.5, 1.0]
    assert all(request.image == "deep/boat.png" for request in calls)
    files = json.loads(said.out)["files"]
    assert files == ["out/a-fox-strength-0.5-3.png", "out/a-fox-strength-1-3.png"]
    record = json.dumps(read_metadata(files[0]).record)
    assert "boat.png" in record
    assert "deep" not in record
    again = draw(*line, "--skip-existing")
    assert again.code == 0, again.err
    assert "other settings" not in again.err


@pytest.fixture
def branch(tiny_folder: Path, tmp_path: Path) -> Path:
    """A control network for the tiny model, which so far changes nothing."""
    from sana.checkpoints.controlnet import SanaControlNetModel
    from sana.checkpoints.pretrained import SanaTransformer2DModel

    transformer = SanaTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    network = SanaControlNetModel.from_transformer(transformer, 1)
    for projection in network.controlnet_blocks:
        projection.weight.data.fill_(0.05)
    network.save_pretrained(tmp_path / "branch")
    return tmp_path / "branch"


def test_a_control_network_of_ones_own_changes_the_picture(draw: Sana, branch: Path, calls: list[Any]) -> None:
    Image.linear_gradient("L").save("edges.png")
    plain, other = draw("a fox", "-s", "1"), ("-o", "b.png", "-s", "1", "--controlnet", str(branch))
    assert plain.code == 0, plain.err
    said = draw("a fox", *other, "--control", "map", "edges.png", "2", "--control", "canny", "edges.png", "0.5@0-0.5")
    assert said.code == 0, said.err
    assert [control.kind for control in calls[-1].controls] == ["map", "canny"]
    with Image.open("a-fox-1.png") as first, Image.open("b.png") as second:
        assert first.tobytes() != second.tobytes()
    record = read_metadata("b.png").record
    assert record is not None
    assert record["request"]["controls"][0]["image"]["name"] == "edges.png"
    assert "no effect without --control" in draw("a fox", *other).err
    assert draw("a fox", "-s", "2", "--control", "map", "edges.png").code == 2


def test_an_outpaint_of_nothing_is_refused(sana: Sana, no_loading: None) -> None:
    Image.new("RGB", (256, 256)).save("grey.png")
    said = sana("edit", "grey.png", "a boat", "--outpaint", "right=0")
    assert said.code == 2
    assert said.err == "sana: --outpaint of 0 pixels on every side adds nothing. Give more, or drop it.\n"
