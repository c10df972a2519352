"""Files that lie, and random ones: one sentence or no settings, never a traceback, never a wait."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clock import cpu_seconds
from foreign_pictures import (
    A1111,
    ASCII,
    COMFYUI,
    FOOOCUS,
    INVOKEAI,
    MFLUX,
    PICTURES,
    PROMPT,
    SETTINGS,
    USER_COMMENT,
    WORKFLOW,
    chunk,
    comment,
    exif,
    found,
    international,
    jpeg,
    packed,
    png,
    said,
    text,
    webp,
    write,
)
from sana.engine.metadata import RECORD_KEY, Settings, read_metadata
from sana.engine.metadata.a1111 import settings_of
from sana.engine.metadata.containers import MAX_TEXT, MAX_TEXTS, MAX_TOTAL, read_container
from sana.engine.metadata.exif import decode_comment, read_exif
from sana.errors import InvalidInput

KEYS = (
    st.sampled_from(sorted({*COMFYUI, *COMFYUI["3"], *COMFYUI["3"]["inputs"], *FOOOCUS, *INVOKEAI}))
    | st.sampled_from([*MFLUX, *WORKFLOW, "sui_image_params"])
    | st.text(max_size=5)
)


def test_user_comments_in_all_their_codes() -> None:
    for value, result in {
        b"": "",
        b"short": "short",
        b"plain text without a code": "plain text without a code",
        b"ASCII\x00\x00\x00caf\xc3\xa9\x00": "café",
        b"UNICODE\x00\x00a\x00b": "ab",
        b"UNICODE\x00a\x00b\x00": "ab",
        b"UNICODE\x00a\x00b\x00\x00\xd8": "ab\ufffd",
        b"UNICODE\x00\xff\xfea\x00": "a",
        b"JIS\x00\x00\x00\x00\x00x": "x",
        bytes(8) + b"x": "x",
        b"UNICODE\x00": "",
    }.items():
        assert decode_comment(value) == result


def test_exif_that_is_cut_or_lies() -> None:
    whole_block = exif({0x0131: b"A program\x00", **comment(ASCII, "a cat", "utf-8")})
    assert read_exif(whole_block) == {"Software": "A program", "UserComment": "a cat"}
    for end in range(len(whole_block)):
        read_exif(whole_block[:end])
    assert read_exif(b"II*\x00\xff\xff\xff\xff") == read_exif(b"II*\x00") == read_exif(b"XX*\x00\x08\x00\x00\x00") == {}
    lying = b"II*\x00\x08\x00\x00\x00\xff\xff" + struct.pack("<HHII", 0x9286, 2, 0xFFFFFFFF, 0xFFFFFFF0)
    assert read_exif(lying) == {"UserComment": ""}
    loop = b"II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack("<HHII", 0x8769, 4, 1, 8)
    assert read_exif(loop) == {}
    assert read_exif(b"II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack("<HHI4s", 0x0131, 2, 3, b"abc\x00")) == {
        "Software": "abc"
    }


@pytest.mark.parametrize("case", PICTURES)
def test_a_file_cut_anywhere_is_told_in_a_sentence_or_gives_what_is_left(tmp_path: Path, case: str) -> None:
    _, name, data = PICTURES[case]
    for end in {*range(16), *range(16, len(data), 97), len(data) - 1}:
        path = write(tmp_path, name, data[:end])
        if end < {"png": 8, "jpg": 3, "webp": 12}[name.rpartition(".")[2]]:
            with pytest.raises(InvalidInput, match="cannot be read as a picture"):
                read_metadata(path)
        else:
            read_metadata(path)


def test_bombs_are_left_packed(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(MAX_TEXT * 20), 9)

    def read() -> None:
        for kind, head in ((b"zTXt", b"parameters\x00\x00"), (b"iTXt", b"parameters\x00\x01\x00\x00\x00")):
            metadata = found(tmp_path, png(chunk(kind, head + bomb), text("Software", "x")))
            assert metadata.settings is None
            assert metadata.remarks == ("The text 'parameters' is longer than 4 MB and was not read.",)

    assert cpu_seconds(read, enough=5) < 5


def test_megabytes_of_text_are_passed_over(tmp_path: Path) -> None:
    long = "x" * (MAX_TEXT + 1)
    assert len(found(tmp_path, png(text("parameters", long), text("a", "b"))).remarks) == 1
    assert found(tmp_path, webp((b"EXIF", long.encode()), (b"XMP ", b"")), "a.webp").remarks[0].startswith("The chunk")
    many = png(*(packed(f"k{i}", bytes(MAX_TEXT)) for i in range(8)))
    assert sum(map(len, read_container(write(tmp_path, "m.png", many)).texts.values())) <= MAX_TOTAL + MAX_TEXT
    crowd = [text(f"k{i}", "x") for i in range(MAX_TEXTS + 9)]
    assert len(read_container(write(tmp_path, "c.png", png(*crowd))).texts) == MAX_TEXTS
    comments = jpeg(*[(0xFE, b"x")] * (MAX_TEXTS + 9))
    assert read_container(write(tmp_path, "c.jpg", comments)).texts == {"Comment": "x"}
    blocks = webp(*[(b"EXIF", b"")] * (MAX_TEXTS + 9))
    assert read_container(write(tmp_path, "c.webp", blocks)).texts == {}


def test_a_million_pieces_do_not_hang(tmp_path: Path) -> None:
    def read() -> None:
        found(tmp_path, png(chunk(b"juNK", b"") * 300_000))
        found(tmp_path, jpeg(*[(0xE2, b"")] * 250_000), "a.jpg")

    assert cpu_seconds(read, enough=10) < 10


def test_the_first_text_of_a_key_counts(tmp_path: Path) -> None:
    data = png(text("parameters", f"first\n{SETTINGS}"), text("parameters", f"second\n{SETTINGS}"))
    assert said(tmp_path, data).prompt == "first"


def test_a_picture_of_a_billion_pixels_is_not_decoded(tmp_path: Path) -> None:
    data = png(international("parameters", A1111), width=60_000, height=60_000)
    assert said(tmp_path, data).prompt == PROMPT
    assert cpu_seconds(lambda: said(tmp_path, data), enough=1) < 1


def test_nul_and_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    data = png(chunk(b"iTXt", b"parameters\x00\x00\x00\x00\x00a\x00b \xed\xa0\x80 c\n" + SETTINGS.encode()))
    prompt = said(tmp_path, data).prompt
    assert prompt.startswith("a\ufffdb")
    prompt.encode()
    wide = exif({USER_COMMENT: b"UNICODE\x00" + f"a cat\n{SETTINGS}".encode("utf-16-le") + b"\x00\xd8"})
    said(tmp_path, webp((b"EXIF", wide)), "a.webp").prompt.encode()


def test_deep_json_and_damaged_json_are_no_settings(tmp_path: Path) -> None:
    for key in ("prompt", "workflow", "invokeai_metadata", "parameters"):
        for value in ('{"a":' * 100_000, '{"nodes": ' + "[" * 5000, "{", '{"a": ' + "9" * 5000 + "}"):
            assert found(tmp_path, png(text(key, value))).settings is None


@pytest.mark.parametrize("value", ["{", "[1]", '"x"', "[" * 100_000])
def test_a_damaged_record_of_ours_is_told(tmp_path: Path, value: str) -> None:
    with pytest.raises(InvalidInput, match="damaged"):
        found(tmp_path, png(text(RECORD_KEY, value)))


def test_lines_that_would_take_a_slow_reader_hours(tmp_path: Path) -> None:
    units = ('a:"', ":", ",:", '":', "Steps: 1", "\nSteps: 1", "Negative prompt:", "a: ", 'a:"\\q, ', "\\", '"a": "\\')
    nodes = {str(i): {"class_type": "K", "inputs": {"steps": ["0", 0], "a": [str(i + 1), 0]}} for i in range(15_000)}
    nodes["0"] = {"class_type": "K", "inputs": {f"k{i}": 1 for i in range(50_000)}}

    def read() -> None:
        for unit in units:
            said(tmp_path, png(text("parameters", f"x\nSteps: 2, {unit * 100_000}"[: MAX_TEXT - 20])))
        said(tmp_path, png(text("prompt", json.dumps(nodes))))

    assert cpu_seconds(read, enough=20) < 20


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no file"):
        read_metadata(tmp_path)
    with pytest.raises(InvalidInput, match="no file"):
        read_metadata(tmp_path / "none.png")
    for data in (b"", b"GIF89a......", b"RIFF....AVI ", b"\x89PNG"):
        with pytest.raises(InvalidInput, match="cannot be read as a picture"):
            found(tmp_path, data)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.png", png())
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InvalidInput, match="Permission denied"):
        read_metadata(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidInput, match="is no file"):
        read_metadata(tmp_path / "pipe.png")


QUIET = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(st.sampled_from(sorted(PICTURES)), st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=9))))
def test_files_with_random_bytes_never_break_the_reader(
    tmp_path: Path, case: str, changes: list[tuple[int, bytes]]
) -> None:
    _, name, original = PICTURES[case]
    data = bytearray(original)
    for place, change in changes:
        data[place % len(data) : place % len(data) + len(change)] = change
    path = write(tmp_path, name, bytes(data))
    try:
        metadata = read_metadata(path)
    except InvalidInput:
        return
    if metadata.settings is not None:
        check(metadata.settings)


@QUIET
@given(
    st.sampled_from(["parameters", "prompt", "workflow", "invokeai_metadata", "fooocus_scheme", "Comment"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(PROMPT),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
        max_leaves=20,
    ),
)
def test_json_of_any_form_never_breaks_a_reader(tmp_path: Path, key: str, value: object) -> None:
    try:
        metadata = found(tmp_path, png(international(key, json.dumps(value))))
    except InvalidInput:
        return
    if metadata.settings is not None:
        check(metadata.settings)


@QUIET
@given(st.text(alphabet=st.sampled_from(list('ab:,"\\\n 1xNS{}')), max_size=200))
def test_texts_of_any_form_never_break_a_reader(words: str) -> None:
    check(settings_of(f"{words}\nSteps: 1, {words}", "a1111"))


def check(settings: Settings) -> None:
    """All that is shown or sent on is text that every encoder takes, and a request of ours or a reason."""
    for value in (settings.prompt, settings.negative_prompt, settings.program, *settings.extra.values()):
        value.encode()
    request, remarks = settings.request()
    assert request is None or request.prompt == settings.prompt
    json.dumps(remarks, allow_nan=False)


def test_damaged_packing_fill_bytes_and_unknown_tags(tmp_path: Path) -> None:
    assert found(tmp_path, png(chunk(b"zTXt", b"parameters\x00\x00no zlib"))).settings is None
    assert found(tmp_path, png(chunk(b"iTXt", b"parameters\x00\x01\x00\x00\x00no zlib"))).settings is None
    filled = jpeg((0xFE, A1111.encode())).replace(b"\xff\xfe", b"\xff\xff\xff\xfe", 1)
    assert said(tmp_path, filled, "a.jpg").prompt == PROMPT
    assert read_exif(exif({0x0131: b"A program", 0x0132: b"2024:01:01"})) == {"Software": "A program"}


def test_names_of_any_length(tmp_path: Path) -> None:
    """A picture may have a name to which nothing can be added."""
    assert found(tmp_path, png(), "x" * 245 + ".png").settings is None
    for name in ("x" * 5000, "x" * 5000 + ".metadata.json", "a\x00b"):
        with pytest.raises(InvalidInput, match="There is no file"):
            read_metadata(tmp_path / name)
