"""Models of transformers that look at pictures: found once, loaded strictly, and never with code of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Fault, Hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from sana.checkpoints.onlookers import find, load_clip, load_describer
from sana.errors import CheckpointError, ModelNotFound
from tiny_onlookers import save_clip, save_describer

CPU = torch.device("cpu")
REPO = "somebody/tiny-clip"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "clip"))


@pytest.fixture
def served(hub: Hub, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {file.name: file.read_bytes() for file in whole.iterdir()}
    hub.push(REPO, {**files, "pytorch_model.bin": b"x" * 2000, "onnx/model.safetensors": b"y" * 2000, "run.py": b"1"})
    return hub


def test_a_model_of_the_hub_is_fetched_once_and_without_what_is_not_read(served: Hub, whole: Path) -> None:
    folder = find(REPO)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
    load_clip(folder, CPU)
    asked = len(served.requests)
    assert find(REPO) == find(REPO, offline=True) == folder
    assert len(served.requests) == asked


def test_a_model_that_cannot_be_had(served: Hub, tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ModelNotFound, match="is not whole in the cache and cannot be fetched offline"):
        find(REPO, offline=True)
    with pytest.raises(ModelNotFound, match="There is no folder 'somebody/else' here"):
        find("somebody/else")
    with pytest.raises(ModelNotFound, match=r"There is no model 'no such model'. Give a folder, or a hub id"):
        find("no such model")
    served.faults.append(Fault("resolve", status=503))
    with pytest.raises(ModelNotFound, match="is not complete in the cache: try again later"):
        find(REPO)
    served.push("somebody/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x" * 2000})
    served.faults.clear()
    with pytest.raises(ModelNotFound, match=r"has no model.safetensors: only models with weights in safetensors"):
        find("somebody/pickles")
    (clip / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"The folder .* has no model.safetensors"):
        find(str(clip))


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_weights_that_lack_a_tensor_are_no_model(clip: Path) -> None:
    tensors = load_file(clip / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, the first is visual_projection.weight"):
        load_clip(clip, CPU)


def test_damaged_weights_are_one_sentence(clip: Path) -> None:
    (clip / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"The model in .* cannot be loaded") as caught:
        load_clip(clip, CPU)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    folder = save_describer(tmp_path / "model")
    marker = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    code = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Model"}
    processor = json.loads((folder / "processor_config.json").read_text())
    del processor["processor_class"]
    (folder / "processor_config.json").write_text(json.dumps({**processor, "auto_map": code}))
    changed(folder, auto_map=code, model_type="something-new", architectures=["New"])
    with pytest.raises(CheckpointError, match="brings code of its own, which is never run"):
        load_describer(folder, CPU)
    assert not marker.exists()


def test_what_would_be_fetched_from_elsewhere_is_refused(clip: Path) -> None:
    config = json.loads((clip / "config.json").read_text())
    vision = {**config["vision_config"], "_attn_implementation": "somebody/kernel"}
    changed(clip, vision_config=vision)
    with pytest.raises(CheckpointError, match="asks for code from elsewhere"):
        load_clip(clip, CPU)
    (clip / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter, which names a model elsewhere"):
        load_clip(clip, CPU)


def test_a_processor_that_needs_torchvision_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    folder = save_describer(tmp_path / "model")

    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("\nSomeImageProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    monkeypatch.setattr(transformers.ProcessorMixin, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match="it needs torchvision: use another model"):
        load_describer(folder, CPU)


def test_a_model_that_describes_nothing_is_refused(clip: Path) -> None:
    with pytest.raises(CheckpointError, match=r"The (model|processor) in .* cannot be loaded"):
        load_describer(clip, CPU)
