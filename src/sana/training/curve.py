"""The loss curve of a run, drawn from its log: a picture to look at while training."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SCALE = 960, 420, 2
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 44
INK, GRID, PAPER = (40, 44, 52), (222, 222, 226), (255, 255, 255)
PAINTS = ((34, 92, 208), (214, 40, 44), (38, 150, 72), (126, 54, 168), (242, 124, 18), (118, 72, 42))
SMOOTHING = 0.9
Points = list[tuple[float, float]]


def read_series(metrics: Path) -> dict[str, Points]:
    """Series name to (step, value): the loss, smoothed, and every held-out figure. Later lines replace earlier ones."""
    lines: dict[int, dict[str, object]] = {}
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[int(line["step"])] = line
    series: dict[str, Points] = {"loss": []}
    smooth: float | None = None
    for step in sorted(lines):
        line = lines[step]
        loss = float(line["loss"])  # type: ignore[arg-type]
        if math.isfinite(loss):
            smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
            series["loss"].append((step, smooth))
        held_out = line.get("held_out")
        if isinstance(held_out, dict):
            for name, value in held_out.items():
                series.setdefault(name, []).append((step, float(value)))
    return {name: points for name, points in series.items() if points}


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def draw_curve(metrics: Path, title: str) -> Image.Image:
    """Every series over the steps, each scaled to its own range, with its first and last value beside it.

    The loss is drawn on a logarithmic scale. Raises OSError when there is no log.
    """
    series = read_series(metrics)
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13 * SCALE)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    last = max((points[-1][0] for points in series.values()), default=1)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * SCALE, y * SCALE

    for tick in range(5):
        x = LEFT + (right - LEFT) * tick / 4
        draw.line([at(x, TOP), at(x, bottom)], GRID, SCALE)
        draw.text(at(x, bottom + 8), f"{last * tick / 4:.0f}", INK, font, anchor="ma")
        draw.line([at(LEFT, TOP + (bottom - TOP) * tick / 4), at(right, TOP + (bottom - TOP) * tick / 4)], GRID, SCALE)
    draw.text(at(LEFT, 12), f"{title}: step {last:.0f}; each curve on its own scale", INK, font)
    for number, (name, points) in enumerate(series.items()):
        paint = PAINTS[number % len(PAINTS)]
        logarithmic = name == "loss" and min(value for _, value in points) > 0
        values = [math.log(value) if logarithmic else value for _, value in points]
        low, high = _bounds(values)
        line = [
            at(LEFT + (right - LEFT) * step / last, bottom - (bottom - TOP) * (value - low) / (high - low))
            for (step, _), value in zip(points, values, strict=True)
        ]
        if len(line) > 1:
            draw.line(line, paint, 2 * SCALE, joint="curve")
        for x, y in line[-1:] if name == "loss" else line:
            draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], paint)
        top = TOP + 38 * number
        draw.text(at(right + 12, top), f"{name}{' (log)' if logarithmic else ''}", paint, font)
        draw.text(at(right + 12, top + 16), f"{points[0][1]:.3g} to {points[-1][1]:.3g}", INK, font)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
