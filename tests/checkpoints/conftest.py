"""The fake hub and a saved model as fixtures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, fake_hub
from huggingface_hub import constants
from tiny_pipeline import transformer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub; the client may go online, but only over plain HTTP and without telemetry or pauses."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with fake_hub() as served:
        yield served


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny transformer in a folder."""
    transformer().save_pretrained(tmp_path)
    return tmp_path
