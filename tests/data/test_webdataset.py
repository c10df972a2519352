"""Shards: the original's layout, captions and scores beside the tar, and what a damaged set costs."""

import json
import random
from pathlib import Path

import pytest

from dataset_files import make_folder, make_shards, make_tar, picture_bytes, shard_members
from sana.data.captions import CaptionChoice, choose, probabilities
from sana.data.examine import Wanted, examine, survey
from sana.data.open import open_source
from sana.data.order import BucketedOrder
from sana.data.reading import Reader
from sana.data.samples import BadSample, Caption, Dataset
from sana.errors import BadData, InvalidInput


def told(source: Dataset) -> list[str]:
    return [f"{finding.kind} {finding}" for finding in source.findings]


@pytest.mark.parametrize("meta", [True, False])
def test_the_layout_of_the_original(tmp_path: Path, meta: bool) -> None:
    source = open_source(make_shards(tmp_path, meta=meta))
    assert len(source) == 6
    assert source.findings == ()
    last = source.sample(5)
    assert (last.key, last.place) == ("00001/000005", "00001.tar:000005.png")
    assert (last.width, last.height, last.captions) == (80, 72, (Caption(text="picture number 5"),))
    assert source.picture(5).getpixel((0, 0)) == (5 * 37 % 256, 5 * 91 % 256, 0)
    assert source.encoded(5) == (picture_bytes(5), ".png")
    if meta:
        assert open_source(tmp_path / "wids-meta.json").identity() == source.identity()
    assert len(open_source(tmp_path / "00001.tar")) == 3


def test_captions_and_scores_beside_the_tar(tmp_path: Path) -> None:
    make_shards(tmp_path, 1, 3)
    (tmp_path / "00000_vlm.json").write_text(json.dumps({"000000": {"InternVL": "a  long one", "prompt": "better"}}))
    (tmp_path / "00000_clip.json").write_text(json.dumps({"000000": {"prompt": "26", "InternVL": 28}, "000001": {}}))
    (tmp_path / "000001_other.json").write_text("{")  # belongs to no tar
    (tmp_path / "notes.json").write_text("[")
    source = open_source(tmp_path)
    assert source.findings[0].place == "000001_other.json" or source.findings == ()
    captions = source.sample(0).captions
    assert captions == (Caption(text="better", score=26), Caption(text="a long one", name="InternVL", score=28))
    assert probabilities(captions) == pytest.approx([0.323, 0.677], abs=1e-3)
    assert source.sample(1).captions == (Caption(text="picture number 1"),)


def test_texts_in_the_record_that_scores_name(tmp_path: Path) -> None:
    members = {"a.png": picture_bytes(), "a.json": b'{"prompt": "p", "VILA": "v", "title": "t"}'}
    make_tar(tmp_path / "s.tar", members)
    assert len(open_source(tmp_path).sample(0).captions) == 1
    (tmp_path / "s_scores.json").write_text('{"a": {"VILA": 30, "prompt": 20}}')
    assert open_source(tmp_path).sample(0).captions == (
        Caption(text="p", score=20),
        Caption(text="v", name="VILA", score=30),
    )


def test_a_file_beside_belongs_to_the_longest_name(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", shard_members(range(1)))
    make_tar(tmp_path / "a_b.tar", shard_members(range(1)))
    (tmp_path / "a_b_vlm.json").write_text('{"000000": {"vlm": "x"}}')
    source = open_source(tmp_path)
    assert [len(source.sample(i).captions) for i in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "bad-text 00000_vlm.json:1: is not valid JSON"),
        ('["a"]', "bad-text 00000_vlm.json: It is no object of objects"),
        ('{"a": "text"}', "bad-text 00000_vlm.json: It is no object of objects"),
        ('{"a": {"vlm": -3}}', "bad-text 00000_vlm.json: has a score of a that is no number"),
    ],
)
def test_faults_of_files_beside(tmp_path: Path, content: str, words: str) -> None:
    make_shards(tmp_path, 1, 1)
    (tmp_path / "00000_vlm.json").write_text(content)
    assert words in told(open_source(tmp_path))[0]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:touch canary", "is no file of this folder"),
        ("https://a/b.tar", "is no file of this folder"),
        ("file:///etc/x.tar", "is no file of this folder"),
        ("../x.tar", "lies outside of this folder"),
        ("/x.tar", "lies outside of this folder"),
        ("a\\x.tar", "lies outside of this folder"),
        ("none.tar", "There is no shard none.tar here"),
        (None, "A shard has no `url`"),
    ],
)
def test_shards_are_files_of_their_folder(tmp_path: Path, url: object, words: str) -> None:
    make_shards(tmp_path, 1, 1)
    shards = [{"url": "00000.tar", "nsamples": 1}, {"url": url, "nsamples": 7}]
    (tmp_path / "wids-meta.json").write_text(json.dumps({"shardlist": shards}))
    source = open_source(tmp_path)
    assert len(source) == 1
    assert words in told(source)[0]
    assert source.findings[0].samples == 7
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    make_shards(tmp_path, 1, 1)
    (tmp_path / "wids-meta.json").write_text(content)
    with pytest.raises(BadData, match=r"wids-meta\.json"):
        open_source(tmp_path)


def test_shards_with_other_numbers_than_told(tmp_path: Path) -> None:
    make_shards(tmp_path, 2, 2)
    shards = [{"url": "00000.tar", "nsamples": 5}, {"url": "00001.tar", "nsamples": 1}]
    (tmp_path / "wids-meta.json").write_text(json.dumps({"shardlist": shards}))
    source = open_source(tmp_path)
    assert told(source) == [
        "lost 00000.tar: wids-meta.json tells of 5 samples, 2 are there.",
        "count 00001.tar: wids-meta.json tells of 1 samples, 2 are there.",
    ]
    assert source.findings[0].samples == 3


def test_broken_samples_of_shards_say_where(tmp_path: Path) -> None:
    members = {
        "a.png": picture_bytes(),
        "b.png": picture_bytes(),
        "b.txt": b" \n",
        "c.png": picture_bytes(),
        "c.json": b'{"prompt": "x",\n }',
        "d.png": b"no picture",
        "d.txt": b"x",
        "e.json": b"{}",
        "f.png": picture_bytes(),
        "f.json": b"[1]",
    }
    source = open_source(make_tar(tmp_path / "s.tar", members))
    assert told(source) == ["ignored s.tar: 1 samples have no picture, the first is e."]
    found = [str(seen.findings[0]) for seen in examine(source)]
    assert found[0] == "s.tar:a: The picture has no caption, in the tar or beside it."
    assert found[1] == "s.tar:b: The caption is empty."
    assert found[2].startswith("s.tar:c.json:2: is not valid JSON")
    assert found[3].startswith("s.tar:d.png: The picture s.tar:d.png cannot be read: it is no PNG, JPEG or WebP")
    assert found[4] == "s.tar:f.json: It holds no JSON object, which stands in {braces}."
    with pytest.raises(BadSample, match=r"^s\.tar:d\.png: "):
        source.picture(3)
    assert open_source(tmp_path / "s.tar", prompt="p").sample(0).captions == (Caption(text="p"),)


def corrupted(folder: Path, count: int, each: int) -> tuple[set[str], int]:
    """Write shards in which every tenth sample is broken in one of five ways, and return their keys.

    The number is of those whose picture ends behind its header, which only decoding shows.
    """
    rng, broken, hidden = random.Random(5), set(), 0
    good = picture_bytes(1, (64, 64))
    for shard in range(count // each):
        members: dict[str, bytes] = {}
        for number in range(shard * each, (shard + 1) * each):
            key = f"{number:05d}"
            record, picture = json.dumps({"prompt": f"number {number}"}).encode(), good
            if number % 10 == 3:
                broken.add(f"{shard:03d}/{key}")
                way = rng.randrange(5)
                hidden += way == 0
                picture = [picture[:60], b"", b"GIF89a", picture, picture][way]
                record = [record, record, record, b"{", b'{"prompt": ""}'][way]
            members |= {f"{key}.png": picture, f"{key}.json": record}
        make_tar(folder / f"{shard:03d}.tar", members)
    return broken, hidden


def test_a_tenth_of_a_thousand_samples_is_broken(tmp_path: Path) -> None:
    """All of them are counted and listed, the run is refused, and when put up with the others keep their order."""
    broken, hidden = corrupted(tmp_path, 1000, 250)
    source = open_source(tmp_path)
    assert (len(broken), hidden) == (100, 19)
    with pytest.raises(BadData, match=r"81 of 1000 samples are broken \(8\.1%\), which is more than the 1\.0%"):
        survey(source)
    late: list[str] = []
    found = survey(source, Wanted(base=64, aspect=False), tolerance=0.2)
    known = {finding.place for finding in found.findings if finding.is_broken}
    order = BucketedOrder(found.buckets, 8, 3)
    reader = Reader(source, found, order, tolerance=0.2)
    seen = []
    for draw in range(order.batches_per_epoch):
        batch = reader.read(draw)
        assert len(batch) == len(order.batch(draw))
        for taken, position in zip(batch, order.batch(draw), strict=True):
            assert taken.picture.size == (64, 64)
            assert taken.sample.key not in broken
            index = found.indices[position]
            if index in reader.broken:
                late.append(source.sample(index).key)
            else:
                assert taken.number == index
            seen.append(taken.sample.key)
    assert len(known) == found.broken == 81
    assert len(reader.broken) == 19
    assert set(late) == {source.sample(index).key for index in reader.broken} <= broken
    assert len(set(seen)) == 900


def test_a_run_stops_when_too_much_breaks_on_the_way(tmp_path: Path) -> None:
    make_folder(tmp_path, 200, (64, 64))
    source = open_source(tmp_path)
    found = survey(source, Wanted(base=64, aspect=False))
    for number in range(5):
        path = tmp_path / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:-40])
    reader = Reader(source, found, BucketedOrder(found.buckets, 4, 0))
    with pytest.raises(BadData, match=r"3 of 200 samples are broken \(1\.5%\).*The first: 00\d\.png: The picture 00\d"):
        [reader.read(draw) for draw in range(reader.order.batches_per_epoch)]
    assert len(reader.broken) == 3


def test_a_bucket_of_nothing_but_broken_pictures_is_told(tmp_path: Path) -> None:
    make_folder(tmp_path, 2, (64, 64))
    source = open_source(tmp_path)
    found = survey(source, Wanted(base=64, aspect=False))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    reader = Reader(source, found, BucketedOrder(found.buckets, 2, 0), tolerance=1)
    with pytest.raises(BadData, match=r"No picture of the bucket \(64, 64\) can be read"):
        reader.read(0)


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it has 90,000 x 9,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def animation() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.png", bomb(), "is too large"),
        ("x.webp", animation(), "an animation of 2 pictures"),
        ("x.jpg", b"%PDF-1.4", "it is no PNG, JPEG or WebP"),
        ("x.png", b"<svg/>", "it is no PNG, JPEG or WebP"),
    ],
)
def test_pictures_that_are_traps(tmp_path: Path, form: str, name: str, data: bytes, words: str) -> None:
    if form == "tar":
        make_tar(tmp_path / "s.tar", {name: data, "x.txt": b"x"})
    else:
        (tmp_path / name).write_bytes(data)
        (tmp_path / "x.txt").write_text("x")
    source = open_source(tmp_path)
    for read in (source.sample, source.picture):
        with pytest.raises(BadSample, match=words) as caught:
            read(0)
        assert caught.value.finding.place.endswith(name)


def test_sizes_and_buckets(tmp_path: Path) -> None:
    make_folder(tmp_path / "10_a", 1, (256, 256))
    make_folder(tmp_path / "b", 1, (300, 240))
    make_folder(tmp_path / "c", 1, (50, 40))
    source = open_source(tmp_path)
    with pytest.raises(
        BadData, match=r"1 of 3 pictures are smaller .*c/000\.png: 50 x 40 pixels do not cover .*288 x 224"
    ):
        survey(source, Wanted(base=256))
    skipped = survey(source, Wanted(base=256, small="skip"))
    assert skipped.indices == (0,) * 10 + (1,)
    assert skipped.buckets == ((256, 256),) * 10 + ((224, 288),)
    assert [finding.kind for finding in skipped.findings] == ["tiny", "left-out"]
    enlarged = survey(source, Wanted(base=256, small="upscale"))
    assert len(enlarged.indices) == 12
    assert "The picture is enlarged 5.76 times" in str(enlarged.findings[-1])
    reader = Reader(source, enlarged, BucketedOrder(enlarged.buckets, 4, 0), upscale=True)
    assert {one.picture.size for draw in range(4) for one in reader.read(draw)} == {(256, 256), (288, 224)}
    assert survey(source).buckets == (None,) * 12


def test_triggers_and_scores_are_asked_for_at_the_start(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    (tmp_path / "001.txt").write_text("a [trigger] here")
    source = open_source(tmp_path)
    (found,) = survey(source).findings
    assert (found.kind, found.place, found.is_broken) == ("trigger", "001.png", False)
    with pytest.raises(InvalidInput, match="no trigger is set"):
        choose(source.sample(1).captions, random.Random(0), CaptionChoice())
    choice = CaptionChoice(trigger="sks")
    assert len(survey(source, Wanted(choice=choice)).indices) == 2
    assert choose(source.sample(1).captions, random.Random(0), choice) == "a sks here"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "x", "score": 21}\n')
    found = survey(open_source(tmp_path), Wanted(choice=CaptionChoice(trigger="sks", least_best=22)))
    assert found.indices == (1,)
    assert str(found.findings[0]) == "000.png: No caption scores 22 or more. The picture is left out."
    (tmp_path / "001.png").unlink()
    with pytest.raises(BadData, match="No sample remains"):
        survey(open_source(tmp_path), Wanted(choice=CaptionChoice(least_best=22)))
    with pytest.raises(InvalidInput, match="must lie from 0 to 1 but is 2"):
        survey(source, tolerance=2)
