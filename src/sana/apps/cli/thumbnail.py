"""Pictures in a terminal: which way of showing them it knows, and the characters that do it."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

if TYPE_CHECKING:
    from PIL.Image import Image

Protocol = Literal["kitty", "iterm2", "sixel", "truecolor", "256"]

MOST_ROWS = 20
"""Height of a thumbnail in lines of text."""
FEWEST_ROWS = 4
_SPARE_LINES = 4
_CELL = (10, 20)
"""Pixels of a character cell, where a terminal does not say."""
_SIXEL_COLOURS = 128
_KITTY_CHUNK = 4096
_RESET = "\x1b[0m"


def protocol(environment: Mapping[str, str], encoding: str) -> Protocol | None:
    """Return the best way to show a picture that the environment of a terminal promises, or None.

    A multiplexer does not pass pictures on, so that only coloured characters are left within one.
    """
    name, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    within = "TMUX" in environment or "STY" in environment or name.startswith(("screen", "tmux"))
    if not within and name != "dumb":
        if "KITTY_WINDOW_ID" in environment or "kitty" in name or "ghostty" in name or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
        if name.startswith(("foot", "mlterm", "yaft")) or "sixel" in name:
            return "sixel"
    if not encoding.lower().replace("-", "").startswith("utf") or name == "dumb":
        return None
    if environment.get("COLORTERM", "").lower() in ("truecolor", "24bit") or "WT_SESSION" in environment:
        return "truecolor"
    return "256" if "256color" in name else None


def thumbnail(image: "Image", way: Protocol, columns: int, lines: int) -> str:
    """Return what makes a terminal of that size show the picture, without the last line's end."""
    rows = max(FEWEST_ROWS, min(MOST_ROWS, lines - _SPARE_LINES))
    small = _fitted(image.convert("RGB"), max(1, columns - 1), rows, WAYS[way].cell)
    return WAYS[way].draw(small)


def _fitted(image: "Image", columns: int, rows: int, cell: tuple[int, int]) -> "Image":
    """Return the picture as large as fits into columns and rows of cells, never larger than it is."""
    from PIL.Image import Resampling

    scale = min(columns * cell[0] / image.width, rows * cell[1] / image.height, 1.0)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Resampling.LANCZOS, reducing_gap=3.0) if size != image.size else image


def _kitty(image: "Image") -> str:
    data = _png(image)
    pieces = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    commands = []
    for i, piece in enumerate(pieces):
        more = int(i < len(pieces) - 1)
        settings = f"a=T,f=100,q=2,m={more}" if i == 0 else f"q=2,m={more}"  # q=2: answer nothing, not even errors
        commands.append(f"\x1b_G{settings};{piece}\x1b\\")
    return "".join(commands)


def _iterm2(image: "Image") -> str:
    data = _png(image)
    size = f"width={image.width}px;height={image.height}px"
    return f"\x1b]1337;File=inline=1;size={len(base64.b64decode(data))};{size};preserveAspectRatio=1:{data}\a"


def _png(image: "Image") -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _sixel(image: "Image") -> str:
    """Return the picture in bands of six rows, each drawn once per colour; see the VT330 manual, chapter 14."""
    from PIL.Image import Dither

    drawn = image.quantize(_SIXEL_COLOURS, dither=Dither.NONE)
    palette, pixels = drawn.getpalette() or [], cast("Any", drawn.load())
    parts = [f'\x1bPq"1;1;{image.width};{image.height}']
    for i in range(len(palette) // 3):
        red, green, blue = (round(value * 100 / 255) for value in palette[3 * i : 3 * i + 3])
        parts.append(f"#{i};2;{red};{green};{blue}")
    for top in range(0, image.height, 6):
        bits: dict[int, list[int]] = {}
        for y in range(top, min(top + 6, image.height)):
            for x in range(image.width):
                bits.setdefault(pixels[x, y], [0] * image.width)[x] |= 1 << (y - top)
        parts.append("$".join(f"#{colour}{''.join(_runs(row))}" for colour, row in sorted(bits.items())) + "-")
    return "".join(parts) + "\x1b\\"


def _runs(row: list[int]) -> Iterator[str]:
    """Yield the characters of one colour's row, equal ones counted."""
    start = 0
    for end in range(1, len(row) + 1):
        if end == len(row) or row[end] != row[start]:
            mark = chr(63 + row[start])
            yield f"!{end - start}{mark}" if end - start > 3 else mark * (end - start)
            start = end


def _truecolor(image: "Image") -> str:
    return _blocks(image, lambda colour: f"2;{colour[0]};{colour[1]};{colour[2]}")


def _palette(image: "Image") -> str:
    """Return the picture in the 6 x 6 x 6 cube and the 24 greys that every terminal of 256 colours has."""
    from PIL.Image import Dither, new

    cube = [(red, green, blue) for red in _LEVELS for green in _LEVELS for blue in _LEVELS]
    greys = [(value, value, value) for value in range(8, 248, 10)]
    colours = new("P", (1, 1))
    colours.putpalette([value for colour in (*cube, *greys) for value in colour])
    return _blocks(image.quantize(palette=colours, dither=Dither.FLOYDSTEINBERG), lambda index: f"5;{16 + index}")


def _blocks(image: "Image", code: Callable[[Any], str]) -> str:
    """Return lines of half blocks: each character shows a pixel above (its colour) and one below (its ground)."""
    pixels: Any = image.load()
    lines = []
    for y in range(0, image.height, 2):
        line, last = [], ""
        for x in range(image.width):
            upper = code(pixels[x, y])
            lower = code(pixels[x, y + 1]) if y + 1 < image.height else ""
            style = f"\x1b[38;{upper};48;{lower}m" if lower else f"\x1b[0;38;{upper}m"
            line += [style if style != last else "", "\N{UPPER HALF BLOCK}"]
            last = style
        lines.append("".join(line) + _RESET)
    return "\n".join(lines)


_LEVELS = (0, 95, 135, 175, 215, 255)


class Way(NamedTuple):
    """How a picture is shown."""

    cell: tuple[int, int]
    """Width and height of one character cell in pixels."""
    draw: "Callable[[Image], str]"


WAYS: dict[Protocol, Way] = {
    "kitty": Way(_CELL, _kitty),
    "iterm2": Way(_CELL, _iterm2),
    "sixel": Way(_CELL, _sixel),
    "truecolor": Way((1, 2), _truecolor),
    "256": Way((1, 2), _palette),
}
