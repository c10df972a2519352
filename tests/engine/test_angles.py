"""Angles that come with a model, and when they hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana import SanaSprintPipeline, SCMScheduler
from sana.checkpoints.folder import save_parts
from sana.engine.angles import ANGLES_KEY, angles_in, chosen, grid_of, keep_angles
from sana.engine.generate import generate_images
from sana.engine.parts import load
from sana.engine.request import Request
from sana.errors import CheckpointError, InvalidInput
from sana.flow.path import angle_from_sigma
from sana.flow.schedules import MAX_ANGLE, MIDDLE_ANGLE, scm_grid
from tiny_model import make_tiny_parts, tiny_transformer

KEPT = {2: (1.55, 0.9, 0.0), 3: (1.55, 0.9, 0.4, 0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    transformer = tiny_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    parts = {**make_tiny_parts().components, "transformer": transformer, "scheduler": SCMScheduler()}
    save_parts(folder, parts, class_name="SanaSprintPipeline")
    return folder


def test_angles_are_kept_beside_others_and_read_again(folder: Path) -> None:
    before = json.loads((folder / "model_index.json").read_text())
    assert angles_in(folder) == {}
    keep_angles(folder, {3: KEPT[3]})
    keep_angles(folder, {2: KEPT[2]})
    assert angles_in(folder) == KEPT
    index = json.loads((folder / "model_index.json").read_text())
    assert list(index.pop(ANGLES_KEY)) == ["2", "3"]
    assert index == before


@pytest.mark.parametrize(
    "kept", ["1.3", [1.3], {"2": [1.5, 0.9]}, {"2": [0.9, 1.5, 0.0]}, {"x": [1.5, 0]}, {"1": [1.5, 0.1]}, {"1": [9, 0]}]
)
def test_damaged_angles_are_named(tmp_path: Path, kept: Any) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({ANGLES_KEY: kept}))
    with pytest.raises(CheckpointError, match="holds no angles"):
        angles_in(tmp_path)


def test_a_folder_without_a_model_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no model_index"):
        keep_angles(tmp_path, KEPT)


def test_kept_angles_hold_unless_others_are_named() -> None:
    assert chosen(KEPT, 2, None, None) == KEPT[2]
    assert chosen(KEPT, 2, MAX_ANGLE, MIDDLE_ANGLE) == KEPT[2]
    assert chosen(KEPT, 2, None, 1.0) is None
    assert chosen(KEPT, 2, 1.5, None) is None
    assert chosen(KEPT, 4, None, None) is None
    torch.testing.assert_close(angle_from_sigma(grid_of(KEPT, 3).sigmas), torch.tensor(KEPT[3]))
    for steps, first, middle in ((1, None, None), (4, None, None), (2, None, 1.0)):
        wanted = scm_grid(steps, first or MAX_ANGLE, middle or MIDDLE_ANGLE)
        assert torch.equal(grid_of(KEPT, steps, first, middle).sigmas, wanted.sigmas)


def test_loop_and_pipeline_draw_with_the_kept_angles(folder: Path, tmp_path: Path) -> None:
    keep_angles(folder, KEPT)
    parts = load(folder)
    assert parts.angles == KEPT
    request = Request(prompt="a", width=256, height=256, seed=0, steps=2, sampler="scm", binning=False)
    kept = generate_images(parts, request).images[0]
    assert kept.tobytes() != generate_images(parts, request.replace(intermediate_timesteps=1.0)).images[0].tobytes()
    parts.angles = {}
    assert kept.tobytes() != generate_images(parts, request).images[0].tobytes()
    pipe = SanaSprintPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 256, "width": 256, "use_resolution_binning": False, "output_type": "latent"}

    def drawn(**changes: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipe("a", num_inference_steps=2, generator=generator, **{**options, **changes}).images

    assert torch.equal(drawn(), drawn(timesteps=list(KEPT[2]), max_timesteps=None))
    # What begins below pure noise begins alike, too.
    same = drawn(output_type="pil")[0]
    assert np.abs(np.asarray(same, dtype=int) - np.asarray(kept, dtype=int)).max() <= 1
    assert not torch.equal(drawn(), drawn(intermediate_timesteps=1.0))
    pipe.save_pretrained(tmp_path / "again")
    assert angles_in(tmp_path / "again") == KEPT
