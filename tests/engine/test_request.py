import dataclasses
import json
import math
import re
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana import Request, SanaPipeline
from sana.engine.request import MAX_CHARACTERS, MAX_SEED, SAMPLER_NAMES, ResolvedRequest, shown
from sana.errors import InvalidInput
from sana.flow.samplers import SAMPLERS


class Evil:
    """Refuses to be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def card(**changes: Any) -> Any:
    values = {"name": "toy", "base_size": 512, "sizes": None, "product": "text-to-image", "sampler": "flow-dpm"}
    return SimpleNamespace(**{**values, "steps": 12, "guidance": 3.5, **changes})


def test_sampler_names_are_those_of_the_registry() -> None:
    assert tuple(SAMPLERS) == SAMPLER_NAMES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", ["a", "b"]),
        ("prompt", "a\x00b"),
        ("negative_prompt", None),
        ("steps", 0),
        ("steps", -3),
        ("steps", 2.5),
        ("steps", True),
        ("steps", 1001),
        ("guidance", math.nan),
        ("guidance", math.inf),
        ("guidance", -1.0),
        ("guidance", "4"),
        ("guidance_interval", (0.8, 0.2)),
        ("guidance_interval", (0.0, 1.5)),
        ("guidance_interval", (0.5,)),
        ("guidance_interval", "01"),
        ("guidance_interval", (0.0, math.nan)),
        ("sampler", "flow_dpm"),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", "7"),
        ("count", 0),
        ("batch_size", 0),
        ("binning", 1),
        ("max_prompt_tokens", 0),
        ("prompt", "a" * (MAX_CHARACTERS + 1)),
        ("prompt", "a \ud83d fox"),
        ("negative_prompt", "\udcff"),
        ("guidance_interval", b"\x00\x01"),
        ("guidance_interval", {0.1: 0.5}),
        ("sampler", np.array(["flow-dpm", "scm"])),
    ],
)
def test_impossible_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"`{field}`")):
        Request(**{"prompt": "a fox", field: value})  # type: ignore[arg-type]


NUMBERS = ("width", "height", "steps", "seed", "count", "batch_size", "max_prompt_tokens", "guidance")
NO_NUMBERS: tuple[Any, ...] = (
    *("512", "", b"1", True, math.nan, math.inf, -math.inf, 1e308, -1, -(10**5000), 10**5000, 2**64, 512.5, -0.5),
    *([512], (1,), {"a": 1}, {1}, object(), int, 3 + 0j, "9" * 5000, Decimal(5), np.array([1, 2]), np.float32(2)),
)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: f"{type(value).__name__}")
def test_every_numeric_field_refuses_what_is_no_number_of_its_range(field: str, value: object) -> None:
    size = {"width": 64, "height": 64, "binning": False} if field in ("width", "height") else {}
    with pytest.raises(InvalidInput) as caught:
        Request(**{"prompt": "a", **size, field: value})
    said = str(caught.value)
    assert said.startswith(f"`{field}` must be a ")
    assert " from " in said
    assert len(said) <= 220
    assert "\n" not in said


@pytest.mark.parametrize("seed", [0, 2**53 - 1])
def test_seeds_at_the_ends_of_their_range(seed: int) -> None:
    assert Request(prompt="a", seed=seed).seed == seed


@pytest.mark.parametrize(
    "text", ["", "  ", "🦊" * 20, "\u202e\u200bfox", "<eos><start_of_turn>", "a" * MAX_CHARACTERS, "\x01\x7f\ufeff"]
)
def test_unusual_text_is_text(text: str) -> None:
    assert Request.from_dict(json.loads(json.dumps(Request(prompt=text).to_dict()))).prompt == text


def test_what_is_computed_at_once_has_a_bound() -> None:
    Request(prompt="a", width=16384, height=16384, batch_size=4)
    with pytest.raises(InvalidInput, match="`batch_size` 8 of 16384 x 16384"):
        Request(prompt="a", width=16384, height=16384, batch_size=8)
    with pytest.raises(InvalidInput, match="`batch_size` 1024 of 2048 x 2048"):
        Request(prompt="a", batch_size=1024).resolve(card(base_size=2048))


@pytest.mark.parametrize(
    "value",
    [10**5000, [10**5000] * 50, "x" * 10**6, {"a" * 999: [[[[1]]]]}, Evil(), b"\xff" * 999, -(10**40), {frozenset()}],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_value_is_shown_shortly(value: object) -> None:
    assert len(shown(value)) <= 120
    assert shown("fox") == "'fox'"
    assert shown(-5) == "-5"


def test_requests_come_from_mappings_only() -> None:
    for values in (None, [], "prompt", 3):
        with pytest.raises(InvalidInput, match="must be a mapping"):
            Request.from_dict(values)  # type: ignore[arg-type]
    for values in ({3: 1}, {"x" * 10**6: 1}, {None: None}):
        with pytest.raises(InvalidInput, match="is not a field") as caught:
            Request.from_dict(values)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 450


def test_a_resolved_request_leaves_nothing_open() -> None:
    whole = Request(prompt="a").resolve(card()).to_dict()
    for name in ("width", "height", "steps", "guidance", "sampler", "seed"):
        with pytest.raises(InvalidInput, match=f"`{name}` is missing"):
            ResolvedRequest.from_dict({key: value for key, value in whole.items() if key != name})
    assert ResolvedRequest.from_dict(whole).to_dict() == whole


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 256}, "go together"),
        ({"width": 1000, "height": 700, "binning": False}, "Use 992 x 704"),
        ({"width": 10, "height": 64, "binning": False}, "Use 32 x 64"),
        ({"width": 64, "height": 99999}, "`height`"),
        ({"negative_prompt": "blur", "guidance": 1.0}, "no effect"),
        ({"seed": MAX_SEED, "count": 2}, "largest seed"),
        ({"sampler": "flow-dmp"}, "Did you mean 'flow-dpm'"),
    ],
)
def test_contradictions_say_what_to_do(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        Request(prompt="a fox", **values)


def test_sizes_need_no_step_with_binning() -> None:
    assert Request(prompt="a fox", width=1000, height=700).width == 1000


def test_resolve_fills_every_gap_from_the_card() -> None:
    done = Request(prompt="a fox", count=2).resolve(card())
    assert (done.width, done.height, done.steps, done.guidance, done.sampler) == (512, 512, 12, 3.5, "flow-dpm")
    assert 0 <= done.seed < 2**32
    assert isinstance(done, ResolvedRequest)
    assert done.count == 2


def test_resolve_keeps_what_was_asked() -> None:
    wish = Request(prompt="a fox", width=64, height=96, steps=3, guidance=1.0, sampler="flow-euler", seed=5)
    assert wish.resolve(card()).to_dict() == wish.to_dict()


def test_a_drawn_seed_differs_between_runs() -> None:
    assert len({Request(prompt="a").resolve(card()).seed for _ in range(8)}) > 1


def test_a_card_with_sizes_refuses_others() -> None:
    small = card(base_size=256, sizes=((256, 256),))
    assert Request(prompt="a").resolve(small).width == 256
    with pytest.raises(InvalidInput, match="toy draws 256 x 256 only, not 512 x 256"):
        Request(prompt="a", width=512, height=256).resolve(small)


def test_sprint_has_its_own_rules() -> None:
    sprint = card(product="sprint", sampler="scm")
    with pytest.raises(InvalidInput, match="no negative prompt"):
        Request(prompt="a", negative_prompt="b").resolve(sprint)
    with pytest.raises(InvalidInput, match="Use 'scm'"):
        Request(prompt="a", sampler="flow-dpm").resolve(sprint)
    with pytest.raises(InvalidInput, match="Use 'flow-dpm'"):
        Request(prompt="a", sampler="scm").resolve(card())


def test_a_negative_prompt_meets_the_cards_guidance() -> None:
    with pytest.raises(InvalidInput, match="no effect"):
        Request(prompt="a", negative_prompt="b").resolve(card(guidance=1.0))


requests = st.builds(
    Request,
    prompt=st.text(alphabet=st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40),
    steps=st.none() | st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 100),
    seed=st.none() | st.integers(0, 2**40),
    count=st.integers(1, 50),
    sampler=st.none() | st.sampled_from(SAMPLER_NAMES),
    binning=st.booleans(),
)


@given(requests)
def test_json_round_trip_is_exact(request: Request) -> None:
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'prompt'"):
        Request.from_dict({"promt": "a"})
    with pytest.raises(InvalidInput, match="`prompt` is missing"):
        Request.from_dict({"steps": 3})


def test_requests_are_frozen_and_replace_checks_again() -> None:
    request = Request(prompt="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.steps = 3  # type: ignore[misc]
    with pytest.raises(InvalidInput, match="`steps`"):
        request.replace(steps=0)
    assert request.replace(steps=3).steps == 3


def test_every_field_carries_its_help() -> None:
    """The command and the web form show the sentence under each field."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(Request)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(field)
            assert isinstance(after.value, ast.Constant)
            assert str(after.value.value).endswith(".")


def test_defaults_agree_with_the_documented_call() -> None:
    import inspect

    call = inspect.signature(SanaPipeline.__call__).parameters
    request = Request(prompt="a")
    assert call["max_sequence_length"].default == request.max_prompt_tokens
    assert call["use_resolution_binning"].default is request.binning
    assert call["clean_caption"].default is request.clean_caption
    assert call["num_images_per_prompt"].default == request.count
