"""Folders of pictures: the forms that captions come in, and every fault with its file and line."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from dataset_files import make_folder, picture_bytes
from sana.data.folder import FolderSource
from sana.data.open import open_source
from sana.data.samples import BadSample, Caption, Finding
from sana.errors import BadData, InvalidInput, ModelNotFound


def texts(source: FolderSource, index: int) -> list[str]:
    return [caption.text for caption in source.sample(index).captions]


def fault(source: FolderSource, index: int) -> Finding:
    with pytest.raises(BadSample) as caught:
        source.sample(index)
    return caught.value.finding


def told(source: FolderSource) -> list[str]:
    return [f"{finding.kind} {finding}" for finding in source.findings]


def test_pictures_with_texts_beside_them(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/wide.JPG").write_bytes(picture_bytes(5, (90, 30), "JPEG"))
    (tmp_path / "sub/wide.caption").write_text("\ufeffa wide one,\n  on two lines\n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = FolderSource(tmp_path)
    assert [source.sample(i).key for i in range(len(source))] == ["000", "001", "002", "sub/wide"]
    assert texts(source, 1) == ["picture number 1"]
    assert texts(source, 3) == ["a wide one, on two lines"]
    assert (source.sample(3).width, source.sample(3).height, source.sample(3).place) == (90, 30, "sub/wide.JPG")
    assert source.picture(3).size == (90, 30)
    assert source.picture(0).mode == "RGB"
    assert source.findings == ()
    assert source.file(0) == tmp_path / "000.png"


def test_upright_sizes_are_told_without_decoding(tmp_path: Path) -> None:
    for kind, name in (("JPEG", "a.jpg"), ("PNG", "b.png"), ("WEBP", "c.webp")):
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / name).write_bytes(picture_bytes(1, (40, 20), kind, exif=exif.tobytes()))
    source = FolderSource(tmp_path, prompt="x")
    assert {(source.sample(i).width, source.sample(i).height) for i in range(3)} == {(20, 40)}
    assert {source.picture(i).size for i in range(3)} == {(20, 40)}


def test_lines_of_metadata(tmp_path: Path) -> None:
    make_folder(tmp_path, 5)
    for name in ("001.txt", "002.txt", "003.txt", "004.txt"):
        (tmp_path / name).unlink()
    records = [
        {"file_name": "000.png", "text": "from the record", "score": 31.5, "other": [1]},
        {"file_name": "001.png", "captions": ["one", {"text": "two", "weight": 3, "name": "vlm", "score": "28.5"}]},
        {"file_name": "./002.png", "prompt": "main", "captions": {"vlm": " long  one "}, "scores": {"vlm": 29}},
        {"file_name": "003.png", "captions": ["a", "b", ""], "weights": [1, 2, 0], "scores": [20, None, 1]},
        {"file_name": "004.png", "text": "first"},
        {"file_name": "004.png", "text": "second"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    source = FolderSource(tmp_path)
    assert source.findings == ()
    assert source.sample(0).captions == (
        Caption(text="from the record", score=31.5),
        Caption(text="picture number 0"),
    )
    assert source.sample(1).captions == (Caption(text="one"), Caption(text="two", weight=3, name="vlm", score=28.5))
    assert source.sample(2).captions == (Caption(text="main"), Caption(text="long one", name="vlm", score=29))
    assert source.sample(3).captions == (Caption(text="a", weight=1, score=20), Caption(text="b", weight=2))
    assert texts(source, 4) == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "000.png", "text": "x"', "bad-text metadata.jsonl:2: is not valid JSON"),
        ("[1]", "bad-text metadata.jsonl:2: holds no JSON object"),
        ('{"text": "x"}', "bad-text metadata.jsonl:2: `file_name` must be a path below this folder but is 'None'"),
        ('{"file_name": "../000.png", "text": "x"}', "bad-name metadata.jsonl:2: `file_name` must be a path below"),
        ('{"file_name": "/000.png", "text": "x"}', "bad-name metadata.jsonl:2: "),
        ('{"file_name": "none.png", "text": "x"}', "missing metadata.jsonl:2: There is no picture none.png."),
        ('{"file_name": "000.png", "text": 3}', "bad-text metadata.jsonl:2: has a caption that is no text: '3'"),
        ('{"file_name": "000.png", "text": " "}', "empty-caption metadata.jsonl:2: The caption of 000.png is empty."),
        ('{"file_name": "000.png", "captions": "x"}', "bad-text metadata.jsonl:2: has `captions` that are neither"),
        (
            '{"file_name": "000.png", "text": "x", "score": "high"}',
            "has a score that is no number of at least 0: 'high'",
        ),
        ('{"file_name": "000.png", "text": "x", "weight": -1}', "has a weight that is no number"),
        ('{"file_name": "000.png", "text": "x", "score": NaN}', "NaN is no number of JSON"),
        ('{"file_name": "000.png", "text": "x", "score": 1e999}', "has a score that is no number"),
        ('{"file_name": "000.png", "text": "x", "score": true}', "has a score that is no number"),
        (
            '{"file_name": "000.png", "captions": ["x"], "scores": [1, 2]}',
            "has `scores` that do not fit its 1 captions",
        ),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "' + "x" * 2**20 + '"}', "bad-text metadata.jsonl:2: has more than 1024 kB"),
        ("\udcff", "bad-text metadata.jsonl:2: is not in UTF-8"),
    ],
)
def test_faults_of_metadata_have_their_line(tmp_path: Path, line: str, words: str) -> None:
    make_folder(tmp_path, 1)
    good = '{"file_name": "000.png", "text": "good"}'
    (tmp_path / "metadata.jsonl").write_bytes(f"{good}\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    source = FolderSource(tmp_path)
    assert len(source.findings) == 1
    assert words in told(source)[0]
    assert source.findings[0].is_broken
    assert texts(source, 0)[0] == "good"


def test_the_originals_list_of_names(tmp_path: Path) -> None:
    make_folder(tmp_path, 4)
    (tmp_path / "meta_data.json").write_text(
        json.dumps({"name": "x", "img_names": ["002", "000.png", "009", "../a", 5]})
    )
    source = FolderSource(tmp_path)
    assert [source.sample(i).key for i in range(len(source))] == ["002", "000"]
    assert [line for line in told(source) if not line.startswith("ignored")] == [
        "missing meta_data.json: There is no picture 009 below this folder.",
        "bad-name meta_data.json: There is no picture ../a below this folder.",
        "bad-name meta_data.json: There is no picture 5 below this folder.",
    ]


@pytest.mark.parametrize("content", ["{}", "[]", '{"img_names": "a"}', "{"])
def test_a_list_of_names_that_is_none(tmp_path: Path, content: str) -> None:
    make_folder(tmp_path, 1)
    (tmp_path / "meta_data.json").write_text(content)
    assert "bad-text meta_data.json" in told(FolderSource(tmp_path))[0]


def test_folders_of_repeats(tmp_path: Path) -> None:
    make_folder(tmp_path / "10_sks dog", 1)
    make_folder(tmp_path / "2_cats", 2)
    make_folder(tmp_path / "2024_summer", 1)
    (tmp_path / "10_sks dog/000.txt").unlink()
    source = FolderSource(tmp_path)
    samples = [source.sample(i) for i in range(len(source))]
    assert [(sample.key, sample.repeats) for sample in samples] == [
        ("10_sks dog/000", 10),
        ("2024_summer/000", 1),
        ("2_cats/000", 2),
        ("2_cats/001", 2),
    ]
    assert samples[0].captions == (Caption(text="sks dog"),)
    assert FolderSource(tmp_path, prompt="a dog").sample(0).captions == (Caption(text="a dog"),)


def test_broken_samples_say_where(tmp_path: Path) -> None:
    make_folder(tmp_path, 6)
    (tmp_path / "000.txt").unlink()
    (tmp_path / "001.txt").write_text(" \n")
    (tmp_path / "002.txt").write_bytes(b"fine\nthen \xff\n")
    (tmp_path / "003.png").write_bytes(b"no picture")
    (tmp_path / "004.txt").write_bytes(b"a\0b")
    (tmp_path / "005.txt").write_text("x" * (2**20 + 1))
    source = FolderSource(tmp_path)
    found = [f"{fault(source, i).kind} {fault(source, i)}" for i in range(6)]
    assert found[0] == (
        "no-caption 000.png: The picture has no caption. Write it into 000.txt, or name the picture in metadata.jsonl."
    )
    assert found[1] == "empty-caption 001.txt:1: The caption is empty. Write it."
    assert FolderSource(tmp_path, prompt="a dog").sample(1).captions == (Caption(text="a dog"),)
    assert found[2] == "bad-text 002.txt:2: is not in UTF-8. Save it anew in that encoding."
    assert found[3].startswith("unreadable 003.png: The picture 003.png cannot be read: it is no PNG, JPEG or WebP.")
    assert found[4] == "bad-text 004.txt:1: holds zero bytes, so it is no text."
    assert "has more than 1024 kB" in found[5]
    with pytest.raises(InvalidInput, match=r"^003\.png: The picture 003\.png cannot be read"):
        source.picture(3)


def test_odd_files_are_told(tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    (tmp_path / "000.jpg").write_bytes(picture_bytes(3, kind="JPEG"))
    (tmp_path / "old.gif").write_bytes(b"GIF89a")
    (tmp_path / "alone.txt").write_text("x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(picture_bytes())
    source = FolderSource(tmp_path)
    assert len(source) == 1
    assert sorted(told(source)) == [
        "bad-name 000.png: The name is that of 000.jpg but for the suffix. Rename one of them.",
        "bad-name \\udcff.png: The name of this file is not in UTF-8. Rename it.",
        "bad-name pipe.png: This is no file but a device. Remove it.",
        "ignored alone.txt: There is no picture of this name beside the text.",
        "ignored link: This link to a folder is not followed.",
        "ignored old.gif: Pictures in GIF are not read. Save it as PNG, JPEG or WebP.",
        "missing gone.png: This is a link to nothing.",
    ]


def test_the_identity_is_of_the_content(tmp_path: Path) -> None:
    first = FolderSource(make_folder(tmp_path / "a")).identity()
    assert first == FolderSource(make_folder(tmp_path / "b")).identity()
    assert len(first) == 64
    (tmp_path / "b/000.txt").write_text("another caption")
    assert FolderSource(tmp_path / "b").identity() != first
    (tmp_path / "a/000.png").write_bytes(picture_bytes(99))
    assert FolderSource(tmp_path / "a").identity() != first
    (tmp_path / "a/000.png").unlink()
    broken = FolderSource(make_folder(tmp_path / "c"))
    (tmp_path / "c/000.png").unlink()
    assert broken.identity() != first


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("none", ModelNotFound, "There is no file or folder none"),
        ("\0", ModelNotFound, "There is no file or folder"),
        ("http://a/b.tar", InvalidInput, "read from this disk only; download it first"),
        ("pipe:touch canary", InvalidInput, "read from this disk only"),
        ("x.tar.gz", InvalidInput, r"x\.tar\.gz is compressed\. Unpack it"),
        ("x.parquet", InvalidInput, r"x\.parquet is no data set"),
        ("empty", BadData, "There is no picture in PNG, JPEG or WebP in empty"),
        ("odd", BadData, r"in odd\. The first of 1 findings: a\.gif: Pictures in GIF"),
    ],
)
def test_what_is_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, error: type[Exception], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("odd").mkdir()
    Path("odd/a.gif").touch()
    Path("x.tar.gz").touch()
    Path("x.parquet").touch()
    with pytest.raises(error, match=words):
        open_source(path)
    assert not Path("canary").exists()


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(folder: Path, onerror: object) -> list[object]:
        onerror(PermissionError(13, "Permission denied", "secret"))  # type: ignore[operator]
        return []

    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(BadData, match="The folder secret cannot be read"):
        FolderSource(tmp_path)
