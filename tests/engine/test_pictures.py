"""The one door for pictures of users: what is converted, what is refused, and that nothing else happens."""

import io
import os
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sana import load_image
from sana.data.pictures import MAX_PIXELS, fit
from sana.engine.attachments import FileRef
from sana.engine.pictures import picture_size, read_mask, read_picture, reference
from sana.errors import InvalidInput, ModelNotFound, SanaError

RAMP = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
COLOURS = Image.merge("RGB", (RAMP, RAMP.transpose(Image.Transpose.FLIP_LEFT_RIGHT), RAMP.rotate(180)))


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def refused(path: Any, *words: str) -> None:
    """The file is refused in one sentence or two that fit on the screen, by each of the readers."""
    for read in (read_picture, read_mask, picture_size):
        with pytest.raises(SanaError) as caught:
            read(path)
        said = str(caught.value)
        assert all(word in said for word in words), said
        assert "\n" not in said
        assert len(said) < 300
        assert str(Path(str(path)).parent) not in said


def outcome(path: Path) -> str:
    try:
        return read_picture(path).mode
    except InvalidInput as error:
        return str(error)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *further: bytes, rows: int = 1) -> bytes:
    """A PNG that declares a size and brings a few rows of white."""
    data = zlib.compress((b"\0" + b"\xff" * width) * rows, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(further) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I;16"])
def test_every_mode_becomes_eight_bit_rgb(mode: str) -> None:
    values = np.asarray(RAMP).astype(np.uint16) * 257
    picture = Image.fromarray(values) if mode == "I;16" else COLOURS.convert("L" if mode in ("L", "LA") else "RGB")
    picture = picture if picture.mode == mode else picture.convert(mode)
    read = read_picture(picture)
    assert (read.mode, read.size) == ("RGB", (20, 12))
    assert read is not picture
    if mode == "I;16":
        assert np.array_equal(np.asarray(read)[..., 0], np.asarray(RAMP))


@pytest.mark.parametrize("kind", ["I;16 png", "I;16B", "I", "F", "rgb16", "cmyk jpeg"])
def test_deep_and_printed_pictures_keep_their_brightness(kind: str, tmp_path: Path) -> None:
    deep = np.asarray(RAMP).astype(np.uint16) * 257
    if kind == "cmyk jpeg":
        path = saved(COLOURS.convert("CMYK"), tmp_path / "a.jpg", quality=95)
        gap = np.abs(np.asarray(read_picture(path)).astype(int) - np.asarray(COLOURS).astype(int))
        assert gap.mean() < 12
        return
    if kind == "rgb16":
        rows = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in deep)
        head = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
        whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        picture: Any = tmp_path / "deep.png"
        picture.write_bytes(whole)
    elif kind == "I;16 png":
        picture = saved(Image.fromarray(deep), tmp_path / "deep.png")
    elif kind == "I;16B":
        picture = Image.fromarray(deep.astype(">u2"))
    elif kind == "I":
        picture = Image.fromarray(deep.astype(np.int32))
    else:
        picture = Image.fromarray((deep / 65535).astype(np.float32))
    assert np.array_equal(np.asarray(read_picture(picture))[..., 1], np.asarray(RAMP))


def test_floats_that_are_no_numbers_become_black() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    assert np.asarray(read_picture(Image.fromarray(values)))[0, :, 0].tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_what_is_see_through_is_laid_on_white(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if kind == "RGBA":
        saved(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), path)
    elif kind == "LA":
        saved(Image.new("LA", (4, 4), (10, 0)), path)
    elif kind == "palette":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        saved(palette, path, transparency=1)
    else:
        saved(Image.new("RGB", (4, 4), (1, 2, 3)), path, transparency=(1, 2, 3))
    assert read_picture(path).getextrema() == ((255, 255),) * 3
    assert read_mask(path).getextrema() == (0, 0)


def test_half_see_through_is_mixed() -> None:
    assert read_picture(Image.new("RGBA", (2, 2), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_honoured(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(COLOURS, tmp_path / "a.png", exif=exif)
    upright = read_picture(path)
    assert picture_size(path) == upright.size == ((12, 20) if orientation > 4 else (20, 12))
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(opened)))
    assert read_mask(path).size == upright.size


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"\0" * 3000,
        b"Exif\0\0" * 99,
    ],
)
def test_broken_exif_data_do_not_matter(exif: bytes, tmp_path: Path) -> None:
    path = saved(COLOURS, tmp_path / "a.jpg", exif=exif)
    assert read_picture(path).size == (20, 12)
    for value in (0, 9, -1, "upside down", 2**40):
        told = Image.Exif()
        told[0x0112] = value
        picture = COLOURS.copy()
        picture.getexif().update(told)
        assert read_picture(picture).size == (20, 12)


def test_a_mask_is_black_and_white() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    mask = np.asarray(read_mask(grey))
    assert sorted(set(mask.ravel().tolist())) == [0, 255]
    assert np.array_equal(mask > 0, np.asarray(grey) >= 128)


def test_the_extension_counts_for_nothing(tmp_path: Path) -> None:
    assert read_picture(saved(COLOURS, tmp_path / "photo.png", format="JPEG")).size == (20, 12)
    assert read_picture(saved(COLOURS, tmp_path / "photo", format="WEBP")).size == (20, 12)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "EPS", "PDF"])
def test_other_formats_are_refused(kind: str, tmp_path: Path) -> None:
    refused(saved(COLOURS, tmp_path / "photo.png", format=kind), "no PNG, JPEG or WebP")


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        b"%PDF-1.7\n%%EOF",
        b"8BPS\0\1" + b"\0" * 99,
        b"SIMPLE  =                    T" + b" " * 3000,
        b"PK\x03\x04" + b"\0" * 99,
        b"\x80\x04\x95\x0e\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93.",
        b"\0",
        b"\xff" * 5000,
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    refused(path, "cannot be read")


def test_polyglots_are_nothing_but_their_picture(tmp_path: Path) -> None:
    """What stands behind the picture, or in its texts, is not looked at; only pixels go on."""
    canary = tmp_path / "ran"
    script = f"import os; open({str(canary)!r}, 'w')".encode()
    plain = io.BytesIO()
    COLOURS.save(plain, "PNG")
    for tail in (b"PK\x03\x04" + script, b"<script>alert(1)</script>", script, b"\0" * 9999):
        path = tmp_path / "photo.png"
        path.write_bytes(plain.getvalue() + tail)
        assert np.array_equal(np.asarray(read_picture(path)), np.asarray(COLOURS))
        assert read_picture(path).info == {}
    assert not canary.exists()


def test_missing_and_odd_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    refused(empty, "0 bytes")
    refused(tmp_path, "not a file")
    refused(tmp_path / "nothing.png", "There is no file nothing.png")
    refused(tmp_path / ("x" * 5000), "There is no file")
    with pytest.raises(ModelNotFound):
        read_picture("a\0b")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(pipe, "not a file")
    with pytest.raises(InvalidInput, match="only known by what its record says"):
        read_picture(FileRef(name="fox.png", sha256="0" * 64))


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (9000, 9000, "too large"),
        (65535, 1, "too large"),
        (1, 65535, "too large"),
        (2**31 - 1, 2**31 - 1, "too large"),
        (30000, 30000, "too large"),
        (16384, 16, "too long and thin"),
        (1, 64, "too long and thin"),
        (0, 5, "cannot be read"),
    ],
)
def test_sizes_are_judged_by_the_header_alone(width: int, height: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(min(width, 70_000), 1)[:16] + struct.pack(">II", width, height) + png(9, 9)[24:])
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, words)
    assert time.process_time() - began < 0.5


def test_a_bomb_of_few_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(9000, 9000, rows=9000))
    assert path.stat().st_size < 100_000
    refused(path, "too large")
    for kind, place, sizes in (
        ("WEBP", 26, struct.pack("<HH", 16383, 9000)),
        ("JPEG", None, struct.pack(">HH", 9000, 9000)),
    ):
        whole = io.BytesIO()
        COLOURS.save(whole, kind)
        data = bytearray(whole.getvalue())
        start = place if place is not None else data.index(b"\xff\xc0") + 5
        data[start : start + 4] = sizes
        path.write_bytes(bytes(data))
        refused(path, "too large")
    assert MAX_PIXELS < 9000 * 9000


def test_bombs_in_the_texts_of_a_picture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    swollen = zlib.compress(b"a" * 100_000_000, 9)
    texts = [chunk(b"zTXt", f"k{i}".encode() + b"\0\0" + swollen) for i in range(3)]
    path.write_bytes(png(4, 4, *texts, chunk(b"iCCP", b"p\0\0" + swollen), rows=4))
    refused(path, "cannot be read")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animations_are_refused(kind: str, tmp_path: Path) -> None:
    path = saved(
        COLOURS, tmp_path / "a.png", format=kind, save_all=True, append_images=[COLOURS.rotate(90), COLOURS.rotate(180)]
    )
    refused(path, "an animation of 3 pictures")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_and_mangled_files_give_a_picture_or_one_sentence(kind: str, tmp_path: Path) -> None:
    whole = io.BytesIO()
    COLOURS.resize((90, 70)).save(whole, kind)
    data, rng, path = whole.getvalue(), random.Random(5), tmp_path / "photo.png"
    outcomes = set()
    cuts = [data[: rng.randrange(len(data))] for _ in range(60)]
    for _ in range(120):
        mangled = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            mangled[rng.randrange(len(mangled))] = rng.randrange(256)
        cuts.append(bytes(mangled))
    for content in cuts:
        path.write_bytes(content)
        outcomes.add(outcome(path))
    assert all("\n" not in one for one in outcomes)
    assert "RGB" in outcomes
    assert len(outcomes) > 1


def test_a_picture_that_is_handed_over_stays_as_it_is() -> None:
    picture = COLOURS.convert("RGBA")
    before = picture.tobytes()
    read_picture(picture).putpixel((0, 0), (1, 2, 3))
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)
    same = read_picture(COLOURS)
    same.putpixel((0, 0), (9, 9, 9))
    assert COLOURS.getpixel((0, 0)) != (9, 9, 9)
    with pytest.raises(InvalidInput, match="too long and thin"):
        read_picture(Image.new("L", (1, 100)))


def test_load_image_goes_through_the_same_door(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(9000, 9000))
    for wrong, words in (
        (path, "too large"),
        (saved(COLOURS, tmp_path / "a.gif"), "cannot be read"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(InvalidInput, match=words):
            load_image(wrong)
    palette = saved(COLOURS.convert("P"), tmp_path / "a.png")
    assert load_image(palette, lambda picture: picture).mode == "P"
    same = load_image(COLOURS, lambda picture: picture)
    assert same is not COLOURS


@pytest.mark.parametrize(("size", "target"), [((20, 12), (40, 24)), ((20, 12), (12, 12)), ((20, 12), (7, 30))])
def test_fitting_covers_and_keeps_the_shape(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert fit(COLOURS, *size) is COLOURS
    disc = Image.new("L", (200, 120))
    disc.paste(255, (90, 50, 110, 70))
    fitted = fit(disc, target[0] * 10, target[1] * 10)
    left, top, right, bottom = fitted.getbbox() or (0, 0, 0, 0)
    assert fitted.size == (target[0] * 10, target[1] * 10)
    assert abs((right - left) - (bottom - top)) <= 1
    assert abs((left + right) - fitted.width) <= 1
    assert abs((top + bottom) - fitted.height) <= 1


def test_records_name_pictures_without_a_path(tmp_path: Path) -> None:
    path = saved(COLOURS, tmp_path / "fox.png")
    named = reference(path, read_picture(path))
    assert named.name == "fox.png"
    assert named.sha256 == reference(COLOURS, read_picture(COLOURS)).sha256
    assert reference(COLOURS, COLOURS).name == ""
    other = COLOURS.copy()
    other.putpixel((0, 0), (9, 9, 9))
    turned = COLOURS.transpose(Image.Transpose.ROTATE_180)
    assert len({reference(p, p).sha256 for p in (COLOURS, other, turned, COLOURS.resize((12, 20)))}) == 4
    odd: Callable[[str], str] = lambda name: reference(Path(name), COLOURS).name  # noqa: E731
    assert odd("/secret/\udcff\n.png").isprintable() is False
    assert odd("C:\\secret\\fox.png") == "C:_secret_fox.png"
    assert len(odd("x" * 999)) == 255
