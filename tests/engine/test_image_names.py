"""Who gets a file's name: two writers at once, file systems without hard links, and what a picture may be called."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sana.engine.images import save_png, write_atomically
from sana.errors import InvalidInput, NotWritten


def test_a_picture_is_called_png(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"a\.jpg does not end in \.png"):
        save_png(None, 0, tmp_path / "a.jpg")  # type: ignore[arg-type]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_somebody_takes_meanwhile_is_his(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "a.png"
    write_atomically(target, lambda file: file.write(b"first"))
    assert target.read_bytes() == b"first"
    target.unlink()

    def meanwhile(file: Any) -> None:
        file.write(b"mine")
        target.write_bytes(b"his")

    with pytest.raises(InvalidInput, match="exists already and is not overwritten"):
        write_atomically(target, meanwhile)
    assert target.read_bytes() == b"his"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_temporary_file_that_vanishes_gives_nobody_its_name(tmp_path: Path) -> None:
    def vanish(file: Any) -> None:
        for path in tmp_path.glob(".a.png.*"):
            path.unlink()

    with pytest.raises(NotWritten, match=r"a\.png could not be written"):
        write_atomically(tmp_path / "a.png", vanish)
    assert list(tmp_path.iterdir()) == []


def test_a_long_name_in_chinese_is_a_name(tmp_path: Path) -> None:
    target = tmp_path / f"{'猫' * 81}.png"  # 247 bytes of the 255 that file systems allow
    write_atomically(target, lambda file: file.write(b"cat"))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"The folder .*gone does not exist\. Create it first\."):
        write_atomically(tmp_path / "gone" / "a.png", lambda file: file.write(b"cat"))
    assert list(tmp_path.iterdir()) == []
