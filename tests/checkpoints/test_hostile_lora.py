"""Adapter files that are damaged, lie, or are for something else: one sentence, nothing changed, little memory."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Hub
from safetensors.torch import save_file
from torch import Tensor

from clock import cpu_seconds
from sana.checkpoints.lora.dialects import MAX_NAME, MAX_TENSORS, read_names
from sana.checkpoints.lora.files import find, read_lora
from sana.checkpoints.lora.writing import save_lora
from sana.engine.adapters import Adapters
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, NonFinite, SanaError
from sana.models.lora import targets
from tiny_lora import random_lora, velocity
from tiny_model import tiny_transformer

KEY = "transformer.transformer_blocks.0.attn1.to_q"


def faulty(change: dict[str, Any]) -> dict[str, Tensor]:
    tensors = random_lora(tiny_transformer())
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "other base": ({f"{KEY}.lora_A.weight": torch.ones(4, 40)}, r"reads 40 inputs, the model's has 32"),
    "other outputs": ({f"{KEY}.lora_B.weight": torch.ones(40, 4)}, r"gives 40 outputs, the model's has 32"),
    "two ranks": ({f"{KEY}.lora_B.weight": torch.ones(32, 3)}, r"different rank, 4 and 3"),
    "rank 100,000": (
        {
            f"{KEY}.lora_A.weight": torch.zeros(100_000, 1).expand(100_000, 32),
            f"{KEY}.lora_B.weight": torch.zeros(32, 1).expand(32, 100_000),
        },
        r"rank 100,000, which is not between 1 and 4,096",
    ),
    "rank 0": (
        {f"{KEY}.lora_A.weight": torch.ones(0, 32), f"{KEY}.lora_B.weight": torch.ones(32, 0)},
        r"rank 0, which is not between",
    ),
    "no up": ({f"{KEY}.lora_B.weight": None}, r"has no up-projection"),
    "no down": ({f"{KEY}.lora_A.weight": None}, r"has no down-projection"),
    "a scalar": ({f"{KEY}.lora_A.weight": torch.tensor(1.0)}, r"projections of shape \[\] and \[32, 4\]"),
    "a kernel": (
        {f"{KEY}.lora_A.weight": torch.ones(4, 32, 3, 3)},
        r"kernel of \[3, 3\], the model's is a linear layer",
    ),
    "an alpha of two": ({f"{KEY}.alpha": torch.ones(2)}, r"alpha of shape \[2\]"),
    "lengths of inputs": ({f"{KEY}.dora_scale": torch.ones(1, 32)}, r"which scales inputs instead of outputs"),
    "lengths of nothing": ({f"{KEY}.dora_scale": torch.ones(7)}, r"magnitude of shape \[7\], which is wrong"),
    "whole numbers": ({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}, r"is int32, which no adapter is"),
    "NaN": ({f"{KEY}.lora_A.weight": torch.full((4, 32), float("nan"))}, r"lora_A\.weight in .* holds NaN or infinity"),
    "infinity": ({f"{KEY}.lora_B.weight": torch.full((32, 4), float("inf"))}, r"holds NaN or infinity"),
    "infinite alpha": ({f"{KEY}.alpha": torch.tensor(float("inf"))}, r"alpha in .* holds NaN or infinity"),
    "twice": ({f"{KEY.removeprefix('transformer.')}.lora_A.weight": torch.ones(4, 32)}, r"no up-projection"),
    "LoKr": ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, r"is LoKr .* is not supported: use LoRA or DoRA"),
    "LoHa": ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, r"is LoHa"),
    "whole weights": ({f"{KEY}.diff": torch.ones(2, 2)}, r"a difference of whole weights"),
    "a model": ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2)}, r"Make sure all LoRA param names contain"),
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_sentence_and_nothing_changed(fault: str, stored: bool, tmp_path: Path) -> None:
    change, told = FAULTS[fault]
    model = tiny_transformer()
    adapters = Adapters(model)
    adapters.load(random_lora(model, seed=5), "kept")
    answer = velocity(model)
    tensors = faulty(change)
    source: Any = tensors
    if stored:
        source = tmp_path / "a.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source)
    with pytest.raises(CheckpointError, match=told) as caught:
        adapters.load(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", ")"))
    assert adapters.names == ("kept",)
    assert torch.equal(velocity(model), answer)


def test_the_same_layer_under_two_names() -> None:
    tensors = random_lora(tiny_transformer())
    again = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match="twice, under two names"):
        read_lora({**tensors, **again}, targets(tiny_transformer()))


def test_no_layer_of_this_model() -> None:
    tensors = {"unet.down_blocks.0.to_q.lora_A.weight": torch.ones(1, 1)}
    with pytest.raises(CheckpointError, match=r"0 of 1 matched; it names unet\.down_blocks\.0\.to_q"):
        read_lora(tensors, targets(tiny_transformer()))


@pytest.mark.parametrize(
    "names", [[], ["a" * (MAX_NAME + 1) + ".lora_A.weight"], ["x.lora_A.weight"] * (MAX_TENSORS + 1)]
)
def test_names_that_no_adapter_has(names: list[str]) -> None:
    with pytest.raises(CheckpointError):
        read_names(names, targets(tiny_transformer()), "x")


def test_a_long_name_is_sorted_in_no_time() -> None:
    known = targets(tiny_transformer())

    def read() -> None:
        with pytest.raises(CheckpointError):
            read_names(["lora_A.x." * 200_000], known, "x")

    assert cpu_seconds(read, enough=1) < 1


@pytest.mark.parametrize("where", [0, 4, 8, 40, 200, -200, -1])
def test_a_file_that_is_cut(where: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_lora(tiny_transformer()), file)
    file.write_bytes(file.read_bytes()[:where])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_lora(file, targets(tiny_transformer()))


SETTINGS = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a text as alpha": '{"lora_alpha": "high"}',
    "a text as switch": '{"use_rslora": "yes"}',
    "a list of patterns": '{"alpha_pattern": [1]}',
    "a number as patterns": '{"alpha_pattern": 5}',
    "nothing as alpha": '{"alpha_pattern": {"to_q": null}}',
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_are_none(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(random_lora(tiny_transformer()), file, metadata={"lora_adapter_metadata": SETTINGS[kind]})
    with pytest.raises(CheckpointError, match=r"a\.safetensors has"):
        read_lora(file, targets(tiny_transformer()))


@pytest.mark.parametrize("source", [None, 5, b"a.safetensors"])
def test_what_is_no_adapter_at_all(source: Any) -> None:
    with pytest.raises(InvalidInput, match="a mapping of tensors, not"):
        read_lora(source, targets(tiny_transformer()))


@pytest.mark.parametrize("config", [5, ["r"], "r", {1: 2}])
def test_settings_in_memory_that_are_none(config: Any) -> None:
    with pytest.raises(InvalidInput, match="must be a mapping of names to values"):
        read_lora(random_lora(tiny_transformer()), targets(tiny_transformer()), config=config)


def test_tensors_without_values() -> None:
    away = {name: tensor.to("meta") for name, tensor in random_lora(tiny_transformer()).items()}
    with pytest.raises(InvalidInput, match="has no values"):
        read_lora(away, targets(tiny_transformer()))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_numbers_of_another_kind(kind: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match="which no adapter is"):
        read_lora({n: t.to(kind) for n, t in random_lora(tiny_transformer()).items()}, targets(tiny_transformer()))


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.ckpt", "a"])
@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("allowed", [False, True])
def test_a_pickle_under_any_name_never_runs(name: str, protocol: int, allowed: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Canary(canary), protocol))
    with pytest.raises(SanaError):
        read_lora(file, targets(tiny_transformer()), allow_pickle=allowed)
    assert not canary.exists()


def test_a_pickle_of_tensors_is_read_where_it_was_allowed(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.bin"
    torch.save(random_lora(tiny_transformer()), file)
    with pytest.raises(CheckpointError, match="pickles are not opened"):
        read_lora(file, targets(tiny_transformer()))
    with pytest.raises(ModelNotFound, match=r"only pytorch_lora_weights\.bin, which is pickled"):
        find(tmp_path)
    assert len(read_lora(file, targets(tiny_transformer()), allow_pickle=True).updates) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak so")
def test_a_huge_file_is_judged_by_its_header(tmp_path: Path) -> None:
    """10 GB that hold a rank of 40 million: refused with less than 400 MB, and at once."""
    file = tmp_path / "huge.safetensors"
    rank = 39_062_500
    size = rank * 32 * 4
    header = {
        f"{KEY}.lora_A.weight": {"dtype": "F32", "shape": [rank, 32], "data_offsets": [0, size]},
        f"{KEY}.lora_B.weight": {"dtype": "F32", "shape": [32, rank], "data_offsets": [size, 2 * size]},
    }
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + 2 * size)  # a hole, which takes no space
    code = (
        "import sys, torch; from sana.checkpoints.lora.files import read_lora;"
        "from sana.models.lora import Target; from sana.errors import CheckpointError\n"
        # Not ru_maxrss, which a new process has from the one that started it.
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
        "used = peak()\n"
        "try: read_lora(sys.argv[1], {'transformer_blocks.0.attn1.to_q': Target(inputs=32, outputs=32)})\n"
        "except CheckpointError as error: print(peak() - used, error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=True
    )
    grown, _, told = run.stdout.partition(" ")
    assert "rank 39,062,500" in told
    assert int(grown) < 50_000  # KB


def test_tensors_that_nobody_asked_for_are_not_read(tmp_path: Path) -> None:
    model = tiny_transformer()
    file = tmp_path / "a.safetensors"
    save_file({**random_lora(model), "text_encoder.x.lora_A.weight": torch.full((4, 4), float("nan"))}, file)
    read = read_lora(file, targets(model))
    assert len(read.updates) == 16
    assert read.unmatched == ("text_encoder.x",)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    updates = read_lora(random_lora(tiny_transformer()), targets(tiny_transformer())).updates
    next(iter(updates.values())).up[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="is not saved"):
        save_lora(tmp_path / "a.safetensors", updates)
    assert list(tmp_path.iterdir()) == []


def test_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no adapter"):
        find(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(InvalidInput, match="holds 2 files"):
        find(tmp_path)
    assert find(tmp_path, weight_name="two.safetensors").name == "two.safetensors"
    with pytest.raises(ModelNotFound, match=r"Did you mean 'two\.safetensors'"):
        find(tmp_path, weight_name="tow.safetensors")
    with pytest.raises(ModelNotFound, match="Check weight_name"):
        find(tmp_path, weight_name="../a.safetensors")
    with pytest.raises(ModelNotFound, match=r"Did you mean 'one\.safetensors'"):
        find(tmp_path / "one.safetensor")
    with pytest.raises(InvalidInput, match="empty"):
        find(" ")
    with pytest.raises(InvalidInput, match="Offline"):
        find("some/adapter", local_files_only=True)
    with pytest.raises(ModelNotFound):
        find("some/adapter", weight_name="a.safetensors", local_files_only=True, cache_dir=tmp_path)


def test_tensors_in_memory_are_copied() -> None:
    model = tiny_transformer()
    tensors = random_lora(model)
    adapters = Adapters(model)
    adapters.load(tensors)
    answer = velocity(model)
    for tensor in tensors.values():
        tensor.zero_()
    adapters.set({"default_0": 1.0})
    assert torch.equal(velocity(model), answer)
    with pytest.raises(InvalidInput, match="names to tensors"):
        adapters.load({"a.lora_A.weight": 3})  # type: ignore[dict-item]


@pytest.fixture
def shelf(hub: Hub, tmp_path: Path) -> Any:
    """Call `find` with a hub that holds two adapters and an empty cache."""
    save_file(random_lora(tiny_transformer()), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    hub.push("acme/one", {"pytorch_lora_weights.safetensors": data, "README.md": b"", "old/b.safetensors": data})
    hub.push("acme/two", {"x.safetensors": data, "y.safetensors": data})

    def call(name: str, **options: Any) -> Path:
        hub.requests.clear()
        return find(name, endpoint=hub.url, cache_dir=tmp_path / "cache", **options)

    return call


def test_an_adapter_on_the_hub(shelf: Any, hub: Hub) -> None:
    assert len(read_lora(shelf("acme/one"), targets(tiny_transformer())).updates) == 16
    assert hub.gets() == ["pytorch_lora_weights.safetensors"]
    assert shelf("acme/one", subfolder="old").name == "b.safetensors"
    assert shelf("acme/two", weight_name="y.safetensors").name == "y.safetensors"
    assert shelf("hf://acme/two/x.safetensors").name == "x.safetensors"
    assert shelf("acme/two", weight_name="y.safetensors", local_files_only=True).name == "y.safetensors"
    assert hub.requests == []
    with pytest.raises(InvalidInput, match="holds 2 files"):
        shelf("acme/two")
    with pytest.raises(ModelNotFound):
        shelf("acme/none")
    with pytest.raises(ModelNotFound):
        shelf("acme/one", weight_name="none.safetensors")
