"""`sana train` makes an adapter and a control network of a distilled model, by the losses of its distillation."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import Sana

pytestmark = pytest.mark.slow
PICTURES = Path(__file__).parents[2] / "examples" / "data" / "pictures"
DATA = {"path": str(PICTURES), "size": 256}
STUDENT = {"student": "nano-sprint", "guidance": [4.5], "matching_weight": 1.0}


def recipe(folder: Path, name: str, objective: str, steps: int, **tables: dict[str, Any]) -> str:
    run = {"steps": steps, "batch_size": 4, "evaluate_every": steps}
    lines = [f'objective = "{objective}"']
    for table, values in {"run": run, **tables}.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")
    return str(folder / f"{name}.toml")


def test_what_goes_beside_a_distilled_model_is_distilled_and_drawn_with(sana: Sana, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    data = {**DATA, "features": str(tmp_path / "features")}
    teacher, branch = str(runs / "teacher" / "export"), str(runs / "branch" / "export")
    control = {"kind": "ink", "blocks": 2, "wiring": "native"}
    flow, steered = {"flow_matching.data": data}, {"start": teacher, "train": "controlnet"}
    branched = {"flow_matching.control": control, **flow}
    dense = {"flow_matching.model": {"timestep_scale": 0.001}}
    sprint = {"sprint.data": data}
    recipes = [
        recipe(tmp_path, "teacher", "flow_matching", 1, flow_matching={"start": "nano"}, **dense, **flow),
        recipe(tmp_path, "branch", "flow_matching", 2, flow_matching=steered, **branched),
        recipe(tmp_path, "lora", "sprint", 2, sprint={"teacher": teacher, **STUDENT, "train": "lora"}, **sprint),
        recipe(
            tmp_path,
            "controlnet",
            "sprint",
            2,
            sprint={"teacher": teacher, **STUDENT, "train": "controlnet"},
            **{"sprint.control": {"kind": "ink", "start": branch, "wiring": "native"}},
            **sprint,
        ),
    ]
    done = sana("train", *recipes, "-o", str(runs))
    assert done.code == 0, done.err
    assert "--control ink picture.png" in (runs / "controlnet" / "export" / "README.md").read_text()
    own = ["--lora", str(runs / "lora" / "export" / "pytorch_lora_weights.safetensors")]
    steering = ["--controlnet", str(runs / "controlnet" / "export"), "--control", "ink", str(tmp_path / "plain.png")]
    for name, more in (("plain", []), ("adapted", own), ("followed", steering)):
        drawn = sana("a red fish", "-m", "nano-sprint", "--seed", "1", *more, "-o", str(tmp_path / f"{name}.png"))
        assert drawn.code == 0, drawn.err
