"""GenEval scores of the built-in model over samplers, guidance scales and steps, as the README shows them.

    python benchmarks/nano_sweep.py                 # measures what the report lacks, then prints the tables
    python benchmarks/nano_sweep.py --images 4      # more pictures per prompt: narrower intervals, more hours

The report, `recipes/nano/reports/sweep.json`, is written after every setting, so a stopped run goes on where it was.
"""

import argparse
import itertools
import json
import sys
import time
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch

from sana.data.cutout_captions import LANGUAGES
from sana.engine.images import write_atomically
from sana.engine.parts import Parts, load
from sana.evaluation.drawing import drawer, resolve
from sana.evaluation.geneval import evaluate
from sana.evaluation.prompts import TASKS
from sana.evaluation.scores import table

REPORT = Path(__file__).parents[1] / "recipes" / "nano" / "reports" / "sweep.json"
SAMPLERS = ("flow-dpm", "flow-euler")
GUIDANCE = (1.0, 2.0, 4.5)
STEPS = (4, 8, 20)


def measure(parts: Parts, sampler: Any, guidance: float, steps: int, images: int) -> dict[str, Any]:
    """Return scores by task and language, and the CPU seconds of one picture (text, steps, decode, judging)."""
    order = resolve(parts, steps=steps, guidance=guidance, sampler=sampler)
    began = time.process_time()
    report = evaluate(drawer(parts, order), images=images)
    seconds = (time.process_time() - began) / (50 * len(TASKS) * images)
    scores = {task or "overall": report.score(task) for task in (*TASKS, None)}
    return {
        "sampler": sampler,
        "guidance": guidance,
        "steps": steps,
        "images": images,
        "scores": {task: score.to_dict() for task, score in scores.items()},
        "languages": {language: report.score(None, language).to_dict() for language in LANGUAGES},
        "cpu_seconds": round(seconds, 3),
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the two tables of the README: scores over settings, and tasks and languages over steps."""
    found = {(row["sampler"], row["guidance"], row["steps"]): row for row in rows}
    first = []
    for sampler, guidance in itertools.product(SAMPLERS, GUIDANCE):
        cells = [found.get((sampler, guidance, steps)) for steps in STEPS]
        shown = ["-" if cell is None else f"{cell['scores']['overall']['share']:.2f}" for cell in cells]
        first.append([sampler, f"{guidance:g}", *shown])
    second = []
    for key in ((s, 4.5, n) for s, n in itertools.product(SAMPLERS, STEPS)):
        if key in found:
            row = found[key]
            parts = [*row["scores"].values(), *row["languages"].values()]
            second.append([key[0], str(key[2]), *(f"{one['share']:.2f}" for one in parts)])
    heads = ["sampler", "guidance", *(f"{n} steps" for n in STEPS)]
    return f"{table(heads, first)}\n\n{table(['sampler', 'steps', *TASKS, 'overall', *LANGUAGES], second)}"


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Replace the report in one step."""
    text = json.dumps(rows, indent=1) + "\n"

    def write(file: BufferedWriter) -> None:
        file.write(text.encode())

    write_atomically(path, write, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1, help="pictures per prompt (default: 1)")
    parser.add_argument("--report", type=Path, default=REPORT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(chosen.report.read_text()) if chosen.report.exists() else []
    rows = [row for row in rows if row["images"] == chosen.images]
    parts = load("nano", device="cpu")
    for steps, guidance, sampler in itertools.product(STEPS, GUIDANCE, SAMPLERS):
        if any((r["sampler"], r["guidance"], r["steps"]) == (sampler, guidance, steps) for r in rows):
            continue
        rows.append(measure(parts, sampler, guidance, steps, chosen.images))
        save(rows, chosen.report)
        print(
            f"{sampler} guidance {guidance:g} steps {steps}: {rows[-1]['scores']['overall']['share']:.2f}",
            file=sys.stderr,
        )
    print(tables(rows))


if __name__ == "__main__":
    main()
