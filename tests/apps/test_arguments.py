"""Flags made from dataclasses."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from sana.apps.cli.arguments import Group, Spelling, read, take
from sana.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Some options."""

    side: int | None = None
    """Length of a side, 100 % of it."""
    weight_share: Annotated[float, Spelling(short="-w", also=("--share",))] = 0.5
    """Share of the weight."""
    kind: Literal["round", "square"] = "round"
    """What it looks like."""
    ends: tuple[float, float] = (0.0, 1.0)
    """Both ends."""
    smooth: bool = True
    """Make it smooth."""
    hollow: bool = False
    """Make it hollow."""
    secret: str = "x"


GROUPS = (Group(title="the toy", options=Toy, leave_out=frozenset({"secret"})),)


def reading(*words: str) -> tuple[list[str], dict[str, Any]]:
    return read(words, GROUPS, usage="toy", description="A toy.", refused={"--glue": "No glue here."})


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ((), {}),
        (("--side", "3"), {"side": 3}),
        (("--side=-3",), {"side": -3}),
        (("--side", "-3"), {"side": -3}),
        (("-w", ".25"), {"weight_share": 0.25}),
        (("--share", "1"), {"weight_share": 1.0}),
        (("--weight_share=1",), {"weight_share": 1.0}),
        (("--kind", "square"), {"kind": "square"}),
        (("--ends", "0.2", "0.8"), {"ends": [0.2, 0.8]}),
        (("--no-smooth", "--hollow"), {"smooth": False, "hollow": True}),
        (("-q", "--json"), {"quiet": True, "json": True}),
    ],
)
def test_only_what_was_given_is_returned(words: tuple[str, ...], given: dict[str, Any]) -> None:
    assert reading(*words) == ([], given)


def test_words_stay_in_order_around_flags() -> None:
    assert reading("a fox", "--side", "3", "-", "-a b") == (["a fox", "-", "-a b"], {"side": 3})
    assert reading("--hollow", "--", "--side", "3") == (["--side", "3"], {"hollow": True})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--sied", "3"), "There is no option --sied. Did you mean '--side'?"),
        (("--xyzzy",), "There is no option --xyzzy. All of them: --help."),
        (("--secret=3",), "There is no option --secret. All of them: --help."),
        (("--glue=much",), "No glue here."),
        (("--side",), "--side needs a value."),
        (("--side", "--hollow"), "--side needs a value."),
        (("--ends", "1"), "--ends needs two values."),
        (("--side", "3.5"), "--side takes a whole number, not '3.5'."),
        (("-w", "much"), "--weight-share takes a number, not 'much'."),
        (("--kind", "rond"), "--kind must be one of round, square, not 'rond'. Did you mean 'round'?"),
        (("--sid", "3"), "There is no option --sid. Did you mean '--side'?"),
    ],
)
def test_every_mistake_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        reading(*words)
    assert str(caught.value) == sentence


def test_the_help_is_the_sentences_under_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        reading("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("Length of a side, 100 % of it.", "(default: 0.5)", "Also --share.", "round|square", "--no-smooth"):
        assert part in text
    assert "--secret" not in text
    assert "(default: 0 1)" in text


def test_take_takes_the_fields_of_a_dataclass() -> None:
    given = {"side": 3, "other": 1}
    assert take(Toy, given) == {"side": 3}
    assert given == {"other": 1}
