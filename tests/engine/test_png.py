"""The PNG writer: any reader gets the same pixels and texts, at Pillow's size; a failing disk leaves nothing."""

import errno
import io
import os
import resource
import threading
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clock import cpu_seconds
from sana import Request, Result, save_png
from sana.cards import CARDS
from sana.engine import images, png
from sana.engine.images import to_pictures, write_atomically
from sana.engine.png import write_png
from sana.errors import InvalidInput, NotWritten


def written(image: Image.Image, info: PngInfo | None = None) -> bytes:
    file = io.BytesIO()
    write_png(file, image, info)
    return file.getvalue()


def opened(data: bytes) -> Any:
    image = Image.open(io.BytesIO(data))
    image.load()  # checks every checksum
    return image


def picture(mode: str, width: int, height: int, seed: int, levels: int) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, levels, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(noise.squeeze(-1) if bands == 1 else noise, mode)


@given(
    mode=st.sampled_from(["RGB", "L", "RGBA"]),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 2, 5, 256]),
    strip=st.sampled_from([1, 100, 1 << 17]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pillow_reads_the_same_pixels(
    mode: str, width: int, height: int, seed: int, levels: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "STRIP_BYTES", strip)
    image = picture(mode, width, height, seed, levels)
    found = opened(written(image))
    assert (found.mode, found.size) == (mode, (width, height))
    assert np.array_equal(np.asarray(found), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "I;16", "CMYK"])
def test_other_modes_are_pillows(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    if mode == "CMYK":
        with pytest.raises(OSError, match="CMYK"):
            written(image)
    else:
        assert opened(written(image)).size == (3, 2)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def test_the_filter_is_the_standards_and_the_strips_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "STRIP_BYTES", 64)
    image = picture("RGB", 9, 11, 0, 256)
    parts = [data for name, data in chunks(written(image)) if name == b"IDAT"]
    assert len(parts) > 4
    rows = zlib.decompress(b"".join(parts))
    stride = 1 + 9 * 3
    assert rows[::stride] == bytes([png.PAETH] * 11)
    above = [0] * 27
    for y in range(11):
        line: list[int] = []
        for i, coded in enumerate(rows[y * stride + 1 : (y + 1) * stride]):
            a, b, c = (line[i - 3] if i > 2 else 0), above[i], (above[i - 3] if i > 2 else 0)
            p = a + b - c
            line.append((coded + min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]) % 256)
        assert bytes(line) == np.asarray(image)[y].tobytes()
        above = line


def test_texts_stand_before_the_pixels() -> None:
    info = PngInfo()
    info.add_text("parameters", "a fox")
    info.add_itxt("sanakit", '{"prompt": "🦊"}')
    data = written(picture("RGB", 4, 4, 0, 256), info)
    assert [name for name, _ in chunks(data)][:4] == [b"IHDR", b"tEXt", b"iTXt", b"IDAT"]
    assert opened(data).text == {"parameters": "a fox", "sanakit": '{"prompt": "🦊"}'}


def photo(side: int) -> Image.Image:
    """Noise whose power falls with frequency as a photograph's does, and a little of the sensor's."""
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(side)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1
    bands = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / radius**1.3).real for _ in range(3)]
    pixels = np.stack([(band - band.mean()) / band.std() for band in bands], -1) * 50 + 128
    return Image.fromarray((pixels + rng.standard_normal(pixels.shape)).clip(0, 255).round().astype(np.uint8))


def test_it_is_no_larger_and_much_faster_than_pillows_default() -> None:
    image = photo(512)

    def pillow() -> bytes:
        image.save(file := io.BytesIO(), format="PNG")
        return file.getvalue()

    assert len(written(image)) < 1.1 * len(pillow())
    allowed = 0.6 * cpu_seconds(pillow)
    assert cpu_seconds(lambda: written(image), enough=allowed, calls=20) <= allowed


def test_one_picture_takes_the_same_bytes_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(256)
    found = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(png, "num_cores", lambda cores=cores: cores)
        found.append(written(image))
    assert found[0] == found[1] == found[2]


def result() -> Result:
    settings = Request(prompt="a fox", seed=7).resolve(CARDS["nano"])
    return Result(images=[picture("RGB", 64, 64, 0, 256)], seeds=[7], settings=settings)


class Disk:
    """Fails at the k-th operation of a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: int, *, links: bool) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error
        real_open = open

        def opening(*arguments: Any) -> "File":
            self.step()
            return File(real_open(*arguments), self)

        monkeypatch.setattr(images, "open", opening, raising=False)
        for name in ("fsync", "link", "replace"):
            monkeypatch.setattr(os, name, self.stepping(getattr(os, name), refused=name == "link" and not links))

    def step(self) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.error, os.strerror(self.error))

    def stepping(self, real: Any, refused: bool) -> Any:
        def work(*arguments: Any) -> Any:
            if refused:
                raise PermissionError(errno.EPERM, "no hard links here")
            self.step()
            return real(*arguments)

        return work


class File:
    """A file whose every call is an operation of the disk."""

    def __init__(self, file: BinaryIO, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.disk.step()
        return self.file.write(data)

    def flush(self) -> None:
        self.disk.step()
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_a_disk_that_fails_at_the_kth_operation(
    error: int, links: bool, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "STRIP_BYTES", 2000)
    made, target = result(), tmp_path / "a.png"
    sentence = {errno.ENOSPC: "There is no room for", errno.EROFS: "cannot be written to"}.get(error, "Check the disk")
    told, threads = list[str](), threading.active_count()
    for k in range(1, 200):
        if force:
            target.write_bytes(b"older")
        with monkeypatch.context() as patch:
            disk = Disk(patch, k, error, links=links)
            problem = None
            try:
                save_png(made, 0, target, force=force)
            except NotWritten as raised:
                problem = raised
        if problem is not None:
            told.append(str(problem))
            assert [file.name for file in tmp_path.iterdir()] == (["a.png"] if force else [])
            assert not force or target.read_bytes() == b"older"
            continue
        opened(target.read_bytes())
        assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
        target.unlink()
        if disk.count < k:
            break
    assert len(told) > 30, "every chunk is written in several calls"
    assert all(sentence in text and ".tmp" not in text for text in told)
    assert threading.active_count() <= threads


def test_a_full_disk_as_the_system_tells_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(NotWritten, match="There is no room for"):
            save_png(result(), 0, tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(images, "open", refuse, raising=False)
    with pytest.raises(NotWritten, match=r"cannot be written to \(Permission denied\)"):
        save_png(result(), 0, tmp_path / "a.png")


def test_an_error_of_our_own_keeps_its_kind(tmp_path: Path) -> None:
    from sana.errors import ModelNotFound

    def fail(_: object) -> None:
        raise ModelNotFound("No model.")

    with pytest.raises(ModelNotFound, match="No model"):
        write_atomically(tmp_path / "a.bin", fail)
    with pytest.raises(InvalidInput, match="does not exist"):
        write_atomically(tmp_path / "no" / "a.bin", fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_rounded_as_before(
    dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP_PIXELS", 100)
    ties = (torch.arange(-20, 531, dtype=torch.float64) / 2 / 255 * 2 - 1).to(dtype)  # halves between two bytes
    values = torch.cat([ties, torch.randn(1209 - len(ties), generator=torch.Generator().manual_seed(0)).to(dtype)])
    decoded = torch.stack([values, values.flip(0)]).view(2, 3, 13, 31).contiguous(memory_format=layout)
    unit = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
    expected = (unit * 255).round().astype(np.uint8)
    assert np.array_equal(np.stack([np.asarray(one) for one in to_pictures(decoded)]), expected)
