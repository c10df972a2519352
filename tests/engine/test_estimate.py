"""The estimate: arithmetic against published counts, memory against weights, seconds from rates."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sana
from clock import cpu_seconds
from sana.cards import CARDS
from sana.engine import estimate
from sana.engine.estimate import PROCESS, Rates, Stage, TextShape, drawn, measure, memory, seconds, stages
from sana.engine.request import Request

BFLOAT = dict.fromkeys(("text_encoder", "transformer", "vae"), "bfloat16")
FLOAT = dict.fromkeys(BFLOAT, "float32")


def of(name: str, **request: object) -> dict[str, Stage]:
    card = CARDS[name]
    resolved = Request(prompt="x", seed=1, **request).resolve(card)  # type: ignore[arg-type]
    return {stage.name: stage for stage in stages(card, resolved, BFLOAT)}


def step_tokens(name: str) -> int:
    return (CARDS[name].base_size // 32) ** 2


@pytest.mark.parametrize(
    ("name", "teraflops"),
    # Counted operator by operator over the reference implementation, with 300 text tokens instead of 60 and with their
    # keys and values, which are computed once here.
    [("sana-0.6b-512", 0.316), ("sana-0.6b-1024", 1.121), ("sana-1.6b-1024", 2.967), ("sana-1.6b-2k", 11.49),
     ("sana-1.6b-4k", 45.57), ("sana1.5-4.8b-1024", 8.887)],
)  # fmt: skip
def test_the_transformers_arithmetic(name: str, teraflops: float) -> None:
    step = of(name, guidance=1.0)["denoise"]
    card = CARDS[name].transformer
    text = 4 * card.num_layers * card.inner_dim * (300 * card.inner_dim + 240 * step_tokens(name))
    assert (step.flops + text) / 1e12 == pytest.approx(teraflops, rel=0.02)
    assert of(name)["denoise"].flops == 2 * step.flops
    assert of(name, batch_size=3, guidance=1.0)["denoise"].flops == 3 * step.flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("sana-0.6b-512", 2.09), ("sana-0.6b-1024", 8.37), ("sana-1.6b-2k", 33.5), ("sana-1.6b-4k", 133.9)],
)
def test_the_decoders_arithmetic(name: str, teraflops: float) -> None:
    assert of(name)["decode"].flops / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_the_text_encoder() -> None:
    assert TextShape().layer_params == pytest.approx(2.0245e9, rel=1e-3)
    text, plain = of("sana-0.6b-1024")["text"], of("sana-0.6b-1024", guidance=1.0, instruction=False)["text"]
    assert text.flops / plain.flops == pytest.approx((60 + 215 + 2) / 60)
    assert text.traffic > 1.9 * plain.traffic
    assert text.weights == pytest.approx(5.23e9, rel=0.01)


def test_sprint_has_one_row_and_bins_decide_what_is_drawn() -> None:
    assert of("sana-sprint-0.6b-1024")["denoise"].flops == of("sana-0.6b-1024", guidance=1.0)["denoise"].flops
    card = CARDS["sana-0.6b-1024"]
    assert drawn(card, Request(prompt="x", width=1000, height=500).resolve(card)) == (704, 1408)
    assert drawn(card, Request(prompt="x", width=1024, height=512, binning=False).resolve(card)) == (512, 1024)


def test_weights_are_those_of_the_files() -> None:
    folder = Path(sana.__file__).parent / "assets" / "nano"
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    names = {f.name for f in dataclasses.fields(TextShape)}
    text = TextShape(**{name: config[name] for name in names})
    card = CARDS["nano"]
    half = stages(card, Request(prompt="x", seed=1).resolve(card), BFLOAT, text=text)
    sizes = {"text": "text_encoder", "denoise": "transformer", "decode": "vae"}
    for stage in half:
        stored = next((folder / sizes[stage.name]).glob("*.safetensors")).stat().st_size
        assert stage.weights == pytest.approx(stored, rel=0.03), stage.name
    single = stages(card, Request(prompt="x", seed=1).resolve(card), FLOAT, text=text)
    assert [stage.weights for stage in single] == [2 * stage.weights for stage in half]


def test_seconds_and_memory_are_sums() -> None:
    stage = Stage(name="a", dtype="float32", flops=9e9, traffic=2e9, ops=100, weights=5, live=7.0, times=3, part="a")
    rates = Rates(flops={"float32": 1e10}, traffic=1e9, ops=1e3)
    assert seconds(stage, rates) == pytest.approx(3 * (1.0 + 2.0 + 0.1))
    other = dataclasses.replace(stage, weights=50, live=70.0, part="b", streamed=20)
    again = dataclasses.replace(other, live=60.0)
    assert memory([stage, other, again]) == PROCESS + 55 + 70
    assert memory([stage, other, again], "low") == PROCESS + 120
    assert memory([stage, other, again], "lowest") == PROCESS + 90
    assert memory([dataclasses.replace(other, device_only=True)]) == 120
    assert seconds(stage, rates, "low", 1.0) == pytest.approx(9.3 + 5)
    assert seconds(dataclasses.replace(other, ops=0), rates, "lowest", 10.0) == pytest.approx(3 * 5.0)


def test_rates_are_measured_in_a_moment() -> None:
    measured: list[Rates] = []
    assert cpu_seconds(lambda: measured.append(measure("cpu", ["float32", "bfloat16", "float32"])), enough=20) < 20
    rates = measured[-1]
    assert set(rates.flops) == {"float32", "bfloat16"}
    assert 1e8 < rates.flops["float32"] < 1e15
    assert 1e8 < rates.traffic < 1e13
    assert 1e3 < rates.ops < 1e8


@pytest.mark.slow
def test_a_dtype_that_takes_a_second_for_a_product_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 0.6)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rates = measure("cpu", ["bfloat16"])
    assert next(clock) == pytest.approx(3 * 4 * 0.6)  # of each of the three rates: the start, a call, and a look
    assert rates.flops["bfloat16"] == pytest.approx(2 * 768 * 1152 * 1152 / 0.6)


def test_the_built_in_model_takes_about_that_long() -> None:
    from sana.engine.generate import generate_images
    from sana.engine.parts import load

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts, request = load("nano"), Request(prompt="a red fish", seed=1)
        ratios: list[float] = []
        for _ in range(3):
            rates = measure("cpu", ["float32"])
            took = generate_images(parts, request).timings
            told = stages(CARDS["nano"], request.resolve(CARDS["nano"]), FLOAT)[1:]
            ratios.append(sum(seconds(stage, rates) for stage in told) / (took["denoise"] + took["decode"]))
    finally:
        torch.set_num_threads(before)
    assert 0.5 < sorted(ratios)[1] < 2, ratios
    assert estimate.BYTES.keys() == estimate.SHARES.keys()
