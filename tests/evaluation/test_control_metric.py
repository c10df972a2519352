"""The control metric on models whose every picture is known: true, recoloured, shifted, other things, blank."""

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sana.data.cutout_captions import LANGUAGES
from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import is_held_out, render
from sana.engine.parts import Parts
from sana.errors import InvalidInput
from sana.evaluation.control import ControlReport, Order, evaluate_control, orders_of
from sana.evaluation.runner import Settings, run
from tiny_model import tiny_controlnet

Picture = NDArray[np.uint8]
SCENES = 12


def shifted(picture: Picture, by: int) -> Picture:
    return np.pad(picture, ((0, 0), (by, 0), (0, 0)), mode="edge")[:, : picture.shape[1]]


def measured(make: Callable[[Order], Picture]) -> ControlReport:
    """The report of a model that makes these pictures of the orders, and blank ones without a control picture."""
    orders = orders_of(SCENES)

    def follow(prompts: list[str], seeds: list[int], _: list[Picture]) -> list[Picture]:
        assert prompts == [orders[seed].text for seed in seeds]
        return [make(orders[seed]) for seed in seeds]

    blank = np.full((256, 256, 3), 240, np.uint8)
    return evaluate_control(follow, lambda prompts, _: [blank] * len(prompts), kind="ink", scenes=SCENES, batch_size=9)


def scores(report: ControlReport) -> tuple[float, float, float, float]:
    found = [report.score("with control", name).share for name in ("near", "strict", "things", "right")]
    assert None not in found
    return tuple(found)  # type: ignore[return-value]


def test_true_pictures_in_the_colours_asked_for_reach_all_there_is() -> None:
    report = measured(lambda order: render(order.wanted))
    near, strict, things, right = scores(report)
    assert near > 0.995
    assert strict > 0.97
    assert (things, right) == (1, 1)
    assert report.outcomes["with control"] == report.outcomes["true"]
    assert report.score("without control", "near").share == report.score("without control", "things").share == 0


def test_the_right_shapes_in_the_old_colours_follow_the_picture_but_not_the_prompt() -> None:
    near, _, things, right = scores(measured(lambda order: render(order.scene)))
    assert near == 1
    assert (things, right) == (0, 0)


@pytest.mark.parametrize(("by", "near", "strict"), [(2, 0.998, 0.60), (4, 0.67, 0.34), (8, 0.30, 0.17)])
def test_shifted_pictures_have_the_right_colours_at_the_wrong_place(by: int, near: float, strict: float) -> None:
    found = scores(measured(lambda order: shifted(render(order.wanted), by)))
    assert found[:2] == (pytest.approx(near, abs=0.03), pytest.approx(strict, abs=0.04))
    assert found[2] > 0.95


def test_pictures_of_other_scenes_fail_in_everything() -> None:
    orders = orders_of(SCENES + 1)
    near, strict, things, right = scores(measured(lambda order: render(orders[orders.index(order) + 1].wanted)))
    assert near < 0.15
    assert strict < 0.08
    assert things < 0.15
    assert right == 0


def test_orders_ask_for_the_same_things_elsewhere_coloured() -> None:
    orders = orders_of(60)
    assert orders[:7] == orders_of(7)
    assert orders[:7] != orders_of(7, seed=1)
    for order in orders:
        assert is_held_out(order.scene.groups, order.scene.relation)
        for before, after in zip(order.scene.things, order.wanted.things, strict=True):
            assert before.colour != after.colour
            assert (before.kind, before.x, before.y, before.radius) == (after.kind, after.x, after.y, after.radius)
    assert {order.language for order in orders} == set(LANGUAGES)
    kinds = [group.kind for order in orders for group in order.scene.groups]
    assert min(map(kinds.count, KINDS)) >= 60 // len(KINDS)


def test_the_record_tells_every_scene_and_the_sheet_shows_the_first() -> None:
    report = measured(lambda order: render(order.wanted))
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["settings"] == {"scenes": SCENES, "seed": 0, "kind": "ink", "tolerance": 2}
    assert len(record["scenes"]) == SCENES
    assert record["scenes"][0]["outcomes"]["with control"]["right"] is True
    assert record["scenes"][0]["outcomes"]["without control"] == {"near": 0, "strict": 0, "things": 0, "right": False}
    assert report.sheet is not None
    assert report.sheet.width > 8 * 168
    assert report.table().splitlines()[0] == (
        "| pictures        | edge IoU within 2 px | strict edge IoU | things in their colour | pictures all right |"
    )


@pytest.mark.parametrize(("given", "message"), [({"scenes": 0}, "1 or more"), ({"kind": "depth"}, "no strokes")])
def test_what_cannot_be_measured_is_refused(given: dict[str, object], message: str) -> None:
    nothing = {"follow": lambda *_: [], "draw": lambda *_: [], "kind": "ink"}
    with pytest.raises(InvalidInput, match=message):
        evaluate_control(**{**nothing, **given})  # type: ignore[arg-type]


def test_a_branch_that_has_learnt_nothing_scores_what_the_model_scores_without(tiny_parts: Parts) -> None:
    small = Settings(scenes=3, steps=(2,), batch_size=2, control="ink")
    fresh = copy.copy(tiny_parts)
    fresh.controlnet = type(tiny_controlnet(fresh.transformer)).from_transformer(fresh.transformer, 1)
    record = run("control", fresh, small).to_dict()
    assert record["scores"]["with control"] == record["scores"]["without control"]
    assert all(one["outcomes"]["with control"] == one["outcomes"]["without control"] for one in record["scenes"])
    fresh.controlnet = tiny_controlnet(fresh.transformer)
    record = run("control", fresh, small).to_dict()
    assert record["scores"]["with control"] != record["scores"]["without control"]
    assert record["settings"]["model"]["controlnet_weights"]


def test_what_is_missing_is_said(tiny_parts: Parts) -> None:
    with pytest.raises(InvalidInput, match="tiny comes without a control network, so it follows no picture"):
        run("control", tiny_parts, Settings(control="ink"))
    fresh = copy.copy(tiny_parts)
    fresh.controlnet = tiny_controlnet(fresh.transformer)
    with pytest.raises(InvalidInput, match=r"of tiny was trained to follow is not known. Name it with `control`"):
        run("control", fresh, Settings())
    with pytest.raises(InvalidInput, match="`steps` must be one number"):
        run("control", fresh, Settings(control="ink", steps=(1, 2)))
