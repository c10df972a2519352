"""The judges: exact, CLIP, and one's own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana.data.cutouts import render
from sana.errors import InvalidInput, ModelNotFound
from sana.evaluation.judges import CLIP_MATCH, ClipJudge, ExactJudge, find_judge
from sana.evaluation.prompts import prompts_of
from sana.evaluation.selection import Opinion
from tiny_onlookers import picture_reader, save_clip


def test_the_exact_judge_counts_what_is_fulfilled() -> None:
    (prompt,) = prompts_of("position", 1)
    picture = Image.fromarray(render(prompt.scene))
    judge = ExactJudge()
    right = judge.judge(prompt.text, picture)
    assert right == Opinion(matches=True, score=6.0)
    assert judge.judge(prompt.text, picture.resize((512, 512))) == right
    empty = judge.judge(prompt.text, Image.new("RGB", (256, 256), (250, 243, 226)))
    assert empty == Opinion(matches=False, score=0.0)
    with pytest.raises(InvalidInput, match="knows the drawn world only"):
        judge.judge("a lighthouse", picture)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A CLIP model of random weights."""
    return save_clip(tmp_path / "clip")


def test_clip_gives_the_cosine_of_its_model(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    judge = find_judge(f"clip:{clip_folder}")
    assert judge.name == f"clip {clip_folder}"
    picture = Image.fromarray(render(prompts_of("counting", 1)[0].scene))
    opinion = judge.judge("a red fish", picture)
    assert -1 <= opinion.score <= 1
    assert opinion.matches is (opinion.score >= CLIP_MATCH)
    assert isinstance(judge, ClipJudge)
    model: Any = CLIPModel.from_pretrained(clip_folder).eval()
    words = AutoTokenizer.from_pretrained(clip_folder)(["a red fish"], return_tensors="pt")
    pixels = picture_reader()(images=[picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        whole = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
    cosine = float((whole.text_embeds * whole.image_embeds).sum())
    assert opinion.score == pytest.approx(cosine, abs=1e-5)
    assert judge.judge("blue " * 90, picture).score != opinion.score  # too long a prompt is cut, not refused


def test_a_clip_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"There is no model '.*nowhere'"):
        find_judge(f"clip:{tmp_path / 'nowhere'}")


JUDGES = """
from sana.evaluation.selection import Opinion
def number(prompt, picture): return picture.width
def answer(prompt, picture): return "fox" in prompt
def both(prompt, picture): return "fox" in prompt, 2
def opinion(prompt, picture): return Opinion(matches=True, score=0.5)
def nothing(prompt, picture): return None
five = 5
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    picture = Image.new("RGB", (32, 16))

    def said(name: str) -> Opinion:
        return find_judge(f"my_judges:{name}").judge("a fox", picture)

    assert said("number") == Opinion(matches=False, score=32.0)
    assert said("answer") == Opinion(matches=True, score=0.0)
    assert said("both") == Opinion(matches=True, score=2.0)
    assert said("opinion") == Opinion(matches=True, score=0.5)
    with pytest.raises(InvalidInput, match="answered 'None'"):
        said("nothing")
    for word, words in {
        "my_judges:six": "no function six",
        "my_judges:five": "no function five",
        "no_such_module_x:judge": "cannot be imported",
        "exakt": "Did you mean 'exact'",
        "exact:all": "takes no 'all'",
    }.items():
        with pytest.raises(InvalidInput, match=words):
            find_judge(word)
    del sys.modules["my_judges"]
