"""The sheet of a sweep: every picture in a grid, with the values along its sides."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.apps.cli.names import slug
from sana.apps.cli.order import Job, Order
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

LARGEST, SMALLEST = 256, 64
"""Side of a picture on the sheet, in pixels."""
WIDEST = 4096
MOST_COLUMNS = 6
"""Of a sheet with one axis only, which is cut into rows."""
GAP, MARGIN, LINE = 8, 32, 20
PAPER, INK, FAINT = (250, 249, 246), (38, 38, 42), (120, 118, 112)
TEXT, TITLE = 15, 22


class Sheet:
    """The pictures of an order as thumbnails, each at its point of the grid; Pillow is loaded with the first."""

    def __init__(self, order: Order) -> None:
        self.axes = _axes(order)
        self.prompts = list(dict.fromkeys(job.request.prompt for job in order.jobs))
        self.seed = f"seed {order.seeds[0]}" if len(set(order.seeds)) == 1 else ""
        self.cells: dict[tuple[str, ...], Image] = {}
        columns = len(self.axes[0][1]) if len(self.axes) > 1 else MOST_COLUMNS
        self.side = min(LARGEST, max(SMALLEST, WIDEST // max(columns, 1) - GAP))

    def add(self, job: Job, seed: int, image: "Image") -> None:
        """Take in a finished picture."""
        from PIL import Image

        small = image.convert("RGB")
        small.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        self.cells[tuple(_label(job, seed, name, self.prompts) for name, _ in self.axes)] = small

    def add_file(self, job: Job, seed: int, file: Path) -> None:
        """Take in a picture that was there already."""
        from PIL import Image

        try:
            with Image.open(file) as image:
                self.add(job, seed, image)
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidInput(f"{file} is there but no picture ({error}). Remove it, or leave out a sheet.") from error

    def save(self, path: Path, model: Mapping[str, Any], *, metadata: str, force: bool) -> None:
        """Write the sheet as PNG, labelled as generated pictures unless metadata is `none`.

        Raises:
            InvalidInput: the file exists and `force` is off.
        """
        from PIL.PngImagePlugin import PngInfo

        from sana.engine.images import write_atomically
        from sana.engine.metadata import XMP_PACKET

        image, info = self.image(str(model.get("name", ""))), PngInfo()
        if metadata != "none":
            info.add_itxt("XML:com.adobe.xmp", XMP_PACKET)
            info.add_text("Title", f"Contact sheet of {len(self.cells)} generated pictures")
        if metadata == "full":
            axes = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in self.axes)
            lines = [*self.prompts, axes, ", ".join(filter(None, [f"model {model.get('name', '')}", self.seed]))]
            info.add_itxt("Description", "\n".join(lines))
            info.add_text("Software", f"sanakit {model.get('sanakit', '')}".strip())
        write_atomically(path, lambda file: image.save(file, format="PNG", pnginfo=info, optimize=True), force=force)

    def image(self, model: str) -> "Image":
        """Return the sheet: the first axis runs to the right, the others down, the second fastest."""
        from PIL import Image, ImageDraw

        columns, rows = self._grid()
        alone = len(self.axes) == 1
        left = MARGIN if alone else MARGIN + max(_width(line) for _, lines in rows for line in lines) + 2 * GAP
        size = (max((image.width for image in self.cells.values()), default=self.side),
                max((image.height for image in self.cells.values()), default=self.side))  # fmt: skip
        width = max(left + len(columns) * (size[0] + GAP) - GAP + MARGIN, 480)
        title = _wrapped(self._title(), width - 2 * MARGIN)
        top = MARGIN + len(title) * (TITLE + GAP) + LINE + 2 * GAP + (0 if alone else 2 * LINE)
        step = size[1] + GAP + (LINE + GAP if alone else 0)
        sheet = Image.new("RGB", (width, top + len(rows) * step + MARGIN), PAPER)
        draw = ImageDraw.Draw(sheet)
        for i, line in enumerate(title):
            draw.text((MARGIN, MARGIN + i * (TITLE + GAP)), line, INK, font(TITLE))
        notes = " · ".join(filter(None, [model, self.seed, f"{len(self.cells)} pictures", "generated"]))
        draw.text((MARGIN, MARGIN + len(title) * (TITLE + GAP)), notes, FAINT, font(TEXT))
        if not alone:
            draw.text((left, top - 2 * LINE - GAP), _spoken(self.axes[0][0]), FAINT, font(TEXT))
        for (r, (key, lines)), (c, column) in itertools.product(enumerate(rows), enumerate(columns)):
            x, y = left + c * (size[0] + GAP), top + r * step
            point = self._point(key, column, r, c)
            if not alone and r == 0:
                _centred(draw, column, x, y - LINE - GAP // 2, size[0])
            if not alone and c == 0:
                _right(draw, lines, left - 2 * GAP, y, size[1])
            cell = self.cells.get(point)
            if cell is not None:
                sheet.paste(cell, (x + (size[0] - cell.width) // 2, y + (size[1] - cell.height) // 2))
                if alone:
                    _centred(draw, f"{_spoken(self.axes[0][0])} {point[0]}", x, y + size[1] + GAP // 2, size[0])
        return sheet

    def _grid(self) -> tuple[list[str], list[tuple[tuple[str, ...], list[str]]]]:
        """Return the labels of the columns, and of each row its place on the other axes and the lines beside it."""
        (_, first), others = self.axes[0], self.axes[1:]
        if not others:
            return list(first[:MOST_COLUMNS]), [((str(i),), []) for i in range(-(-len(first) // MOST_COLUMNS))]
        slow = [*others[1:], others[0]]
        rows: list[tuple[tuple[str, ...], list[str]]] = []
        for combination in itertools.product(*(labels for _, labels in slow)):
            lines = [f"{_spoken(name)} {label}" for (name, _), label in zip(slow, combination, strict=True)]
            rows.append(((combination[-1], *combination[:-1]), lines))
        return list(first), rows

    def _point(self, key: tuple[str, ...], column: str, row: int, number: int) -> tuple[str, ...]:
        if len(self.axes) > 1:
            return (column, *key)
        place = row * MOST_COLUMNS + number
        return (self.axes[0][1][place] if place < len(self.axes[0][1]) else "",)

    def _title(self) -> str:
        if len(self.prompts) > 1:
            return f"{len(self.prompts)} prompts"
        words = slug(self.prompts[0]).replace("-", " ")
        return next((text for text in (self.prompts[0], words) if drawable(text)), "one prompt")


def _axes(order: Order) -> list[tuple[str, list[str]]]:
    """Return the axes of the sheet and their labels: those of the sweep, then of several seeds, then of prompts."""
    axes = [(axis.field, list(axis.labels)) for axis in order.axes]
    seeds = dict.fromkeys(str(seed) for seed in order.seeds)
    if len(seeds) > 1 and "seed" not in dict(axes):
        axes.append(("seed", list(seeds)))
    prompts = list(dict.fromkeys(job.request.prompt for job in order.jobs))
    if len(prompts) > 1:
        axes.append(("prompt", [_name(i, prompts) for i in range(len(prompts))]))
    return axes


def _label(job: Job, seed: int, name: str, prompts: Sequence[str]) -> str:
    if name == "prompt":
        return _name(prompts.index(job.request.prompt), prompts)
    return str(seed) if name == "seed" else job.point[name]


def _name(i: int, prompts: Sequence[str]) -> str:
    """Return what a prompt is called beside its row: its number, and its beginning where the font has the letters."""
    words = prompts[i] if drawable(prompts[i]) else slug(prompts[i]).replace("-", " ")
    return f"{i + 1}: {textwrap.shorten(words, 28, placeholder='…')}" if drawable(words) else f"{i + 1}"


def _spoken(field: str) -> str:
    return field.replace("_", " ")


def drawable(text: str) -> bool:
    """Tell whether Pillow's own font has all the letters."""
    return all(" " <= mark < "\u0180" or mark in "…–—‘’“”" for mark in text)


def font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(text: str) -> int:
    return int(font(TEXT).getlength(text)) + 1


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, int(width / (TITLE * 0.52))), max_lines=3, placeholder=" …") or [""]


def _centred(draw: "ImageDraw", text: str, x: int, y: int, width: int) -> None:
    draw.text((x + width // 2, y), text, INK, font(TEXT), anchor="ma")


def _right(draw: "ImageDraw", lines: Sequence[str], x: int, y: int, height: int) -> None:
    start = y + (height - len(lines) * LINE) // 2
    for i, line in enumerate(lines):
        draw.text((x, start + i * LINE), line, INK, font(TEXT), anchor="ra")
