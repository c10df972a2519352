"""Caption cleaning by itself: one example per rule, linear time, missing packages. Parity is in tests/parity."""

import sys
from typing import Any

import pytest

from clock import cpu_seconds
from sana.errors import MissingDependency
from sana.text.clean import _RULES, clean_caption
from sana.text.gemma import PromptEncoder, prepare_prompt
from text.tiny_gemma import tiny_gemma, tiny_tokenizer

EXAMPLES = {
    "address escapes": ("a%20red+fox", "a red fox"),
    "case": ("  A Red FOX\n", "a red fox"),
    "person tag": ("<person> runs", "person runs"),
    "http links": ("see https://example.org/a/b?x now", "see ?x now"),
    "www links": ("see www:x now", "see now"),
    "markup": ("<b>red</b> fox", "red fox"),
    "nicknames": ("by @some_body here", "by here"),
    "CJK strokes to ideographs": ("a 猫 cat", "a cat"),
    "dashes": ("red—fox", "red-fox"),
    "double quotes": ("a «red» fox", 'a "red" fox'),
    "single quotes": ("a ‘’red fox", 'a "red fox'),
    "quote entity": ("a &amp;quot;red fox", "a red fox"),
    "ampersand entity": ("red &amp;amp fox", "red fox"),
    "IP addresses": ("at 10.0.0.1 now", "at now"),
    "article ids at the end": ("fox 1:23 <br>", "fox"),
    "spelled line breaks": ("red\\nfox", "red fox"),
    "#123": ("fox #12 runs", "fox runs"),
    "#12345...": ("fox #12345 runs", "fox runs"),
    "123456...": ("fox 123456 runs", "fox runs"),
    "file names": ("my_fox.jpeg runs", "runs"),
    "repeated quotes": ("a ''red fox", 'a "red fox'),
    "repeated dots": ("red...fox", "red fox"),
    "signs and brackets": ("red (fox) [*]", "red fox"),
    "lonely dots": ("red . fox", "red fox"),
    "joined words": ("a-red-fox_in-snow", "a red fox in snow"),
    "encoding": ("a ﬁne fox", "a fine fox"),
    "ids like abc123": ("fox abc123 runs", "fox runs"),
    "ids like abc12de": ("fox abcd12de runs", "fox runs"),
    "ids like 12ab34": ("fox 12ab34 runs", "fox runs"),
    "shipping": ("fox worldwide free shipping", "fox"),
    "download": ("fox free download", "fox"),
    "click for": ("click for more foxes", "foxes"),
    "file types": ("fox png images", "fox"),
    "page numbers": ("fox page 12 runs", "fox runs"),
    "long mixed ids": ("fox a1b2c3 runs", "fox runs"),
    "sizes like 3x4": ("fox 3×4 runs", "fox runs"),
    "blanks around colons": ("fox : red", "fox: red"),
    "blank after punctuation": ("red,fox", "red, fox"),
    "blanks": ("red \t\n fox", "red fox"),
    "outer quotes": ('"red fox"', "red fox"),
    "leading punctuation": (";red fox", "red fox"),
    "trailing punctuation": ("red fox,", "red fox"),
    "only a dotted word": (".fox", ""),
    "outer blanks": ("(red) fox", "red fox"),
}


def test_every_rule_has_an_example() -> None:
    assert [name for name, _ in _RULES] == list(EXAMPLES)


@pytest.mark.parametrize("rule", EXAMPLES)
def test_example(rule: str) -> None:
    text, cleaned = EXAMPLES[rule]
    assert clean_caption(text) == cleaned
    for name, apply in _RULES:
        text = text if name == rule else apply(text)
    assert text != cleaned, "the example must need its rule"


def test_prompts_are_cleaned_twice() -> None:
    text = "(red) . .fox"
    assert clean_caption(text) != clean_caption(clean_caption(text))
    assert prepare_prompt(text, clean_caption=True) == clean_caption(clean_caption(text))
    assert prepare_prompt(" A «Fox» ", clean_caption=False) == "a «fox»"


def test_encoder_cleans_only_when_asked() -> None:
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, tiny_gemma(len(tokenizer)))
    dirty = "a   cat (in the snow)"
    assert encoder.encode([dirty], clean_caption=True).mask.shape == encoder.encode(["a cat in the snow"]).mask.shape
    assert encoder.encode([dirty]).mask.shape != encoder.encode(["a cat in the snow"]).mask.shape


@pytest.mark.parametrize(("module", "package"), [("bs4", "beautifulsoup4"), ("ftfy", "ftfy")])
def test_missing_package(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"package {package}; install `sanakit\[clean\]`"):
        clean_caption("a fox")


# Repetitions that take other implementations, or Python's HTML parser, quadratic time.
HARD = [
    *("a.", "a.a-", "a.com@", "a.com/x@", "co.com/-/-", ".", "http:", "  ", "  .", " . ", "x.pn", " .png", ".png"),
    *(
        "<a ",
        "<a b='",
        '<a "',
        "<!--",
        "<!-- -",
        "</",
        "<",
        "<b>",
        "<div>",
        "<div><p>",
        "<?x ",
        "&",
        "&#",
        "1",
        "1.",
        "1.1x",
        "a1a1_",
        "a1a11",
    ),
    *("worldwide free ", "page ", "-_", "'\"", "\n", "%", "Ã©", "1:23 "),
]


@pytest.mark.parametrize("piece", HARD)
def test_time_is_linear(piece: str) -> None:
    clean_caption("warm up <b>")
    short_text, long_text = ("_" + (piece * size)[:size] + "_" for size in (2_000, 32_000))
    # Sixteen times the text: linear is 16, quadratic 256. The floor keeps timer noise out.
    allowed = 64 * max(cpu_seconds(lambda: clean_caption(short_text), calls=2), 0.002)
    took = cpu_seconds(lambda: clean_caption(long_text), enough=allowed)
    assert took <= allowed, f"{took:.4f} s, and {allowed / 64:.4f} s for a sixteenth of the text"


def test_long_text_is_cut_only_between_tags() -> None:
    cell = "<p class='a b'>red fox 3 < 4 in the snow</p> "
    long = clean_caption(cell * 100)
    assert len(cell * 100) > 4000
    assert long == " ".join(["red fox 3 < 4 in the snow"] * 100)


def test_a_caption_that_looks_like_a_file_is_no_warning(recwarn: Any) -> None:
    assert clean_caption("fox&amp;.html") == "fox . html"
    assert clean_caption("/home/fox") == "home fox"
    assert not recwarn.list
