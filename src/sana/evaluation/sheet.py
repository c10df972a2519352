"""A contact sheet: rows of small pictures with a mark and a caption each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, MARGIN = 168, 14, 28
HEAD, LINE, LINES = 30, 15, 2
PAPER, INK, FAINT = (252, 251, 248), (38, 38, 42), (128, 128, 134)
RIGHT, WRONG = (32, 140, 80), (206, 52, 48)
SCALE = 2
"""Drawn this much larger and reduced, so that marks are smooth."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture, uint8 [H, W, 3], with a tag and a caption in plain letters, and whether it is right."""

    picture: NDArray[np.uint8]
    tag: str
    caption: str
    right: bool | None = None
    """None where there is nothing to judge."""


def draw_sheet(rows: Mapping[str, Sequence[Panel]]) -> Image.Image:
    """Draw one row of panels under each heading."""
    columns = max(len(panels) for panels in rows.values())
    step = HEAD + SIDE + LINES * LINE + MARGIN
    width, height = 2 * MARGIN + columns * (SIDE + GAP) - GAP, MARGIN + len(rows) * step
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (heading, panels) in enumerate(rows.items()):
        top = MARGIN + row * step
        pen.text((MARGIN, top), heading, INK, ImageFont.load_default(17))
        for column, panel in enumerate(panels):
            _draw_panel(sheet, panel, MARGIN + column * (SIDE + GAP), top + HEAD)
    return sheet


def _draw_panel(sheet: Image.Image, panel: Panel, left: int, top: int) -> None:
    picture = Image.fromarray(panel.picture).resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.LANCZOS)
    if panel.right is not None:
        _mark(picture, right=panel.right)
    sheet.paste(picture.reduce(SCALE), (left, top))
    font = ImageFont.load_default(12)
    text = ImageDraw.Draw(sheet)
    text.text((left, top + SIDE + 4), panel.tag, FAINT, font)
    indent = int(font.getlength(panel.tag + "  ")) if panel.tag else 0
    for number, line in enumerate(_wrapped(panel.caption, font, SIDE - indent)[:LINES]):
        text.text((left + indent, top + SIDE + 4 + number * LINE), line, INK, font)


def _mark(picture: Image.Image, *, right: bool) -> None:
    """Draw a tick or a cross into the upper right corner."""
    colour = RIGHT if right else WRONG
    centre, radius = (SIDE - 14) * SCALE, 9 * SCALE
    pen = ImageDraw.Draw(picture)
    pen.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), colour, PAPER, SCALE)
    tick = ((-0.45, 0.02), (-0.12, 0.36), (0.46, -0.34)) if right else ((-0.36, -0.36), (0.36, 0.36))
    cross = () if right else ((-0.36, 0.36), (0.36, -0.36))
    for stroke in (tick, cross):
        points = [(centre + radius * x, centre + radius * y) for x, y in stroke]
        if points:
            pen.line(points, PAPER, 2 * SCALE, joint="curve")


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
