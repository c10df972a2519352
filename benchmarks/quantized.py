"""Weights in fewer bits beside bfloat16: size, error, speed and a picture, on the 0.6B transformer.

    python benchmarks/quantized.py [--quick] [--blocks 28] [--rounds 3] [--threads 1] [--size 512]

Random weights. A forward pass is one step with guidance, on a pair of latents, with captions of 60 tokens; the error is
that of its result against the same weights in float32, relative rms. The picture: four steps of the built-in model with
its trained weights, in float32, since one of random weights shows nothing; PSNR against the unquantised picture.
torchao and bitsandbytes are measured where they are installed.
"""

import argparse
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import error, heading, measure
from random_models import filled
from torch import Tensor

import sana
from sana.cards import CARDS
from sana.engine.parts import load
from sana.engine.predictor import Captions, Predictor
from sana.errors import SanaError
from sana.memory.quantize import quantize
from sana.memory.quantize_configs import NAMES

TOKENS = 60
TIMESTEPS = (700.0,)
PLAIN = "bfloat16"


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--quick", action="store_true", help="one block, 128 px, one round, a small text")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.size, options.rounds = 1, 128, 1
    torch.set_num_threads(options.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kinds = [name for name in NAMES if _installed(name)]
    settings = {**CARDS["sana-0.6b-1024"].transformer.to_dict(), "num_layers": options.blocks}
    golden = _forward(_model(settings).float(), options.size)()
    cases: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, float] = {}
    refused: list[str] = []
    for name in (PLAIN, *kinds):
        model = _model(settings)
        try:
            if name != PLAIN:
                quantize(model, name)
            case = _forward(model, options.size)
            case()
        except (SanaError, RuntimeError) as reason:
            refused.append(f"{name}: {str(reason).splitlines()[0]}")
            continue
        cases[name], sizes[name] = case, _bytes(model) / 1e6
    errors = {name: error(case(), golden) for name, case in cases.items()}
    timings = measure(cases, options.rounds, warmups=1, threads=options.threads)
    pictures = _psnr([name for name in cases if name != PLAIN])
    told = (f"{options.blocks} of 28 blocks", f"{options.size} px", f"{options.threads} thread(s)")
    print(heading("Quantised weights: one step with guidance", *told))
    print("| weights | MB | error of a step | PSNR of a picture, dB | CPU s | bfloat16 takes |")
    print("|---|---|---|---|---|---|")
    for name, timing in timings.items():
        ratio = f"{timing.ratio(timings[PLAIN]):.2f}x" if name != PLAIN else "1"
        row = [
            name,
            f"{sizes[name]:.0f}",
            f"{errors[name]:.1e}",
            pictures.get(name, "-"),
            f"{timing.median:.2f}",
            ratio,
        ]
        print(f"| {' | '.join(row)} |")
    print("".join(f"\nDoes not run here: {text}" for text in refused))


def _installed(name: str) -> bool:
    package = name.partition("-")[0]
    return package == "int8" or importlib.util.find_spec(package) is not None


def _model(settings: dict[str, Any]) -> Any:
    return filled(lambda: sana.SanaTransformer2DModel(**settings), torch.bfloat16)


def _bytes(model: torch.nn.Module) -> int:
    """Return the size of the weights, also of those that libraries keep in forms of their own."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        inner = [getattr(tensor, name) for name in getattr(tensor, "tensor_data_names", ())]
        scales = [getattr(getattr(tensor, "quant_state", None), "absmax", None), getattr(tensor, "SCB", None)]
        total += sum(one.nbytes for one in (inner or [tensor.data])) + sum(
            one.nbytes for one in scales if one is not None
        )
    return total


def _forward(model: Any, size: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 32, size // 32, size // 32, generator=generator).to(model.dtype)
    embeds = torch.randn(2, TOKENS, 2304, generator=generator).to(model.dtype)
    captions = Captions(embeds=embeds, mask=torch.ones(2, TOKENS), rows=(0, 1))
    predictor = Predictor(model, torch.tensor(TIMESTEPS), captions)

    def case() -> Tensor:
        with torch.no_grad():
            return predictor(latent, 0, guided=True)

    return case


def _psnr(names: list[str]) -> dict[str, str]:
    """Return how near a picture of the quantised built-in model is to that of the plain one."""
    request = sana.Request(prompt="a red fish above a blue house", seed=1, steps=8)

    def draw(name: str | None) -> Any:
        parts = load("nano", device="cpu", quantization_config=name)
        return np.asarray(sana.generate_images(parts, request).images[0], dtype=float)

    plain, found = draw(None), dict[str, str]()
    for name in names:
        try:
            mean = float(((draw(name) - plain) ** 2).mean())
        except (SanaError, RuntimeError) as reason:
            found[name] = f"none ({str(reason).splitlines()[0][:60]})"
            continue
        found[name] = f"{10 * np.log10(255**2 / mean):.1f}" if mean else "same"
    return found


if __name__ == "__main__":
    main()
