import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sana.cards import CARDS
from sana.checkpoints.hub import Located
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.engine import parts as module
from sana.engine.model_card import fitting
from sana.engine.parts import Parts, load, recommended_dtypes
from sana.engine.placement import pick_device
from sana.errors import InvalidInput
from sana.flow.schedulers import DPMSolverMultistepScheduler
from tiny_model import tiny_transformer


def test_a_scheduler_that_tells_its_shift_is_asked_for_it_where_nothing_else_is_there() -> None:
    assert Parts(scheduler=DPMSolverMultistepScheduler(flow_shift=2.0), name="mine").flow_shift == 2.0


@pytest.mark.parametrize("fast", [False, True])
def test_recommended_dtypes(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on a CPU that multiplies it, else float32; float16 never, and the built-in model stays exact."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: fast)
    here, there = torch.device("cpu"), torch.device("cuda")
    half, exact = ("bfloat16" if fast else "float32"), "float32"
    encoder = {"text_encoder": "bfloat16"}
    published, in_half = CARDS["sana-1.6b-1024"], CARDS["sana-0.6b-1024"]
    assert recommended_dtypes(published, here) == {"transformer": half, "vae": half, **encoder}
    assert recommended_dtypes(in_half, here) == {"transformer": exact, "vae": half, **encoder}
    assert set(dict(recommended_dtypes(CARDS["nano"], here)).values()) == {exact}
    assert recommended_dtypes(None, here) is None
    assert recommended_dtypes(in_half, there) == dict(in_half.dtypes)
    assert recommended_dtypes(None, there) == {"default": "auto"}


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (True, False), (False, True)])
def test_bfloat16_in_hardware(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert module.multiplies_bfloat16() is (amx or avx512)


def test_load_takes_the_recommended_dtypes(tiny_folder: Path) -> None:
    half = load(tiny_folder, variant="bf16", device="cpu")
    assert (half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    assert load(tiny_folder, device="cpu", dtype={"transformer": "bfloat16"}).transformer.dtype == torch.bfloat16


def test_a_model_from_the_hub_keeps_its_name_and_commit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Located(folder=tiny_folder, commit="abc")
    monkeypatch.setattr(module, "hub", SimpleNamespace(locate=lambda model, **where: found))
    parts = load("somebody/something", device="cpu")
    assert (parts.name, parts.commit) == ("somebody/something", "abc")
    assert parts.describe()["commit"] == "abc"


def test_given_parts_need_no_files(tiny_folder: Path, tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def locate(model: str, **where: Any) -> Located:
        asked.append(where["parts"])
        return Located(folder=tiny_folder)

    monkeypatch.setattr(module, "hub", SimpleNamespace(locate=locate))
    load("a/b", device="cpu", text_encoder=tiny_parts.text_encoder, tokenizer=None)
    assert asked == [("vae", "transformer", "scheduler")]


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for bad in ("quantum", "cuda:99"):
        with pytest.raises(InvalidInput, match=f"`device` '{bad}'"):
            pick_device(bad)


def test_cards_fit_only_their_own_architecture(tiny_parts: Parts) -> None:
    config = {
        f.name: getattr(tiny_parts.transformer.config, f.name) for f in dataclasses.fields(CARDS["nano"].transformer)
    }
    card = dataclasses.replace(CARDS["nano"], transformer=type(CARDS["nano"].transformer)(**config))
    assert fitting(card, tiny_parts.transformer) is card
    assert fitting(card, tiny_transformer(cross_attention_head_dim=8)) is None
    assert fitting(None, tiny_parts.transformer) is None
    assert fitting(card, None) is card


def test_a_grown_or_pruned_transformer_follows_its_card_with_its_own_depth() -> None:
    nano = CARDS["nano"]
    deeper = SanaTransformer2DModel.from_config(nano.transformer, num_layers=12)
    card = fitting(nano, deeper)
    assert card is not None
    assert (card.name, card.sizes, card.languages, card.steps) == (nano.name, nano.sizes, nano.languages, nano.steps)
    assert (card.transformer.num_layers, card.params, card.folder) == (12, deeper.num_parameters(), None)
    assert nano.pag_layers == ("transformer_blocks.3",)
    assert card.pag_layers == ("transformer_blocks.6",)


def test_unknown_models_get_the_defaults_of_the_nearest_published_one(tiny_parts: Parts) -> None:
    card = tiny_parts.effective_card
    assert (card.name, card.base_size, card.steps, card.guidance) == ("tiny", 256, 20, 4.5)
    sprint = copy.copy(tiny_parts)
    sprint.transformer = tiny_transformer(guidance_embeds=True, sample_size=16)
    assert (sprint.effective_card.sampler, sprint.effective_card.base_size) == ("scm", 512)


def test_the_prompt_encoder_follows_the_parts(tiny_parts: Parts) -> None:
    parts = copy.copy(tiny_parts)
    first = parts.prompts
    assert parts.prompts is first
    parts.text_encoder = copy.deepcopy(parts.text_encoder)
    assert parts.prompts is not first
    assert parts.prompts.text_encoder is parts.text_encoder
    parts.tokenizer = None
    with pytest.raises(InvalidInput, match="no tokenizer"):
        _ = parts.prompts


def test_a_description_names_weights_and_threads(tiny_parts: Parts) -> None:
    told = tiny_parts.describe()
    assert told["threads"] == str(torch.get_num_threads())
    assert "compiled" not in told
    other = copy.copy(tiny_parts)
    other.transformer = tiny_transformer(num_layers=1)
    assert other.describe()["weights"] != told["weights"]
    assert tiny_parts.describe() == told
