"""Things that are no safetensors under any name: recognised by content, refused in one sentence, never run."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import FILE, load, parts, same, transformer

from sana.checkpoints.folder import load_parts, save_parts
from sana.checkpoints.foreign import foreign
from sana.checkpoints.layout import MAX_JSON, read_json
from sana.checkpoints.tensors import read_header
from sana.errors import CheckpointError, InvalidInput


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def archives(canary: Path) -> dict[str, bytes]:
    """Return one canary in every wrapping that a checkpoint may come in."""
    raw = {f"protocol {number}": pickle.dumps(Canary(canary), protocol=number) for number in range(6)}
    inner = raw["protocol 2"]
    saved, legacy, zipped, tarred = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"proj_out.bias": Canary(canary)}, saved)
    torch.save({"proj_out.bias": Canary(canary)}, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", inner)
        archive.writestr("archive/version", "3")
    with tarfile.open(fileobj=tarred, mode="w") as tape:
        for name in ("pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(inner)
            tape.addfile(entry, io.BytesIO(inner))
    return {
        **raw,
        "torch.save": saved.getvalue(),
        "torch.save of old": legacy.getvalue(),
        "zip": zipped.getvalue(),
        "tar": tarred.getvalue(),
        "gzip": gzip.compress(inner),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(26) + inner,
    }


@pytest.mark.parametrize("name", [FILE, "diffusion_pytorch_model.bin"])
def test_no_pickle_runs_under_any_name(saved: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (saved / FILE).unlink()
    for kind, content in archives(canary).items():
        (saved / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}") as refused:
            load(saved)
        with pytest.raises(CheckpointError, match=rf"{name}") as tried:
            load(saved, use_safetensors=False)
        for error in (refused, tried):
            assert "\n" not in str(error.value), kind
        assert not canary.exists(), kind
    pickle.loads(archives(canary)["protocol 2"])
    assert canary.exists(), "the canary itself must sing"


def test_names_of_other_frameworks_are_never_opened(saved: Path, tmp_path: Path) -> None:
    content = archives(tmp_path / "canary")["torch.save"]
    for name in (
        "model.pth",
        "model.ckpt",
        "model.pkl",
        "pytorch_model.bin",
        "diffusion_pytorch_model.pt",
        ".metadata",
    ):
        (saved / name).write_bytes(content)
    assert same(load(saved), transformer())
    (saved / FILE).unlink()
    with pytest.raises(OSError, match="There are no weights in"):
        load(saved)
    with pytest.raises(OSError, match="There are no weights in"):
        load(saved, use_safetensors=False)
    with pytest.raises(InvalidInput, match="is a file; give the model folder"):
        load(saved / "model.pth")
    assert not (tmp_path / "canary").exists()


def test_the_text_encoder_s_folder_is_never_given_to_its_library(tmp_path: Path) -> None:
    """There it would follow adapters, distributed checkpoints (whose index is a pickle) and names in the config."""
    whole = parts()
    save_parts(tmp_path / "model", whole)
    folder, canary = tmp_path / "model" / "text_encoder", tmp_path / "canary"
    content = archives(canary)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "no/where", "peft_type": "LORA"})
    )
    (folder / "adapter_model.bin").write_bytes(content["torch.save"])
    (folder / "pytorch_model.bin").write_bytes(content["torch.save"])
    for name in ("distributed_checkpoint", "checkpoint"):
        (folder / name).mkdir()
        (folder / name / ".metadata").write_bytes(content["protocol 4"])
    (folder / ".metadata").write_bytes(content["protocol 4"])
    config = json.loads((folder / "config.json").read_text())
    hostile = {
        "transformers_weights": "pytorch_model.bin",
        "_attn_implementation": "no/kernel",
        "fusion_config": {"x": True},
    }
    (folder / "config.json").write_text(json.dumps({**config, **hostile}))
    loaded = load_parts(tmp_path / "model", only=("text_encoder",))["text_encoder"]
    assert same(loaded, whole["text_encoder"])
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64, "a Git LFS pointer, .*`git lfs pull`"),
        (b"<!DOCTYPE html><html><body>Sign in", "a web page, not a model"),
        (b"\n <html>", "a web page, not a model"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page, not a model"),
        (b"", " empty: delete it| not valid JSON"),
        (b"\0" * 4096, "damaged or cut short| not valid JSON"),
    ],
)
def test_pages_and_pointers_are_told_apart(saved: Path, content: bytes, says: str) -> None:
    good = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FILE} is.*({says})"):
        load(saved)
    (saved / FILE).write_bytes(good)
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json is.*({says})"):
        load(saved)


def test_an_unfinished_download_is_no_model(saved: Path) -> None:
    (saved / FILE).rename(saved / f"{FILE}.incomplete")
    with pytest.raises(OSError, match="There are no weights in"):
        load(saved)


def test_a_damaged_file_whose_length_looks_like_a_pickle_is_not_called_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((0x280).to_bytes(8, "little") + b"{" * 0x280)
    assert path.read_bytes().startswith(b"\x80\x02")
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        read_header(path)
    path.write_bytes((0x10280).to_bytes(8, "little") + b"{" * 0x10280)
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        read_header(path)
    assert foreign(b"\x80\x02}q\x00") is not None
    assert foreign(b"{}") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "is not valid JSON: NaN is no value"),
        ('{"a": 1, "a": 2}', "is not valid JSON: 'a' is there twice"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        ('{"a": ' * 100_000, "is not valid JSON"),
        ("{" + " " * MAX_JSON + "}", "has more than 16 MB"),
    ],
)
def test_json_is_bounded_and_strict(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json {says}"):
        read_json(path)
    path.write_text('{"least": -Infinity}')
    assert read_json(path) == {"least": -float("inf")}
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Is a directory"):
        read_json(path)
