"""`report.html` of a run: curves, previews and settings on one page, which needs no network and no script."""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.checkpoints.storage import publish
from sana.training.curve import Points, read_lines, read_series

NAME = "report.html"
SHOWN_PREVIEWS = 12
WIDTH, HEIGHT = 520, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26
MAX_POINTS = 400


def write_report(folder: Path, tables: Mapping[str, Any], best: Mapping[str, Any]) -> None:
    """Renew the page of the run in `folder`; `best` is where the watched figure was best.

    Errors: OSError naming the file.
    """
    lines = read_lines(folder / "metrics.jsonl")
    text = _page(folder, tables, best, lines, read_series(folder / "metrics.jsonl"))
    publish(folder / NAME, lambda beside: beside.write_text(text, encoding="utf-8"))


def _page(
    folder: Path,
    tables: Mapping[str, Any],
    best: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    series: Mapping[str, Points],
) -> str:
    title = f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name
    steps, last = int(tables["run"]["steps"]), lines[-1]["step"] if lines else 0
    share = min(1.0, last / steps)
    kind = str(tables["objective"]).replace("_", " ")
    return _HTML.format(
        title=html.escape(title),
        kind=html.escape(kind),
        percent=f"{100 * share:.0f}",
        state=f"step {last:,} of {steps:,}" if last < steps else f"finished, {steps:,} steps",
        tiles="".join(_tile(name, value) for name, value in _tiles(lines, best)),
        charts="".join(_chart(name, points, best) for name, points in series.items()),
        previews=_previews(folder),
        settings="".join(_table(name, table) for name, table in tables.items() if isinstance(table, Mapping)),
    )


def _tiles(lines: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    timed = [line for line in lines if line.get("samples") and line.get("seconds")]
    if timed:
        speed = sorted(line["samples"] / line["seconds"] for line in timed)[len(timed) // 2]
        yield "samples per second", f"{speed:.3g}"
    if timed and "loss" in timed[-1]:
        yield "last loss", f"{timed[-1]['loss']:.4g}"
    if best:
        yield f"best {_words(best['name'])}", f"{best['figure']:.4g}"
        yield "at step", f"{best['step']:,}"


def _tile(name: str, value: str) -> str:
    return f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _chart(name: str, points: Points, best: Mapping[str, Any]) -> str:
    """One series as a picture: its course, its ends in words, and a mark where it was best."""
    logarithmic = name == "loss" and min(value for _, value in points) > 0
    values = [math.log10(value) if logarithmic else value for _, value in points]
    low, high = min(values), max(values)
    ticks = _log_ticks(low, high) if logarithmic else _ticks(low, high)
    low, high = min(low, *ticks), max(high, *ticks)
    first, last = points[0][0], points[-1][0]

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / ((last - first) or 1)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1)

    parts = []
    for tick in ticks:
        _, y = at(first, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{10**tick:.3g}" if logarithmic else f"{tick:.4g}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((last, "start"),):
        x, _ = at(step, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:,.0f}</text>')
    stride = -(-len(points) // MAX_POINTS)
    every = [*list(zip(points, values, strict=True))[:-1:stride], (points[-1], values[-1])]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(step, value) for (step, _), value in every))
    parts.append(f'<polyline points="{path}"/>')
    dots = [at(step, value) for (step, _), value in every] if len(points) <= 40 else [at(last, values[-1])]
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots]
    marks = [at(step, value) for (step, _), value in zip(points, values, strict=True) if step == best.get("step")]
    if name == best.get("name") and marks:
        parts.append(f'<circle class="best" cx="{marks[-1][0]:.1f}" cy="{marks[-1][1]:.1f}" r="6"/>')
    label = html.escape(_words(name))
    notes = ("smoothed, " if name == "loss" else "held out, ") + ("logarithmic" if logarithmic else "linear")
    ends = f"{points[0][1]:.4g} to {points[-1][1]:.4g}"
    return (
        f"<figure><figcaption><b>{label}</b> <span>{notes}</span><output>{ends}</output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}: {ends}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    start = math.floor(low / step + 1e-9)
    return [round(k * step, 12) for k in range(start, math.ceil(high / step - 1e-9) + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """The logarithms of some of 1, 2, 5, 10, 20 ... around a range."""
    whole = range(math.floor(low), math.ceil(high) + 1)
    if high - low > 3:
        return [float(k) for k in whole]
    fine = [k + math.log10(m) for k in whole for m in (1, 2, 5)]
    inside = [tick for tick in fine if low - 0.31 <= tick <= high + 0.31]
    return inside or [low]


def _previews(folder: Path) -> str:
    """The newest preview large, and some of those before it."""
    pictures = sorted((folder / "previews").glob("*.png"))
    if not pictures:
        return ""
    stride = (len(pictures) - 1) / max(1, SHOWN_PREVIEWS - 1)
    chosen = pictures
    if len(pictures) > SHOWN_PREVIEWS:
        chosen = [pictures[round(i * stride)] for i in range(SHOWN_PREVIEWS)]
    shown = [_picture(path, "newest" if path == pictures[-1] else "") for path in reversed(chosen)]
    return f'<section><h2>Previews</h2><div class="previews">{"".join(shown)}</div></section>'


def _picture(path: Path, kind: str) -> str:
    words = f"step {int(path.stem):,}" if path.stem.isdigit() else path.stem
    source = f"previews/{html.escape(path.name)}"
    return (
        f'<figure class="{kind}"><a href="{source}"><img src="{source}" alt="Preview at {words}" loading="lazy"></a>'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _table(name: str, table: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for key, value in table.items()
    )
    return f"<details><summary>[{html.escape(name)}]</summary><table>{rows}</table></details>" if rows else ""


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #22252b; --soft: #6c717b; --line: #e4e2dd;
  --blue: #225cd0; --gold: #c98a00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --card: #1e2126; --ink: #e8e6e1; --soft: #9a9fa9; --line: #31353c; --blue: #7aa5ff;
    --gold: #f0b93a; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1120px; padding: 40px 24px 72px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 40px 0 12px; }}
p {{ color: var(--soft); margin: 4px 0 14px; }}
progress {{ width: 100%; height: 6px; border: 0; border-radius: 3px; overflow: hidden; background: var(--line);
  accent-color: var(--blue); }}
progress::-webkit-progress-bar {{ background: var(--line); }}
progress::-webkit-progress-value {{ background: var(--blue); }}
dl {{ display: flex; flex-wrap: wrap; gap: 12px 44px; margin: 18px 0 0; }}
dt {{ color: var(--soft); font-size: 13px; }}
dd {{ margin: 0; font-size: 22px; font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }}
figure {{ margin: 0; }}
.charts figure {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px 10px; }}
.charts figcaption {{ display: flex; gap: 8px; align-items: baseline; margin-bottom: 6px; }}
.charts span, .charts output {{ color: var(--soft); font-size: 13px; }}
.charts output {{ margin-left: auto; font-variant-numeric: tabular-nums; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }}
.grid {{ stroke: var(--line); }}
polyline {{ fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
circle {{ fill: var(--blue); }}
.best {{ fill: none; stroke: var(--gold); stroke-width: 2.5; }}
.previews {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 16px; }}
.previews .newest {{ grid-column: 1 / -1; }}
.previews img {{ display: block; width: 100%; border-radius: 8px; border: 1px solid var(--line); }}
.previews .newest img {{ max-width: 100%; width: auto; min-width: min(100%, 512px); max-height: 560px; }}
.previews figcaption {{ color: var(--soft); font-size: 13px; margin-top: 4px; }}
details {{ border-top: 1px solid var(--line); padding: 8px 0; }}
summary {{ cursor: pointer; font-family: ui-monospace, monospace; font-size: 14px; }}
table {{ border-collapse: collapse; margin: 8px 0 4px; font: 13px/1.5 ui-monospace, monospace; }}
th {{ text-align: left; font-weight: normal; color: var(--soft); padding: 1px 24px 1px 0; vertical-align: top; }}
td {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{kind} · {state}</p>
<progress value="{percent}" max="100" aria-label="{percent} percent done"></progress>
<dl>{tiles}</dl>
</header>
<section><h2>Curves</h2><div class="charts">{charts}</div></section>
{previews}
<section><h2>Settings</h2>{settings}</section>
</body>
</html>
"""
