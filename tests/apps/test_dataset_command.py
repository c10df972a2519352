"""`sana dataset`: checked, packed, told about, looked at; and the example data that ships."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from command import Sana
from PIL import Image

from sana.data.open import open_source

EXAMPLES = Path(__file__).parents[2] / "examples"


def write_pictures(folder: Path, count: int = 6, side: int = 96) -> Path:
    """Write noise of that many kinds with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.frombytes("RGB", (6, 5), random.randbytes(90)).resize((side, side - 16), 0).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of number {number}")
    return folder


@pytest.fixture
def pictures(sana: Sana) -> Path:
    """A folder of pictures in the folder where the command runs."""
    return write_pictures(Path("pictures"))


def test_control_pictures_are_checked_beside_their_pictures(sana: Sana, pictures: Path) -> None:
    maps = Path("maps")
    maps.mkdir()
    for number in range(5):
        with Image.open(pictures / f"{number}.png") as picture:
            picture.resize((192, 160)).save(maps / f"{number}.png")
    sound = sana("dataset", "check", "pictures", "--controls", "maps")
    assert sound.code == 3
    assert "✗ 5.png: There is no control picture of the same name, 5.png, in maps." in sound.out
    with Image.open(pictures / "5.png") as picture:
        picture.save(maps / "5.png")
    assert sana("dataset", "check", "pictures", "--controls", "maps").code == 0
    with Image.open(maps / "2.png") as picture:
        picture.resize((64, 64)).save(maps / "2.png")
    (maps / "3.png").write_bytes((maps / "3.png").read_bytes()[:-40])
    (maps / "4.png").write_bytes(b"no picture")
    said = sana("dataset", "check", "pictures", "--controls", "maps", "--json")
    assert said.code == 3
    found = {one["place"]: (one["kind"], one["text"]) for one in json.loads(said.out)["findings"]}
    shape = "It has 64 x 64 pixels, another shape than its picture 2.png of 96 x 80. Save it in that shape."
    assert found["maps/2.png"] == ("other-shape", shape)
    assert found["maps/3.png"][0] == found["maps/4.png"][0] == "unreadable"
    assert len(found) == 3
    with Image.open(pictures / "2.png") as picture:
        picture.resize((48, 40)).save(maps / "2.png")
    for number in (3, 4):
        with Image.open(pictures / f"{number}.png") as picture:
            picture.save(maps / f"{number}.png")
    for small, kind in (("refuse", "small"), ("skip", "left-out"), ("upscale", "enlarged")):
        more = ("--base", "256", "--small", small, "--controls", "maps", "--json")
        for path in pictures.glob("*.png"):
            with Image.open(path) as picture:
                larger = picture.resize((288, 240))
            larger.save(path)
        for number in (0, 1, 3, 4, 5):
            with Image.open(pictures / f"{number}.png") as picture:
                picture.save(maps / f"{number}.png")
        kinds = {
            one["place"]: one["kind"] for one in json.loads(sana("dataset", "check", "pictures", *more).out)["findings"]
        }
        assert kinds["maps/2.png"] == kind, small


def test_a_control_picture_of_no_picture_hides_no_missing_one(sana: Sana, pictures: Path) -> None:
    maps = Path("maps")
    maps.mkdir()
    for number in range(5):
        (maps / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    (maps / "99.png").write_bytes(b"junk")
    said = sana("dataset", "check", "pictures", "--controls", "maps")
    assert "✗ 5.png: There is no control picture of the same name, 5.png, in maps." in said.out
    assert "99.png" not in said.out
    (maps / "5.png").write_bytes(b"junk")
    said = sana("dataset", "check", "pictures", "--controls", "maps")
    assert "✗ maps/5.png: " in said.out
    assert "no control picture" not in said.out
    assert sana("dataset", "pack", "pictures", "tars").code == 0
    (Path("named") / "00000").mkdir(parents=True)
    for number in range(5):
        (Path("named") / "00000" / f"{number}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    said = sana("dataset", "check", "tars", "--controls", "named")
    assert "00000.tar:5.png: There is no control picture of the same name, 00000/5.png, in named." in said.out
    assert sana("dataset", "pack", "pictures", "maptars").code == 0
    assert sana("dataset", "check", "tars", "--controls", "maptars").code == 0


def test_squares_are_checked_as_recipes_of_squares_cut_them(sana: Sana, pictures: Path) -> None:
    assert "--square is about buckets" in sana("dataset", "check", "pictures", "--square").err
    said = sana("dataset", "check", "pictures", "--base", "64", "--square")
    assert said.code == 0
    assert "64 x 64" in said.out
    assert sana("dataset", "check", "pictures", "--base", "96", "--square").code == 3


def test_a_place_for_a_trigger_is_told_and_kept(sana: Sana, pictures: Path) -> None:
    (pictures / "1.txt").write_text("a photo of [trigger] at sea")
    said = sana("dataset", "check", "pictures")
    assert said.code == 0
    assert "· 1.png: A caption has [trigger] in it. Training needs what it stands for: data.trigger" in said.out
    assert "[trigger]" not in sana("dataset", "check", "pictures", "--trigger", "sks").out
    assert sana("dataset", "caption-stats", "pictures").code == 0
    assert sana("dataset", "pack", "pictures", "out").code == 0
    assert [c.text for c in open_source("out").sample(1).captions] == ["a photo of [trigger] at sea"]
    shown = sana("dataset", "preview", "pictures", "--small", "upscale", "-o", "sheet.png")
    assert shown.code == 2
    assert "1.png: a caption has [trigger] in it. Say what it stands for with --trigger." in shown.err
    assert sana("dataset", "preview", "pictures", "--small", "upscale", "-o", "sheet.png", "--trigger", "sks").code == 0


def test_a_sound_folder(sana: Sana, pictures: Path) -> None:
    said = sana("dataset", "check", "pictures")
    assert (said.code, said.err) == (0, "")
    assert [" ".join(line.split()) for line in said.out.splitlines()] == [
        "samples 6 of 6 are sound, with 6 captions",
        "found nothing amiss",
    ]


def test_everything_amiss_is_told_with_its_place(sana: Sana, pictures: Path) -> None:
    (pictures / "0.png").write_bytes((pictures / "0.png").read_bytes()[:-30])
    (pictures / "1.txt").write_text("")
    (pictures / "2.txt").unlink()
    (pictures / "7.png").write_bytes((pictures / "3.png").read_bytes())
    with Image.open(pictures / "4.png") as picture:
        picture.resize((90, 75)).save(pictures / "8.jpg", quality=90)
    (pictures / "7.txt").write_text("word " * 250)
    (pictures / "8.txt").write_text("x")
    Image.new("RGB", (20, 30)).save(pictures / "9.png")
    (pictures / "9.txt").write_text("x")
    (pictures / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "x"}\n{"file_name"\n')
    said = sana("dataset", "check", "pictures", "--base", "256", "--small", "skip")
    assert said.code == 3
    assert said.err == "sana: 4 are broken in pictures. Mend or remove what is listed.\n"
    lines = said.out.splitlines()
    for line in (
        "✗ metadata.jsonl:2: is not valid JSON",
        "✗ 0.png: The picture 0.png cannot be read: it is damaged or cut off.",
        "✗ 1.txt:1: The caption is empty.",
        "✗ 2.png: The picture has no caption.",
        "· 7.png: The picture is that of 3.png.",
        "· 8.jpg: The picture looks like 4.png.",
        "· 7.png: It has 250 words; about 200 are read (300 tokens).",
        "· 9.png: The picture has 20 x 30 pixels only.",
    ):
        assert line in said.out, line
    assert lines[0].startswith("✗")


def test_the_json_document(sana: Sana, pictures: Path) -> None:
    (pictures / "0.txt").write_text(" ")
    Image.new("RGB", (300, 200), "red").save(pictures / "wide.png")
    (pictures / "wide.txt").write_text("wide")
    said = sana("dataset", "check", "pictures", "--base", "256", "--small", "upscale", "--json")
    document = json.loads(said.out)
    assert said.code == 3
    assert document["error"]["exit_code"] == 3
    assert (document["samples"], document["sound"], document["kinds"]) == (7, 6, {"empty-caption": 1, "enlarged": 6})
    assert document["findings"][0] == {
        "kind": "empty-caption", "broken": True, "place": "0.txt", "line": 1, "text": "The caption is empty. Write it.",
    }  # fmt: skip
    assert document["buckets"] == [
        {"height": 192, "width": 320, "samples": 1},
        {"height": 224, "width": 288, "samples": 5},
    ]
    (pictures / "0.txt").write_text("mended")
    document = json.loads(sana("dataset", "check", "pictures", "--json").out)
    assert "error" not in document
    assert document["findings"] == []


def test_small_pictures_are_broken_where_training_would_refuse_them(sana: Sana, pictures: Path) -> None:
    said = sana("dataset", "check", "pictures", "--base", "256")
    assert said.code == 3
    assert "✗ 0.png: 96 x 80 pixels do not cover the bucket of 288 x 224." in said.out
    said = sana("dataset", "check", "pictures", "--base", "256", "--small", "skip")
    assert said.code == 0
    assert "6 pictures left out because they are smaller than their bucket" in said.out


def test_a_histogram_of_buckets(sana: Sana) -> None:
    write_pictures(Path("3_cats"), 1)
    for name, size in (("a", (300, 300)), ("b", (310, 305)), ("c", (600, 260))):
        Image.effect_noise(size, 60).save(f"3_cats/{name}.png")
        Path(f"3_cats/{name}.txt").write_text(name)
    said = sana("dataset", "check", ".", "--base", "256", "--small", "skip", "--headers")
    rows = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "an epoch 9 samples, as the names of the folders repeat them" in rows
    assert "256 x 256 6 ########################" in rows[-1]
    assert "384 x 160 3 ############" in rows[-2]


def test_damage_behind_the_header_needs_decoding(sana: Sana, pictures: Path) -> None:
    (pictures / "0.png").write_bytes((pictures / "0.png").read_bytes()[:-30])
    assert sana("dataset", "check", "pictures", "--headers").code == 0
    assert sana("dataset", "check", "pictures").code == 3


def test_many_findings_are_cut(sana: Sana) -> None:
    write_pictures(Path("many"), 60, 40)
    said = sana("dataset", "check", "many", "--headers")
    assert said.code == 0
    assert "... and 10 more; --all shows them." in said.out
    assert sana("dataset", "check", "many", "--headers", "--all").out.count("pixels only") == 60


def test_tokens_are_those_of_the_model(sana: Sana, pictures: Path) -> None:
    (pictures / "0.txt").write_text("a red fish " * 99 + "and then the end of it")
    (pictures / "1.txt").write_text("fish " * 250)
    said = sana("dataset", "check", "pictures", "-m", "nano")
    told = [line for line in said.out.splitlines() if "tokens are read" in line]
    assert len(told) == 1
    assert told[0].startswith("· 0.png: Only 300 tokens are read; what is lost begins with '")


def test_packing_and_reading_back(sana: Sana, pictures: Path) -> None:
    record = {"file_name": "1.png", "captions": [{"text": "one", "score": 28.5, "weight": 2},
              {"text": "two", "name": "vlm", "score": 30, "weight": 3}, {"text": "three", "name": "vlm"}]}  # fmt: skip
    (pictures / "1.txt").unlink()
    (pictures / "metadata.jsonl").write_text(json.dumps(record))
    said = sana("dataset", "pack", "pictures", "out", "--samples", "4")
    assert said.code == 0, said.err
    assert said.out.startswith("out: 6 samples in 2 tars, ")
    names = sorted(os.listdir("out"))
    assert names == [".pack.json", "00000.tar", "00000_scores.json", "00001.tar", "wids-meta.json"]
    meta = json.loads(Path("out/wids-meta.json").read_text())
    assert meta["shardlist"] == [{"url": "00000.tar", "nsamples": 4}, {"url": "00001.tar", "nsamples": 2}]
    assert (meta["wids_version"], meta["name"]) == (1, "pictures")
    folder, shards = open_source("pictures"), open_source("out")
    assert shards.findings == ()
    for i in range(6):
        ours, theirs = folder.sample(i), shards.sample(i)
        assert (ours.width, ours.height) == (theirs.width, theirs.height)
        assert [(c.text, c.weight, c.score) for c in ours.captions] == [
            (c.text, c.weight, c.score) for c in theirs.captions
        ]
        assert folder.encoded(i) == shards.encoded(i)
    with tarfile.open("out/00000.tar") as archive:
        assert archive.getnames()[:4] == ["0.png", "0.json", "1.png", "1.json"]
        record = json.load(archive.extractfile("1.json"))  # type: ignore[arg-type]
    assert (record["prompt"], record["width"], record["height"], record["vlm"]) == ("one", 96, 80, "two")
    assert json.loads(Path("out/00000_scores.json").read_text()) == {"1": {"prompt": 28.5, "vlm": 30}}
    again = sana("dataset", "pack", "pictures", "other", "--samples", "4")
    assert again.code == 0
    for name in names:
        assert Path("out", name).read_bytes() == Path("other", name).read_bytes(), name


def test_packing_goes_on_where_it_was_stopped(sana: Sana, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.data import packing

    whole, made = packing.write_shard, []

    def stop(*given: Any) -> Any:
        made.append(given[2])
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(packing, "write_shard", stop)
    assert sana("dataset", "pack", "pictures", "out", "--samples", "2").code == 130
    assert sorted(name for name in os.listdir("out") if not name.startswith(".")) == ["00000.tar", "00001.tar"]
    assert not [name for name in os.listdir("out") if "saving" in name]
    assert sana("dataset", "pack", "pictures", "out", "--samples", "2").code == 0
    assert [list(numbers) for numbers in made] == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert sana("dataset", "pack", "pictures", "fresh", "--samples", "2").code == 0
    for name in os.listdir("fresh"):
        assert Path("out", name).read_bytes() == Path("fresh", name).read_bytes()


@pytest.mark.slow
def test_packing_is_killed_at_any_moment(sana: Sana) -> None:
    """Whatever is there after a kill is whole, and the next run ends with the same bytes."""
    write_pictures(Path("pictures"), 40, 64)
    assert sana("dataset", "pack", "pictures", "fresh", "--samples", "2").code == 0
    for attempt in range(4):
        code = "from sana.apps.cli import main; main(['dataset', 'pack', 'pictures', 'out', '--samples', '2', '-q'])"
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            while child.poll() is None and len(list(Path().glob("out/*.tar"))) < 5 * attempt + 1:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
        for path in Path("out").glob("*.tar"):
            assert path.read_bytes() == Path("fresh", path.name).read_bytes()
    assert sana("dataset", "pack", "pictures", "out", "--samples", "2").code == 0
    assert sorted(os.listdir("out")) == sorted(os.listdir("fresh"))
    for name in os.listdir("fresh"):
        assert Path("out", name).read_bytes() == Path("fresh", name).read_bytes()


def test_broken_samples_are_left_out_of_tars(sana: Sana, pictures: Path) -> None:
    (pictures / "0.txt").write_text("")
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:-30])
    said = sana("dataset", "pack", "pictures", "out")
    assert said.code == 3
    assert "1 of 6 samples are broken (16.7%), which is more than the 1.0% that a run puts up with" in said.err
    assert not Path("out").exists()
    said = sana("dataset", "pack", "pictures", "out", "--tolerance", "0.5", "--json")
    assert said.code == 0
    assert json.loads(said.out)["samples"] == 4
    assert "warning: left out: 0.txt:1: The caption is empty." in said.err
    assert "warning: left out: 1.png: The picture 1.png cannot be read" in said.err
    assert open_source("out").findings == ()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Say what to do, for example: sana dataset check my-pictures"),
        (("chekc", "x"), "`sana dataset` does not know 'chekc'. Did you mean 'check'?"),
        (("check",), "Name one data set. For example: sana dataset check my-pictures"),
        (("check", "a", "b"), "Name one data set."),
        (("check", "none"), "There is no file or folder none. Check the name."),
        (("check", "pictures", "--small", "skip"), "--small is about buckets. Give --base too"),
        (("check", "pictures", "--base", "300"), "No buckets are published for 300 pixels"),
        (("check", "pictures", "-m", "nan0"), "There is no model 'nan0'. Did you mean 'nano'?"),
        (("pack", "pictures"), "Name a data set and a folder for the tars"),
        (("pack", "pictures", "pictures"), "The tars would lie among what is packed."),
        (("pack", "pictures", "a\0b"), "has no name that a folder can have"),
        (("check", "~nobody-of-this-name/x"), "There is no file or folder ~nobody-of-this-name/x"),
        (("pack", "pictures", "."), "The tars would lie among what is packed."),
        (("pack", "pictures", "pictures/0.png"), "0.png is a file. Give a folder for the tars."),
        (("pack", "pictures", "out", "--samples", "0"), "--samples must be at least 1, not 0."),
        (("pack", "pictures", "out", "--tolerance", "2"), "must lie from 0 to 1 but is 2"),
        (("caption-stats", "pictures", "--top", "0"), "--top must be at least 1, not 0."),
        (("preview", "pictures", "--count", "0"), "--count must lie from 1 to 400, not 0."),
        (("preview", "pictures", "-o", "x.jpg"), "The sheet is a PNG, so its name must end in .png, not 'x.jpg'."),
        (("preview", "pictures"), "6 of 6 pictures are smaller than what they are trained at"),
    ],
)
def test_what_makes_no_sense_is_refused(sana: Sana, pictures: Path, words: tuple[str, ...], told: str) -> None:
    said = sana("dataset", *words)
    assert said.code in (2, 3)
    assert said.err.startswith("sana: ")
    assert told in said.err


def test_tars_of_another_packing_are_not_written_over(sana: Sana, pictures: Path) -> None:
    assert sana("dataset", "pack", "pictures", "out").code == 0
    assert sana("dataset", "pack", "pictures", "out").code == 0  # the same again is no harm
    write_pictures(Path("others"), 2)
    said = sana("dataset", "pack", "others", "out")
    assert said.code == 2
    assert "out holds 00000.tar of another packing. Give another folder, or --force." in said.err
    assert sana("dataset", "pack", "others", "out", "--force").code == 0
    assert len(open_source("out")) == 2


def test_caption_statistics(sana: Sana, pictures: Path) -> None:
    (pictures / "0.txt").write_text("a picture of number 1")
    (pictures / "5.txt").write_text("")
    record = {"file_name": "2.png", "captions": {"vlm": "five words are in here"}, "scores": {"vlm": 31}}
    (pictures / "metadata.jsonl").write_text(json.dumps(record))
    said = sana("dataset", "caption-stats", "pictures", "--top", "2")
    rows = [" ".join(line.split()) for line in said.out.splitlines()]
    for row in (
        "pictures 5 with 6 captions",
        "of one picture 4 have 1",
        "1 have 2",
        "written by prompt: 5",
        "vlm: 1",
        "words 5 to 5, median 5, mean 5",
        "characters 21 to 22, median 21, mean 21.17",
        "a (5) picture (5)",
        "doubles 2 times: a picture of number 1",
        "CLIP scores 31 to 31, median 31, mean 31",
        "1 of 1 are at 25 or above",
    ):
        assert row in rows, (row, rows)
    assert "1 samples are broken and not counted" in said.err
    facts = json.loads(sana("dataset", "caption-stats", "pictures", "--json").out)
    assert facts["scores"]["most"] == 31
    assert facts["distinct_words"] == 13


def test_statistics_of_nothing(sana: Sana) -> None:
    write_pictures(Path("none"), 1)
    Path("none/0.txt").unlink()
    assert "No picture of none has a caption that can be read." in sana("dataset", "caption-stats", "none").err


def test_a_preview_shows_what_training_sees(sana: Sana) -> None:
    folder = Path("wide")
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        picture = Image.new("RGB", (900, 300), "white")
        picture.paste(colour, (350, 0, 550, 300))
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a [trigger] in {colour}, 猫")
    said = sana("dataset", "preview", "wide", "-o", "p.png", "--base", "256", "--trigger", "sks", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert {one["caption"] for one in document["pictures"]} == {"a sks in red, 猫", "a sks in blue, 猫"}
    assert {(one["width"], one["height"]) for one in document["pictures"]} == {(480, 128), (384, 160)} & {
        (one["width"], one["height"]) for one in document["pictures"]
    }
    with Image.open("p.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or ()}
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= colours
    assert sana("dataset", "preview", "wide", "-o", "p.png", "--base", "256", "--trigger", "x").code == 2
    assert sana("dataset", "preview", "wide", "-o", "p.png", "--base", "256", "--trigger", "x", "--force").code == 0


def test_help_tells_the_tasks_and_their_options(sana: Sana) -> None:
    said = sana("dataset", "--help")
    assert said.code == 0
    for task in ("check", "pack", "unpack", "caption-stats", "preview"):
        assert f"sana dataset {task}" in said.out
        told = sana("dataset", task, "--help")
        assert told.code == 0
        assert f"usage: sana dataset {task}" in told.out


def test_completion_knows_the_tasks_and_their_flags(sana: Sana) -> None:
    script = sana("completion", "bash").out
    rest = script[script.index("        dataset)") :]
    assert "caption-stats" in rest
    assert "--tolerance" in rest


def test_the_example_data_are_what_their_script_makes(sana: Sana, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "make_data.py", tmp_path / "made"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    made, shipped = (
        {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "made", EXAMPLES / "data")
    )
    assert sorted(made) == sorted(shipped)
    assert sum(path.stat().st_size for path in shipped.values()) < 600_000
    for name in made:
        if name.suffix in (".txt", ".json", ".jsonl"):
            assert made[name].read_bytes() == shipped[name].read_bytes(), name
    for folder in ("pictures", "shards"):
        ours, theirs = open_source(tmp_path / "made" / folder), open_source(EXAMPLES / "data" / folder)
        for i in range(24):
            assert ours.picture(i).tobytes() == theirs.picture(i).tobytes()
            assert ours.sample(i).captions == theirs.sample(i).captions


@pytest.mark.parametrize("folder", ["pictures", "shards"])
def test_the_example_data_are_sound(sana: Sana, folder: str) -> None:
    said = sana("dataset", "check", str(EXAMPLES / "data" / folder), "--base", "256", "-m", "nano", "--json")
    document = json.loads(said.out)
    assert said.code == 0
    assert (document["samples"], document["sound"], document["findings"]) == (24, 24, [])
    assert document["buckets"] == [{"height": 256, "width": 256, "samples": 24}]


def test_the_example_prompts_can_be_drawn(sana: Sana) -> None:
    said = sana("--prompt-file", str(EXAMPLES / "data/prompts.txt"), "--dry-run", "-o", "x/")
    assert said.code == 0, said.err
    assert sana("batch", str(EXAMPLES / "data/prompts.jsonl"), "--dry-run", "-o", "y/").code == 0
