"""Thousands of command lines with hostile values: a documented exit code, no traceback, no hang, few lines.

The lines come from a generator with a fixed seed, so a failure comes again; the message shows the line.
"""

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sana import Parts
from sana.apps.cli import VERBS, main
from sana.apps.cli.arguments import COMMON, options_of
from sana.apps.cli.machine import MACHINE
from sana.apps.cli.options import EVERYTHING
from sana.apps.cli.verbs import dataset, models
from sana.errors import ModelNotFound

DOCUMENTED = {0, 1, 2, 3, 4, 6, 130}
LINES = 1800
DRAWN = 120
LIMIT = 10.0
"""Seconds of CPU that a line may take."""
FLAGS = sorted("--" + name.replace("_", "-") for name in options_of((*EVERYTHING, *models.GROUPS, MACHINE, COMMON)))
OTHER_FLAGS = (
    *(
        "-h",
        "-q",
        "-v",
        "-m",
        "-o",
        "-s",
        "-b",
        "-n",
        "-W",
        "-H",
        "--cfg",
        "--n",
        "--eta",
        "-y",
        "--pag-scale",
        "--",
        "-",
    ),
    *(
        "--run.steps",
        "--output",
        "--no-binning",
        "--no-force",
        "--stpes",
        "--promt",
        "-x",
        "-1",
        "---",
        "--=",
        "--seed=",
        "--é",
    ),
    *("--samples", "--suffix", "--limit", "--num_inference_steps", "--guidance_scale", "--version", "--help"),
)
VALUES = (
    *(
        "",
        " ",
        "0",
        "1",
        "2",
        "-1",
        "1.5",
        "3",
        "64",
        "512",
        "10000",
        "99999999999999999999",
        "9" * 5000,
        "1e308",
        "1e9",
        "nan",
    ),
    *(
        "inf",
        "-inf",
        "0x10",
        "1_0",
        "٣",
        "½",
        "true",
        "None",
        "a fox",
        "a",
        "x.png",
        "x.jpg",
        "out/",
        "none/x.png",
        "..",
        "/",
    ),
    *(
        "/dev/null",
        "/proc/self/mem",
        "~",
        "~nobody/x",
        "a" * 300 + ".png",
        "16:9",
        "0:0",
        "64x64",
        "1x1",
        "99999x1",
        "64x",
        "x",
    ),
    *(
        "1-4",
        "4-1",
        "1,2,2",
        "random",
        "0-99999999",
        "nano",
        "nan0",
        "a/b",
        "../..",
        "sana-1.6b-1024",
        "cpu",
        "cuda:99",
        "meta",
    ),
    *(
        "float16",
        "int8",
        "scm",
        "flow-euler",
        "full",
        "steps=1,2",
        "steps=",
        "=1",
        "guidance=1-5:0",
        "seed=1,2",
        "count=1-99999",
    ),
    *(
        "[",
        "{}",
        "\x00",
        "\ud83d",
        "a\udcff",
        "\u202e\u2066",
        "🦊",
        "猫",
        "<eos>",
        "a.a." * 500,
        "\n",
        "\x1b[2J",
        "%s%n",
        "$(id)",
        "';--",
    ),
    *(
        "canny",
        "canny fox.png",
        "map fox.png 0.5@0-0.5",
        "depth none.png nan",
        "soft-edge 'fox.png",
        "a.safetensors 0.7",
        "x.safetensors",
        "right=3",
        "1,2,3,4",
        "left=9,left=9",
        "1/3",
        "3/1",
        "strength=0.5,1",
        "pag=0-3",
        "transformer_blocks.1",
        "hf://a/b/c.pth",
        "hf://",
        "pull",
        "verify",
        "rm",
        "merge",
        "convert",
    ),
)
SLOW = {"--count", "--batch-size", "--seed", "--steps", "--sweep", "--size", "--width", "--height", "--prompt-file"}
"""Flags whose sensible values may order hundreds of pictures."""
SEVERAL = ("--control", "--lora", "--pag", "--mask", "--image", "--outpaint")
FILES = (
    "fox.png",
    "foreign.png",
    "broken.png",
    "empty.png",
    "x.latents.safetensors",
    "a.txt",
    "a.csv",
    "a.jsonl",
    "a.json",
    "a.toml",
    "bad.toml",
    "a.safetensors",
    "folder",
    "link.png",
    "none.png",
)


class Hang(BaseException):
    """A line that takes too long; no `except Exception` of the command may swallow it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang when the block uses more CPU time than this."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of many kinds, no settings of a user, and no way out of the process or into the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("COLUMNS", "80")
    for name in [name for name in os.environ if name.startswith("SANA_")]:
        monkeypatch.delenv(name)
    Image.new("RGB", (8, 8)).save("fox.png")
    Image.new("RGB", (8, 8)).save("link.png")
    Path("foreign.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 200)
    Path("broken.png").write_bytes(Path("fox.png").read_bytes()[:40])
    Path("empty.png").touch()
    Path("x.latents.safetensors").write_bytes(b"\xff" * 64)
    Path("a.txt").write_text("a fox\n\na cat\n")
    Path("a.csv").write_text("prompt,steps\na fox,2\n")
    Path("a.jsonl").write_text('{"prompt": "a fox", "steps": 1}\n{"prompt"\n')
    Path("a.json").write_text('[{"prompt": "a fox"}]')
    Path("a.toml").write_text("steps = 2\n")
    Path("a.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    Path("bad.toml").write_text("steps = [[\n\x00")
    Path("folder").mkdir()
    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("sana.apps.cli.cache.folder", lambda: tmp_path / "hub")  # one of the verbs removes models
    Path("hub/models--a--b/blobs").mkdir(parents=True)
    probes = ("torch", "transformers", "drawing", "torchvision", "hub")
    monkeypatch.setattr("sana.apps.cli.verbs.doctor.ask", lambda: {name: {"error": "not tried"} for name in probes})
    monkeypatch.setattr("sys.stdin", None)
    return tmp_path


def refuse(*_: object, **__: object) -> None:
    raise ModelNotFound("There is no model in this test.")


def line(rng: random.Random) -> list[str]:
    """Return a command line: a verb or none, and words of all kinds behind it."""
    words = [rng.choice([*VERBS, "generate"])] if rng.random() < 0.7 else []
    for _ in range(rng.randrange(6)):
        kind = rng.random()
        if kind < 0.3:
            words += [rng.choice(FLAGS), rng.choice(VALUES)]
        elif kind < 0.35:
            words += [rng.choice(SEVERAL), *rng.choices((*VALUES, *FILES), k=rng.randrange(4))]
        elif kind < 0.45:
            words += [f"{rng.choice(FLAGS)}={rng.choice(VALUES)}"]
        elif kind < 0.65:
            words += [rng.choice([*FLAGS, *OTHER_FLAGS])]
        elif kind < 0.8:
            words += [rng.choice(FILES)]
        else:
            words += [rng.choice(VALUES)]
    return words


def check(words: list[str], capfd: pytest.CaptureFixture[str]) -> int:
    """Run a line and return its exit code."""
    with limited(LIMIT):
        code = main(words)
    said = capfd.readouterr()
    shown = ascii(words)[:2000]
    assert code in DOCUMENTED, shown
    assert "Traceback" not in said.err or {"-v", "--verbose"} & set(words), (shown, said.err)
    assert "Unexpected error" not in said.err, (shown, said.err)
    errors = [text for text in said.err.splitlines() if text.startswith("sana: ")]
    assert bool(errors) == (code not in (0, 1)) or code == 1, (shown, said.err)
    assert len(errors) <= 1
    assert all(len(text) < 700 for text in errors), (shown, said.err)
    if "--json" in words and "--" not in words and not {"--help", "-h", "help"} & set(words):
        json.loads(said.out)
    return code


def test_no_command_line_brings_a_traceback_or_a_hang(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sana.apps.cli.machine.Machine.load", refuse)
    monkeypatch.setattr("sana.engine.parts.load", refuse)
    rng = random.Random(20251)
    codes: dict[int, int] = {}
    for _ in range(LINES):
        code = check(line(rng), capfd)
        codes[code] = codes.get(code, 0) + 1
    # The lines prove little if all of them fail at the first word.
    assert codes[2] > LINES // 5
    assert codes[3] > 20
    assert codes[0] > LINES // 20


def drawable(rng: random.Random, i: int) -> list[str]:
    """Return a line that draws with a small model, most of the time."""
    words = [
        rng.choice(["a fox", "🦊", "<eos>", "a.a." * 99, "\u202e\u200bx", " "]),
        "--steps",
        "1",
        "-o",
        f"out{i}/",
        "-m",
        "folder",
    ]
    words += rng.choice([["--seed", "1-2"], ["--count", "2"], ["--seed", "9007199254740991"], ["-s", "random"]])
    words += rng.choice(
        [["--size", "32x64", "--no-binning"], ["-W", "40", "-H", "300"], ["--size", "1:1"], ["--size", "900x9"]]
    )
    words += rng.choice([[], ["--cfg", "1"], ["--guidance-interval", "0.2", "0.9"], ["--negative-prompt", "snow"]])
    words += rng.choice(
        [[], ["--json"], ["--events"], ["-q"], ["-v"], ["--metadata", rng.choice(["none", "label", "x"])]]
    )
    words += rng.choice([*[[]] * 6, ["--pag"], ["--lora", "a.safetensors"], ["--control", "canny", "fox.png", "0.5"]])
    if rng.random() < 0.3:
        words = ["edit", rng.choice(["fox.png", "fox.png", "fox.png", "broken.png", "none.png"]), *words]
        words += rng.choice(
            [[], ["--strength", rng.choice(["0.5", "1", "2"])], ["--mask", "fox.png"], ["--outpaint", "8"]]
        )
    words += rng.choice([[], [], [], [rng.choice([flag for flag in FLAGS if flag not in SLOW]), rng.choice(VALUES)]])
    return words


def test_lines_that_draw(
    place: Path, tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sana.apps.cli.machine.Machine.load", lambda *_, **__: (tiny_parts, 0.1))
    rng = random.Random(3)
    drawn = 0
    for i in range(DRAWN):
        words = drawable(rng, i)
        if check(words, capfd) == 0:
            drawn += any(Path(f"out{i}").glob("*.png"))
    assert drawn > DRAWN // 4


def test_lines_about_data_sets(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sana.engine.parts.load", refuse)
    Image.new("RGB", (300, 300)).save("folder/a.png")
    Path("folder/a.txt").write_text("a fox")
    flags = ["--" + name.replace("_", "-") for name in options_of(dataset.groups())]
    rng = random.Random(4)
    codes: dict[int, int] = {}
    for _ in range(250):
        words = ["dataset", rng.choice(["check", "pack", "caption-stats", "preview"])]
        words += rng.choices(
            ["folder", *FILES, *VALUES], [200, *[1] * len(FILES), *[1] * len(VALUES)], k=rng.choice([1, 1, 2])
        )
        for _ in range(rng.randrange(3)):
            words += [rng.choice([*flags, "--json", "-q"]), *rng.choices([*VALUES, *FILES], k=rng.randrange(2))]
        code = check(words, capfd)
        codes[code] = codes.get(code, 0) + 1
    assert codes[0] > 10
    assert codes[2] > 40
    assert codes[3] > 5
