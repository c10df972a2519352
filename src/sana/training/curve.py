"""The loss curve of a run, drawn from its log: a picture to look at while training."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sana.checkpoints.storage import naming, write_all

WIDTH, HEIGHT, SCALE = 960, 420, 2
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 44
INK, GRID, PAPER = (40, 44, 52), (222, 222, 226), (255, 255, 255)
PAINTS = ((34, 92, 208), (214, 40, 44), (38, 150, 72), (126, 54, 168), (242, 124, 18), (118, 72, 42))
SMOOTHING = 0.9
Points = list[tuple[float, float]]


def append_line(metrics: Path, line: Mapping[str, object]) -> None:
    """Add a line to a log; what a killed run left of its last line stays a line of its own.

    Errors: OSError naming the log, which is then as it was.
    """
    with naming(metrics), metrics.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"
        try:
            write_all(file, (b"\n" if torn else b"") + json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
        except OSError:
            file.truncate(end)
            raise


def _finite(value: Any) -> Any:
    """Return what JSON can hold, with null for numbers that are none."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a log, one for each step, in the order of the steps.

    Later lines replace earlier ones; held-out figures that were made up for, without a loss, join the line before.
    """
    lines: dict[int, dict[str, Any]] = {}
    for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            numbers = {name: _number(line[name]) for name in ("loss", "seconds", "samples") if name in line}
            held_out = {str(name): _number(value) for name, value in (line.get("held_out") or {}).items()}
            if numbers.get("loss") is not None or held_out:
                step = int(line["step"])
                before = {} if "loss" in numbers else lines.get(step, {})
                lines[step] = {**line, **numbers, **before, "step": step, "held_out": held_out}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
    return [lines[step] for step in sorted(lines)]


def read_series(metrics: Path) -> dict[str, Points]:
    """Series name to (step, value): the loss, smoothed, and every held-out figure."""
    series: dict[str, Points] = {"loss": []}
    smooth: float | None = None
    for line in read_lines(metrics):
        step, loss = line["step"], line.get("loss", math.nan)
        if math.isfinite(loss):
            smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
            series["loss"].append((step, smooth))
        for name, value in line["held_out"].items():
            if math.isfinite(value):
                series.setdefault(name, []).append((step, value))
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
    last = max((points[-1][0] for points in series.values()), default=1) or 1

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
