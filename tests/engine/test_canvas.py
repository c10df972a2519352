import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sana.engine.canvas import Canvas, Kept, extended, feathered, fitted_mask, masked, outpainted
from sana.errors import InvalidInput

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """A picture without fine detail, which survives being resized."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    values = np.stack([x, y, (np.sin(5 * x) * np.cos(4 * y) + 1) / 2], axis=-1)
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def back(canvas: Canvas, drawn: Image.Image) -> np.ndarray:
    tensor = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].float()
    return canvas.cut(tensor)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((300, 200), (256, 256)), ((200, 300), (256, 256)), ((720, 1280), (768, 1344)), ((90, 800), (512, 2048))],
)
def test_a_picture_that_is_placed_and_cut_lies_where_it_was(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    canvas = Canvas(height=size[0], width=size[1], drawn=drawn, resized=True)
    picture = smooth(size[1], size[0])
    placed = canvas.place(picture)
    assert placed.size == (drawn[1], drawn[0])
    gap = np.abs(back(canvas, placed) - np.asarray(picture))
    assert gap[4:-4, 4:-4].max() < 6
    assert gap.mean() < 1


def test_a_canvas_of_whole_cells_keeps_every_pixel() -> None:
    canvas = Canvas(height=50, width=70, drawn=(64, 96), resized=False)
    placed = canvas.place(NOISE)
    assert placed.size == (96, 64)
    assert np.array_equal(back(canvas, placed), np.asarray(NOISE))
    assert np.array_equal(np.asarray(placed)[:50, 70:], np.repeat(np.asarray(NOISE)[:, -1:], 26, 1))


def test_extreme_shapes_do_not_fill_the_memory() -> None:
    canvas = Canvas(height=1000, width=16000, drawn=(256, 256), resized=True)
    placed = canvas.place(smooth(1600, 100).resize((16000, 1000), Image.Resampling.NEAREST))
    assert placed.size == (256, 256)
    assert np.asarray(placed)[128, 250, 0] > 240
    assert np.asarray(placed)[128, 5, 0] < 15


def test_room_is_filled_without_a_jump_and_the_picture_stays() -> None:
    picture = smooth(70, 50)
    grown = np.asarray(outpainted(picture, (20, 10, 30, 0)))
    assert grown.shape == (60, 120, 3)
    assert np.array_equal(grown[10:, 20:90], np.asarray(picture))
    assert np.abs(grown[10:, 19].astype(int) - np.asarray(picture)[:, 0]).max() < 24
    assert np.abs(grown[10:, 90].astype(int) - np.asarray(picture)[:, -1]).max() < 24
    assert outpainted(picture, (0, 0, 0, 0)) is picture
    assert extended(picture, (0, 0, 0, 0)) is picture


def test_a_mask_covers_what_it_says_and_all_new_room() -> None:
    mask = Image.new("L", (7, 5))
    ImageDraw.Draw(mask).rectangle((2, 2, 3, 3), fill=255)
    whole = np.asarray(masked(mask, (70, 50), (0, 10, 5, 0)))
    assert whole.shape == (60, 75)
    assert np.all(whole[:10] == 255)
    assert np.all(whole[:, 70:] == 255)
    assert np.argwhere(whole[10:, :70]).min(0).tolist() == [20, 20]
    assert np.argwhere(whole[10:, :70]).max(0).tolist() == [39, 39]
    assert masked(None, (70, 50), (0, 0, 0, 0)) is None
    assert np.asarray(masked(None, (4, 4), (1, 0, 0, 0))).sum(0).tolist() == [4 * 255, 0, 0, 0, 0]
    with pytest.raises(InvalidInput, match="black everywhere"):
        masked(Image.new("L", (70, 50)), (70, 50), (0, 0, 0, 0))
    with pytest.raises(InvalidInput, match="their shapes differ"):
        masked(Image.new("L", (50, 70), 255), (70, 50), (0, 0, 0, 0))
    assert set(np.unique(np.asarray(fitted_mask(mask, 33, 21)))) == {0, 255}


def brute(inside: np.ndarray, width: int) -> np.ndarray:
    outside = np.argwhere(~inside)
    depth = np.array(
        [[np.abs(outside - (y, x)).sum(1).min() for x in range(inside.shape[1])] for y in range(inside.shape[0])]
    )
    capped = np.minimum(depth, width + 1)
    pad = np.pad(capped, width)
    span = 2 * width + 1
    deepest = np.array(
        [[pad[y : y + span, x : x + span].max() for x in range(inside.shape[1])] for y in range(inside.shape[0])]
    )
    share = np.minimum(capped / np.maximum(deepest, 1), 1)
    return share * share * (3 - 2 * share)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
def test_the_feather_is_that_of_plain_loops(width: int) -> None:
    inside = np.zeros((24, 31), bool)
    inside[4:17, 5:30] = True
    inside[20:22, 2:20] = True
    inside[10, :9] = True
    share = feathered(Image.fromarray(inside.astype(np.uint8) * 255), width)
    assert share.dtype == np.float32
    assert np.abs(share - brute(inside, width)).max() < 1e-6


def test_the_feather_lies_inside_and_thin_lines_are_drawn() -> None:
    inside = np.zeros((80, 80), bool)
    inside[10:50, 10:] = True
    inside[70, :] = True
    share = feathered(Image.fromarray(inside), 8)
    assert np.all(share[~inside] == 0)
    assert np.all(share[inside] > 0)
    assert np.all(share[18:42, 18:] == 1)
    assert share[30, 79] == 1  # the picture's own edge is no border
    assert share[70, 5] == 1
    assert np.all(np.diff(share[30, 9:20]) >= 0)
    assert np.array_equal(feathered(Image.fromarray(inside), 0), inside)
    assert feathered(Image.new("L", (5, 5), 255), 9).min() == 1


def test_pasting_keeps_the_picture_to_the_last_bit() -> None:
    rng = np.random.default_rng(1)
    old, new = (Image.fromarray(rng.integers(0, 256, (700, 40, 3), dtype=np.uint8)) for _ in range(2))
    share = np.zeros((700, 40), np.float32)
    share[100:600, 10:30] = 1
    share[100:600, 20] = 0.25
    mixed = np.asarray(Kept(picture=old, share=share).paste(new))
    assert np.array_equal(mixed[share == 0], np.asarray(old)[share == 0])
    assert np.array_equal(mixed[share == 1], np.asarray(new)[share == 1])
    part = share == 0.25
    exact = np.asarray(old)[part] * 0.75 + np.asarray(new)[part] * 0.25
    assert np.abs(mixed[part] - exact).max() <= 0.5
