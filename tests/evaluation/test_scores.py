"""Shares, their half-widths, and the table."""

import pytest

from sana.evaluation.scores import Score, table


def test_binomial_half_width() -> None:
    # 200 pictures at one half: 1.96 sqrt(0.25 / 200) = 0.0693, the seven points of the specification.
    score = Score.of([True, False] * 100)
    assert score.share == 0.5
    assert score.half_width == pytest.approx(0.0693, abs=1e-4)
    assert score.with_width == "0.50 ± 0.07"
    assert Score.of([True] * 7).half_width == 0


def test_mean_of_figures() -> None:
    flags = [True, False, False, True, True]
    assert Score.of_values([float(flag) for flag in flags]).to_dict() == Score.of(flags).to_dict()
    score = Score.of_values([0.8, 0.6] * 50)
    assert score.with_width == "0.70 ± 0.02"
    assert score.half_width == pytest.approx(1.96 * 0.1 / 10)
    assert Score.of_values([]) == Score.of([])


def test_mean_of_tasks_is_unweighted() -> None:
    one, other = Score.of([True, False] * 100), Score.of([True] * 50)
    both = Score.mean_of([one, other, Score.of([])])
    assert both.share == 0.75
    assert both.half_width == pytest.approx(one.half_width / 2)
    assert both.total == 250
    # Six tasks of 200 pictures each at one half: 2.8 points.
    assert Score.mean_of([one] * 6).half_width == pytest.approx(0.0283, abs=1e-4)


def test_nothing_counted_is_no_zero() -> None:
    for nothing in (Score.of([]), Score.mean_of([]), Score.mean_of([Score.of([])])):
        assert nothing.share is None
        assert str(nothing) == nothing.with_width == "-"
        assert nothing.to_dict() == {"share": None, "half_width": 0.0, "pictures": 0}


def test_table_is_aligned_markdown() -> None:
    assert table(["task", "score"], [["a", "0.5"], ["colours", "1.00 ± 0.00"]]).splitlines() == [
        "| task    |       score |",
        "| ------- | ----------: |",
        "| a       |         0.5 |",
        "| colours | 1.00 ± 0.00 |",
    ]
