"""What a start imports and costs: help needs no library, drawing none beside the ones it cannot do without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIBRARY = "import torch; from transformers import Gemma2Model"
"""The part of a start that no care of ours shortens; its cost is the unit of the others."""

DRAW = f"""
import json, sys, time
{LIBRARY}
library, known = time.process_time(), set(sys.modules)
from sana.apps.cli import main
code = main(["a red fish", "--seed", "1", "-q", "-o", sys.argv[1]])
new = sorted(name for name in set(sys.modules) - known)
print(json.dumps({{"code": code, "library": library, "whole": time.process_time(), "new": new}}))
"""

ALLOWED = {"PIL", "tqdm", "tokenizers", "safetensors", "huggingface_hub", "transformers", "torch", "numpy"}
FORBIDDEN = {"torch._inductor", "torch._dynamo", "torchvision", "diffusers", "accelerate", "sympy", "scipy", "sklearn"}


def child(code: str, *words: str, compiled: Path | None = None) -> Any:
    """Run a program on one thread and return its last line, read as JSON; its modules are compiled into a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if compiled is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(compiled)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def packages(modules: list[str]) -> set[str]:
    """Return the packages that are neither Python's nor ours."""
    tops = {name.partition(".")[0] for name in modules}
    return {top for top in tops if top not in sys.stdlib_module_names and top != "sana"}


def test_a_picture_costs_little_more_than_importing_the_language_model(tmp_path: Path) -> None:
    for attempt in range(6):  # one of them meets a moment when the machine is not too busy
        found = child(DRAW, str(tmp_path / f"{attempt}.png"))
        assert found["code"] == 0
        assert packages(found["new"]) <= ALLOWED
        assert not {name for name in found["new"] if name in FORBIDDEN}
        if found["whole"] <= 1.5 * found["library"]:
            return
    pytest.fail(f"{found['whole']:.2f} s of CPU, of which the library takes {found['library']:.2f}")


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["generate", "--help"], ["models"]])
def test_help_needs_no_library_and_no_quarter_of_a_second(words: list[str], tmp_path: Path) -> None:
    code = (
        "import contextlib, io, json, sys, time\n"
        "known = set(sys.modules)\n"
        "from sana.apps.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    code = main(json.loads(sys.argv[1]))\n"
        "new = sorted(set(sys.modules) - known)\n"
        "print(json.dumps({'code': code, 'new': new, 'cpu': time.process_time()}))"
    )
    seconds = []
    for _ in range(6):
        found = child(code, json.dumps(words), compiled=tmp_path)  # as pip leaves an installed package
        assert found["code"] == 0
        # The hub library's constants tell where downloads lie; nothing of it that talks to a network is imported.
        assert packages(found["new"]) <= ({"huggingface_hub"} if words == ["models"] else set())
        seconds.append(found["cpu"])
        if found["cpu"] < 0.25:
            return
    pytest.fail(f"{min(seconds):.2f} s of CPU")


def test_the_python_names_bring_no_transformers() -> None:
    code = (
        "import json, sys\nfrom sana import Parts, Request, SanaPipeline, generate, load, save_png\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    modules = set(child(code))
    assert not modules & (FORBIDDEN | {"transformers", "tokenizers", "bs4", "ftfy"})
