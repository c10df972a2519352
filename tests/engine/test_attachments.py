"""What a request attaches: each field alone, together, in JSON, and against the model."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sana import Request
from sana.engine.attachments import CONTROL_KINDS, ControlRequest, FileRef, LoraRequest
from sana.errors import InvalidInput

PICTURE = Image.new("RGB", (48, 32), (9, 8, 7))
DIGEST = "0123456789abcdef" * 4
REF = {"name": "fox.png", "sha256": DIGEST}


def card(**changes: Any) -> Any:
    values = {"name": "toy", "base_size": 512, "sizes": None, "product": "text-to-image", "sampler": "flow-dpm"}
    shape = SimpleNamespace(sample_size=16)
    return SimpleNamespace(
        **{**values, "steps": 12, "guidance": 3.5, "pag_layers": ("b.1",), "transformer": shape, **changes}
    )


SPRINT = card(product="sprint", sampler="scm", steps=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": ""}, "`image` is empty"),
        ({"image": 7}, "`image` must be a path or a PIL image"),
        ({"image": b"x"}, "`image` must be a path"),
        ({"image": "a\x00b"}, "NUL"),
        ({"image": "a" * 5000}, "`image` has 5000 characters"),
        ({"image": "https://example.org/fox.png"}, "is an address, which is not fetched"),
        ({"image": "file:///etc/passwd"}, "is an address"),
        ({"image": {"name": "fox.png"}}, "needs `sha256`"),
        ({"image": {**REF, "path": "/x"}}, "has no field 'path'"),
        ({"image": {**REF, "name": "/x/fox.png"}}, "not a path"),
        ({"image": {**REF, "name": "..\\fox.png"}}, "not a path"),
        ({"image": {**REF, "sha256": "0"}}, "64 hexadecimal digits"),
        ({"image": {**REF, "sha256": None}}, "64 hexadecimal digits"),
        ({"mask": "m.png"}, "`mask` needs a picture"),
        ({"strength": 0.5}, "`strength` needs a picture"),
        ({"outpaint": (0, 0, 9, 0)}, "`outpaint` needs a picture"),
        ({"image": "a.png", "strength": 0}, "`strength` 0 would give the picture back"),
        ({"image": "a.png", "strength": 1.01}, "`strength` must be a number from 0 to 1"),
        ({"image": "a.png", "strength": float("nan")}, "`strength` must be a number"),
        ({"image": "a.png", "strength": "0.5"}, "`strength` must be a number"),
        ({"image": "a.png", "feather": 4}, "`feather` has no effect"),
        ({"feather": -1}, "`feather` must be a whole number"),
        ({"image": "a.png", "outpaint": (1, 2, 3)}, "`outpaint` must be four widths"),
        ({"image": "a.png", "outpaint": (0, 0, -1, 0)}, "`outpaint` must be a whole number"),
        ({"image": "a.png", "outpaint": (0, 0, 1.5, 0)}, "`outpaint` must be a whole number"),
        ({"outpaint": None}, "`outpaint` must be four widths"),
        ({"controls": "canny"}, "`controls` must be a list"),
        ({"controls": [{"kind": "edges", "image": "a"}]}, "In `controls`: `kind` of a control must be one of"),
        ({"controls": [{"kind": "cany", "image": "a"}]}, "Did you mean 'canny'"),
        ({"controls": [{"kind": "canny"}]}, "In `controls`: A control needs `image`"),
        ({"controls": [{"kind": "canny", "image": "a", "scale": 11}]}, "`scale` must be a number from 0 to 10"),
        ({"controls": [{"kind": "canny", "image": "a", "start": 0.6, "end": 0.5}]}, "must rise"),
        ({"controls": [{"kind": "canny", "image": "a", "weight": 1}]}, "has no field 'weight'"),
        ({"controls": ["canny"]}, "must hold ControlRequest only"),
        ({"controls": [{"kind": "canny", "image": "a"}] * 9}, "the most are 8"),
        ({"loras": [{"source": PICTURE}]}, "`source` of a LoRA must be a path"),
        ({"loras": [{"source": "a", "scale": float("inf")}]}, "`scale` must be a number from -10 to 10"),
        ({"loras": [{"source": "a"}] * 33}, "the most are 32"),
        ({"loras": {"source": "a"}}, "`loras` must be a list"),
        ({"pag_scale": -1}, "`pag_scale` must be a number"),
        ({"pag_scale": None}, "`pag_scale` must be a number"),
        ({"pag_adaptive_scale": 0.1}, "has no effect without `pag_scale`"),
        ({"pag_layers": "blocks.1"}, "has no effect without `pag_scale`"),
        ({"pag_scale": 1, "pag_layers": []}, "`pag_layers` must be a name"),
        ({"pag_scale": 1, "pag_layers": [3]}, "`pag_layers` must be text"),
        ({"pag_scale": 1, "pag_layers": " "}, "empty name"),
        ({"max_timesteps": 1.6}, "`max_timesteps` must be a number"),
        ({"intermediate_timesteps": 1.3, "max_timesteps": 1.2}, "must lie below `max_timesteps`"),
        ({"intermediate_timesteps": 1.3, "steps": 3}, "belongs to 2 steps, not to 3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)) as caught:
        Request(prompt="a fox", **values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350


@pytest.mark.parametrize(
    ("values", "model", "words"),
    [
        ({"pag_scale": 2.0}, SPRINT, "guided from within and has no PAG"),
        ({"guidance_interval": (0.1, 0.9)}, SPRINT, "`guidance_interval` has no effect"),
        ({"negative_prompt": "b"}, SPRINT, "no negative prompt"),
        ({"max_timesteps": 1.5}, card(), "`max_timesteps` is for SANA-Sprint models only"),
        ({"intermediate_timesteps": 1.3}, card(), "`intermediate_timesteps` is for SANA-Sprint models only"),
    ],
)
def test_what_a_model_cannot_honour_is_refused_with_the_reason(values: dict[str, Any], model: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        Request(prompt="a", **values).resolve(model)


def test_the_most_that_can_be_asked_survives_json() -> None:
    request = Request(
        prompt="a",
        image=FileRef(**REF),
        mask="mask.png",
        strength=1,
        feather=3,
        outpaint=[1, 2, 3, 4],  # type: ignore[arg-type]
        controls=[{"kind": kind, "image": REF, "scale": 1, "end": 0.5} for kind in CONTROL_KINDS],  # type: ignore[arg-type]
        loras=[LoraRequest(source="a/b.safetensors", scale=-1), {"source": REF}],  # type: ignore[arg-type]
        pag_scale=2,
        pag_adaptive_scale=1,
        pag_layers=["a", "b"],  # type: ignore[arg-type]
    )
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert hash(again) == hash(request)
    assert request.outpaint == (1, 2, 3, 4)
    assert request.pag_layers == ("a", "b")
    assert isinstance(again.controls[0], ControlRequest)
    assert isinstance(again.controls[0].image, FileRef)
    assert again.loras[0].source == "a/b.safetensors"


def test_a_picture_that_is_handed_over_becomes_its_digest_in_json(tmp_path: Path) -> None:
    told = Request(prompt="a", image=PICTURE, mask=tmp_path / "m.png").to_dict()
    assert told["image"]["name"] == ""
    assert re.fullmatch("[0-9a-f]{64}", told["image"]["sha256"])
    assert told["mask"] == str(tmp_path / "m.png")
    assert isinstance(
        hash(Request(prompt="a", image=PICTURE, controls=(ControlRequest(kind="map", image=PICTURE),))), int
    )


def test_sizes_come_from_the_picture_and_only_its_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    PICTURE.save(path)
    path.write_bytes(path.read_bytes()[:60])
    done = Request(prompt="a", image=path, outpaint=(1, 2, 3, 4)).resolve(card(sizes=((512, 512),)))
    assert (done.width, done.height) == (52, 38)
    done = Request(prompt="a", controls=(ControlRequest(kind="canny", image=path),)).resolve(card())
    assert (done.width, done.height) == (608, 416)
    done = Request(prompt="a", controls=(ControlRequest(kind="canny", image=path),)).resolve(card(sizes=((512, 512),)))
    assert (done.width, done.height) == (512, 512)
    done = Request(prompt="a", image=path, width=100, height=77, binning=False).resolve(card())
    assert (done.width, done.height) == (100, 77)


def test_sprint_steps_follow_a_middle_angle() -> None:
    assert (
        Request(prompt="a", intermediate_timesteps=1.0).resolve(card(product="sprint", sampler="scm", steps=4)).steps
        == 2
    )
