import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL import Image

from sana import load_image
from sana.engine import images
from sana.engine.images import resize_and_crop, to_pictures
from sana.errors import InvalidInput, NonFinite

PROCESSOR = PixArtImageProcessor(vae_scale_factor=32)


def decoded(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 0.9).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_pictures_equal_the_references(dtype: torch.dtype, output_type: str) -> None:
    ours, oracle = (
        to_pictures(decoded(dtype), output_type),
        PROCESSOR.postprocess(decoded(dtype), output_type=output_type),
    )
    if output_type == "pt":
        assert ours.dtype == oracle.dtype == dtype
        assert torch.equal(ours, oracle)
    else:
        assert np.array_equal(np.stack([np.asarray(i) for i in ours]), np.stack([np.asarray(i) for i in oracle]))


@pytest.mark.parametrize("size", [(20, 24), (30, 30), (10, 40), (64, 11), (33, 24), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resizing_equals_the_references(size: tuple[int, int], dtype: torch.dtype) -> None:
    ours = resize_and_crop(decoded(dtype), *size)
    assert ours.shape[-2:] == size
    assert torch.equal(ours, PROCESSOR.resize_and_crop_tensor(decoded(dtype), size[1], size[0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_non_finite_values_never_become_a_picture(bad: float, output_type: str) -> None:
    tensor = decoded()
    tensor[1, 2, 3, 4] = bad
    with pytest.raises(NonFinite, match="NaN or infinity"):
        to_pictures(tensor, output_type)


def test_unknown_output_types_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'pil'"):
        to_pictures(decoded(), "pill")


def test_load_image_turns_anything_into_upright_rgb(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 10))
    picture.save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png")).mode == "RGB"
    assert load_image(tmp_path / "a.png").size == (4, 2)
    assert load_image(picture.convert("L")).mode == "RGB"
    assert load_image(picture, lambda image: image.resize((1, 1))).size == (1, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_load_image_fetches_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_image(f"{address}/a.png").size == (4, 2)
    with pytest.raises(InvalidInput, match="cannot be fetched"):
        load_image(f"{address}/none.png")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_image(f"{address}/text.png")
    monkeypatch.setattr(images, "MAX_DOWNLOAD", 3)
    with pytest.raises(InvalidInput, match="exceeds"):
        load_image(f"{address}/a.png")


@pytest.mark.parametrize(
    ("image", "words"), [("no-such.png", "no picture at"), (3, "must be a path"), ("ftp://x/a.png", "no picture")]
)
def test_load_image_names_what_is_wrong(image: object, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        load_image(image)  # type: ignore[arg-type]
