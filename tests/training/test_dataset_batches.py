"""Pictures with captions as the trainer sees them: order, cuts, captions, what is broken and what is too small."""

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sana.data import cutouts
from sana.data.controls import ControlMaps
from sana.data.open import open_source
from sana.errors import BadData, InvalidInput, ModelNotFound
from sana.training.dataset_batches import DATA, PRIOR, Control, DatasetBatches, PriorBatches
from sana.training.dataset_features import Encoders
from sana.training.drawn_batches import DrawnBatches
from sana.training.drawn_features import Features, scene_of
from sana.training.objectives.flow_settings import DataSettings, FlowMatchingSettings

CPU = torch.device("cpu")


class Blocks:
    """Stands for the encoders: a picture becomes the mean colours of its 32 x 32 cells, a text its bytes."""

    def picture(self, picture: Image.Image) -> Tensor:
        height, width = picture.height // 32, picture.width // 32
        cells = np.asarray(picture, np.float32).reshape(height, 32, width, 32, 3).mean((1, 3))
        return torch.from_numpy(cells).permute(2, 0, 1).contiguous()

    def rest(self) -> None:
        """Nothing was brought."""

    def text(self, text: str) -> Tensor:
        return torch.tensor([[2.0], *([float(byte)] for byte in text.encode())])


def save(folder: Path, name: str, size: tuple[int, int], caption: str | None = None, shade: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


SIZES = ((512, 512), (704, 352), (352, 704))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        save(tmp_path / "data", f"p{number:02d}", SIZES[number % 3], f"picture {number}", shade=10 * number)
    return tmp_path / "data"


def save_maps(folder: Path, shades: Sequence[int], times: int = 1) -> Path:
    """Plain control pictures for `folder`, so many times as large."""
    for number, shade in enumerate(shades):
        width, height = SIZES[number % 3]
        save(folder, f"p{number:02d}", (width * times, height * times), shade=shade)
    return folder


def open_batches(path: Path, **changes: Any) -> DatasetBatches:
    options: dict[str, Any] = {"batch_size": 2, "seed": 7, "side": 512, "dropout": 0.0, "device": CPU}
    control, table = changes.pop("control", None), changes.pop("table", DATA)
    options |= {key: changes.pop(key) for key in tuple(changes) if key in options}
    encoders: Any = Blocks()
    return DatasetBatches(DataSettings(path=str(path), **changes), encoders, **options, control=control, table=table)


def test_the_content_tells_pictures_captions_and_what_can_be_read_but_no_settings(folder: Path) -> None:
    first = open_batches(folder).content
    assert first.samples == 12
    assert open_batches(folder, side=256, batch_size=3, seed=1).content == first
    shutil.copytree(folder, folder.parent / "copy")
    assert open_batches(folder.parent / "copy").content == first
    found = [first.digest]
    (folder / "p03.txt").write_text("another text", encoding="utf-8")
    found.append(open_batches(folder).content.digest)
    save(folder, "p03", (512, 512), "another text", shade=99)
    found.append(open_batches(folder).content.digest)
    assert open_batches(folder).content.samples == 12
    (folder / "p04.png").unlink()
    (folder / "p04.txt").unlink()
    found.append(open_batches(folder).content.digest)
    assert open_batches(folder).content.samples == 11
    for number in range(100, 200):  # one broken one in so many is put up with
        save(folder, f"p{number}", (512, 512), "more")
    known = open_batches(folder).content
    (folder / "p150.png").write_bytes(b"no picture")
    broken = open_batches(folder).content
    assert (known.samples, broken.samples) == (111, 111)
    assert open_batches(folder, square=True, side=352, small="skip").content == broken
    assert len({*found, known.digest, broken.digest}) == 6


def draw(batches: Any, number: int) -> Any:
    return batches.batch(number, torch.Generator().manual_seed(number))


def words(batch: Any) -> list[str]:
    rows = zip(batch.embeds, batch.mask, strict=True)
    return [bytes(int(value) for value in row[1 : int(seen.sum()), 0]).decode() for row, seen in rows]


def test_every_batch_has_one_shape_and_an_epoch_shows_everything_once(folder: Path) -> None:
    batches = open_batches(folder)
    epoch = [draw(batches, number) for number in range(batches.order.batches_per_epoch)]
    assert {tuple(batch.latents.shape[2:]) for batch in epoch} == {(16, 16), (22, 11), (11, 22)}
    assert sorted(text for batch in epoch for text in words(batch)) == sorted(f"picture {i}" for i in range(12))
    for batch in epoch:  # each text beside its own picture
        shades = batch.latents.mean((1, 2, 3)).round().int().tolist()
        assert words(batch) == [f"picture {shade // 10}" for shade in shades]


def test_a_batch_is_a_function_of_seed_and_number(folder: Path) -> None:
    one, other = open_batches(folder), open_batches(folder)
    for number in (5, 0, 9):
        first, second = draw(one, number), draw(other, number)
        assert torch.equal(first.latents, second.latents)
        assert torch.equal(first.embeds, second.embeds)
    another = open_batches(folder, seed=8)
    assert any(words(draw(one, i)) != words(draw(another, i)) for i in range(4))


def test_the_share_of_dropped_captions(folder: Path) -> None:
    """S1.4: one in ten, within 0.01 over 1e4 samples; never where the model is evaluated."""
    batches = open_batches(folder, square=True, side=352, batch_size=12, dropout=0.1)
    lengths = torch.cat([draw(batches, number).mask.sum(1) for number in range(840)])
    assert len(lengths) > 10_000
    assert float((lengths == 1).float().mean()) == pytest.approx(0.1, abs=0.01)  # of the empty text
    assert set(words(draw(batches, 0))) <= {"", *(f"picture {number}" for number in range(12))}
    assert words(draw(open_batches(folder, dropout=0.0), 3)) == words(draw(open_batches(folder), 3))
    for held_out in (0, 5):
        often = open_batches(folder, dropout=0.99, held_out=held_out)
        seen = [text for _ in range(20) for batch in often.held_out() for text in words(batch)]
        assert len(seen) == 20 * (held_out or 8)
        assert "" not in seen


class Encoded:
    """Stands for the features of 2,256 scenes with three captions of three words each, which are their numbers."""

    captions, scenes = 3, 2_256

    def compute(self) -> Iterator[Any]:
        return iter(())

    def null(self) -> Tensor:
        return torch.full((1, 1), -1.0)

    def read(self) -> Features:
        count = self.scenes
        starts = torch.arange(3 * count).view(count, 3) * 3
        return Features(
            latents=torch.zeros(count, 1, 1, 1),
            labels=torch.zeros(count, 2, 1, 1),
            text=torch.arange(9.0 * count).view(-1, 1),
            starts=starts,
            lengths=torch.full_like(starts, 3),
        )


def test_the_share_of_dropped_captions_in_the_drawn_world() -> None:
    """S1.4: a dropped caption is replaced by the null text, and no held-out one is dropped."""
    store: Any = Encoded()
    batches = DrawnBatches(store, batch_size=500, seed=0, dropout=0.1, device=CPU)
    made = [draw(batches, number) for number in range(20)]
    first = torch.cat([batch.embeds[:, 0, 0] for batch in made])
    lengths = torch.cat([batch.mask.sum(1) for batch in made])
    assert len(first) == 10_000
    assert float((first == -1).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(lengths, torch.where(first == -1, 1, 3))
    often = DrawnBatches(store, batch_size=500, seed=0, dropout=0.99, device=CPU)
    (apart,) = often.held_out()
    assert bool((apart.embeds[:, 0, 0] >= 0).all())
    assert bool((apart.mask.sum(1) == 3).all())


def test_a_batch_of_more_scenes_than_are_trained_on_is_refused_before_features_are_computed() -> None:
    store: Any = Encoded()
    assert len(draw(DrawnBatches(store, batch_size=2_000, seed=0, dropout=0.0, device=CPU), 3).latents) == 2_000
    store.compute = None
    sentence = r"batch_size is 2001, but of 2256 drawn scenes 256 are held out, which leaves 2000 .* or raise scenes"
    with pytest.raises(InvalidInput, match=sentence):
        DrawnBatches(store, batch_size=2_001, seed=0, dropout=0.0, device=CPU)


def test_triggers_and_captions_of_the_recipe(tmp_path: Path) -> None:
    save(tmp_path, "a", (512, 512), "a [trigger] on grass")
    save(tmp_path, "b", (512, 512))
    batches = open_batches(tmp_path, trigger="sks dog", caption="a photo")
    assert sorted(text for number in range(2) for text in words(draw(batches, number)))[:1]
    assert batches.first_captions(4) == ("a sks dog on grass", "sks dog, a photo")


def test_held_out_samples_are_never_trained_on_and_do_not_depend_on_the_order(folder: Path) -> None:
    batches = open_batches(folder, held_out=3)
    apart = sorted(text for batch in batches.held_out() for text in words(batch))
    assert len(apart) == 3
    seen = {text for number in range(60) for text in words(draw(batches, number))}
    assert len(seen) == 9
    assert not seen & set(apart)
    assert apart == sorted(
        text for batch in open_batches(folder, held_out=3, seed=1).held_out() for text in words(batch)
    )
    with pytest.raises(InvalidInput, match="held_out is 12, but there are only 12 samples; hold out fewer"):
        open_batches(folder, held_out=12)


def test_held_out_samples_have_their_likeliest_captions(folder: Path) -> None:
    told: dict[str, dict[str, Any]] = {
        "p00": {
            "prompt": "low",
            "score": 20,
            "captions": [{"text": "high", "score": 31}, {"text": "same", "score": 31}],
        },
        "p01": {"prompt": "none reaches it", "score": 10, "captions": [{"text": "best", "score": 12}]},
        "p02": {"prompt": "rare", "weight": 1, "captions": [{"text": "often", "weight": 3}]},
        "p03": {"prompt": "first", "captions": [{"text": "equal"}]},
    }
    for file in folder.iterdir():
        if file.suffix == ".txt" or file.stem not in told:
            file.unlink()
    lines = [json.dumps({"file_name": f"{name}.png", **record}) for name, record in told.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    batches = open_batches(folder)  # of a few samples all are shown
    assert sorted(text for batch in batches.held_out() for text in words(batch)) == ["best", "first", "high", "often"]
    first = open_batches(folder, mode="first")
    assert {text for batch in first.held_out() for text in words(batch)} == {
        record["prompt"] for record in told.values()
    }


def test_small_pictures_are_never_enlarged_silently(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(folder, "tiny", (100, 100), "tiny picture")
    sentence = (
        r"1 pictures of .*data are smaller than their bucket at 512 pixels: tiny.png \(100x100\)\. Train at a smaller"
    )
    with pytest.raises(InvalidInput, match=sentence):
        open_batches(folder)
    assert len(open_batches(folder, small="skip").samples) == 12
    assert "left out" in caplog.text
    enlarged = open_batches(folder, small="upscale")
    assert len(enlarged.samples) == 13
    assert "enlarged" in caplog.text


def test_a_broken_picture_found_at_the_start_stops_a_small_set_with_its_name(folder: Path) -> None:
    (folder / "p03.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(
        BadData, match=r"1 of 12 samples in .* are broken \(8\.3%\), .* the 1\.0% .* The first: p03\.png"
    ):
        open_batches(folder)


def test_a_missing_and_an_empty_caption_are_named(folder: Path) -> None:
    (folder / "p01.txt").unlink()
    (folder / "p02.txt").write_text("\n")
    with pytest.raises(BadData, match=r"2 of 12 samples.*p02\.txt:1") as caught:
        open_batches(folder)
    assert "p01.png" in str(caught.value)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(200):
        save(tmp_path / "many", f"m{number:03d}", (32, 32), f"m {number}", shade=number)
    return tmp_path / "many"


def test_a_picture_that_breaks_in_the_middle_is_replaced_and_told(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = open_batches(many, side=32, square=True, batch_size=10)
    whole = (many / "m005.png").read_bytes()
    (many / "m005.png").write_bytes(whole[:-30])  # the header, read at the start, was whole
    epoch = [draw(batches, number) for number in range(20)]
    texts = [text for batch in epoch for text in words(batch)]
    assert len(texts) == 200
    assert "m 5" not in texts
    assert caplog.text.count("left out: m005.png") == 1
    for number in range(3):
        (many / f"m{number + 10:03d}.png").write_bytes(whole[:-30])
    fresh = open_batches(many, side=32, square=True, batch_size=10)
    with pytest.raises(BadData, match=r"3 of 20\d samples in .* are broken \(1\.5%\)"):
        [draw(fresh, number) for number in range(20)]


def cut_off(file: Path) -> None:
    """Leave the header of a picture, which is all that is read at the start, and none of its pixels."""
    file.write_bytes(file.read_bytes()[:-30])


def test_a_held_out_picture_that_is_broken_is_left_out_of_every_look(
    many: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def looks(held_out: int) -> list[list[str]]:
        batches = open_batches(many, side=32, square=True, batch_size=10, held_out=held_out)
        return [[text for batch in batches.held_out() for text in words(batch)] for _ in range(2)]

    (apart, _), (first, _) = looks(20), looks(0)
    for number in (apart[3].split()[1], "0"):
        cut_off(many / f"m{int(number):03d}.png")
    without = [text for text in apart if text not in (apart[3], "m 0")]
    assert looks(20) == [without, without]
    assert caplog.text.count(f"left out: m{int(apart[3].split()[1]):03d}.png") == 1
    assert looks(0) == [["m 1", *first[2:], "m 8"]] * 2


def test_a_look_at_held_out_pictures_of_which_none_can_be_read_says_what_to_do(many: Path) -> None:
    batches = open_batches(many, side=32, square=True, held_out=1)
    (index,) = batches._apart
    cut_off(many / batches.samples[index].place)
    with pytest.raises(BadData, match=r"No held-out picture in .* can be read\. Mend them, or raise .*held_out"):
        list(batches.held_out())


def test_a_control_picture_that_is_broken_costs_its_sample_alone(many: Path, caplog: pytest.LogCaptureFixture) -> None:
    maps = many.parent / "maps"
    for number in range(200):
        save(maps, f"m{number:03d}", (32, 32), shade=200 - number)
    options: dict[str, Any] = {"side": 32, "square": True, "batch_size": 10, "controls": str(maps)}
    before = [words(draw(open_batches(many, control=Control(kind="map"), **options), i)) for i in range(20)]
    cut_off(maps / "m100.png")
    (maps / "m101.png").write_bytes(b"no picture")
    batches = open_batches(many, control=Control(kind="map"), **options)
    assert len(batches.samples) == 199
    texts = [text for number in range(20) for text in words(draw(batches, number))]
    assert len(texts) == 199
    assert not {"m 100", "m 101"} & set(texts)
    assert [caplog.text.count(f"left out: {maps}/{name}.png: ") for name in ("m100", "m101")] == [1, 1]
    (maps / "m101.png").write_bytes((maps / "m102.png").read_bytes())
    after = [words(draw(open_batches(many, control=Control(kind="map"), **options), i)) for i in range(20)]
    changed = [
        (one, other)
        for one, other in zip(itertools.chain(*before), itertools.chain(*after), strict=True)
        if one != other
    ]
    assert [one for one, _ in changed] == ["m 100"]


def test_a_broken_picture_alone_in_its_bucket_is_read_once_and_its_draws_go_to_others(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(many, "lone", (16, 64), "lone")
    known = open_batches(many, side=256, small="upscale", batch_size=10)
    (turn,) = (i for i in range(known.order.batches_per_epoch) if words(draw(known, i)) == ["lone"])
    before = [words(draw(known, i)) for i in range(42)]
    cut_off(many / "lone.png")
    batches = open_batches(many, side=256, small="upscale", batch_size=10)
    reads: list[int] = []
    read = batches.source.picture
    monkeypatch.setattr(batches.source, "picture", lambda index: (reads.append(index), read(index))[1])
    after = [words(draw(batches, i)) for i in range(42)]
    assert [i for i in range(42) if before[i] != after[i]] == [
        turn,
        *(i for i in range(21, 42) if before[i] == ["lone"]),
    ]
    assert len(after[turn]) == 10
    (lone,) = (index for index, sample in batches.samples.items() if sample.key == "lone")
    assert reads.count(lone) == 1
    resumed = open_batches(many, side=256, small="upscale", batch_size=10)  # another process, which has seen nothing
    assert words(draw(resumed, turn)) == after[turn]


def test_controls_come_from_the_picture_or_from_a_folder_of_the_same_names(folder: Path, tmp_path: Path) -> None:
    computed = open_batches(folder, control=Control(kind="canny"))
    batch = draw(computed, 0)
    assert batch.control is not None
    assert float(batch.control.abs().max()) == 0  # plain pictures have no edges
    save_maps(tmp_path / "maps", [200 - number for number in range(12)], times=2)
    paired = open_batches(folder, control=Control(kind="map"), controls=str(tmp_path / "maps"))
    batch = draw(paired, 1)
    numbers = [int(text.split()[1]) for text in words(batch)]
    assert batch.control is not None
    assert batch.control.mean((1, 2, 3)).round().int().tolist() == [200 - number for number in numbers]
    (tmp_path / "maps" / "p04.png").unlink()
    with pytest.raises(InvalidInput, match=r"1 pictures have no control picture of the same name .* first is p04\.png"):
        open_batches(folder, control=Control(kind="map"), controls=str(tmp_path / "maps"))


def test_a_control_picture_of_another_shape_is_named_and_costs_its_sample(
    many: Path, caplog: pytest.LogCaptureFixture
) -> None:
    maps = many.parent / "maps"
    for number in range(200):
        save(maps, f"m{number:03d}", (64, 64), shade=200 - number)
    save(maps, "m007", (64, 32))
    options: dict[str, Any] = {"side": 32, "square": True, "batch_size": 10, "controls": str(maps)}
    batches = open_batches(many, control=Control(kind="map"), **options)
    assert len(batches.samples) == 199
    told = f"left out: {maps}/m007.png: It has 64 x 32 pixels, another shape than its picture m007.png of 32 x 32."
    assert told in caplog.text
    save(maps, "m008", (70, 64))
    save(maps, "m009", (56, 64))
    command = rf"`sana dataset check {many} --controls {maps}` lists all"
    with pytest.raises(BadData, match=rf"3 of 200 samples in .* The first: {maps}/m007\.png: It has.* {command}"):
        open_batches(many, control=Control(kind="map"), **options)


def test_a_side_of_a_scaled_control_picture_may_be_off_by_less_than_a_pixel(tmp_path: Path) -> None:
    save(tmp_path / "data", "a", (1000, 707), "a")
    for size, is_fine in (((500, 354), True), ((500, 353), True), ((500, 357), False), ((2000, 1414), True)):
        save(tmp_path / "maps", "a", size)
        source = open_source(tmp_path / "data")
        assert (not ControlMaps(str(tmp_path / "maps"), [source.sample(0)]).missing) == is_fine, size


@pytest.mark.parametrize("policy", ["refuse", "skip", "upscale"])
def test_small_control_pictures_are_never_enlarged_silently(
    folder: Path, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    maps = save_maps(folder.parent / "maps", [200] * 12)
    save(maps, "p00", (64, 64), shade=200)
    options: dict[str, Any] = {"control": Control(kind="map"), "controls": str(maps), "small": policy}
    if policy == "refuse":
        told = rf"1 pictures of {maps} are smaller than their bucket at 512 pixels: p00\.png \(64x64\)\. Train"
        with pytest.raises(InvalidInput, match=rf'{told} .* or set flow_matching\.data\.small to "skip"'):
            open_batches(folder, **options)
        return
    batches = open_batches(folder, **options)
    done = {"skip": "left out", "upscale": "enlarged"}[policy]
    assert f"1 pictures of {maps} are smaller than their bucket and are {done}" in caplog.text
    assert ("p00" in {sample.key for sample in batches.samples.values()}) == (policy == "upscale")
    assert all(float(draw(batches, number).control.min()) == 200 for number in range(6))


def test_a_place_for_a_trigger_names_its_picture_and_the_setting(folder: Path) -> None:
    (folder / "p03.txt").write_text("a [trigger] here", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"A caption of p03\.png in .*: set flow_matching\.data\.trigger to what it"):
        open_batches(folder)
    assert open_batches(folder, trigger="sks").says("SKS here")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"caption": "a dog"}, "data.caption has no effect: all pictures of {} have captions"),
        (
            {"mode": "score"},
            "data.mode has no effect: no caption of {} has a score; `sana dataset score`",
        ),
        ({"threshold": 20.0}, "data.threshold has no effect: no caption of {} has a score"),
        ({"temperature": 0.5}, "data.temperature has no effect: no caption of {} has a score"),
        ({"least_best": 20.0}, "data.least_best has no effect: no caption of {} has a score"),
    ],
)
def test_settings_that_no_caption_gives_anything_to_do_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], sentence: str
) -> None:
    open_batches(folder, **changes)
    assert sentence.format(folder) in caplog.text
    caplog.clear()
    save(folder, "p12", (512, 512))
    (folder / "metadata.jsonl").write_text('{"file_name": "p11.png", "text": "x", "score": 30}\n', encoding="utf-8")
    open_batches(folder, **{"caption": "a dog", **changes})
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"side": 300}, r"flow_matching\.data\.size: No buckets are published for 300 pixels"),
        ({"side": 300, "square": True}, r"flow_matching\.data\.size: A square bucket has a side that is a multiple of"),
    ],
)
def test_a_size_without_buckets_names_its_setting(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        open_batches(folder, **changes)


def test_a_source_that_is_not_there_names_its_setting(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"flow_matching\.data\.path: There is no file or folder .*nope"):
        open_batches(folder / "nope")
    with pytest.raises(ModelNotFound, match=r"flow_matching\.prior\.folder: There is no file or folder .*nope"):
        open_batches(folder / "nope", table=PRIOR)
    with pytest.raises(ModelNotFound, match=r"flow_matching\.data\.controls: There is no file or folder nope"):
        open_batches(folder, control=Control(kind="map"), controls="nope")


def test_a_share_of_the_controls_is_emptied(folder: Path) -> None:
    save_maps(folder.parent / "maps", [200] * 12)
    batches = open_batches(folder, control=Control(kind="map", dropout=0.3), controls=str(folder.parent / "maps"))
    seen = [float(c.abs().max()) for number in range(300) for c in draw(batches, number).control]
    assert sum(value == 0 for value in seen) / len(seen) == pytest.approx(0.3, abs=0.06)


def test_instance_and_prior_share_a_batch(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "class", "c0", (512, 512))
    save(tmp_path / "class", "c1", (512, 512))
    instance = open_batches(folder, square=True, side=352)
    both = PriorBatches(instance, open_batches(tmp_path / "class", square=True, side=352, caption="a dog"), 0.5)
    batch = draw(both, 4)
    assert words(batch)[2:] == ["a dog", "a dog"]
    assert batch.weights is not None
    assert batch.weights.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert [words(one) for one in both.held_out()] == [words(one) for one in instance.held_out()]


def test_instance_and_prior_bring_their_own_control_pictures(folder: Path, tmp_path: Path) -> None:
    maps = save_maps(tmp_path / "maps", [200 - number for number in range(12)])
    save(tmp_path / "class", "c0", (512, 512))
    options: dict[str, Any] = {"square": True, "side": 352}
    instance = open_batches(folder, control=Control(kind="map"), controls=str(maps), **options)
    prior = open_batches(tmp_path / "class", control=Control(kind="canny"), caption="a dog", **options)
    batch = draw(PriorBatches(instance, prior, 1.0), 4)
    own = draw(instance, 4)
    assert batch.control.shape == batch.latents.shape
    assert torch.equal(batch.control[:2], own.control)
    assert torch.equal(batch.control[2:], draw(prior, 4).control)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": "loar"}, r"flow_matching.train is 'loar'. Did you mean '?lora"),
        ({"density": "gauss"}, "flow_matching.density is 'gauss'"),
        ({"weighting": "snr"}, "flow_matching.weighting is 'snr'"),
        ({"base_dtype": "fp8"}, "base_dtype is float32 or bfloat16, but not 'fp8'"),
        ({"base_dtype": "bfloat16"}, 'with train = "full" none is'),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), but is 1.0"),
        ({"shift": -1.0}, "shift must be positive, or 0 for the model's own"),
        ({"snr_gamma": 2.0}, 'snr_gamma acts only with weighting = "min-snr"'),
        ({"lora": {"rank": 3}}, r'\[flow_matching.lora\] acts only with train = "lora"; it is "full"'),
        ({"control": {"blocks": 3}}, 'acts only with train = "controlnet"'),
        ({"text": "a"}, "flow_matching.text has no effect beside start"),
        ({"train": "lora", "fresh": True}, 'fresh draws all weights anew, which needs train = "full"'),
        ({"data": {"path": "a"}, "features": "f"}, r"write \[flow_matching.data\] features"),
        ({"prior": {"prompt": "a", "folder": "b"}}, "needs pictures to learn from"),
        ({"data": {"path": "a"}, "prior": {"prompt": "a", "folder": "b"}}, "square = true: one size for both"),
        ({"data": {"path": "a", "controls": "b"}}, r'goes with \[flow_matching.control\] kind = "map"'),
        ({"data": {"path": "a", "small": "grow"}}, "small is refuse, skip or upscale, but not 'grow'"),
        ({"scenes": 0}, "flow_matching.scenes must be at least 1, but is 0"),
        ({"captions": 0}, "flow_matching.captions must be at least 1, but is 0"),
        ({"data": {"path": "a", "held_out": -1}}, "must not be negative"),
        ({"data": {"pth": "a"}}, r"flow_matching.data has no setting 'pth'. Did you mean '?path"),
        ({"start": "", "train": "lora"}, "needs a model to start from: set start"),
        ({"start": "", "data": {"path": "a"}}, "needs the encoders of a model: set start, with fresh = true"),
        ({"start": ""}, "flow_matching lacks autoencoder, text, features"),
        (
            {"data": {"path": "a", "square": True}, "prior": {"prompt": "a", "folder": "b", "weight": 0.0}},
            "prior.weight must be positive, but is 0.0; omit the table",
        ),
        (
            {
                "data": {"path": "a", "square": True, "controls": "c"},
                "prior": {"prompt": "a", "folder": "b"},
                "train": "controlnet",
                "control": {"kind": "map"},
            },
            r'\[flow_matching.prior\] has no control pictures, so kind = "map" does not go with it',
        ),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        FlowMatchingSettings(**{"start": "nano", **changes})


def test_the_world_of_the_package_is_read_like_any_other(tmp_path: Path) -> None:
    for number in range(4):
        Image.fromarray(cutouts.render(scene_of(1, number))).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a thing")
    from sana.training.starting import StartModel

    batches = DatasetBatches(
        DataSettings(path=str(tmp_path)),
        Encoders(StartModel("nano", CPU)),
        batch_size=2,
        seed=0,
        side=256,
        dropout=0.0,
        device=CPU,
    )
    batch = draw(batches, 0)
    assert batch.latents.shape == (2, 32, 8, 8)
    assert 0.5 < float(batch.latents.square().mean()) < 2
    assert batches.null.shape == (1, 192)
