"""What the tests of the command share."""

import os
from pathlib import Path

import pytest
from command import Said, Sana


@pytest.fixture
def sana(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sana:
    """Run the command in this process, in an empty folder."""
    from sana.apps.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
    for variable in [name for name in os.environ if name.startswith("SANA_")]:
        monkeypatch.delenv(variable)

    def run(*words: str) -> Said:
        code = main(words)
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def draw(sana: Sana, tiny_folder: Path) -> Sana:
    """`sana ... -m TINY`, two steps unless said otherwise."""
    given = {"--steps", "--sweep", "--prompt-file", "--config"}
    return lambda *words: sana(*words, "-m", str(tiny_folder), *(() if given & set(words) else ("--steps", "2")))


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loading of a model fail the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sana.engine.parts.load", load)
