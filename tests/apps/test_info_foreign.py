"""`sana info` of pictures that other programs made, and of files that are none or lie."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Sana

from foreign_pictures import A1111, NEGATIVE, PICTURES, PROMPT, international, packed, png, text, write
from sana.apps.cli.order import parse
from sana.apps.cli.verbs.info import NEAREST, nearest
from sana.cards import CARDS
from sana.engine.metadata import Settings


def read_back(line: str) -> tuple[Any, str]:
    """Return the request and the model that a printed command orders."""
    words = shlex.split(line)
    assert words[0] == "sana"
    order = parse(words[2:] if words[1] == "generate" else words[1:])
    assert order.machine.card is not None
    order.fitted(order.machine.card)
    return order.request, order.machine.model


@pytest.mark.parametrize("case", PICTURES)
def test_every_dialect_is_shown_with_a_command_that_works(sana: Sana, tmp_path: Path, case: str) -> None:
    dialect, name, data = PICTURES[case]
    write(tmp_path, name, data)
    said = sana("info", name)
    assert said.code == 0
    for part in ("made by ", PROMPT, "965400086", "512x768", "nearest "):
        assert part in said.out
    page = json.loads(sana("info", name, "--json").out)["pictures"][0]
    assert (page["dialect"], page["settings"]["prompt"], page["generated"]) == (dialect, PROMPT, False)
    assert page["program"] in said.out
    request, model = read_back(page["command"])
    assert (request.prompt, request.steps, request.guidance, request.seed) == (PROMPT, 20, 7.5, 965400086)
    assert request.negative_prompt == ("" if "guider" in case else NEGATIVE)
    assert model == "sana-1.6b-512"


def settings(**changes: Any) -> Settings:
    return Settings(**{"dialect": "x", "program": "X", "prompt": "a cat", **changes})


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, "sana-1.6b-1024"),
        ({"width": 512, "height": 768}, "sana-1.6b-512"),
        ({"width": 1024, "height": 1024}, "sana-1.6b-1024"),
        ({"width": 2048, "height": 2048}, "sana-1.6b-2k"),
        ({"width": 9000, "height": 4000}, "sana-1.6b-4k"),
        ({"width": 0, "height": -3}, "sana-1.6b-1024"),
        ({"model": "nano", "width": 64, "height": 64}, "nano"),
        ({"model": "Efficient-Large-Model/Sana_600M_512px_diffusers"}, "sana-0.6b-512"),
        ({"model": "sana-sprint-0.6b-1024", "negative_prompt": "x", "sampler": "euler"}, "sana-sprint-0.6b-1024"),
        ({"sampler": "scm"}, "sana-1.6b-1024"),
        ({"guidance": 1.0, "negative_prompt": "x"}, "sana-1.6b-1024"),
        ({"prompt": "-a --cat", "negative_prompt": "-b"}, "sana-1.6b-1024"),
        ({"prompt": "train", "seed": -1, "steps": 0, "guidance": 0.3}, "sana-1.6b-1024"),
    ],
)
def test_the_nearest_command_is_always_one_that_can_be_carried_out(changes: dict[str, Any], model: str) -> None:
    line, _ = nearest(settings(**changes))
    assert line is not None
    request, named = read_back(line)
    assert named == model
    assert request.prompt == changes.get("prompt", "a cat")


def test_what_the_command_leaves_out_is_said(sana: Sana, tmp_path: Path) -> None:
    write(tmp_path, "a.png", png(international("parameters", A1111.replace("DPM++ 2M", "Euler a"))))
    said = sana("info", "a.png").out
    assert "The sampler 'Euler a' is not one of ours" in said
    assert "Its LoRA is left out" in said
    assert "The model is another" in said
    assert nearest(settings(model="nano"))[1] == ()
    assert nearest(settings(prompt=" ")) == (None, ())


def test_models_that_stand_for_others_are_published() -> None:
    assert all(CARDS[name].hub_id and CARDS[name].product == "text-to-image" for name in NEAREST)
    assert [CARDS[name].base_size for name in NEAREST] == [1024, 512, 2048, 4096]


def test_much_beside_the_settings_is_cut_on_the_terminal_only(sana: Sana, tmp_path: Path) -> None:
    many = ", ".join(f"Key {i}: {'v' * 200}" for i in range(30))
    write(tmp_path, "a.png", png(text("parameters", f"a cat\nSteps: 2, {many}")))
    said = sana("info", "a.png")
    assert "18 more: --json" in said.out
    assert max(map(len, said.out.splitlines())) < 160
    assert len(json.loads(sana("info", "a.png", "--json").out)["pictures"][0]["settings"]["extra"]) == 30


def test_what_was_left_unread_is_warned_of(sana: Sana, tmp_path: Path) -> None:
    write(tmp_path, "a.png", png(packed("parameters", bytes(2**23))))
    said = sana("info", "a.png")
    assert (said.code, "carries no settings" in said.out) == (0, True)
    assert "a.png: The text 'parameters' is longer than 4 MB" in said.err


@pytest.mark.parametrize("key", ["parameters", "prompt", "workflow", "sanakit", "invokeai_metadata", "\x1b[2J"])
@pytest.mark.parametrize(
    "value", ['{"a":' * 50_000, "{", "[]", '"\\ud800"', "\x1b[2J\x9b1A\u202e", "{}", '{"version": 1}']
)
def test_nothing_in_a_file_reaches_the_terminal_or_breaks_the_command(
    sana: Sana, tmp_path: Path, key: str, value: str
) -> None:
    write(tmp_path, "a.png", png(international(key, value)))
    for words in (["info", "a.png"], ["info", "a.png", "--json"]):
        said = sana(*words)
        assert said.code in (0, 2)
        assert "Unexpected" not in said.err
        assert not {"\x1b", "\x9b"} & set(said.out + said.err)
    assert "\u202e" not in sana("info", "a.png").out


def test_lone_surrogates_reach_every_stream(sana: Sana, tmp_path: Path) -> None:
    write(tmp_path, "a.png", png(text("invokeai_metadata", '{"positive_prompt": "a \\ud800 cat\\u0000"}')))
    assert "a \ufffd cat\ufffd" in sana("info", "a.png").out
    page = json.loads(sana("info", "a.png", "--json").out)["pictures"][0]
    assert page["settings"]["prompt"] == "a \ufffd cat\ufffd"


def test_names_that_are_none(sana: Sana, tmp_path: Path) -> None:
    assert sana("info", "x" * 5000).code == 3
    assert sana("info", str(tmp_path)).code == 2


def test_a_picture_of_a_billion_pixels_and_pillow_is_not_even_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, "a.png", png(international("parameters", A1111), width=65_000, height=65_000))
    code = "import sys; from sana.apps.cli import main; main(['info', sys.argv[1]]); print('PIL' in sys.modules)"
    words = [sys.executable, "-W", "error", "-c", code, str(path)]
    done = subprocess.run(words, capture_output=True, timeout=60, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.stdout.decode().splitlines()[-1] == "False", done.stderr
    assert PROMPT in done.stdout.decode()
