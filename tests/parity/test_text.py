"""Prompt encoding and caption cleaning against the reference pipeline as a black box. Oracle: diffusers 0.42.1."""

import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana.text.clean import clean_caption
from sana.text.gemma import PromptEncoder, pad
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from text.tiny_gemma import INSTRUCTION, PROMPTS, tiny_gemma, tiny_tokenizer

RMS_GATE = 1e-6

NASTY = [
    "",
    " ",
    "A photo of a red fox, 4K (best quality) [masterpiece] {trending} | art*",
    "https://www.example.com/path/to?x=1&y=2#frag and http:a.com.https://b.org/ x.com.http://y",
    "mail me@home.co.uk or a.b-c.it/d_e/f@g, a.com/x.org é.com ..com a.communication it.it",
    "<person> &amp; <b>bold</b> &lt;i&gt; <!-- note --> <script>alert(1)</script> a < b > &quot;x&quot; &#x41; &nope;",
    "IMG_20231212_123456.JPG my.file.png.webp .png x.pdfs 1920x1080 10.5x20. 3×4 12х7 1x2x3",
    "free shipping worldwide  free   shipping freeshipping free download free downloads click for more click on\tit",
    "page 12 page twelve #1 #1234 #12345 123456 12345 192.168.0.1 1.2.3.4.5 fox 12:34 ",
    "abc123 ab12cd 12ab34 a1b2c3d4 1a1a1a_ abcd1234 x1y2z3é",
    "“quotes” ‘single’ «guillemets» `ticks´ ''double'' \"\"x\"\" — – ‐ 〜 ー",
    "cafÃ© â€™ l'Ã©tÃ© &amp;amp;lt;b&amp;gt; ﬁne ï»¿ \x1b[31mred",
    "一只猫 in 東京 ㇀ ㍿ ䷀ カタカナ 한국어 مرحبا 🦊👩‍👩‍👧",
    "a-b-c-d-e_f -_- ....... . . : :: a : b ,c.d/e ;",
    "'leading and trailing'",
    ".onlyword",
    "\\n literal \\t and \n real \r\n lines \x00 \u2028 \ufeff",
    "%20 %41%ff %u1234 100% a+b",
    "İstanbul K ǅ ß ſ",
]
PIECES = [
    *(
        "a",
        "fox",
        "com",
        ".com",
        ".co",
        ".it",
        "it",
        ".",
        "..",
        "-",
        "_",
        "/",
        "//",
        "http://",
        "https:",
        "http:",
        "www:",
    ),
    *(
        "@",
        "@bob",
        "<person>",
        "<b>",
        "</b>",
        "<a href='x'>",
        "<",
        ">",
        "&",
        "&amp;",
        "&quot;",
        "&quot",
        "&lt;",
        "&#39;",
    ),
    *(
        "猫",
        "é",
        "É",
        "1",
        "12",
        "123",
        "12345",
        "1234567",
        "255.255.255.255",
        "3:45 ",
        "\\n",
        "#12",
        "#123456",
        "x",
        "×",
    ),
    *(
        "10x20",
        "1.5x2.5",
        "x.png",
        ".jpeg",
        "png images",
        "pdf",
        '"',
        "'",
        "''",
        "«",
        "’",
        "...",
        "®",
        "(",
        ")",
        "]",
        "|",
    ),
    *(
        "\\",
        "*",
        " . ",
        " ",
        ",",
        ", ",
        ":",
        " : ",
        ";",
        "+",
        "%20",
        "%41",
        "free shipping",
        "worldwide  free shipping",
    ),
    *(
        "free download",
        "click for more",
        "page 12",
        "abc123",
        "abc12de",
        "12ab34",
        "a1b2c3",
        "1a1a111_",
        "\t",
        "\n",
        "—",
    ),
    *(
        "Ã©",
        "â€™",
        "&amp;amp;",
        "\u200b",
        "World.",
        "<!-- c -->",
        "<script>x</script>",
        "\x00",
        "\xa0",
        "İ",
        "١٢٣",
        "😀",
    ),
]
ALPHABETS = [
    "a.-/@:_ ",
    "1a_. x",
    "ac.om/@-é",
    "http:/w.a %",
    " .\t\n-_'\",:;",
    "<>ab/='\" !-",
    "&#x41;ampquot ",
    "1.x×2_ a",
]


@pytest.fixture(scope="module")
def reference_clean() -> Callable[[str], str]:
    clean: Callable[[str], str] = oracle(None, None)._clean_caption
    return clean


def oracle(tokenizer: Any, text_encoder: Any) -> Any:
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=None, transformer=None, scheduler=None
    )


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_nasty_captions_are_cleaned_alike(reference_clean: Callable[[str], str]) -> None:
    for text in NASTY:
        assert clean_caption(text) == reference_clean(text), text
        assert clean_caption(clean_caption(text)) == reference_clean(reference_clean(text)), text


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_random_captions_are_cleaned_alike(reference_clean: Callable[[str], str]) -> None:
    rng = random.Random(0)
    changed = 0
    for _ in range(1500):
        pieces = [rng.choice(PIECES) + rng.choice(["", "", " "]) for _ in range(rng.choice([1, 2, 3, 5, 8, 13]))]
        letters = rng.choices(rng.choice(ALPHABETS), k=rng.choice([4, 8, 16, 30]))
        for text in ("".join(pieces), "".join(letters)):
            assert clean_caption(text) == reference_clean(text), repr(text)
            changed += clean_caption(text) != text.lower().strip()
    assert changed > 1500, "most random texts must give the rules something to do"


def test_every_character_is_cleaned_alike(reference_clean: Callable[[str], str]) -> None:
    # Blocks of characters, for speed; half the alphabet of scripts ends a word, so each one stands between letters.
    for start in (*range(0x20, 0x3400, 64), *range(0xFB00, 0xFFF0, 64), 0x4DC0, 0x9FC0, 0x1F300):
        text = "".join(f"a{chr(i)}b " for i in range(start, start + 64))
        assert clean_caption(text) == reference_clean(text), hex(start)


def relative_rms(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    difference = (ours - reference).pow(2).mean().sqrt()
    return float(difference / reference.pow(2).mean().sqrt())


@pytest.mark.parametrize("style", ["words", "phrases", "letters"])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, RMS_GATE), (torch.bfloat16, 1e-2)])
def test_encode_prompt(style: str, bos: bool, eos: bool, dtype: torch.dtype, gate: float) -> None:
    tokenizer = tiny_tokenizer(style, bos=bos, eos=eos)
    model = tiny_gemma(len(tokenizer), dtype=dtype, sliding_window=8)
    encoder = PromptEncoder(tokenizer, model)
    reference = oracle(tiny_tokenizer(style, bos=bos, eos=eos), model)
    for limit, instruction in ((2, INSTRUCTION), (9, INSTRUCTION), (40, INSTRUCTION), (9, ["x"]), (9, None)):
        embeds, mask, negative, negative_mask = reference.encode_prompt(
            PROMPTS,
            True,
            "blurry, LOW quality",
            device="cpu",
            max_sequence_length=limit,
            complex_human_instruction=None if instruction is None else list(instruction),
        )
        pairs = [
            (encoder.encode(PROMPTS, instruction, limit), embeds, mask),
            (encoder.encode(["blurry, LOW quality"] * len(PROMPTS), None, limit), negative, negative_mask),
        ]
        for condition, wanted, wanted_mask in pairs:
            ours = pad(condition, limit)
            assert ours.embeds.dtype == dtype
            assert ours.embeds.shape == wanted.shape
            assert torch.equal(ours.mask, wanted_mask)
            valid = wanted_mask.bool()
            assert relative_rms(ours.embeds[valid], wanted[valid]) <= gate


def test_an_instruction_of_one_token_repeats_it_as_the_reference_does() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma(len(tokenizer))
    embeds, mask, _, _ = oracle(tiny_tokenizer(), model).encode_prompt(
        PROMPTS, True, device="cpu", max_sequence_length=9, complex_human_instruction=[""]
    )
    ours = pad(PromptEncoder(tokenizer, model).encode(PROMPTS, [""], 9), 9)
    assert torch.equal(ours.mask, mask)
    assert relative_rms(ours.embeds[mask.bool()], embeds[mask.bool()]) <= RMS_GATE


def test_the_published_instruction_and_limit() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma(len(tokenizer))
    embeds, mask, negative, negative_mask = oracle(tiny_tokenizer(), model).encode_prompt(
        PROMPTS, True, device="cpu", complex_human_instruction=list(COMPLEX_HUMAN_INSTRUCTION)
    )
    encoder = PromptEncoder(tokenizer, model)
    ours = pad(encoder.encode(PROMPTS, COMPLEX_HUMAN_INSTRUCTION), 300)
    assert torch.equal(ours.mask, mask)
    assert relative_rms(ours.embeds[mask.bool()], embeds[mask.bool()]) <= RMS_GATE
    empty = pad(encoder.encode([""]), 300)
    assert torch.equal(empty.mask, negative_mask[:1])
    assert relative_rms(empty.embeds[0, :1], negative[0, :1]) <= RMS_GATE


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_cleaned_prompts() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma(len(tokenizer))
    prompts = NASTY[2:8]
    embeds, mask, _, _ = oracle(tiny_tokenizer(), model).encode_prompt(
        prompts, False, device="cpu", clean_caption=True, complex_human_instruction=list(INSTRUCTION)
    )
    ours = pad(PromptEncoder(tokenizer, model).encode(prompts, INSTRUCTION, clean_caption=True), 300)
    assert torch.equal(ours.mask, mask)
    assert relative_rms(ours.embeds[mask.bool()], embeds[mask.bool()]) <= RMS_GATE
