"""`--best-of`: candidates, a judge, and the pictures that stay."""

import json
from pathlib import Path

import pytest
from command import Sana

from sana.engine.metadata import read_metadata

JUDGE = ("--judge", "own:third")
FOX = ("a fox", "--seed", "5", "--best-of", "4", *JUDGE)


@pytest.fixture(autouse=True)
def own_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder, which prefers every third picture that it sees."""
    lines = ("seen = []", "def third(prompt, picture):", "    seen.append(1)", "    return len(seen) % 3 == 0", "")
    (tmp_path / "own.py").write_text("\n".join(lines))
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)


def test_the_winner_is_written_with_how_it_was_chosen_and_replays(draw: Sana, sana: Sana) -> None:
    said = draw(*FOX)
    assert said.code == 0, said.err
    assert said.out.strip() == "a-fox-best-of-4-5.png"
    assert "seed 7" in said.err
    assert "best of 4: it matches, score 0 by own:third" in said.err
    record = read_metadata("a-fox-best-of-4-5.png").record
    assert record is not None
    assert record["seed"] == 7
    assert record["selection"]["first_seed"] == 5
    assert "best of 4: it matches, score 0 by own:third" in sana("info", "a-fox-best-of-4-5.png").out
    model = ("--model", str(record["model"]["source"])) if Path(str(record["model"]["source"])).exists() else ()
    assert draw("a fox", "--seed", "7", "-o", "alone.png").code == 0
    alone = sana("replay", "a-fox-best-of-4-5.png", *model)
    assert alone.out.strip() == "identical", alone.err


def test_several_winners_a_sweep_and_the_document(draw: Sana) -> None:
    said = draw(*FOX, "--count", "2", "-o", "out/", "--json")
    document = json.loads(said.out)
    assert document["files"] == ["out/a-fox-best-of-4-5.png", "out/a-fox-best-of-4-6.png"]
    assert document["seeds"] == [5, 7]
    assert [one["seed"] for one in document["selection"]] == [5, 7]
    assert document["settings"]["count"] == 2
    said = draw("a fox", "--seed", "5", "--sweep", "steps=1,2", "--best-of", "3", "-o", "s/", *JUDGE)
    assert said.code == 0, said.err
    assert sorted(path.name for path in Path("s").iterdir()) == [
        "a-fox-steps-1-best-of-3-5.png",
        "a-fox-steps-2-best-of-3-5.png",
        "a-fox-sweep-5.png",
    ]


def test_the_built_in_model_is_judged_exactly_and_a_file_keeps_its_name(sana: Sana) -> None:
    said = sana("a red fish", "--best-of", "2", "--seed", "1", "--steps", "2", "-o", "fish.png", "--json")
    assert said.code == 0, said.err
    document = json.loads(said.out)
    assert document["files"] == ["fish.png"]
    assert document["selection"][0]["judge"] == "exact"
    said = sana("a lighthouse", "--best-of", "2", "--steps", "1", "-o", "no.png")
    assert said.code == 2
    assert "knows the drawn world only" in said.err
    assert not Path("no.png").exists()


def test_a_dry_run_counts_the_candidates(sana: Sana) -> None:
    one, many = (
        json.loads(sana("a red fish", *more, "--dry-run", "--json").out)["estimate"]["seconds"]["all"]
        for more in ((), ("--best-of", "64"))
    )
    assert many > 10 * one
    assert "64 candidates" in sana("a red fish", "--best-of", "64", "--dry-run").out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--judge", "exact"), "--judge has no effect without --best-of"),
        (("--best-of", "1"), "--best-of must be a number of candidates from 2 to 2048, not 1"),
        (("--best-of", "4", "--count", "4"), "--best-of 4 leaves nothing to choose for 4 pictures"),
        (("--best-of", "4", "--seed", "1-2"), "--best-of draws candidates from one --seed on"),
        (("--best-of", "4", "--count", "2", "--skip-existing"), "--skip-existing cannot tell which"),
    ],
)
def test_what_leaves_no_choice_is_refused(sana: Sana, no_loading: None, words: tuple[str, ...], text: str) -> None:
    said = sana("a red fish", *words)
    assert said.code == 2
    assert text in said.err


def test_a_batch_has_no_candidates_and_settings_for_all_verbs_do_not_disturb_it(
    sana: Sana, draw: Sana, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("two.txt").write_text("a fox\na boat\n")
    assert "There is no option --best-of" in sana("batch", "two.txt", "--best-of", "4").err
    monkeypatch.setenv("SANA_BEST_OF", "4")
    monkeypatch.setenv("SANA_JUDGE", "exact")
    said = draw("batch", "two.txt", "-o", "out")
    assert said.code == 0, said.err
    assert len(list(Path("out").glob("*.png"))) == 2
