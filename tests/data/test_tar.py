"""Tars from elsewhere: only plain members with harmless names are read, nothing runs, nothing is written."""

import contextlib
import gzip
import io
import os
import pickle
import random
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_files import make_shards, make_tar, picture_bytes, shard_members
from sana.data import tar as tar_module
from sana.data.open import open_source
from sana.data.samples import BadSample
from sana.data.tar import BLOCK, read_index, read_member, split_name
from sana.errors import BadData, SanaError

CANARY = "canary"
PICTURE = picture_bytes(1)
GOOD = {"good.txt": b"good", "good.png": PICTURE, "last.txt": b"last"}
LAST = (3 + -(-len(PICTURE) // 512)) * 512
"""Place of the last header in the tar of good members."""


class Bomb:
    """Something that leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


def header(name: bytes = b"x.png", size: bytes = b"00000000001\0", kind: bytes = b"0", **fields: bytes) -> bytes:
    """Return a header with a right checksum, whatever else is in it."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for place, value in fields.items():
        start = int(place[1:])
        block[start : start + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def whole(*parts: bytes) -> bytes:
    """Return headers and data as a tar, the data padded, behind it good members and the end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in GOOD.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return b"".join(part + b"\0" * (-len(part) % BLOCK) for part in parts) + out.getvalue()


def member(name: str, data: bytes = PICTURE) -> Callable[[], bytes]:
    return lambda: whole(header(name.encode(), b"%011o\0" % len(data)), data)


def link(kind: bytes, target: str, name: str = "link.png") -> Callable[[], bytes]:
    return lambda: whole(header(name.encode(), b"00000000000\0", kind, _157=target.encode()))


def pax(records: dict[str, str], name: bytes = b"x.png") -> bytes:
    data = b""
    for key, value in records.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + 2
        length += len(str(length)) - 2 if len(str(length)) > 2 else 0
        data += str(length).encode() + line
    head = header(b"pax", b"%011o\0" % len(data), b"x")
    return head + data + b"\0" * (-len(data) % BLOCK) + header(name, b"%011o\0" % len(PICTURE)) + PICTURE


def compressed(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "gz":
        return gzip.compress(whole())
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("good.png", PICTURE)
    return out.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], bool, str]] = {
    # name: (bytes, whether the good sample behind it is still read, what is told)
    "a name that climbs": (lambda: whole(header(b"../../evil.png") + b"x"), True, "leads out of the tar"),
    "a name that climbs within": (lambda: whole(header(b"a/../../evil.png") + b"x"), True, "leads out of the tar"),
    "an absolute name": (lambda: whole(header(b"/tmp/evil.png") + b"x"), True, "is no relative path"),
    "a drive": (lambda: whole(header(b"C:evil.png") + b"x"), True, "is no relative path"),
    "backslashes": (lambda: whole(header(b"..\\evil.png") + b"x"), True, "is no relative path"),
    "a new line": (lambda: whole(header(b"a\nb.png") + b"x"), True, "characters that are no text"),
    "an escape": (lambda: whole(header(b"a\x1b[2Jb.png") + b"x"), True, "characters that are no text"),
    "no UTF-8": (lambda: whole(header(b"\xff\xfe.png") + b"x"), True, "characters that are no text"),
    "no name": (lambda: whole(header(b"") + b"x"), True, "is empty or too long"),
    "a long name of GNU that climbs": (
        lambda: whole(header(b"l", b"%011o\0" % 214, b"L"), b"../" * 70 + b"x.pn", header() + b"x"),
        True,
        "leads out of the tar",
    ),
    "a name of 5,000 letters": (
        lambda: whole(header(b"l", b"%011o\0" % 5000, b"L"), b"x" * 5000, header() + b"x"),
        True,
        "is empty or too long",
    ),
    "a prefix that climbs": (lambda: whole(header(b"x.png", _345=b"../..") + b"x"), True, "leads out of the tar"),
    "a path of pax that climbs": (lambda: whole(pax({"path": "../evil.png"})), True, "leads out of the tar"),
    "a hard link": (link(b"1", "/etc/passwd"), True, "is a link and no plain file"),
    "a soft link": (link(b"2", "/etc/passwd"), True, "is a link and no plain file"),
    "a link to a folder": (link(b"2", "..", "good"), True, "is a link and no plain file"),
    "a device of characters": (link(b"3", ""), True, "is a device and no plain file"),
    "a device of blocks": (link(b"4", ""), True, "is a device and no plain file"),
    "a pipe": (link(b"6", ""), True, "is a pipe and no plain file"),
    "an unknown kind": (lambda: whole(header(kind=b"Z") + b"x"), True, "is of an unknown kind"),
    "a part of a file": (lambda: whole(header(kind=b"M") + b"x"), True, "is a part of a file"),
    "a sparse file of 10 GB": (
        lambda: whole(header(kind=b"S", size=b"00000000000\0", _483=b"%011o\0" % (10 * 2**30))),
        True,
        "is a sparse file",
    ),
    "a sparse file in pieces": (lambda: whole(header(kind=b"S", _482=b"\1") + b"x"), False, "or it is in pieces"),
    "a sparse file of pax": (lambda: whole(pax({"GNU.sparse.realsize": "9999999999"})), True, "is a sparse file"),
    "a pickle": (member("evil.pkl", pickle.dumps(Bomb())), True, "can run programs"),
    "a pickle in capitals": (member("evil.PICKLE", pickle.dumps(Bomb())), True, "can run programs"),
    "a pickle behind a suffix": (member("evil.png.pyd", pickle.dumps(Bomb())), True, "can run programs"),
    "a checkpoint": (member("evil.pth", pickle.dumps(Bomb())), True, "can run programs"),
    "an array of objects": (member("evil.npy", pickle.dumps(Bomb())), True, "can run programs"),
    "a program": (member("evil.sh", f"touch {CANARY}".encode()), True, "Members of this kind are left out"),
    "a name used twice": (lambda: whole(whole()[: BLOCK * 2]), True, "a member of this name before it"),
    "two pictures of a sample": (member("good.jpg", picture_bytes(1, kind="JPEG")), True, "has two pictures"),
    "a text of 2 MB": (member("good2.txt", b"x" * 2**21), True, "at most 1048576 are read"),
    "a size of 8 GB": (lambda: whole(header(size=b"77777777777\0")), False, "cut off within this member"),
    "a size of 2**80": (lambda: whole(header(size=b"\x80" + b"\xff" * 11)), False, "cut off within this member"),
    "a size below 0": (lambda: whole(header(size=b"\xff" * 12)), False, "The size of a member is damaged"),
    "a size in words": (lambda: whole(header(size=b"many\0")), False, "The size of a member is damaged"),
    "a size of pax": (lambda: whole(pax({"size": "99999999999"})), False, "cut off within this member"),
    "an endless header": (lambda: whole(header(b"l", b"%011o\0" % 2**20, b"L")), False, "is too long"),
    "a wrong sum": (lambda: whole(header().replace(b"ustar", b"usta!")), False, "It is no tar"),
    "compressed": (lambda: compressed("gz"), False, "It is compressed"),
    "a zip": (lambda: compressed("zip"), False, "It is compressed"),
    "a pickle alone": (lambda: pickle.dumps(Bomb()), False, "cut off within a header"),
    "text": (lambda: b"x" * 4000, False, "It is no tar"),
    "nothing": (lambda: b"", False, "it has 0 bytes"),
    "cut in a header": (lambda: whole()[: LAST + 100], True, "cut off within a header"),
    "cut in a member": (lambda: whole()[: BLOCK + 2], False, "cut off within this member"),
    "cut behind the data of a member": (lambda: whole()[: LAST - 10], True, "no end mark"),
    "without an end": (lambda: whole()[: LAST + 2 * BLOCK], True, "no end mark"),
}


def test_there_are_enough_hostile_tars() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for forbidden in ("os.system", "subprocess.Popen", "pickle.loads", "pickle.load"):
        monkeypatch.setattr(forbidden, _refuse)
    make, is_read, words = HOSTILE[name]
    Path("h.tar").write_bytes(make())
    before = sorted(os.listdir())
    index = read_index(Path("h.tar"), "h.tar")
    try:
        source = open_source("h.tar")
    except BadData:
        assert not is_read
    else:
        assert is_read
        samples = [source.sample(i) for i in range(len(source)) if source.sample(i).key == "h/good"]
        assert len(samples) == 1
        assert source.picture(0).size == (80, 72)
        findings = [str(finding) for finding in source.findings]
        assert any(words in finding for finding in findings), findings
        assert all(ord(mark) >= 32 for finding in findings for mark in finding)
    assert any(words in str(finding) for finding in index.findings) or "two pictures" in words
    assert all(".." not in one.name.split("/") and not one.name.startswith("/") for one in index.members)
    assert sorted(os.listdir()) == before


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("something was run")


def test_the_canary_can_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert Path(CANARY).exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    subprocess.run(["true"], check=True)
    with pytest.raises(BadData, match=r"none\.tar cannot be read"):
        read_index(tmp_path / "none.tar", "none.tar")
    with pytest.raises(BadData, match="cannot be read"):
        read_index(tmp_path, "folder")
    with pytest.raises(BadData, match="is no file but a device"):
        read_index(Path("/dev/null"), "null.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(names=st.lists(st.text("abc/.é猫 -", min_size=1, max_size=90), max_size=6, unique=True), sizes=st.data())
@settings(max_examples=25)
def test_members_are_read_as_the_standard_library_wrote_them(
    form: int, names: list[str], sizes: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    members = {
        f"k{i}{name.replace('.', '')}.txt": random.randbytes(sizes.draw(st.integers(0, 1500)))
        for i, name in enumerate(names)
    }
    try:
        make_tar(path, members, format=form)
    except ValueError:  # a name too long for the oldest format
        return
    index = read_index(path, "x.tar")
    assert index.findings == []
    assert {one.name: read_member(index, one) for one in index.members} == members


@given(st.binary(max_size=3000))
@settings(max_examples=100)
def test_any_bytes_give_findings_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    path.write_bytes(data)
    index = read_index(path, "x.tar")
    assert index.findings or not data.strip(b"\0")


@given(st.integers(0, 5 * BLOCK - 1), st.integers(1, 255))
@settings(max_examples=150)
def test_any_flipped_byte_leaves_a_reader_that_answers(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    data = bytearray(whole())
    data[place] ^= change
    path.write_bytes(data)
    with contextlib.suppress(SanaError):
        source = open_source(path)
        for i in range(len(source)):
            source.sample(i)
            source.picture(i)


def test_every_cut_of_a_shard_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", shard_members(range(3)))
    data = path.read_bytes()
    for length in range(0, path.stat().st_size - tarfile.RECORDSIZE, 97):
        path.write_bytes(data[:length])
        index = read_index(path, "a.tar")
        assert [finding.kind for finding in index.findings] == ["bad-shard"], length


def test_a_tar_that_changes_is_no_longer_read(tmp_path: Path) -> None:
    source = open_source(make_shards(tmp_path))
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(BadSample, match=r"00000\.tar:000000\.json: The tar has changed since it was opened"):
        source.sample(0)
    path.unlink()
    with pytest.raises(BadSample, match="The tar cannot be read"):
        source.picture(0)
    assert source.sample(3).captions[0].text == "picture number 3"


def test_a_member_that_ends_early_is_told(tmp_path: Path) -> None:
    index = read_index(make_tar(tmp_path / "a.tar", GOOD), "a.tar")
    with pytest.raises(BadSample, match="The tar ends within this member"):
        read_member(index, index.members[-1]._replace(size=10**6))


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a large picture costs a few kilobytes, at any place of the tar."""
    noise = picture_bytes(1, (700, 700), "BMP")
    large = io.BytesIO()
    from PIL import Image

    Image.frombytes("RGB", (1000, 1000), random.randbytes(3_000_000)).save(large, "PNG", compress_level=0)
    assert len(large.getvalue()) > 2**21 < len(noise) * 2
    source = open_source(
        make_tar(tmp_path / "a.tar", {"a.png": large.getvalue(), "a.txt": b"x", "b.png": PICTURE, "b.txt": b"y"})
    )
    counts: list[int] = []
    read = os.read
    monkeypatch.setattr(tar_module.os, "read", lambda handle, size: counts.append(size) or read(handle, size))
    assert source.sample(0).width == 1000
    assert sum(counts) < 2**20


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.png", ("a/b", "png")),
        ("a.b/c.PNG", ("a.b/c", "png")),
        ("k.cls.txt", ("k", "cls.txt")),
        ("none", ("none", "")),
        (".png", ("", "png")),
    ],
)
def test_names_are_split_at_the_first_dot(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_a_limit_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "MAX_MEMBERS", 1)
    index = read_index(make_tar(tmp_path / "a.tar", shard_members(range(3))), "a.tar")
    assert "It has more than 1 members" in str(index.findings[0])
    assert len(index.members) == 2
