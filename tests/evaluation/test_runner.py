"""The registry of metrics over a real (tiny, random) model, and the files."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from sana.engine.parts import Parts
from sana.errors import InvalidInput
from sana.evaluation.autoencoder import AutoencoderReport
from sana.evaluation.runner import METRICS, Report, Settings, run, save, save_sheet
from sana.evaluation.scores import Score
from tiny_model import tiny_controlnet

SMALL = Settings(prompts=2, images=2, scenes=3, steps=(1,), guidance=1.0, batch_size=4, control="ink")


@pytest.fixture(scope="module")
def steered_parts(tiny_parts: Parts) -> Parts:
    """The tiny model with a control network."""
    parts = copy.copy(tiny_parts)
    parts.controlnet = tiny_controlnet(parts.transformer)
    return parts


@pytest.fixture(scope="module", params=METRICS)
def report(request: pytest.FixtureRequest, steered_parts: Parts) -> Report:
    found: Report = run(request.param, steered_parts, SMALL)
    return found


def test_every_metric_gives_a_table_and_a_record(report: Report) -> None:
    assert report.table().startswith("| ")
    record = report.to_dict()
    assert METRICS[record["metric"]].summary.endswith(".")
    assert record["settings"]["seed"] == 0


def test_the_same_run_writes_the_same_bytes(report: Report, steered_parts: Parts, tmp_path: Path) -> None:
    again = run(report.to_dict()["metric"], steered_parts, SMALL)
    one, other = save(report, tmp_path / "one.json"), save(again, tmp_path / "other.json")
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text(encoding="utf-8")) == json.loads(json.dumps(report.to_dict()))


def test_files_are_not_overwritten_unasked(report: Report, tmp_path: Path) -> None:
    for write, name in ((save, "report.json"), (save_sheet, "sheet.png")):
        write(report, tmp_path / name)
        with pytest.raises(InvalidInput, match="exists"):
            write(report, tmp_path / name)
        write(report, tmp_path / name, force=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 168


def test_a_report_without_pictures_has_no_sheet(tmp_path: Path) -> None:
    score = Score.of([True])
    bare = AutoencoderReport(read_right=score, truth_read_right=score, psnr=30.0, settings={})
    with pytest.raises(InvalidInput, match="no sample pictures"):
        save_sheet(bare, tmp_path / "sheet.png")


def test_settings_reach_the_model(tiny_parts: Parts) -> None:
    done: list[tuple[int, int]] = []
    record = run("geneval", tiny_parts, SMALL, lambda *step: done.append(step)).to_dict()
    assert done[-1] == (24, 24)
    assert len(done) == 6
    assert record["settings"]["steps"] == 1
    assert record["settings"]["guidance"] == 1.0
    assert record["settings"]["sampler"] == "flow-dpm"
    assert record["settings"]["model"]["name"] == "tiny"
    assert record["scores"]["overall"]["ground truth"]["share"] == 1.0
    assert record["scores"]["overall"]["autoencoder ceiling"]["share"] == 0.0


def test_an_autoencoder_alone_can_be_measured(tiny_parts: Parts) -> None:
    alone = Parts(vae=tiny_parts.vae)
    assert run("autoencoder", alone, SMALL).to_dict()["read_right"]["pictures"] == 3
    with pytest.raises(InvalidInput, match="tokenizer"):
        run("geneval", alone, SMALL)


def test_every_setting_concerns_some_metric_and_is_one() -> None:
    taken = {name for metric in METRICS.values() for name in metric.takes}
    assert taken | {"seed", "batch_size"} == {one.name for one in dataclasses.fields(Settings)}


def test_an_unknown_metric_is_refused_with_a_hint(tiny_parts: Parts) -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'geneval'"):
        run("genevil", tiny_parts, SMALL)
