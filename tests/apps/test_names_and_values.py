"""Slugs, planned files, and the notations of --size, --seed and --device."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana.apps.cli.names import LONGEST_SLUG, LONGEST_SLUG_BYTES, check_files, plan_files, slug
from sana.apps.cli.values import Shape, read_device, read_seeds, read_size, runs_of
from sana.cards import CARDS
from sana.errors import InvalidInput


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red fish above a yellow boat", "a-red-fish-above-a-yellow-boat"),
        ("  A Fox's  den, at NIGHT!  ", "a-foxs-den-at-night"),
        ("一只紫色的猫", "一只紫色的猫"),
        ("../../etc/passwd", "etc-passwd"),
        ('a\\b:c*d?"<>|', "a-b-c-d"),
        ("🐟", "fish"),
        ("❤️ and 🐟🐟", "heavy-black-heart-and-fish-fish"),
        ("नमस्ते", "नमस्ते"),
        ("a\x1b[31mb\x00\n", "a-31mb"),
        ("café", "café"),
        ("--force", "force"),
        ("...", "picture"),
        ("\ud83d", "picture"),
        ("\u202e\ufe0f", "picture"),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@given(st.text(max_size=200))
def test_every_prompt_has_a_name_that_every_file_system_takes(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(name) <= LONGEST_SLUG
    assert len(name.encode()) <= LONGEST_SLUG_BYTES
    assert not set(name) & set('/\\:*?"<>|\0\n ')
    assert not name.startswith((".", "-"))


def test_long_prompts_end_at_a_word() -> None:
    name = slug("word " * 40)
    assert name == "-".join(["word"] * 12)
    assert len(slug("猫" * 100).encode()) <= LONGEST_SLUG_BYTES


def test_files_are_named_after_prompt_and_seed(tmp_path: Path) -> None:
    assert plan_files("a fox", [7, 8], None) == [Path("a-fox-7.png"), Path("a-fox-8.png")]
    assert plan_files("a fox", [7], str(tmp_path)) == [tmp_path / "a-fox-7.png"]
    assert plan_files("a fox", [7], f"{tmp_path}/new.dir/") == [tmp_path / "new.dir" / "a-fox-7.png"]
    assert plan_files("a fox", [7], str(tmp_path / "one.png")) == [tmp_path / "one.png"]
    assert plan_files("a fox", [7, 9], str(tmp_path / "x.PNG")) == [tmp_path / "x-7.PNG", tmp_path / "x-9.PNG"]


@pytest.mark.parametrize(("output", "words"), [("a.jpg", "as PNG"), ("nowhere/a.png", "no folder nowhere")])
def test_impossible_outputs_are_refused(output: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        plan_files("a fox", [7], output)


def test_taken_names_are_refused_unless_forced(tmp_path: Path) -> None:
    taken, folder = tmp_path / "taken.png", tmp_path / "folder.png"
    taken.touch()
    folder.mkdir()
    check_files([tmp_path / "new" / "a.png"], force=False)
    assert (tmp_path / "new").is_dir()
    check_files([taken], force=True)
    with pytest.raises(InvalidInput, match=r"taken\.png exists already"):
        check_files([tmp_path / "free.png", taken], force=False)
    with pytest.raises(InvalidInput, match="is a folder"):
        check_files([folder], force=True)
    with pytest.raises(InvalidInput, match="is there, but is no folder"):
        check_files([taken / "a.png"], force=False)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1024x768", Shape(width=1024, height=768)),
        ("640 X 512", Shape(width=640, height=512)),
        ("512", Shape(width=512, height=512)),
        ("640×512", Shape(width=640, height=512)),
        ("16:9", Shape(width=16, height=9, ratio=True)),
    ],
)
def test_sizes_are_read(text: str, shape: Shape) -> None:
    assert read_size(text) == shape


@pytest.mark.parametrize("text", ["", "x", "16x", "0x5", "5:0", "-3x4", "1e3", "9999999", "3x4x5"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="such as 16:9"):
        read_size(text)


def test_a_shape_becomes_the_nearest_trained_size() -> None:
    large, small = CARDS["sana-1.6b-1024"], CARDS["nano"]
    assert Shape(width=16, height=9, ratio=True).pixels(large) == (1344, 768)
    assert Shape(width=9, height=16, ratio=True).pixels(large) == (768, 1344)
    assert Shape(width=1, height=1, ratio=True).pixels(small) == (256, 256)
    assert Shape(width=640, height=480).pixels(small) == (640, 480)  # refused later, by the request
    with pytest.raises(InvalidInput, match="nearest it has is 256x256"):
        Shape(width=16, height=9, ratio=True).pixels(small)
    with pytest.raises(InvalidInput, match="shape 10:1"):
        Shape(width=10, height=1, ratio=True).pixels(large)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("1-4", [1, 2, 3, 4]), ("3, 17,20-21", [3, 17, 20, 21]), ("random", None), ("-1", None)],
)
def test_seeds_are_read(text: str, seeds: list[int] | None) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "1.5", "4-1", "1,,2", "3,3", "-2", "0-99999999", "9" * 19])
def test_wrong_seeds_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        read_seeds(text)


@given(st.lists(st.integers(0, 30), unique=True, min_size=1))
def test_runs_hold_every_seed_once_and_are_as_long_as_can_be(seeds: list[int]) -> None:
    runs = list(runs_of(seeds))
    assert [seed for run in runs for seed in run] == seeds
    assert all(a[-1] + 1 != b[0] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize(("text", "good"), [("auto", True), ("cuda:1", True), ("cpu:0x", False), ("gpu", False)])
def test_devices_are_known_by_name(text: str, good: bool) -> None:
    if good:
        assert read_device(text) == text
    else:
        with pytest.raises(InvalidInput, match="must be auto"):
            read_device(text)
