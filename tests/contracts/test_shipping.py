"""`recipes/nano/ship.py` puts what the recipes made into the package, and prints golden values as they are kept."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sana.engine.golden as golden
from sana.cards import CARDS
from sana.checkpoints.built_in import folder_of
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.folder import save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.schedulers import SCMScheduler
from sana.checkpoints.tensors import read_header
from sana.engine.parts import Parts, load
from sana.training.objectives.sprint.students import student_of

SCRIPT = Path(__file__).parents[2] / "recipes" / "nano" / "ship.py"
KEPT = Path(golden.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ship() -> Any:
    spec = importlib.util.spec_from_file_location("ship_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano() -> Parts:
    return load("nano", device="cpu")


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that comes with nano alone."""
    real = folder_of(CARDS["nano"])
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "nano").symlink_to(real)
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    return tmp_path / "assets"


def test_a_whole_export_is_shipped_without_what_nano_has(
    ship: Any, assets: Path, nano: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of(nano.transformer, 0)
    finished = SanaTransformer2DModel.from_config(student.config)
    finished.load_state_dict(student.state_dict())
    parts = {**nano.components, "transformer": finished, "scheduler": SCMScheduler()}
    notes = {"_sanakit_card": "nano-sprint", "_sanakit_angles": {"2": [1.5, 1.0, 0.0]}}
    save_parts(tmp_path / "export", parts, class_name="SanaSprintPipeline", notes=notes)
    for _ in range(2):  # the second time in place of the first
        capsys.readouterr()
        assert ship.main(["nano-sprint", str(tmp_path / "export")]) == 0
    assert sorted(path.name for path in assets.iterdir()) == ["nano", "nano-sprint"]
    folder = assets / "nano-sprint"
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "scheduler", "transformer"}
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["_sanakit_card"]) == ("SanaSprintPipeline", "nano-sprint")
    assert {*CARDS["nano-sprint"].shared, "transformer", "scheduler"} <= set(index)
    (weights,) = folder.rglob("*.safetensors")
    assert {entry.dtype for entry in read_header(weights)} == {torch.float16}
    loaded = load("nano-sprint", device="cpu")
    assert (loaded.name, loaded.card, loaded.angles) == ("nano-sprint", CARDS["nano-sprint"], {2: (1.5, 1.0, 0.0)})
    kept = eval(f"{{{capsys.readouterr().out}}}", {"Golden": golden.Golden})["nano-sprint"]
    assert golden.observe(loaded, kept.request) == kept


def test_a_control_network_alone_is_shipped(ship: Any, assets: Path, nano: Parts, tmp_path: Path) -> None:
    branch = SanaControlNetModel.from_transformer(nano.transformer, 3)
    branch.to(torch.float16).save_pretrained(tmp_path / "export")
    branch.float()
    folder = ship.ship(CARDS["nano-controlnet"], tmp_path / "export")
    assert folder == assets / "nano-controlnet"
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "controlnet"}
    loaded = load("nano-controlnet", device="cpu")
    assert {parameter.dtype for parameter in loaded.controlnet.parameters()} == {torch.float32}
    # An untrained branch changes nothing, whatever it follows.
    request = {"prompt": "a red fish", "seed": 7, "steps": 2}
    assert golden.observe(loaded, request) == golden.observe(nano, request)


@pytest.mark.parametrize("name", golden.GOLDEN)
def test_an_entry_is_printed_as_it_is_kept(ship: Any, name: str) -> None:
    assert ship.entry(name, golden.GOLDEN[name]) in KEPT


def test_only_built_in_models_are_shipped(ship: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["sana-0.6b-512"], ["nano", "a", "b"]):
        assert ship.main(words) == 2
        assert "usage: python recipes/nano/ship.py nano|nano-sprint|nano-controlnet [EXPORT]" in capsys.readouterr().err
