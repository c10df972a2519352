"""`sana batch`: names and seeds that depend on each line alone, shards, the manifest, failures, and going on."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Sana
from PIL import Image

from sana.apps.cli.manifest import Manifest, entries, read
from sana.apps.cli.names import safe_name
from sana.apps.cli.order import Order, parse
from sana.apps.cli.prompts import MOST_PROMPTS
from sana.apps.cli.roads import BATCH
from sana.apps.cli.shards import name_batch, share
from sana.apps.cli.values import Shard, read_shard
from sana.engine import generate as engine
from sana.engine.metadata import read_metadata
from sana.errors import InvalidInput, NonFinite, OutOfMemory

LONG = "a very long prompt that goes on and on about a red fish above a yellow boat on a green sea under a blue moon"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))


def order(*words: str) -> Order:
    return parse(words, BATCH, name_batch)


def written(content: Any, name: str = "p.jsonl") -> str:
    """Write lines, or one JSON document."""
    lines = "\n".join(json.dumps(line) for line in content) if name.endswith(".jsonl") else json.dumps(content)
    Path(name).write_text(lines)
    return name


def names(content: Any, *words: str, name: str = "p.jsonl") -> list[str]:
    return [path.name for path in order(written(content, name), *words).files]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> dict[int, BaseException]:
    """Let the engine fail at these seeds, once it comes to them."""
    errors: dict[int, BaseException] = {}
    original = engine.generate

    def generate(parts: Any, request: Any, **others: Any) -> Any:
        for seed in range(request.seed, request.seed + request.count, request.batch_size):
            if seed in errors:
                raise errors[seed]
            count = min(request.batch_size, request.seed + request.count - seed)
            result = yield from original(parts, request.replace(seed=seed, count=count), **others)
        return result

    monkeypatch.setattr(engine, "generate", generate)
    return errors


def test_names_tell_prompts_apart_and_do_not_depend_on_other_lines() -> None:
    first, second = f"{LONG} and one", f"{LONG} and two"
    both = names([{"prompt": first}, {"prompt": second}], "--seed", "3")
    assert len(set(both)) == 2
    assert all(len(name) < 120 for name in both)
    assert names([{"prompt": second}], "--seed", "3") == both[1:]
    assert names(["a fox!", "a cat"], "--seed", "3-4") == ["a-fox-3.png", "a-fox-4.png", "a-cat-3.png", "a-cat-4.png"]
    same = names([{"prompt": "a fox"}, {"prompt": "A fox?"}, {"prompt": "a fox", "steps": 3}], "--seed", "3")
    assert len({name.casefold() for name in same}) == 3
    assert names(["a fox", "a fox"], "--seed", "3")[1].endswith("-2.png"), "the same picture twice is drawn twice"


def test_the_keys_of_an_object_are_the_names() -> None:
    content = {"007": {"prompt": "a fox"}, "B/x": {"prompt": "a cat"}, "B:x": {"prompt": "a dog"}, "c": "an owl"}
    found = names(content, name="p.json")
    assert (found[0], found[3]) == ("007.png", "c.png")
    assert len(set(found)) == 4
    assert all("/" not in name and ":" not in name for name in found)
    assert names({"a": {"prompt": "x", "seed": [1, 2]}}, name="p.json") == ["a-1.png", "a-2.png"]
    assert names({"a": {"prompt": "x", "seed": 1, "category": "people"}}, name="p.json") == ["a.png"], "published sets"
    assert names([{"prompt": "x", "name": "mine"}]) == ["mine.png"]
    assert Path("p").name == order(written(["a fox"])).files[0].parent.name, "the folder is named after the file"
    with pytest.raises(InvalidInput, match=r"p\.json must hold a list of prompts, or an object of them by name"):
        order(written({"prompt": "x"}, "p.json"))
    with pytest.raises(InvalidInput, match=r"p\.json, entry 'a': there is no field 'stpes'\. Did you mean 'steps'\?"):
        order(written({"a": {"prompt": "x", "stpes": 3}}, "p.json"))
    Path("p.json").write_text('{"a": "a fox", "b": "a cat", "a": "an owl"}')
    with pytest.raises(InvalidInput, match=r"p\.json: 'a' is there twice\. Rename one of them"):
        order("p.json")


def test_as_many_prompts_as_models_are_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.apps.cli.order.MOST_PICTURES", 4)
    written([f"a fox, number {i}" for i in range(5)])
    assert len(order("p.jsonl").jobs) == 5
    with pytest.raises(InvalidInput, match="more than 4 pictures"):
        parse(["--prompt-file", "p.jsonl"])
    assert min(BATCH.most or 0, MOST_PROMPTS) >= 30_000


@pytest.mark.parametrize(
    ("wish", "name"),
    [("../../x", "-..-x"), ("", "picture"), ("...", "picture"), ("a b.c_D-1", "a b.c_D-1"), ("CON", "CON-"),
     ("nul.txt", "nul.txt-"), ("\x00/\n", "---"), ("猫🐟", "猫-"), ("e\u0301", "é"), ("x" * 500, "x" * 160)],
)  # fmt: skip
def test_names_are_safe_on_every_system(wish: str, name: str) -> None:
    assert safe_name(wish) == name


def test_seeds_come_from_the_line_alone_and_stay() -> None:
    lines = ["a fox", "a cat", {"prompt": "a dog", "seed": 5}, "a fox"]
    seeds = order(written(lines)).seeds
    assert seeds == order(written(lines), "--steps", "3").seeds, "flags do not change them"
    assert seeds[1:2] == order(written(["a cat"])).seeds
    assert seeds[2] == 5
    assert seeds[3] == seeds[0] + 1, "a line that stands there again draws on"
    assert len(set(order(written(["a fox"] * 3), "--count", "2").seeds)) == 6


def test_shards_are_disjoint_complete_and_even() -> None:
    lines = [{"prompt": f"p{i}", "count": 1 + i % 4} for i in range(13)]
    jobs = order(written(lines)).jobs
    whole = [file for job in jobs for file in job.files]
    for n in (1, 2, 3, 7, 31, 40):
        shards = [share(jobs, Shard(number=i, of=n)) for i in range(1, n + 1)]
        files = [[file for job in shard for file in job.files] for shard in shards]
        assert list(itertools.chain(*files)) == whole
        assert max(map(len, files)) - min(map(len, files)) <= 1
        assert all(len(job.seeds) == len(job.files) and job.request.seed == job.seeds[0] for s in shards for job in s)
    assert str(read_shard(" 2/8 ")) == "2/8"
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/99999", "1/2/3", ""):
        with pytest.raises(InvalidInput, match="takes a share such as 1/8"):
            read_shard(text)


def test_a_batch_is_drawn_noted_and_not_drawn_again(draw: Sana) -> None:
    lines = [
        {"prompt": "a fox", "name": "f"},
        {"prompt": "a cat", "seed": 9, "steps": 1},
        {"prompt": "a dog", "steps": 3},
    ]
    said = draw("batch", written(lines), "-o", "out")
    assert said.code == 0, said.err
    files = said.out.split()
    assert files[:2] == ["out/f.png", "out/a-cat-9.png"]
    assert "3 pictures: 3 drawn." in said.err
    assert read_metadata("out/a-cat-9.png").request().steps == 1
    noted = list(read(Path("out/manifest.jsonl")))
    assert [(e["state"], e["file"], e["line"]) for e in noted] == [
        ("done", Path(file).name, f"p.jsonl, line {i}") for i, file in enumerate(files, start=1)
    ]
    assert "a fox" not in Path("out/manifest.jsonl").read_text(), "prompts are not repeated there"
    before = {file: os.stat(file).st_mtime_ns for file in files}
    Path("out/a-cat-9.png").unlink()
    again = draw("batch", "p.jsonl", "-o", "out")
    assert again.out.split() == ["out/a-cat-9.png"]
    assert "3 pictures: 1 drawn, 2 there already." in again.err
    assert "other settings" not in again.err
    assert all(os.stat(file).st_mtime_ns == before[file] for file in files if "cat" not in file)
    forced = draw("batch", "p.jsonl", "-o", "out", "--force")
    assert forced.out.split() == files


def test_the_noise_of_a_picture_does_not_depend_on_what_is_left_out(draw: Sana) -> None:
    def pixels(path: str) -> bytes:
        with Image.open(path) as image:
            return image.tobytes()

    written(["a fox", "a cat", "a dog", "an owl"])
    whole = draw("batch", "p.jsonl", "-o", "whole").out.split()
    for i in (2, 1, 3):
        assert draw("batch", "p.jsonl", "-o", "shards", "--shard", f"{i}/3").code == 0
    found = sorted(path.name for path in Path("shards").glob("*.png"))
    assert found == sorted(Path(file).name for file in whole)
    assert all(pixels(f"shards/{name}") == pixels(f"whole/{name}") for name in found)
    assert len(list(Path("shards").glob("manifest-*-of-3.jsonl"))) == 3
    assert set(entries(Path("shards"))) == set(found)
    Path("one.jsonl").write_text('"an owl"')
    (alone,) = draw("batch", "one.jsonl").out.split()
    assert pixels(alone) == pixels(f"whole/{Path(alone).name}")


def test_what_fails_is_told_at_the_end_and_the_rest_is_drawn(draw: Sana, fails: dict[int, BaseException]) -> None:
    fails |= {4: NonFinite("The picture is not finite."), 20: InvalidInput("`steps` is not to its liking.")}
    lines = [
        {"prompt": "a fox", "seed": [3, 4, 5]},
        {"prompt": "a cat", "seed": [20, 21]},
        {"prompt": "a dog", "seed": 7},
    ]
    said = draw("batch", written(lines), "-o", "out", "--json")
    assert said.code == 6
    document = json.loads(said.out)
    assert document["files"] == ["out/a-fox-3.png", "out/a-fox-5.png", "out/a-dog-7.png"]
    assert [(e["file"], e["line"]) for e in document["failed"]] == [
        ("out/a-fox-4.png", "p.jsonl, line 1"),
        ("out/a-cat-20.png", "p.jsonl, line 2"),
        ("out/a-cat-21.png", "p.jsonl, line 2"),
    ]
    assert document["error"]["exit_code"] == 6
    assert "6 pictures: 3 drawn, 3 failed." in said.err
    assert "p.jsonl, line 2: --steps is not to its liking." in said.err
    assert said.err.endswith("3 of the pictures could not be drawn. The same command tries them again.\n")
    fails.clear()
    again = draw("batch", "p.jsonl", "-o", "out")
    assert (again.code, len(again.out.split())) == (0, 3)
    assert all(entry["state"] == "done" for entry in entries(Path("out")).values())


def test_memory_that_is_full_costs_one_batch_only(draw: Sana, fails: dict[int, BaseException]) -> None:
    fails[3] = OutOfMemory("The memory is full.")
    said = draw("batch", written([{"prompt": "a fox", "seed": [1, 2, 3, 4, 5]}]), "--batch-size", "2", "-o", "out")
    assert said.code == 6
    assert [Path(file).name for file in said.out.split()] == ["a-fox-1.png", "a-fox-2.png", "a-fox-5.png"]


def test_a_wrong_line_is_refused_before_anything_is_drawn(draw: Sana, no_loading: None) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "stpes": 3}]
    said = draw("batch", written(lines))
    assert said.code == 2
    assert said.err == "sana: p.jsonl, line 2: there is no field 'stpes'. Did you mean 'steps'?\n"
    missing = draw("batch", written([{"prompt": "a", "image": "none.png"}]))
    assert missing.code == 3
    assert "p.jsonl, line 1: There is no file none.png for the image." in missing.err
    assert sorted(os.listdir()) == ["p.jsonl"]


def test_what_the_model_cannot_draw_is_told_with_its_line(sana: Sana, no_loading: None) -> None:
    said = sana("batch", written([{"prompt": "a"}, {"prompt": "b", "size": "192x256"}]), "-m", "nano")
    assert (said.code, said.out) == (2, ""), said.err
    assert said.err.startswith("sana: p.jsonl, line 2: nano draws 256 x 256 only, not 192 x 256.")


def test_a_half_picture_is_told_and_the_rest_is_drawn(draw: Sana) -> None:
    written([{"prompt": "a fox", "name": "f"}, {"prompt": "a cat", "name": "c"}])
    Path("out").mkdir()
    Path("out/f.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    said = draw("batch", "p.jsonl", "-o", "out")
    assert said.code == 6
    assert said.out.split() == ["out/c.png"]
    assert "p.jsonl, line 1: out/f.png is no whole picture." in said.err


def test_what_is_left_of_a_picture_of_ours_is_drawn_anew(draw: Sana) -> None:
    written([{"prompt": "a fox", "name": name, "seed": 3} for name in "abcde"])
    assert draw("batch", "p.jsonl", "-o", "out", "--steps", "1").code == 0
    whole = {name: Path(f"out/{name}.png").read_bytes() for name in "abcde"}
    flipped = bytearray(whole["b"])
    flipped[-60] ^= 1  # within the pixels: begin, end and sizes are right
    noise = Path("out/c.png")
    ruins = {"a": whole["a"][:-300], "b": bytes(flipped), "c": whole["c"][:9], "d": b"", "e": whole["e"] + b"more"}
    for name, data in ruins.items():
        Path(f"out/{name}.png").write_bytes(data)
    said = draw("batch", "p.jsonl", "-o", "out", "--steps", "1")
    assert said.code == 0, said.err
    assert said.out.split() == [f"out/{name}.png" for name in "abcde"]
    assert said.err.count("is no whole picture; it is drawn anew.") == 5
    assert "5 pictures: 5 drawn." in said.err
    assert {name: Path(f"out/{name}.png").read_bytes() for name in "abcde"} == whole
    for manifest in Path("out").glob("manifest*"):
        manifest.unlink()
    Path("out/a.png").write_bytes(whole["a"][:-300])  # its record is still in it
    noise.write_bytes(whole["c"][:9])  # may have been anybody's
    Path("out/d.png").write_bytes(b"a letter to my aunt")
    said = draw("batch", "p.jsonl", "-o", "out", "--steps", "1")
    assert said.code == 6
    assert said.out.split() == ["out/a.png"]
    assert (noise.read_bytes(), Path("out/d.png").read_bytes()) == (whole["c"][:9], b"a letter to my aunt")
    assert "out/d.png is no whole picture. Delete it, or draw it again with --force." in said.err


def test_another_picture_is_never_written_over(draw: Sana) -> None:
    written([{"prompt": "a fox", "name": "f", "seed": 3}])
    Path("out").mkdir()
    Image.new("RGB", (8, 8), "red").save("out/f.png")
    before = Path("out/f.png").read_bytes()
    assert draw("batch", "p.jsonl", "-o", "out").out == ""
    assert Path("out/f.png").read_bytes() == before


def test_a_manifest_that_was_cut_short_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    Manifest(path).done(Path("a.png"), 1, 0.5, "p, line 1", "x")
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert len(list(read(path))) == int(cut >= len(whole) - 1)
        Manifest(path).done(Path("b.png"), 2, 0.5, "p, line 2", "x")
        assert [entry["file"] for entry in read(path)][-1] == "b.png"
    path.write_bytes(b"\xff\x00\n[1]\n{}\n" + b"[" * 100_000 + b"\n")
    assert list(read(path)) == []
    assert list(read(tmp_path / "none.jsonl")) == []


def test_every_line_of_the_manifest_is_on_the_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    manifest = Manifest(tmp_path / "manifest.jsonl")
    for i in range(3):
        manifest.done(Path("a.png"), i, 0.5, "p", "x")
    sizes = [size for size in synced if size <= manifest.path.stat().st_size]
    assert manifest.path.stat().st_size in sizes
    assert len(synced) >= 3


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "Which file of prompts? For example: sana batch prompts.txt -o pictures/"),
        (["p.jsonl", "q.jsonl"], 2, "takes one file of prompts, not 2"),
        (["none.txt"], 2, "none.txt cannot be read"),
        (["p.jsonl", "-o", "x.png"], 2, "A batch goes into a folder. Name one as --output."),
        (["p.jsonl", "--shard", "3/2"], 2, "--shard takes a share such as 1/8"),
        (["p.jsonl", "--sweep", "steps=1,2"], 2, "A batch has no --sweep."),
        (["p.jsonl", "--skip-existing"], 2, "leaves out what is there anyway"),
        (["--prompt-file", "p.jsonl"], 2, "The file comes right behind the verb"),
    ],
)
def test_what_cannot_be(sana: Sana, no_loading: None, words: list[str], code: int, sentence: str) -> None:
    written(["a fox"])
    said = sana("batch", *words)
    assert said.code == code
    assert sentence in said.err
    assert said.out == ""


def test_a_share_without_pictures_is_no_error(sana: Sana, no_loading: None) -> None:
    said = sana("batch", written(["a fox"]), "--shard", "1/3", "--json")
    assert said.code == 0
    assert json.loads(said.out)["files"] == []
    assert "The file has fewer pictures (1) than there are shares, and 1/3 has none." in said.err


def test_an_interrupted_batch_goes_on(tmp_path: Path, tiny_folder: Path) -> None:
    written([f"prompt {i}" for i in range(12)])
    line = [sys.executable, "-m", "sana", "batch", "p.jsonl", "-m", str(tiny_folder), "--steps", "20", "-o", "out"]
    code = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sana.apps.cli import main\nfrom sana.engine import images\nsave, count = images.save_png, 0\n"
        "def interrupted(*args, **others):\n    global count\n    path, count = save(*args, **others), count + 1\n"
        "    if count == 3: os.kill(os.getpid(), signal.SIGINT)\n    return path\n"
        "images.save_png = interrupted\nsys.exit(main(sys.argv[1:]))"
    )
    run = subprocess.run([sys.executable, "-c", code, *line[3:]], capture_output=True, text=True, timeout=600)
    assert run.returncode == 130, run.stderr
    assert "For the rest, run the same command again." in run.stderr
    there = {path.name for path in Path("out").glob("*.png")}
    assert 3 <= len(there) < 12
    assert there == set(entries(Path("out"))), "the manifest has all that is there"
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=True)
    assert len(done.stdout.split()) == 12 - len(there)
    assert len(list(Path("out").glob("*.png"))) == 12
