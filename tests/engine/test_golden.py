"""The golden check of the built-in models passes, fails for a model that is not it, and is never faked for another."""

from pathlib import Path

import pytest
import torch

import sana
from sana.cards import CARDS
from sana.engine.golden import GOLDEN, SAMPLES, THUMBNAIL, observe, verify
from sana.engine.parts import Parts, load

NANO = Path(sana.__file__).parent / "assets" / "nano"

pytestmark = pytest.mark.skipif(not NANO.is_dir(), reason="the built-in model is not in this checkout")


@pytest.fixture
def nano() -> Parts:
    return load("nano", device="cpu", dtype="float32")


BUILT_IN = [card.name for card in CARDS.values() if card.folder is not None]


def test_something_is_kept_for_every_built_in_model() -> None:
    assert set(GOLDEN) == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_gives_what_is_kept(name: str) -> None:
    parts = load(name, device="cpu", dtype="float32")
    findings = verify(parts)
    assert [finding.check for finding in findings] == ["tokens", "latents", "pixels"]
    assert all(finding.passed for finding in findings), findings
    found, kept = observe(parts, GOLDEN[name].request), GOLDEN[name]
    assert len(found.latents) == len(kept.latents) == SAMPLES
    assert len(found.pixels) == len(kept.pixels) == 3 * THUMBNAIL**2


# Of the two large steps of a Sprint model, rounding moves edges: it is held to float32, in which its card has it.
@pytest.mark.parametrize("name", [name for name in BUILT_IN if CARDS[name].product != "sprint"])
def test_half_precision_passes_within_its_rounding(name: str) -> None:
    findings = verify(load(name, device="cpu", dtype="bfloat16"))
    assert len(findings) == 3
    assert all(finding.passed for finding in findings), findings


def test_a_control_network_is_part_of_what_is_checked(nano: Parts) -> None:
    parts = load("nano-controlnet", device="cpu", dtype="float32")
    request = {**GOLDEN["nano"].request, "steps": 2}
    followed = observe(parts, request)
    with torch.no_grad():
        for weight in parts.controlnet.parameters():
            weight.zero_()
    assert observe(parts, request) == observe(nano, request) != followed


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_another_model_fails(nano: Parts, part: str) -> None:
    with torch.no_grad():
        for weight in getattr(nano, part).parameters():
            weight.mul_(1.05)
    tokens, latents, pixels = verify(nano)
    assert tokens.passed
    assert latents.passed is (part == "vae")
    # Words that are read a little otherwise move latents more than they move pixels.
    assert not pixels.passed or part == "text_encoder"


def test_other_words_fail(nano: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    request = {**GOLDEN["nano"].request, "prompt": "a blue fish above a yellow boat"}
    monkeypatch.setitem(GOLDEN, "nano", dataclasses.replace(GOLDEN["nano"], request=request))
    tokens, latents, _ = verify(nano)
    assert not tokens.passed
    assert not latents.passed
    assert "not those that are kept" in tokens.said


def test_what_could_not_be_had_is_not_checked(nano: Parts) -> None:
    nano.name = "sana-1.6b-1024"
    (finding,) = verify(nano)
    assert finding.passed is None
    assert finding.said.startswith("sana-1.6b-1024: not checked here: its weights could not be had")
