"""`sana dataset preview`: a sheet of pictures, each cut as training cuts it, with the caption that it would read."""

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal
from sana.apps.cli.verbs.dataset import one_path
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.data.reading import Taken

USAGE = "sana dataset preview DATA [-o SHEET.png] [options]"
DESCRIPTION = """\
Draw pictures of a data set on one sheet, each cut to its bucket as training does it, with the caption that the first
draw of that seed reads and the size of the bucket."""
SIDE, LINES_BELOW = 200, 4
MOST = 400


@dataclass(frozen=True, kw_only=True)
class Previewing:
    """What is drawn."""

    output: Annotated[Path, Spelling(short="-o", value="FILE.png", read=Path)] = Path("preview.png")
    """The sheet."""
    base: Annotated[int, Spelling(value="PIXELS")] = 512
    """Side of the square that a model is trained at."""
    small: Literal["refuse", "skip", "upscale"] = "refuse"
    """What is done with pictures smaller than their bucket: stop, leave them out, or enlarge them."""
    count: Annotated[int, Spelling(short="-n", value="N")] = 24
    """How many pictures."""
    seed: Annotated[int, Spelling(short="-s", value="N")] = 0
    """Chooses the pictures and their captions."""
    trigger: Annotated[str, Spelling(value="WORDS")] = ""
    """Words that captions get, or that stand for [trigger] in them."""
    force: bool = False
    """Write over a sheet that is there."""


GROUPS = (Group(title="preview", options=Previewing),)


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Draw the sheet and print its path."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    options = Previewing(**arguments.take(Previewing, given))
    path = one_path(names, "preview")
    if not 1 <= options.count <= MOST:
        raise InvalidInput(f"--count must lie from 1 to {MOST}, not {options.count}.")
    if options.output.suffix.lower() != ".png" or "\0" in str(options.output):
        raise InvalidInput(f"The sheet is a PNG, so its name must end in .png, not '{options.output.name[-40:]}'.")

    from sana.data.captions import CaptionChoice, choose
    from sana.data.examine import Wanted, survey
    from sana.data.open import open_source
    from sana.data.order import BucketedOrder
    from sana.data.reading import Reader
    from sana.engine.images import write_atomically

    source, choice = open_source(path), CaptionChoice(trigger=options.trigger)
    found = survey(source, Wanted(base=options.base, small=options.small, choice=choice))
    if unsaid := next((finding for finding in found.findings if finding.kind == "trigger"), None):
        raise InvalidInput(f"{unsaid.place}: a caption has [trigger] in it. Say what it stands for with --trigger.")
    order = BucketedOrder(found.buckets, 1, options.seed)
    reader = Reader(source, found, order, upscale=options.small == "upscale")
    taken = [reader.read(draw)[0] for draw in range(min(options.count, order.batches_per_epoch))]
    captions = [
        choose(one.sample.captions, random.Random(f"{options.seed}/{i}"), choice) for i, one in enumerate(taken)
    ]
    sheet = _sheet(taken, captions)
    write_atomically(options.output, lambda file: sheet.save(file, format="PNG", optimize=True), force=options.force)
    terminal.result(str(options.output))
    pictures = [
        {"place": one.sample.place, "width": one.picture.width, "height": one.picture.height, "caption": caption}
        for one, caption in zip(taken, captions, strict=True)
    ]
    terminal.document({"file": str(options.output), "pictures": pictures, "warnings": terminal.warnings})
    return 0


def _sheet(taken: "Sequence[Taken]", captions: Sequence[str]) -> "Image":
    """Return the pictures in rows, their captions below them."""
    from PIL import Image, ImageDraw

    from sana.apps.cli.sheet import FAINT, GAP, INK, LINE, MARGIN, PAPER, TEXT, font

    columns = min(6, max(1, round(len(taken) ** 0.5)))
    rows = -(-len(taken) // columns)
    step = (SIDE + 2 * GAP, SIDE + GAP + (LINES_BELOW + 1) * LINE)
    size = (2 * MARGIN + columns * step[0] - 2 * GAP, 2 * MARGIN + rows * step[1])
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (one, caption) in enumerate(zip(taken, captions, strict=True)):
        x, y = MARGIN + place % columns * step[0], MARGIN + place // columns * step[1]
        small = one.picture.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        told = f"{one.picture.width} x {one.picture.height}  {_short(one.sample.place)}"
        draw.text((x, y + SIDE + GAP // 2), told, FAINT, font(TEXT - 2))
        for i, line in enumerate(_lines(caption)):
            draw.text((x, y + SIDE + GAP // 2 + (i + 1) * (LINE - 3)), line, INK, font(TEXT - 2))
    return sheet


def _short(place: str) -> str:
    """Return the end of a name, as far as it fits beside the size."""
    from sana.apps.cli.sheet import drawable

    plain = "".join(mark if drawable(mark) else "·" for mark in place)
    return plain if len(plain) <= 16 else f"…{plain[-15:]}"


def _lines(caption: str) -> list[str]:
    """Return a caption as it fits below a picture, as far as the font has its letters."""
    from sana.apps.cli.sheet import drawable

    text = "".join(mark if drawable(mark) else "·" for mark in caption)
    if text.count("·") > len(text) / 3:
        text = "(the font lacks its letters)"
    return textwrap.wrap(text or "(empty)", 30, max_lines=LINES_BELOW, placeholder=" …")
