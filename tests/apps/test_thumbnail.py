"""Small pictures in a terminal: which way is taken, and that each way shows the picture."""

import base64
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sana.apps.cli.output import Terminal
from sana.apps.cli.thumbnail import MOST_ROWS, WAYS, Protocol, protocol, thumbnail

LEVELS = (0, 95, 135, 175, 215, 255)


def picture(width: int = 256, height: int = 256) -> Image.Image:
    """Four flat fields, red and blue above, green and white below."""
    image = Image.new("RGB", (width, height), (255, 255, 255))
    for colour, place in (((220, 20, 20), (0, 0)), ((20, 20, 220), (width // 2, 0)), ((20, 160, 20), (0, height // 2))):
        image.paste(Image.new("RGB", (width // 2, height // 2), colour), place)
    return image


def of_blocks(text: str) -> Image.Image:
    """Return the picture that a terminal would show for half blocks."""
    rows: list[list[tuple[int, ...]]] = []
    for line in text.split("\n"):
        upper: list[tuple[int, ...]] = []
        lower: list[tuple[int, ...]] = []
        colours: dict[int, tuple[int, ...]] = {}
        for found in re.finditer(r"\x1b\[([0-9;]*)m|(▀)", line):
            if found[2]:
                upper.append(colours[38])
                lower += [colours[48]] if 48 in colours else []
                continue
            codes = [int(code) for code in found[1].split(";")]
            while codes:
                which = codes.pop(0)
                if which == 0:
                    colours.clear()
                elif codes.pop(0) == 2:
                    colours[which] = (codes.pop(0), codes.pop(0), codes.pop(0))
                else:
                    index = codes.pop(0) - 16
                    grey = (8 + 10 * (index - 216),) * 3
                    cube = LEVELS[index // 36 % 6], LEVELS[index // 6 % 6], LEVELS[index % 6]
                    colours[which] = grey if index >= 216 else cube
        rows += [upper, lower] if lower else [upper]
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def of_sixels(text: str) -> Image.Image:
    """Return the picture that a terminal would show for sixels."""
    assert text.startswith("\x1bPq")
    assert text.endswith("\x1b\\")
    size = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert size is not None
    shown: NDArray[np.uint8] = np.zeros((int(size[2]) + 6, int(size[1]), 3), dtype=np.uint8)
    palette: dict[int, list[float]] = {}
    x = y = colour = 0
    for found in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$-])", text[size.end() : -2]):
        if found[1]:
            palette[int(found[1])] = [int(part) * 2.55 for part in found.groups()[1:4]]
        elif found[5]:
            colour = int(found[5])
        elif found[8]:
            x, y = 0, y + 6 * (found[8] == "-")
        else:
            end = x + int(found[6] or 1)
            for row in range(6):
                if (ord(found[7]) - 63) >> row & 1:
                    shown[y + row, x:end] = palette[colour]
            x = end
    return Image.fromarray(shown[: int(size[2])])


def of_base64(text: str) -> Image.Image:
    """Return the PNG within kitty's or iTerm2's escapes."""
    kitty = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    if kitty:
        assert kitty[0][0].startswith("a=T,f=100,q=2,")
        assert [settings[-1] for settings, _ in kitty] == ["1"] * (len(kitty) - 1) + ["0"]
        assert all(len(piece) <= 4096 for _, piece in kitty)
        data = "".join(piece for _, piece in kitty)
    else:
        found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:([^\x07]*)\x07", text)
        assert found is not None
        data = found[2]
        assert len(base64.b64decode(data)) == int(found[1])
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


SHOWN = {"truecolor": of_blocks, "256": of_blocks, "sixel": of_sixels, "kitty": of_base64, "iterm2": of_base64}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("size", [(256, 256), (1024, 512), (300, 1000), (37, 23), (1, 1)])
def test_what_is_shown_is_the_picture(way: Protocol, size: tuple[int, int]) -> None:
    image = picture(*size)
    shown = SHOWN[way](thumbnail(image, way, columns=80, lines=40))
    cell = WAYS[way].cell
    assert shown.width <= 79 * cell[0]
    assert shown.height <= MOST_ROWS * cell[1]
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.15)
    if min(size) > 1:
        corners = [(i * (shown.width - 1), j * (shown.height - 1)) for i in (0, 1) for j in (0, 1)]
        wanted = [image.getpixel((i * (size[0] - 1), j * (size[1] - 1))) for i in (0, 1) for j in (0, 1)]
        if size[0] % 2 == 0:
            found = [shown.getpixel(corner) for corner in corners]
            assert np.abs(np.subtract(found, wanted)).max() <= (60 if way == "256" else 25)


@pytest.mark.parametrize("way", list(WAYS))
def test_every_row_and_column_is_in_its_place(way: Protocol) -> None:
    rows, columns = np.mgrid[0:90, 0:90]
    image = Image.fromarray(np.stack([rows * 2, columns * 2, 255 - rows * 2], axis=2).astype(np.uint8))
    shown = SHOWN[way](thumbnail(image, way, columns=80, lines=40))
    wanted = np.asarray(image.resize(shown.size), dtype=float)
    assert np.abs(np.asarray(shown, dtype=float) - wanted).mean() < {"256": 20, "sixel": 5.5}.get(way, 1)


@pytest.mark.parametrize(("columns", "lines"), [(1, 1), (10, 5), (500, 500)])
def test_any_size_of_terminal_will_do(columns: int, lines: int) -> None:
    for way in WAYS:
        text = thumbnail(picture(), way, columns, lines)
        assert text.count("\n") < MOST_ROWS


@pytest.mark.parametrize(
    ("environment", "encoding", "way"),
    [
        ({"TERM": "xterm-kitty"}, "utf-8", "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "ascii", "kitty"),
        ({"TERM": "xterm-ghostty"}, "utf-8", "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "utf-8", "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "utf-8", "iterm2"),
        ({"TERM": "foot"}, "utf-8", "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "utf-8", "truecolor"),
        ({"WT_SESSION": "1"}, "UTF8", "truecolor"),
        ({"TERM": "xterm-256color"}, "utf-8", "256"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "ascii", None),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, "utf-8", "256"),
        ({"TERM": "xterm-256color", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, "utf-8", "256"),
        ({"TERM": "screen.xterm-256color", "COLORTERM": "24bit"}, "utf-8", "truecolor"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "utf-8", None),
        ({"TERM": "xterm"}, "utf-8", None),
        ({"TERM": "linux"}, "utf-8", None),
        ({}, "utf-8", None),
    ],
)
def test_the_terminal_is_known_by_its_environment(
    environment: dict[str, str], encoding: str, way: Protocol | None
) -> None:
    assert protocol(environment, encoding) == way


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMUX", "STY", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL", "NO_COLOR", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


def test_a_thumbnail_goes_to_a_terminal_on_stderr(colours: None, capsys: pytest.CaptureFixture[str]) -> None:
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    Terminal().show(picture())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") <= MOST_ROWS
    assert of_blocks(err.rstrip("\n")).size == (40, 40)


@pytest.mark.parametrize(
    ("terminal", "variable"),
    [
        (Terminal(quiet=True), ""),
        (Terminal(json=True), ""),
        (Terminal(events=True), ""),
        (Terminal(thumbnail=False), ""),
        (Terminal(thumbnail=True), "NO_COLOR"),
    ],
)
def test_no_thumbnail_where_it_would_disturb(
    colours: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: Terminal,
    variable: str,
) -> None:
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    if variable:
        monkeypatch.setenv(variable, "1")
    terminal.show(picture())
    assert capsys.readouterr().err == ""


def test_no_thumbnail_into_a_file_and_only_on_demand_where_the_terminal_says_nothing(
    colours: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]
    Terminal(thumbnail=True).show(picture())
    assert capsys.readouterr().err == ""
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLORTERM")
    Terminal().show(picture())
    assert capsys.readouterr().err == ""
    Terminal(thumbnail=True).show(picture())
    assert "▀" in capsys.readouterr().err
