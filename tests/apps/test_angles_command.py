"""`sana angles`."""

import json
from pathlib import Path

import pytest
from command import Sana

from sana import SCMScheduler
from sana.checkpoints.folder import save_parts
from sana.engine.angles import angles_in, keep_angles
from sana.evaluation import angles
from tiny_model import make_tiny_parts, tiny_transformer


def saved(folder: Path, *, student: bool) -> Path:
    transformer = tiny_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=student)
    parts = {**make_tiny_parts().components, "transformer": transformer}
    save_parts(folder, {**parts, "scheduler": SCMScheduler()} if student else parts)
    return folder


def test_what_is_found_is_printed_and_kept(sana: Sana, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(angles, "FIRST", (1.5,))
    monkeypatch.setattr(angles, "LATER", (0.8,))
    monkeypatch.setattr(angles.search, "__defaults__", ((1.5,), (0.8,)))
    folder = saved(tmp_path / "m", student=True)
    words = ("angles", "-m", str(folder), "--steps", "2", "--prompts", "1", "--json")
    dry = sana(*words, "--dry-run")
    assert dry.code == 0, dry.err
    assert angles_in(folder) == {}
    said = sana(*words)
    assert said.code == 0, said.err
    told = json.loads(said.out)["angles"]
    assert told["2"]["angles"] == [1.5, 0.8, 0.0]
    assert 0 <= told["2"]["score"] <= 1
    assert angles_in(folder) == {1: (1.5, 0.0), 2: (1.5, 0.8, 0.0)}


def test_what_has_no_angles_is_refused(sana: Sana, tmp_path: Path) -> None:
    said = sana("angles", "-m", "nano")
    assert (said.code, "nano is none" in said.err) == (2, True)
    said = sana("angles", "-m", str(saved(tmp_path / "flow", student=False)))
    assert (said.code, "no SANA-Sprint model" in said.err) == (2, True)
    said = sana("angles", "word")
    assert (said.code, "named with -m" in said.err) == (2, True)


def test_a_distilled_model_is_measured_at_several_numbers_of_steps(sana: Sana, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", student=True)
    keep_angles(folder, {1: (1.5, 0.0)})
    words = ("evaluate", "geneval", "-m", str(folder), "--prompts", "1", "--images", "1")
    first = sana(*words, "--steps", "1", "-o", "one.json")
    assert first.code == 0, first.err
    said = sana(*words, "--steps", "1,2", "--against", "one.json", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert [(one["settings"]["steps"], one["settings"]["sampler"]) for one in told["runs"]] == [(1, "scm"), (2, "scm")]
    assert told["runs"][0] == json.loads(Path("one.json").read_text())
