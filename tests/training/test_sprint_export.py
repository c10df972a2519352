"""What a distillation leaves is a model of the Sprint pipeline."""

import json
from pathlib import Path

import torch

from sana import SanaSprintPipeline
from sana.checkpoints.folder import save_parts
from sana.engine.parts import load
from sana.models.linear_dit import LinearDiT
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.students import student_of
from sana.training.objectives.sprint.watching import write
from tiny_model import make_tiny_parts, tiny_transformer


def test_an_exported_student_draws_in_the_sprint_pipeline(tmp_path: Path) -> None:
    teacher: LinearDiT = tiny_transformer(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    parts = make_tiny_parts()
    save_parts(tmp_path / "teacher", {**parts.components, "transformer": teacher})
    settings = SprintSettings(teacher=str(tmp_path / "teacher"), features="nowhere")
    student = student_of(teacher, 0)
    write(student, settings, tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert index["scheduler"][1] == "SCMScheduler"
    config = load(tmp_path / "student").transformer.config
    assert config.guidance_embeds
    assert config.timestep_scale == 1.0
    pipe = SanaSprintPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 256, "width": 256, "use_resolution_binning": False, "output_type": "latent"}
    drawn = pipe(
        "a",
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        complex_human_instruction=None,
        **options,
    )
    assert torch.isfinite(torch.as_tensor(drawn.images)).all()
