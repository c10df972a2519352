"""Caption cleaning of the published pipelines: web scraps out of alt texts, as DeepFloyd IF and its heirs do it.

The steps, their order and their oddities are kept, so that the result is the same text, in time linear in its length.
"""

import html
import re
import warnings
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote_plus

from sana.errors import MissingDependency

_HOST = re.compile(r"[a-zA-Z0-9.\-]+")
_HOST_END = re.compile(r"(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)")
_WORD_EDGE = re.compile(r"\b")
_SCHEME_LENGTH = len("https")
_FILE_ENDINGS = ("png", "jpg", "jpeg", "bmp", "webp", "eps", "pdf", "apk", "mp4")
_ANY_ENDING = "|".join(_FILE_ENDINGS)
# Unclosed tags take Python's parser quadratic time; this bounds the square.
_MARKUP_CHARACTERS = 1000


def clean_caption(text: str) -> str:
    """Clean a caption once; the published pipelines do it twice in a row.

    Beware that it removes Chinese characters. Raises MissingDependency without beautifulsoup4 and ftfy.
    """
    for _, rule in _RULES:
        text = rule(text)
    return text


def _dependency(name: str) -> MissingDependency:
    return MissingDependency(
        f"Cleaning captions needs the package {name}; install `sanakit[clean]` or leave `clean_caption` off."
    )


def _remove_links(scheme: re.Pattern[str], text: str) -> str:
    """Remove `scheme` at word starts, and host names with a well-known ending together with what follows them.

    Within one run of host characters every later start sees the same endings, so the first start and the last ending
    decide and no start is tried twice.
    """
    kept: list[str] = []
    position = 0
    while run := _HOST.search(text, position):
        kept.append(text[position : run.start()])
        start, end = _link(scheme, text, run.start(), run.end())
        kept.append(text[run.start() : start])
        position = end
    return "".join(kept) + text[position:]


def _link(scheme: re.Pattern[str], text: str, run_start: int, run_end: int) -> tuple[int, int]:
    """Return start and end of the first link in a run of host characters; (run_end, run_end) when there is none."""
    edge = _WORD_EDGE.search(text, run_start, run_end)
    first = run_end if edge is None else edge.start()
    dot = text.rfind(".", first + 1, run_end)
    while dot > 0:
        if match := _HOST_END.match(text, dot + 1):
            return first, match.end()
        dot = text.rfind(".", first + 1, dot)
    # A scheme ends with the colon that ends the run.
    for start in range(max(run_start, run_end - _SCHEME_LENGTH), run_end):
        if match := scheme.match(text, start):
            return start, match.end()
    return run_end, run_end


def _strip_markup(text: str) -> str:
    """Return the text without HTML tags; long texts are cut where no tag seems to be open."""
    try:
        import bs4
    except ImportError:
        raise _dependency("beautifulsoup4") from None
    pieces: list[str] = []
    start = 0
    while start < len(text):
        piece = text[start : start + _MARKUP_CHARACTERS]
        if start + len(piece) < len(text):
            size = 1 + max(piece.rfind(">"), piece.rfind(" ") if "<" not in piece else -1)
            piece = piece[:size] or piece
        start += len(piece)
        if "<" in piece or "&" in piece:
            with warnings.catch_warnings():
                # A caption that looks like a file name or an address is still a caption.
                warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
                piece = bs4.BeautifulSoup(piece, features="html.parser").text
        pieces.append(piece)
    return "".join(pieces)


def _remove_file_name(match: re.Match[str]) -> str:
    """Cut a word after its last file ending that has something before it."""
    word = match[0]
    end = max((at + len(ending) + 1 for ending in _FILE_ENDINGS if (at := word.rfind("." + ending, 1)) > 0), default=0)
    return word[end:]


def _split_joined_words(text: str) -> str:
    """Take hyphens and underscores for spaces when there are more than three of them."""
    return re.sub("[-_]", " ", text) if text.count("-") + text.count("_") > 3 else text


def _fix_encoding(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        raise _dependency("ftfy") from None
    return html.unescape(html.unescape(str(ftfy.fix_text(text))))


def _replace(pattern: str, replacement: str = "") -> Callable[[str], str]:
    return partial(re.compile(pattern).sub, replacement)


_HTTP = re.compile(r"\bhttps?:(?:/{1,3}|[a-zA-Z0-9%])")
_WWW = re.compile(r"\bwww:(?:/{1,3}|[a-zA-Z0-9%])")
_DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    r"\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("address escapes", unquote_plus),
    ("case", lambda text: text.strip().lower()),
    ("person tag", _replace("<person>", "person")),
    ("http links", partial(_remove_links, _HTTP)),
    ("www links", partial(_remove_links, _WWW)),
    ("markup", _strip_markup),
    ("nicknames", _replace(r"@\w+")),
    ("CJK strokes to ideographs", _replace("[\u31c0-\u9fff]+")),
    ("dashes", _replace(f"[{_DASHES}]+", "-")),
    ("double quotes", _replace("[`´«»“”¨]", '"')),
    ("single quotes", _replace("[‘’]", "'")),
    ("quote entity", _replace("&quot;?")),
    ("ampersand entity", _replace("&amp")),
    ("IP addresses", _replace(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ")),
    ("article ids at the end", _replace(r"\d:\d\d\s+$")),
    ("spelled line breaks", _replace(r"\\n", " ")),
    ("#123", _replace(r"#\d{1,3}\b")),
    ("#12345...", _replace(r"#\d{5,}\b")),
    ("123456...", _replace(r"\b\d{6,}\b")),
    ("file names", partial(re.compile(r"\S+").sub, _remove_file_name)),
    ("repeated quotes", _replace("[\"']{2,}", '"')),
    ("repeated dots", _replace(r"\.{2,}", " ")),
    ("signs and brackets", _replace(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " ")),
    # Only the first blank of a run is worth a try.
    ("lonely dots", _replace(r"(?<!\s)\s+\.\s+", " ")),
    ("joined words", _split_joined_words),
    ("encoding", _fix_encoding),
    ("ids like abc123", _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b")),
    ("ids like abc12de", _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b")),
    ("ids like 12ab34", _replace(r"\b\d+[a-zA-Z]+\d+\b")),
    ("shipping", _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping")),
    ("download", _replace(r"(?:free\s)?download(?:\sfree)?")),
    ("click for", _replace(r"\bclick\b\s(?:for|on)\s\w+")),
    ("file types", _replace(rf"\b(?:{_ANY_ENDING})(?:\simages?)?")),
    ("page numbers", _replace(r"\bpage\s+\d+\b")),
    ("long mixed ids", _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " ")),
    ("sizes like 3x4", _replace(r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b")),
    ("blanks around colons", _replace(r"\b\s+:\s+", ": ")),
    ("blank after punctuation", _replace(r"(\D[,./])\b", r"\1 ")),
    ("blanks", _replace(r"\s+", " ")),
    ("outer quotes", _replace(r"^[\"']([\w\W]+)[\"']$", r"\1")),
    ("leading punctuation", _replace(r"^['_,\-:;]")),
    ("trailing punctuation", _replace(r"['_,\-:+]$")),
    ("only a dotted word", _replace(r"^\.\S+$")),
    ("outer blanks", str.strip),
)
