"""Latents to pictures with the DC-AE of the published models, beside the reference implementation.

    python benchmarks/decode.py [--quick] [--size 512] [--rounds 5] [--threads 1] [--no-compile] [--float32]

Random weights in bfloat16, shared by both sides. The reference runs as it comes, and compiled with weights and latents
in channels-last. The share of the matmul ceiling counts the operations of the published network for all; ours needs
12 % less, for it upsamples with summed kernels.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from harness import error, heading, measure, table
from random_models import filled
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformer import OURS, THEIRS, cost

import sana
from sana.cards import CARDS
from sana.engine.parts import Parts

SETTINGS: dict[str, Any] = CARDS["sana-0.6b-1024"].autoencoder.to_dict()
SIZES = (512, 1024)


def main() -> None:
    """Print one Markdown table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, action="append", help="side of the picture in pixels, may be repeated")
    parser.add_argument("--quick", action="store_true", help="256 px, two rounds")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--float32", action="store_true", help="measure in float32")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = [256], 2
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.float32 else torch.bfloat16
    for size in options.size or SIZES:
        report(size, dtype, options)


def report(size: int, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Measure one size and print its table."""
    latent = torch.randn(1, 32, size // 32, size // 32, generator=torch.Generator().manual_seed(1))
    cases, errors, notes = build(latent, dtype, options.compile)
    flops = published_work(latent)
    timings = measure(cases, options.rounds, warmups=1, flops=flops, threads=options.threads)
    told = (
        f"{size} px, {flops / 1e12:.2f} TFLOP",
        f"{str(dtype).removeprefix('torch.')}, {options.threads} thread(s), {options.rounds} rounds",
    )
    print(heading("DC-AE f32c32: decode", *told))
    print(table(timings, peers=[name for name in cases if name.startswith(THEIRS)], errors=errors))
    print("".join(f"\n{note}" for note in notes), flush=True)


def build(
    latent: Tensor, dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], list[str]]:
    """Return the cases, how far each is from float32, and what compiling cost."""
    import diffusers

    def peer() -> Any:
        return filled(lambda: diffusers.AutoencoderDC(**SETTINGS), dtype)

    first, z = peer(), latent.to(dtype)
    golden = decode(peer().float(), z.float())()
    cases = {f"{THEIRS}, eager": decode(first, z), f"{OURS}, eager": decode(twin(first), z)}
    notes = []
    if compiled:
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(vae=twin(first))
            parts.compile(folder)
            cases[f"{OURS}, compiled"] = decode(parts.vae, z)
            second = peer().to(memory_format=torch.channels_last)
            second.decoder = torch.compile(second.decoder, dynamic=False)
            cases[f"{THEIRS}, compiled, channels-last"] = decode(second, z.to(memory_format=torch.channels_last))
            for name in list(cases)[2:]:
                notes.append(f"First call of {name}: {cost(cases[name])}.")
    with torch.no_grad():
        return cases, {name: error(case(), golden) for name, case in cases.items()}, notes


def twin(peer: torch.nn.Module) -> sana.AutoencoderDC:
    """Return our model on the very weights of the peer."""
    with torch.device("meta"):
        model = sana.AutoencoderDC(**SETTINGS)
    model.load_state_dict(peer.state_dict(), assign=True)
    return model.eval()


def decode(model: Any, latent: Tensor) -> Callable[[], Tensor]:
    """Return a call that decodes."""
    return torch.no_grad()(lambda: model.decode(latent, return_dict=False)[0])


def published_work(latent: Tensor) -> float:
    """Count the operations of the published network: matrix products and convolutions."""
    with torch.device("meta"), torch.no_grad():
        model = sana.AutoencoderDC(**SETTINGS)
        with FlopCounterMode(display=False) as counter:
            model.decode(torch.zeros(latent.shape))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
