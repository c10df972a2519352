"""A vision-language model that describes pictures, on a tiny random one of a real architecture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana.errors import InvalidInput
from sana.training.labelling.captioner import Captioner, Describing
from tiny_onlookers import save_describer, save_video_describer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_describer(tmp_path_factory.mktemp("describer"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.RandomState(1)
    return [Image.fromarray(noise.randint(0, 255, (h, w, 3), np.uint8)) for h, w in ((40, 64), (64, 40), (32, 32))]


def captioner(folder: Path, **options: Any) -> Captioner:
    return Captioner(str(folder), Describing(**{"max_tokens": 6, "prompts": ("describe it",), **options}))


def test_every_prompt_gets_its_answer_and_a_picture_says_the_same_in_every_company(
    folder: Path, pictures: list[Image.Image]
) -> None:
    one = captioner(folder, prompts=("describe it", "the picture of a blue boat"))
    together = one.describe(pictures)
    assert [len(texts) for texts in together] == [2, 2, 2]
    assert together == [one.describe([picture])[0] for picture in pictures]
    assert len({texts[0] for texts in together}) > 1, "it does not look at the pictures"
    assert any(texts[0] != texts[1] for texts in together), "it does not read the prompts"
    assert all(1 <= len(text.split()) <= 6 for texts in together for text in texts)
    assert not any("<" in text or "describe it :" in text for texts in together for text in texts)


def test_a_model_that_also_reads_videos_needs_no_torchvision(tmp_path: Path, pictures: list[Image.Image]) -> None:
    one = captioner(save_video_describer(tmp_path))
    together = one.describe(pictures)  # of as many tokens as the pictures are large
    assert together == [one.describe([picture])[0] for picture in pictures]
    assert len({texts[0] for texts in together}) > 1


def test_samples_differ_and_depend_on_seed_and_salt_alone(folder: Path, pictures: list[Image.Image]) -> None:
    one = captioner(folder, samples=3, temperature=1.0)
    first = one.describe(pictures, "a")
    assert [len(texts) for texts in first] == [3, 3, 3]
    assert len(set(first[0])) > 1
    assert one.describe(pictures, "b") != first
    assert one.describe(pictures, "a") == first
    assert captioner(folder, samples=3, temperature=1.0, seed=1).describe(pictures, "a") != first


def test_a_model_without_a_chat_template_gets_the_bare_prompt(
    folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = captioner(tmp_path, prompts=("<image> describe it :",))
    assert bare.describe(pictures) == captioner(folder).describe(pictures)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompts": ()}, "A prompt for the captions is empty"),
        ({"prompts": (" ",)}, "A prompt for the captions is empty"),
        ({"samples": 0}, "must be at least 1"),
        ({"temperature": -1.0}, "`temperature` must lie from 0 to 10 but is -1"),
        ({"samples": 2}, "Several `samples` of a prompt are all the same at `temperature` 0. Raise it."),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Describing(**settings)
