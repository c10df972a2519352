import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sana import Request, generate_images
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Predictor, padded
from sana.errors import InvalidInput
from tiny_model import tiny_transformer

TIMESTEPS = torch.tensor([900, 500, 100])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captions(rows: int, length: int = 5, valid: int = 5) -> Captions:
    mask = (torch.arange(length) < valid).long().expand(rows, length)
    return Captions(embeds=random(rows, length, 32), mask=mask, rows=tuple(range(rows)))


def counted(module: Any, calls: list[str]) -> Any:
    """A copy of the transformer that notes which of its pieces are called."""
    spy = copy.deepcopy(module)
    for name in ("encode_caption", "cross_attention_kv", "modulation", "denoise"):
        piece = getattr(spy, name)

        def call(*arguments: Any, name: str = name, piece: Any = piece) -> Any:
            calls.append(name)
            return piece(*arguments)

        setattr(spy, name, call)
    return spy


def test_a_step_equals_the_whole_forward(tiny_parts: Parts) -> None:
    text = captions(2, valid=3)
    predict = Predictor(tiny_parts.transformer, TIMESTEPS, text)
    x = random(2, 4, 3, 2, seed=1)
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        told = torch.full((2,), float(timestep))
        with torch.no_grad():
            whole = tiny_parts.transformer(x, text.embeds, told, encoder_attention_mask=text.mask).sample
        assert torch.allclose(predict(x, i, guided=False), whole, atol=1e-5)


def test_what_is_constant_is_computed_once(tiny_parts: Parts) -> None:
    calls: list[str] = []
    parts = copy.copy(tiny_parts)
    parts.transformer = counted(tiny_parts.transformer, calls)
    request = Request(prompt="a fox", steps=4, seed=1, count=3, width=64, height=64, binning=False)
    generate_images(parts, request)
    assert {name: calls.count(name) for name in set(calls)} == {
        "encode_caption": 1,
        "cross_attention_kv": 1,
        "modulation": 1,
        "denoise": 12,
    }


def test_the_text_encoder_runs_once_per_new_prompt(tiny_parts: Parts) -> None:
    parts = copy.deepcopy(tiny_parts)
    lengths: list[int] = []
    parts.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    request = Request(prompt="a fox", steps=1, seed=1, width=64, height=64, binning=False)
    generate_images(parts, request)
    prefix, *rest = lengths
    assert prefix > 100, "the instruction is encoded by itself"
    assert len(rest) == 2, "the prompt and the empty negative prompt"
    assert max(rest) < 20
    lengths.clear()
    generate_images(parts, request.replace(prompt="a cat in a hat"))
    assert len(lengths) == 1, "the instruction and the negative prompt are known by now"
    lengths.clear()
    generate_images(parts, request)
    assert lengths == []


def test_using_the_same_captions_again_costs_nothing(tiny_parts: Parts) -> None:
    calls: list[str] = []
    text = captions(1)
    predict = Predictor(counted(tiny_parts.transformer, calls), TIMESTEPS, text)
    calls.clear()
    predict.use(text)
    assert calls == []
    predict.use(captions(1))
    assert calls == ["encode_caption", "cross_attention_kv"]


def test_shared_captions_equal_repeated_ones(tiny_parts: Parts) -> None:
    one, two = captions(1, valid=4), captions(1, length=3, valid=3)
    shared = Captions.stack([(one.embeds, one.mask), (two.embeds, two.mask)], repeat=2)
    assert shared.rows == (0, 0, 1, 1)
    assert shared.embeds.shape == (2, 5, 32)
    plain = Captions(embeds=shared.embeds[[0, 0, 1, 1]], mask=shared.mask[[0, 0, 1, 1]], rows=(0, 1, 2, 3))
    x = random(2, 4, 3, 2, seed=1)
    left, right = (Predictor(tiny_parts.transformer, TIMESTEPS, text)(x, 1, guided=True) for text in (shared, plain))
    assert torch.allclose(left, right, atol=1e-6)


def test_the_conditional_rows_are_the_last_ones(tiny_parts: Parts) -> None:
    predict = Predictor(tiny_parts.transformer, TIMESTEPS, captions(4))
    x = random(2, 4, 3, 2, seed=1)
    both, conditional = predict(x, 0, guided=True), predict(x, 0, guided=False)
    assert both.shape == (4, 4, 3, 2)
    assert torch.allclose(both[2:], conditional, atol=1e-6)
    assert not torch.allclose(both[:2], conditional, atol=1e-3)


def test_padding_changes_nothing(tiny_parts: Parts) -> None:
    """Masked positions weigh exactly nothing, so a batch may be padded to its longest prompt, or to 300."""
    text = captions(1, length=4, valid=4)
    padded = Captions(
        embeds=torch.cat([text.embeds, random(1, 60, 32, seed=9)], dim=1),
        mask=torch.cat([text.mask, torch.zeros(1, 60, dtype=torch.long)], dim=1),
        rows=(0,),
    )
    x = random(1, 4, 3, 2, seed=1)
    left, right = (Predictor(tiny_parts.transformer, TIMESTEPS, t)(x, 1, guided=False) for t in (text, padded))
    assert torch.allclose(left, right, atol=1e-6)


def test_trimming_drops_only_what_nobody_reads() -> None:
    embeds = random(2, 4, 3)
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    short = Captions(embeds=embeds, mask=mask, rows=(0, 1)).trimmed()
    assert torch.equal(short.embeds, embeds[:, [0, 2]])
    assert short.mask.tolist() == [[1, 1], [1, 0]]
    mask[1] = 0
    whole = Captions(embeds=embeds, mask=mask, rows=(0, 1))
    assert whole.trimmed() is whole, "a row without tokens reads all of its positions"


def test_padding_to_a_multiple() -> None:
    text = captions(2, length=5, valid=4)
    longer = padded(text, 16)
    assert longer.embeds.shape == (2, 16, 32)
    assert longer.mask.tolist() == [[1] * 4 + [0] * 12] * 2
    assert padded(longer, 16) is longer
    assert padded(text, 1) is text
    empty = Captions(embeds=text.embeds, mask=torch.tensor([[1] * 5, [0] * 5]), rows=(0, 1))
    assert padded(empty, 16) is empty, "a row without tokens reads all of its positions"


def test_the_text_has_a_length_that_the_attention_likes(tiny_parts: Parts) -> None:
    lengths: list[int] = []
    spy = copy.deepcopy(tiny_parts.transformer)
    project = spy.cross_attention_kv
    spy.cross_attention_kv = lambda caption: lengths.append(caption.shape[1]) or project(caption)
    text = captions(1, length=20, valid=20)
    Predictor(spy, TIMESTEPS, text)
    spy.transformer_blocks[0].compile(backend="eager")
    predict = Predictor(spy, TIMESTEPS, text)
    assert lengths == [32, 64]
    assert predict.captions is text


def test_half_of_a_learned_variance_is_dropped() -> None:
    predict = Predictor(tiny_transformer(out_channels=8), TIMESTEPS, captions(1))
    assert predict(random(1, 4, 3, 2), 0, guided=False).shape == (1, 4, 3, 2)


def test_the_timestep_scale_is_applied() -> None:
    x = random(1, 4, 3, 2)
    scaled = Predictor(tiny_transformer(timestep_scale=0.5), TIMESTEPS, captions(1))(x, 0, guided=False)
    plain = Predictor(tiny_transformer(), TIMESTEPS // 2, captions(1))(x, 0, guided=False)
    assert torch.allclose(scaled, plain, atol=1e-6)


def test_misfits_are_named(tiny_parts: Parts) -> None:
    with pytest.raises(InvalidInput, match="has no `encode_caption`"):
        Predictor(torch.nn.Linear(2, 2), TIMESTEPS, captions(1))
    wide = Captions(embeds=random(1, 5, 33), mask=torch.ones(1, 5), rows=(0,))
    with pytest.raises(InvalidInput, match="width 33, the transformer reads 32"):
        Predictor(tiny_parts.transformer, TIMESTEPS, wide)
    with pytest.raises(InvalidInput, match="mask that belongs"):
        Captions(embeds=random(1, 5, 32), mask=torch.ones(1, 4), rows=(0,))
    with pytest.raises(InvalidInput, match="3 caption rows do not fit 2 latents"):
        Predictor(tiny_parts.transformer, TIMESTEPS, captions(3))(random(2, 4, 3, 2), 0, guided=True)
