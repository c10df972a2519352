"""Model folders that are wrong: every fault is named in one sentence, nothing is loaded in part, nothing is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import FILE, INDEX, TRANSFORMER, load, same, transformer

from sana.errors import CheckpointError, ModelNotFound


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, value)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: tensors.pop("proj_out.bias"),
            r"do not fit its config.json: 1 missing, first 'proj_out.bias'\.",
        ),
        (put("extra", torch.zeros(1)), rf"1 unexpected, first 'extra' in {FILE}\."),
        (
            rename("proj_out.bias", "proj_out.bais"),
            r"1 missing, first 'proj_out.bias'; 1 unexpected, first 'proj_out.bais'",
        ),
        (
            put("proj_out.bias", torch.zeros(5)),
            rf"1 of a wrong shape, first 'proj_out.bias' in {FILE}: \[5\] where the config asks for \[4\]",
        ),
        (put("proj_out.bias", torch.tensor([0, 0, torch.nan, 0])), r"'proj_out.bias' in .* holds NaN or infinity"),
        (put("proj_out.bias", torch.tensor([0, 0, -torch.inf, 0])), r"'proj_out.bias' in .* holds NaN or infinity"),
    ],
)
def test_wrong_tensors_are_named(saved: Path, change: Callable[[Any], object], says: str) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_every_tensor_is_checked_for_nan(saved: Path) -> None:
    good = load_file(saved / FILE)
    for name in list(good)[::5]:
        edit(saved, lambda tensors, name=name: tensors[name].view(-1)[-1:].fill_(torch.nan))
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            load(saved)
        save_file(good, saved / FILE)


def test_overflow_of_the_wanted_dtype_is_told_apart(saved: Path) -> None:
    edit(saved, put("proj_out.bias", torch.tensor([0.0, 0.0, 7e4, 0.0])))
    with pytest.raises(CheckpointError, match=r"'proj_out.bias' .* does not fit into float16: choose"):
        load(saved, torch_dtype=torch.float16)
    load(saved, torch_dtype=torch.bfloat16)


def test_header_flips_never_load_silently(saved: Path) -> None:
    whole = bytearray((saved / FILE).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, 61):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 7)
        (saved / FILE).write_bytes(damaged)
        try:
            again = load(saved)
        except CheckpointError:
            continue
        assert same(again, transformer()), f"bit flip at {position} changed the model"


def test_pickle_under_a_safetensors_name(saved: Path) -> None:
    torch.save({"a": torch.zeros(1)}, saved / FILE)
    with pytest.raises(CheckpointError, match="a pickle or an archive under a safetensors name; it is not opened"):
        load(saved)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickles_are_refused_unless_allowed_and_never_run(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*use_safetensors=False"
    ):
        load(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.bin"
    for content in ({"proj_out.bias": Canary(tmp_path / "canary")}, [1], Canary(tmp_path / "canary")):
        torch.save(content, file)
        with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin"):
            load(tmp_path, use_safetensors=False)
        with pytest.raises(CheckpointError, match="only pickled"):
            load(tmp_path)
    torch.save(transformer().state_dict(), file, _use_new_zipfile_serialization=False)
    assert same(load(tmp_path, use_safetensors=False), transformer())
    assert not (tmp_path / "canary").exists()


def test_wrong_shards(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    aside = tmp_path / "aside"
    shutil.move(tmp_path / shards[1], aside)
    with pytest.raises(CheckpointError, match=rf"lists 2 files of which 1 are missing, first {shards[1]}"):
        load(tmp_path)
    shutil.copy(tmp_path / shards[0], tmp_path / shards[1])
    with pytest.raises(CheckpointError, match=rf"is in both {shards[0]} and {shards[1]}"):
        load(tmp_path)
    shutil.move(aside, tmp_path / shards[1])
    for name in ("../secret.safetensors", "/etc/passwd", "..\\x"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="points outside its folder"):
            load(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)


def test_missing_files_and_variants(saved: Path) -> None:
    says = (
        r"^There are no weights in .*leave variant out.*\(Error no file named diffusion_pytorch_model.fp16.bin found in"
    )
    with pytest.raises(OSError, match=says):
        load(saved, variant="fp16")
    shutil.move(saved / FILE, saved / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(
        OSError, match=r"no diffusion_pytorch_model.safetensors: pass variant='bf16' to load the variant"
    ):
        load(saved)
    (saved / "diffusion_pytorch_model.bf16.safetensors").unlink()
    says = (
        r"no diffusion_pytorch_model.safetensors: check .*\(Error no file named diffusion_pytorch_model.bin found in "
    )
    with pytest.raises(OSError, match=says):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config.json in .*its saving was interrupted"):
        load(saved)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("[" * 100_000, "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        ({"num_layers": 1_000_000}, "asks for 1000000 num_layers but the files hold only"),
        ({"num_layers": -1}, "describes no model that can be built: .*num_layers is -1"),
        ({"caption_channels": 1 << 40}, "sets caption_channels to 1099511627776, which no real model has"),
        ({"num_attention_heads": "two"}, "describes no model that can be built: .*num_attention_heads"),
        ({"num_attention_heads": 3, "cross_attention_dim": 24}, "of a wrong shape"),
        ({"_class_name": "FluxTransformer2DModel"}, "is the configuration of FluxTransformer2DModel"),
    ],
)  # fmt: skip
def test_wrong_configurations(saved: Path, config: Any, says: str) -> None:
    if isinstance(config, dict):
        config = json.dumps({**TRANSFORMER, **config})
    (saved / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(CheckpointError, match=says):
        load(saved)
