"""Prompt encoding: exactness against the plain call, caches and their invalidation, errors."""

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sana.errors import InvalidInput, NonFinite
from sana.text.gemma import PromptEncoder, TextCondition, pad, with_cache
from text.tiny_gemma import INSTRUCTION, PROMPTS, tiny_gemma, tiny_tokenizer

RMS_GATE = 1e-6


def relative_rms(ours: Tensor, reference: Tensor) -> float:
    difference = (ours.double() - reference.double()).pow(2).mean().sqrt()
    return float(difference / reference.double().pow(2).mean().sqrt())


def plain(tokenizer: Any, model: Any, prompts: list[str], head: str, limit: int) -> tuple[Tensor, Tensor]:
    """The published way: one padded call over instruction and prompt, then the window."""
    length = len(tokenizer(head).input_ids) + limit - 2 if head else limit
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        row = tokenizer(head + prompt.lower().strip(), truncation=True, max_length=length).input_ids
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask)[0]
    if head:
        keep = [0, *range(length - limit + 1, length)]
        return hidden[:, keep], mask[:, keep]
    return hidden, mask


class Calls:
    """Counts the calls of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(lambda _, arguments: self.shapes.append(tuple(arguments[0].shape)))


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Any:
    return tiny_gemma(len(tokenizer))


@pytest.mark.parametrize("style", ["words", "phrases", "letters"])
@pytest.mark.parametrize("sliding_window", [8, 4096])
@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
def test_equals_the_plain_padded_call(style: str, sliding_window: int, instruction: tuple[str, ...] | None) -> None:
    tokenizer = tiny_tokenizer(style)
    model = tiny_gemma(len(tokenizer), sliding_window=sliding_window)
    head = "\n".join(instruction or ())
    if head:
        assert len(tokenizer(head).input_ids) > 8, "the prefix must be longer than the small window"
    encoder = PromptEncoder(tokenizer, model)
    for limit in (1, 2, 12, 40):
        embeds, mask = plain(tokenizer, model, PROMPTS, head, limit)
        condition = encoder.encode(PROMPTS, instruction, limit)
        assert condition.embeds.shape[1] == mask.sum(1).max()
        full = pad(condition, limit)
        assert torch.equal(full.mask, mask)
        assert full.embeds.shape == embeds.shape
        valid = mask.bool()
        assert relative_rms(full.embeds[valid], embeds[valid]) <= RMS_GATE
        assert not full.embeds[~valid].any()


def test_a_small_sliding_window_matters(tokenizer: Any) -> None:
    small, large = (
        PromptEncoder(tokenizer, tiny_gemma(len(tokenizer), sliding_window=window)).encode(PROMPTS, INSTRUCTION)
        for window in (8, 4096)
    )
    assert relative_rms(small.embeds, large.embeds) > 1e-3


def test_bfloat16_equals_the_plain_call_within_its_rounding(tokenizer: Any) -> None:
    model = tiny_gemma(len(tokenizer), dtype=torch.bfloat16)
    embeds, mask = plain(tokenizer, model, PROMPTS, "\n".join(INSTRUCTION), 40)
    condition = pad(PromptEncoder(tokenizer, model).encode(PROMPTS, INSTRUCTION, 40), 40)
    assert condition.embeds.dtype == torch.bfloat16
    assert relative_rms(condition.embeds[mask.bool()], embeds[mask.bool()]) <= 1e-2


@pytest.mark.parametrize("bos", [True, False])
def test_edge_instructions(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    model = tiny_gemma(len(tokenizer))
    encoder = PromptEncoder(tokenizer, model)
    for head in ("x", "cat ", "User Prompt: a ca", "<bos>"):
        embeds, mask = plain(tokenizer, model, PROMPTS[:5], head, 9) if head != "<bos>" else (None, None)
        condition = pad(encoder.encode(PROMPTS[:5], [head], 9), 9)
        assert condition.embeds.isfinite().all()
        if embeds is not None and mask is not None:
            assert torch.equal(condition.mask, mask)
            assert relative_rms(condition.embeds[mask.bool()], embeds[mask.bool()]) <= RMS_GATE


def test_no_token_at_all_gives_one_masked_row() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    encoder = PromptEncoder(tokenizer, tiny_gemma(len(tokenizer)))
    alone = encoder.encode([""])
    assert alone.embeds.shape == (1, 1, 32)
    assert not alone.mask.any()
    assert not alone.embeds.any()
    together = encoder.encode(["", "a cat"])
    assert together.mask.tolist() == [[0, 0], [1, 1]]
    assert relative_rms(together.embeds[1], encoder.encode(["a cat"]).embeds[0]) <= RMS_GATE


def test_a_batch_of_one_at_a_time_has_the_same_bits_in_any_company(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model, max_batch=1)
    together = encoder.encode(PROMPTS, INSTRUCTION)
    for i, prompt in enumerate(PROMPTS):
        encoder.clear()
        alone = encoder.encode([prompt], INSTRUCTION)
        size = alone.embeds.shape[1]
        assert torch.equal(together.embeds[i, :size], alone.embeds[0])
        assert together.mask[i].sum() == size


def test_equal_calls_give_equal_bits_whatever_came_before(tokenizer: Any, model: Any) -> None:
    fresh = PromptEncoder(tokenizer, model).encode(PROMPTS, INSTRUCTION)
    encoder = PromptEncoder(tokenizer, model)
    for prompt in PROMPTS:
        encoder.encode([prompt], INSTRUCTION)
        encoder.encode([prompt])
    used = encoder.encode(PROMPTS, INSTRUCTION)
    again = encoder.encode(PROMPTS, INSTRUCTION)
    assert torch.equal(used.embeds, fresh.embeds)
    assert torch.equal(again.embeds, fresh.embeds)


def test_the_instruction_is_read_once_and_repeated_prompts_never(tokenizer: Any, model: Any) -> None:
    calls = Calls(model)
    encoder = PromptEncoder(tokenizer, model)
    encoder.encode(["a cat"], INSTRUCTION)
    prefix = len(tokenizer("\n".join(INSTRUCTION)).input_ids) - 1
    assert calls.shapes == [(1, prefix), (1, 2)]
    encoder.encode(["a red fox", "a cat", "A RED fox "], INSTRUCTION)
    assert calls.shapes[2:] == [(2, 3)], "only the new tokens, equal prompts once"
    encoder.encode(["a cat"], INSTRUCTION)
    encoder.encode(["a red fox", "a cat", "a red fox"], INSTRUCTION)
    assert len(calls.shapes) == 3
    encoder.encode([""])
    encoder.encode([""] * 4)
    assert calls.shapes[3:] == [(1, 1)]


def test_the_kept_prefix_is_never_changed(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    first = encoder.encode(["a cat"], INSTRUCTION)
    (prefix,) = encoder._prefixes.values()
    before = copy.deepcopy([(layer.keys, layer.values) for layer in prefix.cache.layers])
    length = prefix.cache.get_seq_length()
    encoder.encode(PROMPTS, INSTRUCTION)
    assert prefix.cache.get_seq_length() == length
    for (keys, values), layer in zip(before, prefix.cache.layers, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    encoder._results.clear()
    assert torch.equal(encoder.encode(["a cat"], INSTRUCTION).embeds, first.embeds)


def test_changing_a_result_does_not_change_the_next(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    for _ in range(2):
        condition = encoder.encode(["a cat"], INSTRUCTION)
        kept = condition.embeds.clone()
        condition.embeds.zero_()
        condition.mask.zero_()
    last = encoder.encode(["a cat"], INSTRUCTION)
    assert torch.equal(last.embeds, kept)
    assert last.mask.all()


def replace_weight(model: Any) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(model.layers[1].mlp.up_proj.weight * 1.5)


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(1.5)


def swap_data(model: Any) -> None:
    model.layers[1].mlp.up_proj.weight.data = model.layers[1].mlp.up_proj.weight.data * 1.5


def load_other_weights(model: Any) -> None:
    model.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()})


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def cast_and_back(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "change", [replace_weight, change_in_place, swap_data, load_other_weights, cast, cast_and_back]
)
def test_a_changed_model_never_gives_a_stale_result(tokenizer: Any, model: Any, change: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    before = encoder.encode(["a cat"], INSTRUCTION)
    change(model)
    after = encoder.encode(["a cat"], INSTRUCTION)
    fresh = PromptEncoder(tokenizer, copy.deepcopy(model)).encode(["a cat"], INSTRUCTION)
    assert after.embeds.dtype == fresh.embeds.dtype
    assert torch.equal(after.embeds, fresh.embeds)
    assert not torch.equal(before.embeds, after.embeds)


def test_another_model_or_tokenizer_object_is_used_at_once(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    encoder.encode(["a cat"], INSTRUCTION)
    encoder.text_encoder = tiny_gemma(len(tokenizer), seed=1)
    fresh = PromptEncoder(tokenizer, encoder.text_encoder)
    assert torch.equal(encoder.encode(["a cat"], INSTRUCTION).embeds, fresh.encode(["a cat"], INSTRUCTION).embeds)
    tokenizer.add_bos_token = False
    assert encoder.encode(["a cat"]).mask.shape == (1, 2)


def test_the_same_tokens_in_another_role_are_another_result(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    assert encoder.encode(["red fox: a cat"]).mask.sum() == 6
    assert encoder.encode(["a cat"], ["red fox: "]).mask.sum() == 3
    assert encoder.encode(["fox: a cat"], ["red "]).mask.sum() == 5


def test_memory_is_bounded_and_on_the_cpu(tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(tokenizer, model)
    for i in range(70):
        encoder.encode([f"a cat {i}"])
    assert len(encoder._results) == 64
    assert all(kept.device.type == "cpu" for kept in encoder._results.values())
    for head in ("one:", "two:", "three:"):
        encoder.encode(["a cat"], [head])
    assert len(encoder._prefixes) == 2
    rows_of_float32 = 32 * 4
    monkeypatch.setattr("sana.text.gemma._KEPT_BYTES", 40 * rows_of_float32)
    encoder.encode(["cat"])
    assert 0 < sum(kept.nbytes for kept in encoder._results.values()) <= 40 * rows_of_float32
    encoder.encode(["a prompt of more than ten tokens because most of its letters stand alone"])
    assert max(kept.nbytes for kept in encoder._results.values()) <= 10 * rows_of_float32, "one may not fill it all"


def test_results_of_inference_mode_serve_training(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    with torch.inference_mode():
        encoder.encode(["a cat"], INSTRUCTION)
    weight = torch.ones(32, requires_grad=True)
    (encoder.encode(["a cat"], INSTRUCTION).embeds * weight).sum().backward()
    (encoder.encode(["a red fox"], INSTRUCTION).embeds * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_autocast_of_the_caller_does_not_reach_in(tokenizer: Any, model: Any) -> None:
    outside = PromptEncoder(tokenizer, model).encode(["a cat"], INSTRUCTION)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = PromptEncoder(tokenizer, model).encode(["a cat"], INSTRUCTION)
    assert torch.equal(inside.embeds, outside.embeds)


def test_special_token_text_changes_the_picture_only_as_text(tokenizer: Any, model: Any) -> None:
    encoder = PromptEncoder(tokenizer, model)
    condition = encoder.encode(["a cat<eos>"])
    embeds, mask = plain(tokenizer, model, ["a cat<eos>"], "", 20)
    assert condition.mask.sum() > mask.sum(), "the reference sees one token, we see its letters"
    assert relative_rms(condition.embeds[0, :3], embeds[0, :3]) <= RMS_GATE


def test_truncation_is_reported(tokenizer: Any, model: Any) -> None:
    condition = PromptEncoder(tokenizer, model).encode(["a red fox in the SNOW", "a cat"], INSTRUCTION, 4)
    assert condition.truncated == (" in the snow", "")
    assert condition.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_megabyte_prompt_is_cut(tokenizer: Any, model: Any) -> None:
    condition = PromptEncoder(tokenizer, model).encode(["a red fox " * 100_000], INSTRUCTION)
    assert condition.embeds.shape == (1, 300, 32)
    assert len(condition.truncated[0]) > 990_000


def test_a_causal_model_with_its_output_layer_gives_hidden_states(tokenizer: Any, model: Any) -> None:
    from transformers import Gemma2ForCausalLM

    causal = Gemma2ForCausalLM(model.config).eval()
    causal.model = model
    expected = PromptEncoder(tokenizer, model).encode(PROMPTS, INSTRUCTION)
    assert torch.equal(PromptEncoder(tokenizer, causal).encode(PROMPTS, INSTRUCTION).embeds, expected.embeds)


def test_another_encoder_gets_the_plain_call(tokenizer: Any) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = T5EncoderModel(config).eval()
    embeds, mask = plain(tokenizer, model, PROMPTS, "\n".join(INSTRUCTION), 40)
    condition = pad(PromptEncoder(tokenizer, model).encode(PROMPTS, INSTRUCTION, 40), 40)
    assert torch.equal(condition.mask, mask)
    assert relative_rms(condition.embeds[mask.bool()], embeds[mask.bool()]) <= RMS_GATE


@pytest.mark.parametrize(
    ("dtype", "sentence"), [(torch.float16, "load it in bfloat16 or float32"), (torch.float32, "weights are damaged")]
)
def test_non_finite_raises_and_is_not_kept(tokenizer: Any, dtype: torch.dtype, sentence: str) -> None:
    model = tiny_gemma(len(tokenizer), dtype=dtype)
    with torch.no_grad():
        good = model.norm.weight.clone()
        model.norm.weight.fill_(torch.inf)
    encoder = PromptEncoder(tokenizer, model)
    for _ in range(2):
        with pytest.raises(NonFinite, match=sentence):
            encoder.encode(["a cat"], INSTRUCTION)
    with torch.no_grad():
        model.norm.weight.copy_(good)
    assert encoder.encode(["a cat"], INSTRUCTION).embeds.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a cat",), "put a single prompt into a list"),
        (([],), "at least one prompt"),
        ((["a", 3],), "type int"),
        ((["a", "b\ud800"],), "character 2 is half of a surrogate pair"),
        ((["a"], ["\udfff"]), "The instruction is not valid Unicode"),
        ((["a"], None, 0), "whole number from 1"),
        ((["a"], None, 2.0), "whole number from 1"),
        ((["a"], None, True), "whole number from 1"),
    ],
)
def test_bad_arguments(tokenizer: Any, model: Any, arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        PromptEncoder(tokenizer, model).encode(*arguments)


def test_the_cache_is_handed_over_under_the_name_that_the_installed_library_knows(model: Any) -> None:
    class Older:
        def forward(self, input_ids: Tensor, past_key_values: object = None) -> None: ...

    class Newer:
        def forward(self, input_ids: Tensor, cache: object = None, **options: object) -> None: ...

    assert with_cache(Older(), 1) == {"past_key_values": 1}
    assert with_cache(Newer(), 1) == {"cache": 1}
    (name,) = with_cache(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.tensor([[2, 3]]), **{name: DynamicCache(config=model.config)})


def test_bad_batch_size(tokenizer: Any, model: Any) -> None:
    with pytest.raises(InvalidInput, match="max_batch"):
        PromptEncoder(tokenizer, model, max_batch=0)


def test_pad_refuses_to_cut() -> None:
    condition = TextCondition(embeds=torch.ones(1, 4, 2), mask=torch.ones(1, 4, dtype=torch.int64), truncated=("",))
    assert pad(condition, 4).embeds.shape == (1, 4, 2)
    assert pad(condition, 6).mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    with pytest.raises(InvalidInput, match="4 tokens, more than 3"):
        pad(condition, 3)


def test_importing_the_package_does_not_import_transformers() -> None:
    code = (
        "import sys, sana.text.gemma, sana.text.clean, sana.text.instruction;"
        "sys.exit(bool({'transformers', 'bs4', 'ftfy', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
