"""CLIP scores: those of the library's own pipeline, on a tiny random CLIP."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sana.errors import CheckpointError
from sana.evaluation.clip_score import ClipScorer
from tiny_onlookers import picture_reader, save_clip

TEXTS = ["a red fish", "the blue boat", "a picture of one fish above two", "it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer(str(folder))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.RandomState(0)
    return [Image.fromarray(noise.randint(0, 255, (h, w, 3), np.uint8)) for h, w in ((40, 64), (64, 40), (32, 32))]


def test_scores_are_a_hundred_times_the_cosine_of_the_library(
    folder: Path, scorer: ClipScorer, pictures: list[Image.Image]
) -> None:
    from transformers import AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    pixels = picture_reader()(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        told = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
        wanted = 100 * told.logits_per_image / model.logit_scale.exp()
    found = torch.tensor(scorer.scores(pictures, [TEXTS] * 3))
    assert torch.allclose(found, wanted.clamp_min(0), atol=1e-3)
    assert float(wanted.std()) > 1


def test_a_score_does_not_depend_on_its_company(scorer: ClipScorer, pictures: list[Image.Image]) -> None:
    together = scorer.scores(pictures, [TEXTS[:1], [], TEXTS[1:]])
    assert [len(own) for own in together] == [1, 0, 3]
    alone = scorer.scores(pictures[2:], [TEXTS[2:3]])
    assert together[2][1] == pytest.approx(alone[0][0], abs=1e-3)
    assert scorer.scores([], []) == []
    assert scorer.scores(pictures[:1], [[]]) == [[]]


def test_texts_are_cut_at_the_length_of_the_model(scorer: ClipScorer) -> None:
    many = " ".join(["fish"] * 75)  # and the two marks around it
    whole, longer, other = scorer.texts([many, f"{many} boat", f"boat {many}"])
    assert torch.equal(whole, longer)
    assert not torch.allclose(whole, other, atol=1e-3)


def test_scores_lie_between_0_and_100(scorer: ClipScorer, pictures: list[Image.Image], monkeypatch: Any) -> None:
    seen = scorer.pictures(pictures[:1])
    monkeypatch.setattr(scorer, "texts", lambda texts: torch.cat([seen, -seen]))
    assert scorer.scores(pictures[:1], [["same", "opposite"]])[0] == pytest.approx([100, 0], abs=1e-3)


def test_a_model_that_is_no_clip_is_refused(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"model_type": "clip"', '"model_type": "siglip"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="holds a model of type 'siglip', no CLIP: name a CLIP model"):
        ClipScorer(str(tmp_path))
