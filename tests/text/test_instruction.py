"""The instruction's text, the token window and tokenisation as plain text."""

import hashlib
import random
from typing import Any

import pytest

from clock import cpu_seconds
from sana.errors import InvalidInput
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION, join_instruction, token_window, tokenize
from text.tiny_gemma import SENTENCES, tiny_tokenizer


def test_instruction_is_the_published_one() -> None:
    text = join_instruction(COMPLEX_HUMAN_INSTRUCTION)
    assert text is not None
    assert len(COMPLEX_HUMAN_INSTRUCTION) == 8
    assert len(text) == 1057
    assert text.endswith("User Prompt: ")
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"
    )


@pytest.mark.parametrize(
    ("instruction", "text"), [(None, None), ([], None), ("", None), ([""], ""), (["a", "b "], "a\nb "), ("one", "one")]
)
def test_join_instruction(instruction: list[str] | str | None, text: str | None) -> None:
    assert join_instruction(instruction) == text


def test_join_instruction_refuses_other_things() -> None:
    with pytest.raises(InvalidInput, match="list of strings"):
        join_instruction(["a", 3])  # type: ignore[list-item]


@pytest.mark.parametrize("instruction_tokens", [0, 1, 2, 3, 215])
@pytest.mark.parametrize("limit", [1, 2, 3, 300])
def test_window_is_position_0_and_the_last_ones(instruction_tokens: int, limit: int) -> None:
    window = token_window(instruction_tokens, limit)
    assert window.rows == limit
    if instruction_tokens == 0:
        assert window.length == limit
        return
    length = max(1, instruction_tokens + limit - 2)
    assert window.length == length
    # The published selection on a padded sequence, written as its list of positions.
    positions = [0, *range(length - (limit - 1), length)]
    for num_tokens in range(length + 1):
        assert window.valid_rows(num_tokens) == sum(position < num_tokens for position in positions)


def test_special_token_text_is_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    bos, turn = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<start_of_turn>")
    text = "a <bos> <start_of_turn>cat<eos>"
    assert tokenizer(text).input_ids.count(bos) == 2, "the reference reads the spelling as the token"
    assert turn in tokenizer(text).input_ids
    ids = tokenize(tokenizer, text, 100).ids
    assert ids[0] == bos
    assert not {bos, turn, tokenizer.eos_token_id} & set(ids[1:])
    assert tokenizer.decode(ids[1:]) == text


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    ids = tokenize(tokenizer, "a cat\n\nin the snow", 100).ids
    assert tokenizer.convert_tokens_to_ids("\n\n") in ids
    assert list(ids) == tokenizer("a cat\n\nin the snow").input_ids


def test_the_callers_tokenizer_is_left_alone() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side
    tokenize(tokenizer, "a <bos> cat", 5)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side) == before
    assert tokenizer.padding_side == "left"
    assert tokenizer.backend_tokenizer.encode_special_tokens is False
    assert tokenizer.bos_token_id in tokenizer.backend_tokenizer.encode("a <bos> cat", add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["a\x00cat", "\x00", "👩‍👩‍👧‍👦 ﷽", "<0x41>", "\t\r\n", "\ufeff"])
def test_odd_text_is_tokenised_as_the_tokenizer_does(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert list(tokenize(tokenizer, text, 100).ids) == tokenizer(text).input_ids


@pytest.mark.parametrize("style", ["words", "phrases", "letters"])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_truncation_is_the_tokenizers_own(style: str, bos: bool, eos: bool) -> None:
    tokenizer = tiny_tokenizer(style, bos=bos, eos=eos)
    text = SENTENCES[-1]
    for limit in (2, 3, 7, 20, 500):
        tokens = tokenize(tokenizer, text, limit)
        assert list(tokens.ids) == tokenizer(text, truncation=True, max_length=limit).input_ids
        specials = bos + eos
        assert tokens.dropped == text[len(tokenizer.decode(tokens.ids[int(bos) : len(tokens.ids) - eos])) :]
        assert bool(tokens.dropped) == (len(tokenizer(text).input_ids) - specials > limit - specials)


def test_fewer_tokens_than_special_ones() -> None:
    tokenizer = tiny_tokenizer(eos=True)
    assert tokenize(tokenizer, "", 1).ids == (tokenizer.bos_token_id,)
    assert tokenize(tokenizer, "cat", 1).ids == (tokenizer.bos_token_id,)


def test_dropped_text_never_contains_the_instruction() -> None:
    tokenizer = tiny_tokenizer("letters")
    assert tokenize(tokenizer, "prompt: cat", 4, protected=8).dropped == "cat"


@pytest.mark.parametrize("characters_per_token", [1, 3, 16])
@pytest.mark.parametrize("style", ["words", "phrases", "letters"])
def test_long_texts_give_the_same_first_tokens(
    style: str, characters_per_token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.text.instruction._CHARACTERS_PER_TOKEN", characters_per_token)
    tokenizer = tiny_tokenizer(style)
    rng = random.Random(0)
    words = " ".join(SENTENCES).split(" ")
    for _ in range(10):
        text = " ".join(rng.choice(words) for _ in range(2000))
        whole = tokenizer(text).input_ids
        tokens = tokenize(tokenizer, text, 40)
        assert list(tokens.ids) == whole[:40]
        assert text.endswith(tokens.dropped)
        assert len(tokens.dropped) > 5000


@pytest.mark.parametrize("instruction", [5, {"a": "b"}, [b"a"], ["a", None], object(), range(3)])
def test_an_instruction_of_another_kind_is_refused(instruction: Any) -> None:
    with pytest.raises(InvalidInput, match="something else than text"):
        join_instruction(instruction)


def test_a_very_long_instruction_is_refused() -> None:
    assert join_instruction(["a" * 10_000, "b" * 10_000]) is not None
    with pytest.raises(InvalidInput, match="shorten it"):
        join_instruction(["a" * 10_000, "b" * 10_001])


def test_a_megabyte_is_quick() -> None:
    tokenizer = tiny_tokenizer()
    text = "a photo of a red fox " * 50_000
    whole = cpu_seconds(lambda: tokenizer(text), calls=2)
    assert cpu_seconds(lambda: tokenize(tokenizer, text, 300), enough=whole / 4) < whole / 4
    assert len(tokenize(tokenizer, text, 300).ids) == 300


def test_a_text_of_few_tokens_and_many_characters_is_read_to_its_end() -> None:
    tokenizer = tiny_tokenizer()
    # Blanks vanish in some tokenizers; then the first part of the text holds too few tokens.
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    text = " " * 100_000 + "cat"
    assert list(tokenize(tokenizer, text, 10).ids) == tokenizer("cat").input_ids
