"""What the tests of the command share."""

from pathlib import Path

import pytest
from command import Said, Sana


@pytest.fixture
def sana(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sana:
    """Run the command in this process, in an empty folder."""
    from sana.apps.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Said:
        code = main(words)
        return Said(code, *capfd.readouterr())

    return run
