"""`sana dataset check`: every sample read, what is amiss told with file and line, and a histogram of the buckets."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal, listed
from sana.apps.cli.verbs.dataset import one_path
from sana.errors import BadData, InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.data.examine import Bucket, Seen
    from sana.data.samples import Dataset, Finding, Sample

USAGE = "sana dataset check DATA [options]"
DESCRIPTION = """\
Read every picture and caption of a data set and tell what is amiss, with file and line. Broken samples end it with
exit code 3; the rest is told only.

  sana dataset check my-pictures --base 1024      also what training at 1024 px makes of them
  sana dataset check shards --model sana-1.6b-1024   counts tokens as that model does
  sana dataset check pictures --controls edges       also the control pictures"""
WINDOW = 300
"""Tokens of a caption that the published models read."""
WORDS = 200
"""Words that have about that many tokens."""
LINES = 50
"""Findings that are printed without --all."""
ALIKE = 20
"""Difference of colours, out of 255, up to which two pictures are alike: the most of 8 x 8 fields."""
SMALL = {
    "refuse": ("small", ""),
    "skip": ("left-out", "The picture is left out."),
    "upscale": ("enlarged", "It is enlarged."),
}
"""What becomes of a small control picture -> the kind of the finding, and the end of its sentence."""
FLIPPED = 3
"""Bits of 64 in which the outlines of alike pictures may differ."""


@dataclass(frozen=True, kw_only=True)
class Checking:
    """What is asked of the samples."""

    base: Annotated[int | None, Spelling(value="PIXELS")] = None
    """Side of the square that a model is trained at; tells buckets, and what is too small for them."""
    square: bool = False
    """Cut all pictures to a square, as recipes with square = true do; --base may then be any multiple of 32."""
    small: Literal["refuse", "skip", "upscale"] = "refuse"
    """What training does with pictures smaller than their bucket: stop, leave them out, or enlarge them."""
    model: Annotated[str | None, Spelling(short="-m", value="MODEL")] = None
    """Model whose tokens the captions are counted in; left out, words are counted."""
    trigger: Annotated[str, Spelling(value="WORDS")] = ""
    """What [trigger] in the captions stands for."""
    controls: Annotated[str | None, Spelling(value="FOLDER")] = None
    """Control pictures of the same names, which training a control network reads; they are checked, too."""
    headers: bool = False
    """Read no more of the pictures than their headers: fast, but damage and doubles are not seen."""
    all: bool = False
    """Print every finding, not the first 50 alone."""


GROUPS = (Group(title="checking", options=Checking),)


@dataclass(kw_only=True)
class Checked:
    """What was seen so far."""

    findings: "list[Finding]" = field(default_factory=list)
    buckets: "Counter[Bucket]" = field(default_factory=Counter)
    sound: int = 0
    repeats: int = 0
    captions: int = 0
    by_bytes: dict[bytes, str] = field(default_factory=dict)
    by_outline: dict[tuple[int, int], list[tuple[int, Any, str]]] = field(default_factory=lambda: defaultdict(list))


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Check a data set and print what was found."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Checking(**arguments.take(Checking, given))
    path = one_path(names, "check")
    for name, is_given in (("small", options.small != "refuse"), ("square", options.square)):
        if is_given and options.base is None:
            raise InvalidInput(f"--{name} is about buckets. Give --base too, or leave it out.")

    from sana.data.captions import CaptionChoice
    from sana.data.examine import Wanted, examine
    from sana.data.open import open_source

    source = open_source(path)
    choice = CaptionChoice(trigger=options.trigger)
    wanted = Wanted(base=options.base, aspect=not options.square, small=options.small, choice=choice)
    too_long = _counter(options.model)
    seen = Checked(findings=list(source.findings))
    used: list[Seen] = []
    with terminal.count(len(source), text="reading") as progress:
        for one in examine(source, wanted):
            _take(source, one, seen, _told_too_long(too_long, options.trigger), decode=not options.headers)
            used += [one] if one.is_used else []
            progress.advance(f"{one.number + 1} of {len(source)}")
    if options.controls is not None:
        seen.findings += _of_controls(options.controls, used, options)
    return _tell(path, len(source), seen, options, terminal)


def _told_too_long(too_long: Callable[[str], str], trigger: str) -> Callable[[str], str]:
    """Return what tells how a caption is too long when it is read with the trigger in it."""
    from sana.data.captions import triggered

    return (lambda text: too_long(triggered(text, trigger))) if trigger else too_long


def _of_controls(path: str, used: "Sequence[Seen]", options: Checking) -> "Iterator[Finding]":
    """Yield what is amiss with the control pictures of samples that would be trained on."""
    from sana.data.buckets import enlargement
    from sana.data.controls import ControlMaps
    from sana.data.samples import BadSample, Finding

    maps = ControlMaps(path, [one.sample for one in used if one.sample is not None])
    yield from maps.findings
    for sample in maps.unexplained:
        text = f"There is no control picture of the same name, {sample.key}.png, in {path}."
        yield Finding(kind="missing", place=sample.place, text=text)
    lost = {sample.key for sample in maps.missing}
    for one in used:
        if one.sample is None or one.sample.key in lost:
            continue
        known = maps.samples[one.sample.key]
        place = os.path.join(path, known.place) if os.path.isdir(path) else known.place
        larger = 1.0 if one.bucket is None else enlargement(known.width, known.height, one.bucket)
        if larger > 1 and one.bucket is not None:
            kind, end = SMALL[options.small]
            told = f"{known.width} x {known.height} pixels do not cover the bucket of {one.bucket[1]} x {one.bucket[0]}"
            yield Finding(kind=kind, place=place, text=f"{told}. {end}".strip())
        if not options.headers:
            try:
                maps.picture(one.sample.key)
            except BadSample as error:
                yield error.finding


def _counter(model: str | None) -> Callable[[str], str]:
    """Return what tells how a caption is too long, or nothing."""
    if model is None:
        return lambda text: _words(len(text.split()))
    from sana.apps.cli import cache
    from sana.apps.cli.known import check_model
    from sana.checkpoints.hub import locate
    from sana.checkpoints.text_parts import load_tokenizer
    from sana.text.instruction import tokenize

    check_model(model)
    folder = locate(model, parts=["tokenizer"], cache_dir=cache.folder()).folder
    tokenizer = load_tokenizer(folder / "tokenizer", "GemmaTokenizer")

    def told(text: str) -> str:
        dropped = tokenize(tokenizer, text, WINDOW).dropped
        return f"Only {WINDOW} tokens are read; what is lost begins with '{dropped.strip()[:40]}'." if dropped else ""

    return told


def _words(count: int) -> str:
    return f"It has {count} words; about {WORDS} are read ({WINDOW} tokens)." if count > WORDS else ""


def _take(source: "Dataset", one: "Seen", seen: Checked, too_long: Callable[[str], str], *, decode: bool) -> None:
    """Add what is seen of one sample."""
    from sana.data.samples import BadSample, Finding

    seen.findings += one.findings
    if one.sample is None:
        return
    for caption in one.sample.captions:
        text = too_long(caption.text)
        if text:
            seen.findings.append(Finding(kind="long-caption", place=one.sample.place, text=text))
    if decode:
        try:
            seen.findings += _doubles(one.sample, source.encoded(one.number)[0], source.picture(one.number), seen)
        except BadSample as error:
            seen.findings.append(error.finding)
            return
    if not one.is_used:
        return
    seen.sound += 1
    seen.repeats += one.sample.repeats
    seen.captions += len(one.sample.captions)
    if one.bucket is not None:
        seen.buckets[one.bucket] += one.sample.repeats


def _doubles(sample: "Sample", data: bytes, picture: "Image", seen: Checked) -> "Iterator[Finding]":
    """Yield which picture before this one it is, or looks like."""
    from sana.data.samples import Finding

    digest = hashlib.sha256(data).digest()
    if digest in seen.by_bytes:
        text = f"The picture is that of {seen.by_bytes[digest]}."
        yield Finding(kind="duplicate", place=sample.place, text=text)
        return
    seen.by_bytes[digest] = sample.place
    outline, colours = _outline(picture), _colours(picture)
    # Two outlines that differ in at most three bits share at least one of their four quarters.
    quarters = [(part, outline >> 16 * part & 0xFFFF) for part in range(4)]
    for other, tones, place in (known for quarter in quarters for known in seen.by_outline[quarter]):
        near = abs(tones - colours).max() <= ALIKE
        if near and (other ^ outline).bit_count() <= FLIPPED:
            yield Finding(kind="similar", place=sample.place, text=f"The picture looks like {place}.")
            break
    for quarter in quarters:
        seen.by_outline[quarter].append((outline, colours, sample.place))


def _outline(picture: "Image") -> int:
    """Return 64 bits that tell where a picture grows brighter from left to right."""
    from PIL.Image import Resampling

    small = list(picture.convert("L").resize((9, 8), Resampling.BOX).tobytes())
    bits = (small[9 * y + x] < small[9 * y + x + 1] for y in range(8) for x in range(8))
    return sum(bit << place for place, bit in enumerate(bits))


def _colours(picture: "Image") -> Any:
    import numpy as np
    from PIL.Image import Resampling

    return np.asarray(picture.resize((8, 8), Resampling.BOX), dtype=np.int16)


def _tell(path: str, total: int, seen: Checked, options: Checking, terminal: Terminal) -> int:
    """Print the findings and the summary, and fail when something is broken."""
    from sana.data.samples import KINDS

    kinds = Counter({kind: sum(f.kind == kind for f in seen.findings) for kind in KINDS})
    ordered = sorted(seen.findings, key=lambda finding: not finding.is_broken)
    shown = ordered if options.all else ordered[:LINES]
    for finding in shown:
        terminal.result(
            f"{'✗' if finding.is_broken else '·'} {finding}", colour="red" if finding.is_broken else "yellow"
        )
    if len(shown) < len(ordered):
        terminal.result(f"... and {len(ordered) - len(shown)} more; --all shows them.")
    rows: dict[str, str | Sequence[str]] = {
        "samples": f"{seen.sound} of {total} are sound, with {seen.captions} captions",
        "found": [f"{count} {KINDS[kind][1]}" for kind, count in kinds.items() if count] or "nothing amiss",
    }
    if seen.repeats != seen.sound:
        rows["an epoch"] = f"{seen.repeats} samples, as the names of the folders repeat them"
    rows |= {"buckets": _histogram(seen.buckets)} if seen.buckets else {}
    terminal.result("\n".join(listed(rows)))
    document = {
        "data": path,
        "samples": total,
        "sound": seen.sound,
        "per_epoch": seen.repeats,
        "captions": seen.captions,
        "kinds": {kind: count for kind, count in kinds.items() if count},
        "findings": [
            {"kind": f.kind, "broken": f.is_broken, "place": f.place, "line": f.line, "text": f.text} for f in ordered
        ],
        "buckets": [{"height": h, "width": w, "samples": n} for (h, w), n in sorted(seen.buckets.items())],
    }
    broken = sum(finding.samples for finding in seen.findings if finding.is_broken)
    if broken:
        terminal.draft = document
        raise BadData(f"{broken} {'is' if broken == 1 else 'are'} broken in {path}. Mend or remove what is listed.")
    terminal.document({**document, "warnings": terminal.warnings})
    return 0


def _histogram(buckets: "Counter[Bucket]") -> list[str]:
    most = max(buckets.values())
    rows = sorted(buckets.items(), key=lambda item: item[0][0] / item[0][1])
    return [f"{w:>4} x {h:<4} {count:>6} {'#' * max(1, round(24 * count / most))}" for (h, w), count in rows]
