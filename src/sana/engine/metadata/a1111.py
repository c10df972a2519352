"""The text form of AUTOMATIC1111: prompt, `Negative prompt: ...`, then one line of `Name: value` pairs.

Forge, SD.Next, stable-diffusion.cpp, Fooocus (in one of its two schemes) and this program write it too. Values with a
comma, a colon or a line break are JSON strings.
"""

import re
from collections.abc import Iterator

from sana.engine.metadata.containers import Carried
from sana.engine.metadata.settings import Settings, number, parse_json, parse_object, rest_of, whole

NEGATIVE = "Negative prompt:"


def read_a1111(carried: Carried) -> Settings | None:
    """Read the text `parameters`, or the comment of a picture that has no keys."""
    text = carried.texts.get("parameters") or carried.comment
    return settings_of(text, "a1111") if _START.search(text) and parse_object(text) is None else None


def settings_of(text: str, dialect: str, program: str | None = None) -> Settings:
    """Return what a text of this form says; without the line of pairs all of it is the prompt."""
    prompt, negative, line = split(text)
    pairs: dict[str, str] = {}
    for name, value in pairs_of(line):
        pairs.setdefault(name, value)
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs.get("Size", ""))
    return Settings(
        dialect=dialect,
        program=program or _program(pairs),
        prompt=prompt,
        negative_prompt=negative,
        steps=whole(pairs.get("Steps")),
        guidance=number(pairs.get("CFG scale")),
        seed=whole(pairs.get("Seed")),
        width=int(size[1]) if size else None,
        height=int(size[2]) if size else None,
        sampler=pairs.get("Sampler"),
        model=pairs.get("Model"),
        extra=rest_of(pairs, _USED),
    )


def split(text: str) -> tuple[str, str, str]:
    """Return prompt, negative prompt and the line of pairs."""
    lines = [found.start() for found in _LINE_START.finditer(text)]
    starts = lines or [found.start() for found in _START.finditer(text)]
    start = starts[-1] if starts else len(text)
    words, line = text[:start].strip(), text[start:].partition("\n")[0].strip()
    if words.startswith(NEGATIVE):
        return "", words.removeprefix(NEGATIVE).strip(), line
    prompt, _, negative = words.partition("\n" + NEGATIVE)
    return prompt.strip(), negative.strip(), line


def pairs_of(line: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a line, in time linear in its length."""
    at = 0
    while (colon := line.find(":", at)) >= 0:
        name = line[at:colon].rpartition(",")[2].strip()
        if name == "SDCPP":  # stable-diffusion.cpp repeats everything as JSON at the end
            return
        start = colon + 1
        while line[start : start + 1] == " ":
            start += 1
        quoted = _QUOTED.match(line, start)
        value = parse_json(quoted[0]) if quoted else None
        end = quoted.end() if quoted and value is not None else line.find(",", start)
        end = end if end >= 0 else len(line)
        yield name, line[start:end].strip() if value is None else value
        at = end + 1


def _program(pairs: dict[str, str]) -> str:
    version = pairs.get("Version", "")
    if "App" in pairs:
        return f"{pairs['App']} {version}".strip()
    if re.match(r"f\d", version):
        return f"Forge {version}"
    if re.match(r"v\d", version):
        return f"AUTOMATIC1111 {version}"
    return version or "a program that writes AUTOMATIC1111's form"


_QUOTED = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_START = re.compile(r"Steps: ?\d")
_LINE_START = re.compile(r"^Steps: ?\d", re.MULTILINE)
_USED = frozenset({"Steps", "CFG scale", "Seed", "Size", "Sampler", "Model", "Version", "App"})
