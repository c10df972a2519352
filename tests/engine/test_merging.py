"""Adapters merged into a model for good: folders, transformers alone and original files, whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana import SanaPipeline, SanaTransformer2DModel
from sana.engine.adapters import Adapters
from sana.engine.merging import merge
from sana.errors import CheckpointError, InvalidInput
from tiny_lora import EVERYWHERE, off, random_lora, velocity
from tiny_model import make_tiny_parts, tiny_transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    SanaPipeline(**{k: v for k, v in make_tiny_parts().components.items() if v is not None}).save_pretrained(folder)
    return folder


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    files = []
    for seed, dora in ((1, False), (2, True)):
        files.append(tmp_path / f"lora{seed}.safetensors")
        save_file(random_lora(tiny_transformer(), seed=seed, dora=dora, ends=EVERYWHERE), files[-1])
    return files


def expected(loras: list[Path], scales: list[float]) -> torch.Tensor:
    transformer = tiny_transformer()
    adapters = Adapters(transformer)
    adapters.set({adapters.ensure(file): scale for file, scale in zip(loras, scales, strict=True)})
    return velocity(transformer)


def test_a_whole_model(model: Path, loras: list[Path], tmp_path: Path) -> None:
    reports = merge(model, [(loras[0], 0.5), (loras[1], 1.0)], tmp_path / "out")
    assert [len(report.matched) for report in reports] == [23, 23]
    pipe = SanaPipeline.from_pretrained(tmp_path / "out")
    assert off(velocity(pipe.transformer), expected(loras, [0.5, 1.0])) < 1e-6
    assert not hasattr(pipe.transformer.proj_out, "lora_sides")
    files = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == files
    same = [name for name in files if (model / name).read_bytes() == (tmp_path / "out" / name).read_bytes()]
    assert [str(name) for name in files if name not in same] == ["transformer/diffusion_pytorch_model.safetensors"]


def test_a_transformer_alone(model: Path, loras: list[Path], tmp_path: Path) -> None:
    merge(model / "transformer", [(loras[0], 1.0)], tmp_path / "out")
    merged = SanaTransformer2DModel.from_pretrained(tmp_path / "out")
    assert off(velocity(merged), expected(loras[:1], [1.0])) < 1e-6


def test_an_original_file_from_a_folder_and_from_a_file(model: Path, loras: list[Path], tmp_path: Path) -> None:
    once = tmp_path / "once.safetensors"
    merge(model, [(loras[0], 1.0)], once)
    assert "blocks.0.attn.qkv.weight" in load_file(once)
    merge(once, [(loras[1], 1.0)], tmp_path / "twice.safetensors")
    both = SanaTransformer2DModel.from_single_file(
        tmp_path / "twice.safetensors", config=tiny_transformer().config.to_dict()
    )
    one = tiny_transformer()
    adapters = Adapters(one)
    adapters.ensure(loras[0])
    adapters.set({"lora1": 1.0})
    adapters.fuse()
    adapters.clear()
    adapters.load(loras[1])
    assert off(velocity(both), velocity(one)) < 1e-6


def test_faults_leave_nothing(model: Path, loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    faults: list[tuple[Any, str]] = [
        (lambda: merge(model, [], out), "nothing to merge"),
        (lambda: merge(model, [(loras[0], 1.0)], model, force=True), "is the model itself"),
        (lambda: merge(model, [(loras[0], 1.0)], model), "exists already"),
        (lambda: merge(model, [(loras[0], 1.0)], loras[0]), "exists already"),
        (lambda: merge(model, [(loras[0], 1e39)], out), "is not finite|finite number"),
    ]
    for call, told in faults:
        with pytest.raises(InvalidInput, match=told):
            call()
    save_file({"transformer.proj_out.lora_A.weight": torch.ones(1, 1)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        merge(model, [(tmp_path / "bad.safetensors", 1.0)], out)
    assert not out.exists()


def test_written_over_where_it_is_wanted(model: Path, loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(model, [(loras[0], 1.0)], out)
    before = (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    merge(model, [(loras[1], 1.0)], out, force=True)
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    assert SanaPipeline.from_pretrained(out).transformer is not None
