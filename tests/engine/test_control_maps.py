"""Control pictures: edges against a plain implementation, the HED network's names, depth by a tiny random model."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from sana.checkpoints import hub
from sana.engine.attachments import ControlKind
from sana.engine.control_maps import CONTROL_MAPS, blurred, canny, control_map, depth, grown, scribble, slope, soft_edge
from sana.engine.depth import estimate, load_depth
from sana.engine.hed import HED, load_hed, soft_edges
from sana.errors import CheckpointError, InvalidInput, ModelNotFound


def drawn(side: int = 96) -> Image.Image:
    """A dark disc and a square of the ground's brightness but another colour, on a grey ground."""
    picture = Image.new("RGB", (side + 32, side), (120, 120, 120))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((side // 8, side // 8, side // 2, side // 2), fill=(10, 10, 10))
    draw.rectangle((side * 5 // 8, side // 2, side * 7 // 8, side * 7 // 8), fill=(200, 97, 40))
    return picture


def noisy(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).normal(128, 40, (40, 56, 3))
    values = ndimage.gaussian_filter(values, (1.5, 1.5, 0)) * 3 - 256
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"))


def test_there_is_a_map_for_each_kind_of_a_request() -> None:
    assert set(CONTROL_MAPS) == set(get_args(ControlKind))


@pytest.mark.parametrize("kind", ["canny", "scribble", "soft-edge", "ink", "map"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_every_map_is_rgb_of_the_pictures_size(kind: str, mode: str) -> None:
    found = control_map(kind, drawn().convert(mode))
    assert found.mode == "RGB"
    assert found.size == (128, 96)
    assert np.ptp(np.asarray(found), axis=2).max() == 0 or kind == "map"


def test_ink_is_the_thin_edges_thickened_and_black_on_white() -> None:
    picture = drawn().resize((512, 384))
    thin, strokes = values(canny(picture)) > 0, values(control_map("ink", picture)) == 0
    assert set(np.unique(values(control_map("ink", picture)))) == {0, 255}
    assert thin.any()
    near = ndimage.distance_transform_edt(~thin) <= 3  # 8 pixels of 1024 are 3 of 384
    assert np.array_equal(strokes, near)


def test_a_finished_map_is_left_alone() -> None:
    assert np.array_equal(np.asarray(control_map("map", drawn())), np.asarray(drawn()))


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.3])
def test_the_blur_and_the_slope_are_the_usual_ones(sigma: float) -> None:
    plane = np.random.default_rng(0).random((30, 21)).astype(np.float32)
    expected = ndimage.gaussian_filter(plane, sigma, mode="nearest", radius=max(1, round(3 * sigma)))
    assert np.allclose(blurred(plane, sigma), expected, atol=1e-6)
    across, down = slope(plane)
    assert np.allclose(across, ndimage.sobel(plane, axis=1, mode="nearest"), atol=1e-5)
    assert np.allclose(down, ndimage.sobel(plane, axis=0, mode="nearest"), atol=1e-5)


def plain_canny(picture: Image.Image, low: float, high: float) -> np.ndarray:
    """Canny's method pixel by pixel, with scipy's blur and slopes and a flood from the strong pixels."""
    colours = np.asarray(picture, dtype=np.float32) / 255
    sigma = max(1.0, 2.0 * min(colours.shape[:2]) / 1024)
    soft = [ndimage.gaussian_filter(colours[..., c], sigma, mode="nearest", radius=round(3 * sigma)) for c in range(3)]
    across, down = (np.stack([ndimage.sobel(one, axis=axis, mode="nearest") for one in soft]) for axis in (1, 0))
    size = np.hypot(across, down)
    best, height_of_one = size.argmax(axis=0), math.sqrt(2 * math.pi * (sigma**2 + 1 / 3)) / 8
    height, width = best.shape

    def strength(y: int, x: int) -> float:
        return float(size[:, y, x].max()) * height_of_one if 0 <= y < height and 0 <= x < width else 0.0

    thin = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            angle = math.degrees(math.atan2(down[best[y, x], y, x], across[best[y, x], y, x])) % 180
            step = [(0, 1), (1, 1), (1, 0), (1, -1)][int((angle + 22.5) // 45) % 4]
            here, behind, ahead = strength(y, x), strength(y - step[0], x - step[1]), strength(y + step[0], x + step[1])
            thin[y, x] = here if here >= behind and here > ahead else 0
    found, stack = np.zeros((height, width), dtype=bool), list(zip(*np.nonzero(thin >= high), strict=True))
    while stack:
        y, x = stack.pop()
        if not found[y, x]:
            found[y, x] = True
            around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            stack += [(i, j) for i, j in around if 0 <= i < height and 0 <= j < width and thin[i, j] >= low]
    return found


@pytest.mark.parametrize("low_high", [(0.1, 0.25), (0.02, 0.15)])
@pytest.mark.parametrize("picture", [drawn(64), noisy(0), noisy(1)], ids=["drawn", "noise", "other noise"])
def test_thin_edges_are_those_of_a_plain_implementation(picture: Image.Image, low_high: tuple[float, float]) -> None:
    found, expected = values(canny(picture, *low_high)) > 0, plain_canny(picture, *low_high)
    assert expected.any()
    # Where two directions or two strengths are equal, rounding decides.
    assert (found != expected).sum() <= 0.03 * expected.sum()


def test_thin_edges_follow_shapes_even_of_equal_brightness() -> None:
    found = values(canny(drawn()))
    assert set(np.unique(found)) == {0, 255}
    assert found[:, 60:].any(), "the square differs from its ground in colour only"
    assert 0.005 < (found > 0).mean() < 0.1
    assert not found[2:8, 2:8].any()
    assert not values(canny(Image.new("RGB", (64, 64), (9, 200, 30)))).any()


@pytest.mark.parametrize("side", [64, 512, 1500])
def test_a_step_has_the_same_strength_in_pictures_of_all_sizes(side: int) -> None:
    for height, white in ((50, False), (75, True)):
        picture = Image.new("RGB", (side, side), (100, 100, 100))
        picture.paste((100 + height,) * 3, (side // 2, 0, side, side))
        assert values(canny(picture)).any() == white


def test_weak_edges_count_only_where_they_touch_strong_ones() -> None:
    weak = np.zeros((6, 8), dtype=bool)
    weak[0, 0] = weak[1, 1] = weak[2, 2] = weak[2, 3] = True
    weak[5, 6] = weak[5, 7] = True
    strong = np.zeros_like(weak)
    strong[2, 3] = strong[4, 0] = True
    expected = weak.copy()
    expected[5] = False
    assert np.array_equal(grown(weak, strong), expected)


def test_a_long_winding_edge_is_followed_to_its_end() -> None:
    weak = np.zeros((41, 60), dtype=bool)
    weak[::2] = True
    weak[1::4, -1] = weak[3::4, 0] = True
    strong = np.zeros_like(weak)
    strong[0, 0] = True
    assert np.array_equal(grown(weak, strong), weak)


def test_soft_edges_are_graded_and_strongest_at_the_edge() -> None:
    found = values(soft_edge(drawn(256))).astype(float)
    assert len(np.unique(found)) > 50
    assert found.max() == 255
    middle, rim = found[80, 80], found[80, 29:36].max()
    assert rim > 200
    assert middle < 10
    flat = np.random.default_rng(0).integers(120, 124, (64, 64, 3), dtype=np.uint8)
    assert values(soft_edge(Image.fromarray(flat))).max() < 100, "noise stays dark"


def test_strokes_are_thick_clean_and_black_or_white() -> None:
    found = values(scribble(drawn(512)))
    assert set(np.unique(found)) == {0, 255}
    _, count = ndimage.label(found > 0)
    assert count == 2, "one stroke round each shape and nothing else"
    thickness = 2 * ndimage.distance_transform_edt(found > 0).max()
    assert 2 <= thickness <= 8


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'canny'"):
        control_map("cany", drawn())


SMALL_STAGES = ((3, 4, 2), (4, 6, 2), (6, 8, 3))


def test_the_hed_network_has_the_published_names() -> None:
    names = {name: tuple(tensor.shape) for name, tensor in HED().state_dict().items()}
    assert names["norm"] == (1, 3, 1, 1)
    assert names["block1.convs.0.weight"] == (64, 3, 3, 3)
    assert names["block5.convs.2.bias"] == (512,)
    assert names["block3.projection.weight"] == (1, 256, 1, 1)
    assert len(names) == 1 + 2 * (2 + 2 + 3 + 3 + 3 + 5)


def test_hed_averages_its_sides_before_the_sigmoid() -> None:
    torch.manual_seed(0)
    network = HED(SMALL_STAGES).eval()
    pixels = np.asarray(drawn(45))
    x, sides = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() - network.norm, []
    with torch.no_grad():
        for i, stage in enumerate([network.block1, network.block2, network.block3]):
            x = torch.nn.functional.max_pool2d(x, 2) if i else x
            for conv in stage.convs:  # type: ignore[union-attr]
                x = conv(x).relu()
            size = pixels.shape[:2]
            sides.append(torch.nn.functional.interpolate(stage.projection(x), size, mode="bilinear"))  # type: ignore[operator, union-attr]
    expected = 1 / (1 + np.exp(-torch.cat(sides, dim=1).mean(dim=1)[0].numpy()))
    assert np.allclose(soft_edges(network, pixels), expected, atol=1e-5)
    assert 0 <= expected.min() < expected.max() <= 1


def test_hed_weights_come_from_a_file_and_only_from_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HED.__init__, "__defaults__", (SMALL_STAGES,))
    torch.manual_seed(1)
    network = HED()
    path = tmp_path / "ControlNetHED.pth"
    torch.save(network.state_dict(), path)
    loaded = load_hed(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    assert not loaded.training
    monkeypatch.setattr("sana.engine.hed.load_hed", lambda: network)
    assert control_map("hed", drawn()).size == (128, 96)
    torch.save({"norm": torch.zeros(1, 3, 1, 1)}, path)
    with pytest.raises(CheckpointError, match="does not hold the weights of the HED network"):
        load_hed(path)


def test_without_hed_weights_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="'soft-edge', which needs no weights"):
        control_map("hed", drawn())


def tiny_depth() -> Any:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=4,
            patch_size=14,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


def test_depth_of_a_tiny_model(tmp_path: Path) -> None:
    model = tiny_depth()
    model.save_pretrained(tmp_path)
    loaded = load_depth(tmp_path)
    sizes: list[Any] = []
    loaded.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["pixel_values"].shape), with_kwargs=True
    )
    found = estimate(loaded, np.asarray(drawn()), short_side=56)
    assert sizes[0] == (1, 3, 56, 70), "the short side as trained, both multiples of the patch"
    assert found.shape == (96, 128)
    assert (found.min(), found.max()) == (0, 1)
    assert np.allclose(found, estimate(model, np.asarray(drawn()), short_side=56), atol=1e-6)
    picture = depth(drawn(), tmp_path)
    assert (picture.mode, picture.size) == ("RGB", (128, 96))


def test_without_a_depth_model_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="finished depth picture with the kind 'map'"):
        load_depth("no-such/depth-model", local_files_only=True)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises((CheckpointError, ModelNotFound), match="depth"):
        load_depth(tmp_path)
