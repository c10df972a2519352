"""The README's commands are run as they stand, but for what would take minutes, which is made smaller here."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from sana.apps.cli import main
from sana.cards import CARDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "evaluate geneval": ["--prompts", "1", "--images", "1", "--steps", "1"],
    "evaluate control": ["--scenes", "2", "--steps", "1"],
    "train": ["--run.steps", "2", "--run.evaluate_every", "2"],
}
NOT_HERE = {
    "recipes/nano/*.toml": "rebuilds the three models in hours; tests/training runs its stages small",
    "pull": "needs the hub; tests/checkpoints/test_library.py runs it against a hub of its own",
    "Sana_1600M_1024px.pth": "a file of 3 GB; tests/apps/test_convert_command.py converts small ones",
    "my-model.safetensors": "a file of the reader's; tests/apps/test_info_and_models.py",
    "my-style.safetensors": "a file of the reader's; tests/apps/test_lora_command.py",
}


def needs_the_hub(words: list[str]) -> bool:
    """Tell whether a command names a model that is not built in; tests/checkpoints runs such against its own hub."""
    named = [CARDS.get(model) for flag, model in pairwise(words) if flag == "-m"]
    return any(card is None or card.folder is None for card in named)


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield lines that call the command, and their words behind its name; none for lines that only a shell can run."""
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] in (["sana"], ["printf"]):
                yield line, [] if {"|", ">"} & set(words) else words[1:]


def run_in_shell(line: str) -> int:
    """Run a line as a user would, with the command of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", "-c", line], env=variables, check=False).returncode


def test_every_command_of_the_readme_works_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 256, 120))
    mask.save("sky.png")
    ran = 0
    for line, words in commands():
        if any(word in NOT_HERE for word in words) or needs_the_hub(words):
            continue
        smaller = SMALLER.get(" ".join(words[:2]), SMALLER.get(words[0], [])) if words else []
        code = main([*words, *smaller]) if words else run_in_shell(line)
        assert code == 0, (line, capsys.readouterr().err)
        ran += 1
    assert ran >= 33
    folders = {"pictures": 4, "sweep": 7, "fish": 2, "two": 2, "eight": 8, "edits": 5, "many": 2}
    assert {name: len(list((tmp_path / name).glob("*.png"))) for name in folders} == folders


def test_the_readmes_python_draws_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "fish.png").stat().st_size > 1000


def test_what_the_readme_names_exists() -> None:
    for path in re.findall(r"`((?:recipes|src|tests)/[\w/.*-]+)`", README) + re.findall(r"\]\((\S+\.png)\)", README):
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"`((?:apps|engine|text|flow|models)/[\w/]+\.py)`", README):
        assert (ROOT / "src" / "sana" / module).is_file(), module
    assert len(re.findall(r"^python3 -m venv", README, flags=re.MULTILINE)) == 2
