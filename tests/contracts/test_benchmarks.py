"""The benchmarks run, and their arithmetic is right."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
WITHOUT_QUICK = {"nano_sweep", "harness", "random_models"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in WITHOUT_QUICK)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness() -> Any:
    return script("harness")


def test_the_readmes_sweep_is_the_report_that_was_measured() -> None:
    sweep = script("nano_sweep")
    rows = json.loads(sweep.REPORT.read_text(encoding="utf-8"))
    assert len(rows) == len(sweep.SAMPLERS) * len(sweep.GUIDANCE) * len(sweep.STEPS)
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for table in sweep.tables(rows).split("\n\n"):
        assert table in readme


def test_ratios_are_of_pairs_and_shares_of_the_ceiling(harness: Any) -> None:
    ours = harness.Timing(cpu=(1.0, 2.0, 4.0), wall=(1.0, 1.0, 1.0), ceiling=(8.0, 4.0, 2.0), flops=4.0, peak=3 << 20)
    theirs = harness.Timing(cpu=(3.0, 4.0, 12.0), wall=(1.0, 1.0, 1.0))
    assert ours.median == 2.0
    assert ours.ratio(theirs) == 3.0
    assert ours.share == 0.5
    lines = harness.table({"ours": ours, "theirs": theirs}, peers=["theirs"], errors={"ours": 0.5}).splitlines()
    assert lines[2] == "| ours | 2.000 (1.000 - 4.000) | 1.000 | 3.00x | 50% | 3 MiB | 5.0e-01 |"
    assert lines[3] == "| theirs | 4.000 (3.000 - 12.000) | 1.000 | 1 | - | - | - |"


def test_cases_take_turns_and_warm_ups_do_not_count(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CEILING_SECONDS", 0.0)
    calls: list[str] = []
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-6  # no product of the ceiling takes no time at all
        return now

    def case(name: str, seconds: float) -> Any:
        def work() -> None:
            nonlocal now
            calls.append(name)
            now += seconds if len(calls) > 2 else 5 * seconds

        return work

    monkeypatch.setattr(harness, "time", SimpleNamespace(process_time=clock, perf_counter=clock))

    timings = harness.measure({"a": case("a", 0.01), "b": case("b", 0.02)}, 3, warmups=1)
    assert calls == ["a", "b"] * 4
    assert len(timings["a"].cpu) == 3
    assert timings["a"].cpu == pytest.approx([0.01] * 3, rel=1e-3)
    assert timings["a"].ratio(timings["b"]) == pytest.approx(2, rel=1e-3)


def test_every_script_is_listed_with_its_command() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`python benchmarks/(\w+)\.py", text)) == {*SCRIPTS, "nano_sweep"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_and_prints_a_table(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"{script}.py", "--quick"], cwd=FOLDER, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| --- \|", done.stdout.replace("|---", "| --- "), re.MULTILINE), done.stdout
