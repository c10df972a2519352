"""Original files that are cut, flipped, lying or out to run code: one sentence naming the file, and nothing runs."""

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import (
    TOLD,
    controlled_state,
    original_state,
    save_pth,
    small_autoencoder,
    tiny_branch,
    tiny_original,
)
from safetensors.torch import save_file
from test_foreign_files import Canary, archives
from tiny_pipeline import transformer

from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.original.examine import examine
from sana.checkpoints.original.loading import load_single_file
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.single import open_single
from sana.errors import CheckpointError, InvalidInput, ModelNotFound


def refuse(path: Path, match: str = ".") -> str:
    """Return the one sentence with which a file is refused."""
    with pytest.raises(CheckpointError, match=match) as refused:
        load_single_file(path, **TOLD)
    text = str(refused.value)
    assert path.name in text
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_no_pickle_runs_under_any_name(tmp_path: Path, suffix: str) -> None:
    canary = tmp_path / "canary"
    for kind, content in archives(canary).items():
        path = tmp_path / f"model{suffix}"
        path.write_bytes(content)
        refuse(path)
        with pytest.raises((CheckpointError, InvalidInput)):
            convert(Conversion(source=path, target=tmp_path / "out"))
        assert not canary.exists(), kind
        assert not (tmp_path / "out").exists()
    pickle.loads(archives(canary)["protocol 2"])
    assert canary.exists(), "the canary itself must sing"


def test_a_canary_beside_real_weights_does_not_sing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    state = original_state(transformer())
    for more in ({"args": Canary(canary)}, {"optimizer": {"state": Canary(canary)}}):
        refuse(save_pth(tmp_path / "model.pth", state, **more), "ask its author for safetensors")
    torch.save({"state_dict": {**state, "extra": Canary(canary)}}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth")
    assert not canary.exists()


def test_other_files_in_the_folder_are_never_opened(tmp_path: Path) -> None:
    """Only the file that was named is: a pickle beside it, or under a model's name, stays closed."""
    path, model = tiny_original(tmp_path / "mine.pth")
    canary = tmp_path / "canary"
    for name in ("model.pth", "config.pkl", "pytorch_model.bin", "mine.pth.bak"):
        (tmp_path / name).write_bytes(archives(canary)["torch.save"])
    assert load_single_file(path, **TOLD).transformer is not None
    with pytest.raises(ModelNotFound):
        SanaTransformer2DModel.from_pretrained(tmp_path)
    assert not canary.exists()
    assert model is not None


@pytest.mark.parametrize("form", ["pth", "safetensors", "old"])
def test_a_cut_file_is_refused_wherever_it_ends(tmp_path: Path, form: str) -> None:
    state = original_state(transformer(num_layers=1))
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "pth")
    whole = path.read_bytes()
    cuts = {0, 1, 2, 3, 7, 8, 9, 100, 1000, len(whole) - 1, len(whole) - 30}
    cuts |= set(random.Random(0).sample(range(len(whole)), 40))
    for cut in cuts:
        path.write_bytes(whole[:cut])
        refuse(path)


def test_flipped_bits_are_found_by_the_checksums(tmp_path: Path) -> None:
    path, model = tiny_original(tmp_path / "m.pth", num_layers=1)
    whole = path.read_bytes()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    used = 0
    for bit in random.Random(1).sample(range(8 * len(whole)), 80):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = load_single_file(path, **TOLD).transformer
        except CheckpointError:
            continue
        # A bit between the members, or in a tensor that is dropped: the weights are the right ones all the same.
        used += 1
        assert loaded is not None
        assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())
    assert used < 80


def rebuilt(path: Path, change: Callable[[str, bytes], tuple[bytes, int]]) -> None:
    """Write an archive anew with members changed; `change` returns content and way of compression."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            content, kind = change(name, data)
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)


def test_lying_archives_are_refused(tmp_path: Path) -> None:
    path, _ = tiny_original(tmp_path / "m.pth", num_layers=1)
    whole = path.read_bytes()
    rebuilt(path, lambda name, data: (data, zipfile.ZIP_DEFLATED))
    refuse(path, "compressed archive, which torch does not write")
    path.write_bytes(whole)
    rebuilt(path, lambda name, data: (b"big" if name.endswith("byteorder") else data, zipfile.ZIP_STORED))
    refuse(path, "big-endian")
    path.write_bytes(whole)
    rebuilt(path, lambda name, data: (data[: len(data) // 2] if "/data/" in name else data, zipfile.ZIP_STORED))
    refuse(path, "lies outside its data")
    path.write_bytes(whole)
    rebuilt(path, lambda name, data: (bytes(1 << 27) if name.endswith("data.pkl") else data, zipfile.ZIP_STORED))
    refuse(path, "pickle program of 128 MB")


def test_lying_shapes_take_no_memory(tmp_path: Path) -> None:
    """A tensor that is wider than its data is refused before anything of its size is made."""
    state = original_state(transformer(num_layers=1))
    big = torch.zeros(1).expand(1 << 20, 1 << 20)
    state["t_block.1.weight"] = torch.zeros(1).as_strided((96, 16), (0, 0))
    refuse(save_pth(tmp_path / "m.pth", state), "lies outside its data")
    state["t_block.1.weight"] = big
    refuse(save_pth(tmp_path / "m.pth", state), "lies outside its data")
    header = b'{"x_embedder.proj.weight":{"dtype":"F32","shape":[4294967295,4294967295],"data_offsets":[0,4]}}'
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refuse(tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "final_layer.linear.bias"])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, name: str, value: float) -> None:
    state = original_state(transformer())
    state[name].view(-1)[-1] = value
    refuse(save_pth(tmp_path / "m.pth", state), f"'{name}' in .* holds NaN or infinity")
    save_file(state, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", f"'{name}'")


def test_zeros_of_an_interrupted_copy_are_named(tmp_path: Path) -> None:
    state = original_state(transformer())
    state["blocks.0.attn.qkv.weight"].zero_()
    refuse(save_pth(tmp_path / "m.pth", state), "'blocks.0.attn.qkv.weight' in .* is all zero")


def test_numbers_that_do_not_fit_the_dtype_are_named(tmp_path: Path) -> None:
    state = original_state(transformer())
    state["blocks.0.attn.qkv.weight"][0, 0] = 1e6
    path = save_pth(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match="does not fit into float16"):
        load_single_file(path, dtype="float16", **TOLD)


@pytest.mark.parametrize("kind", ["transformer", "autoencoder", "controlnet"])
def test_a_model_with_any_tensor_gone_or_renamed_is_refused(tmp_path: Path, kind: str) -> None:
    base = transformer()
    state = {
        "transformer": lambda: original_state(transformer(num_layers=1)),
        "autoencoder": lambda: original_state(small_autoencoder("f32-sana")),
        "controlnet": lambda: controlled_state(base, tiny_branch(base)),
    }[kind]()
    told = {} if kind == "autoencoder" else TOLD
    free = {"pos_embed", "y_embedder.y_embedding"}
    names = [name for name in state if name not in free]
    if kind == "controlnet":
        names = [name for name in names if name.startswith("controlnet.")]
    for name in names if kind == "transformer" else random.Random(4).sample(names, 15):
        for changed in ({}, {name + "x": state[name]}):
            rest = {other: tensor for other, tensor in state.items() if other != name}
            save_file({**rest, **changed}, tmp_path / "m.safetensors")
            with pytest.raises(CheckpointError, match=r"m\.safetensors") as refused:
                load_single_file(tmp_path / "m.safetensors", **told)
            assert "\n" not in str(refused.value)


def test_random_shapes_are_never_a_traceback(tmp_path: Path) -> None:
    """Any shapes at all under the names of a model: refused in words, by whoever looks at them first."""
    random_shapes = random.Random(3)
    for make, told in ((lambda: transformer(num_layers=1), TOLD), (lambda: small_autoencoder("f32-in"), {})):
        state = original_state(make())
        names, said = list(state), list[str]()
        for _ in range(60):
            changed = dict(state)
            for name in random_shapes.sample(names, 3):
                rank = random_shapes.randrange(5)
                changed[name] = torch.ones([random_shapes.choice([0, 1, 3, 16, 50]) for _ in range(rank)])
            save_file(changed, tmp_path / "m.safetensors")
            try:
                load_single_file(tmp_path / "m.safetensors", **told)
            except CheckpointError as error:
                said.append(str(error))
        assert len(said) >= 55, "hardly any of these is a model"
        assert not any("\n" in text for text in said)


def test_many_blocks_in_a_name_take_no_memory(tmp_path: Path) -> None:
    state: dict[str, Any] = original_state(transformer(num_layers=1))
    state["blocks.99999.attn.proj.bias"] = torch.ones(16)
    save_file(state, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", "holds 'blocks.99999' but not 'blocks.1'")
    state["blocks.99999999999999999.attn.proj.bias"] = state.pop("blocks.99999.attn.proj.bias")
    save_file(state, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", "unexpected")


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    state = original_state(transformer())
    save_file(state, tmp_path / "m.pth")  # safetensors under a pickle's name is as good as ever
    assert load_single_file(tmp_path / "m.pth", **TOLD).transformer is not None
    for name, content, text in (
        ("a.pth", b"<!doctype html><p>Sign in", "a web page"),
        ("b.pth", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("c.ckpt", b"hello, I am no model", "no file of weights"),
        ("d.pth", b"", "is empty"),
        ("e.safetensors", b"PK\x03\x04" + bytes(100), "pickle or an archive under a safetensors name"),
    ):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, text)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path, _ = tiny_original(tmp_path / "m.pth")
    path.chmod(0)
    refuse(path, "cannot be opened")


def test_a_file_that_changes_while_it_is_read_gives_an_error(tmp_path: Path) -> None:
    path, _ = tiny_original(tmp_path / "m.pth")
    found = examine(path, told=TOLD)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cut short"):
        found.build("transformer", SanaTransformer2DModel, dtype=torch.float32)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Listing a file makes no tensor with data, and reading yields each in memory of its own."""
    path, _ = tiny_original(tmp_path / "m.pth")
    file = open_single(path)
    assert all(type(tensor).__name__ == "FakeTensor" for tensor in file._tensors.values())
    for name, tensor in file.read(file.entries):
        assert tuple(tensor.shape) == file.entries[name].shape
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
