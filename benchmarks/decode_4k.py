"""Large pictures through the DC-AE of the published models: time and peak memory, beside the reference's tiles.

    python benchmarks/decode_4k.py [--quick] [--work decode-4096] [--no-peer] [--end-to-end]

Random weights in bfloat16. Every case is a process of its own with one thread, called once; peak memory is what a call
adds to what was resident with the weights loaded, the result itself included. The reference decodes 4096 px in blended
tiles of 1024 px every 896, as its documentation advises for large pictures. `--end-to-end` draws one picture of 2K and
one of 4K with the 1.6B transformer's full width and two of its layers, and gives the process's peak with all weights.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import child, heading, once, peak_memory
from random_models import filled, text_encoder, tokenizer
from transformer import OURS, THEIRS

import sana
from sana.cards import CARDS

SETTINGS: dict[str, Any] = CARDS["sana-0.6b-1024"].autoencoder.to_dict()
TILE, STRIDE = 1024, 896
STRIPS, FRUGAL, WHOLE = f"{OURS}, strips", f"{OURS}, strips, frugal", f"{OURS}, whole"
TILED, PEER_WHOLE = f"{THEIRS}, tiles", f"{THEIRS}, whole"
WORK: dict[str, tuple[str, ...]] = {
    "decode-1024": (STRIPS, WHOLE, PEER_WHOLE),
    "decode-2048": (STRIPS, FRUGAL, WHOLE, TILED),
    "decode-4096": (STRIPS, TILED),
    "encode-2048": (STRIPS, WHOLE, TILED),
    "encode-4096": (STRIPS,),
}
QUICK = {"decode-512": (STRIPS, FRUGAL, WHOLE, TILED), "encode-512": (STRIPS, WHOLE)}
LAYERS, STEPS = 2, 2
PICTURES = {2048: "sana-1.6b-2k", 4096: "sana-1.6b-4k"}


def main() -> None:
    """Print one Markdown table for all work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="append", choices=[*WORK, *QUICK], help="what to measure, may be repeated")
    parser.add_argument("--quick", action="store_true", help="512 px")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave the reference out")
    parser.add_argument("--end-to-end", action="store_true", help="whole pictures instead of the autoencoder alone")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        work, name = options.case
        print(json.dumps(end_to_end(int(name)) if work == "picture" else run(work, name)))
    elif options.end_to_end:
        report_pictures([512] if options.quick else list(PICTURES))
    else:
        report(options.work or list(QUICK if options.quick else WORK), options.peer)


def report(chosen: list[str], peer: bool) -> None:
    """Print the table of the autoencoder alone."""
    print(heading("DC-AE f32c32: large pictures", "bfloat16, 1 thread, one call each"), flush=True)
    print("| work | CPU s | wall s | peak memory above the weights |\n| --- | --- | --- | --- |", flush=True)
    for work in chosen:
        for name in {**WORK, **QUICK}[work]:
            if peer or name not in (TILED, PEER_WHOLE):
                cpu, wall, peak = measured(work, name)
                print(f"| {work} px, {name} | {cpu:.1f} | {wall:.1f} | {megabytes(peak)} |", flush=True)


def report_pictures(sizes: list[int]) -> None:
    """Print the table of whole pictures."""
    note = f"SANA 1.6B, {LAYERS} of 20 layers, {STEPS} steps with guidance, two layers of text, bfloat16"
    print(heading("Prompt to pixels, large pictures", note), flush=True)
    print("| picture | CPU s | wall s | weights in memory | peak of the process |\n| --- | --- | --- | --- | --- |")
    for size in sizes:
        cpu, wall, weights, peak = measured("picture", str(size))
        print(f"| {size} px | {cpu:.1f} | {wall:.1f} | {megabytes(weights)} | {megabytes(peak)} |", flush=True)


def measured(work: str, name: str) -> list[Any]:
    """Return what a case prints that runs in a process of its own."""
    found: list[Any] = json.loads(child([__file__, "--case", work, name])[1])
    return found


def megabytes(count: int | None) -> str:
    """Return a number of bytes to be read."""
    return "-" if count is None else f"{count / 2**20:.0f} MiB"


def run(work: str, name: str) -> tuple[float, float, int | None]:
    """Call one case once."""
    torch.set_num_threads(1)
    kind, size = work.split("-")
    call = prepared(name, kind, int(size))
    with torch.no_grad():
        small = torch.ones(1, 8, 8, 8, dtype=torch.bfloat16)
        torch.nn.functional.conv2d(small, small)  # the library's own memory is no part of the call
        return once(call)


def prepared(name: str, kind: str, size: int) -> Callable[[], object]:
    """Return a call that encodes or decodes one picture."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith(THEIRS):
        import diffusers

        vae = filled(lambda: diffusers.AutoencoderDC(**SETTINGS), torch.bfloat16)
        if name == TILED:
            tile, stride = (TILE, STRIDE) if size > TILE else (256, 224)
            vae.enable_tiling(tile, tile, stride, stride)
    else:
        vae = filled(lambda: sana.AutoencoderDC(**SETTINGS), torch.bfloat16)
        vae.disable_streaming() if name == WHOLE else vae.enable_streaming(frugal=name == FRUGAL)
    if kind == "decode":
        latent = torch.randn(1, 32, size // 32, size // 32, generator=generator).bfloat16()
        return partial(vae.decode, latent, return_dict=False)
    picture = torch.rand(1, 3, size, size, generator=generator).bfloat16()
    return partial(vae.encode, picture, return_dict=False)


def end_to_end(size: int) -> tuple[float, float, int, int | None]:
    """Draw one picture with the documented pipeline, everything at its defaults."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    card = CARDS[PICTURES.get(size, "sana-1.6b-1024")]
    fields = {**card.transformer.to_dict(), "num_layers": LAYERS}
    transformer = filled(lambda: sana.SanaTransformer2DModel(**fields), torch.bfloat16, 1)
    vae = filled(lambda: sana.AutoencoderDC(**card.autoencoder.to_dict()), torch.bfloat16, 2)
    sampler = sana.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=card.flow_shift
    )
    encoder = text_encoder(2)
    pipe = sana.SanaPipeline(tokenizer(), encoder, vae, transformer, sampler)
    pipe.set_progress_bar_config(disable=True)
    parts = (transformer, vae, encoder)
    weights = sum(one.numel() * one.itemsize for part in parts for one in part.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw() -> None:
        options = {"height": size, "width": size, "num_inference_steps": STEPS, "generator": generator}
        picture = pipe("a red fox above a yellow boat", **options).images[0]
        assert picture.size == (size, size)

    cpu, wall, _ = once(draw)
    return cpu, wall, weights, peak_memory()


if __name__ == "__main__":
    main()
