"""Pixels to a PNG file in memory, beside Pillow; and decoded tensors to pixels, beside the reference.

    python benchmarks/png_files.py [--quick] [--rounds 5]

The picture is noise whose power falls with frequency as a photograph's does. The strips of our writer are made on as
many threads as there are cores, so here wall seconds count too.
"""

import argparse
import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from diffusers.image_processor import PixArtImageProcessor
from harness import heading, measure, table
from PIL import Image

from sana.engine.images import to_pictures
from sana.engine.png import write_png

DEFAULT = "Pillow, its default (level 6)"


def main() -> None:
    """Print two Markdown tables for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="256 px, two rounds")
    options = parser.parse_args()
    sizes, rounds = ((256,), 2) if options.quick else ((1024, 4096), options.rounds)
    for side in sizes:
        print(heading(f"PNG, {side} px", f"{rounds} rounds"))
        pixels = photo(side)
        print(writers(Image.fromarray(pixels), rounds) + "\n")
        print(converters(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1, rounds) + "\n")


def writers(image: Image.Image, rounds: int) -> str:
    """Return the table of the ways to write a file."""
    cases: dict[str, Callable[[], bytes]] = {"sanakit": partial(ours, image), DEFAULT: partial(pillow, image, 6)}
    cases |= {f"Pillow, level {level}": partial(pillow, image, level) for level in (1, 0)}
    default = len(cases[DEFAULT]())
    lines = table(measure(cases, rounds), peers=[DEFAULT])
    sizes = ", ".join(f"{name} {len(case()) / default:.3f}" for name, case in cases.items())
    return f"{lines}\n\nSizes, relative to Pillow's default: {sizes}."


def converters(decoded: torch.Tensor, rounds: int) -> str:
    """Return the table of the ways to turn what the decoder gives into pixels."""
    processor = PixArtImageProcessor(vae_scale_factor=32)
    decoded = decoded.bfloat16()
    cases: dict[str, Callable[[], object]] = {
        "sanakit: bfloat16 to pixels": lambda: to_pictures(decoded),
        "diffusers": lambda: processor.postprocess(decoded, output_type="pil"),
    }
    return table(measure(cases, rounds), peers=["diffusers"])


def ours(image: Image.Image) -> bytes:
    """Write with our writer."""
    file = io.BytesIO()
    write_png(file, image)
    return file.getvalue()


def pillow(image: Image.Image, level: int) -> bytes:
    """Write with Pillow."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=level)
    return file.getvalue()


def photo(side: int) -> np.ndarray:
    """Return [side, side, 3] pixels."""
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(side)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1
    bands = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / radius**1.3).real for _ in range(3)]
    pixels = np.stack([(band - band.mean()) / band.std() for band in bands], -1) * 50 + 128
    return (pixels + rng.standard_normal(pixels.shape)).clip(0, 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
