"""One denoising step of the 0.6B transformer, beside the reference implementation.

    python benchmarks/transformer.py [--quick] [--blocks 28] [--rounds 5] [--threads 1] [--no-compile]

Random weights in bfloat16, shared by both sides: a pair of latents (unconditional and conditional) of 1024 px, a prompt
of 60 tokens. The reference gets its captions padded to 300 with a mask, as its pipeline makes them; it projects them in
every step, we once per prompt. `--blocks 4` keeps the ratios and takes a seventh of the time. The share of the matmul
ceiling counts the operations that are necessary, ours, for all.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import error, heading, measure, table
from random_models import filled
from torch import Tensor

import sana
from sana.cards import CARDS
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Predictor

TOKENS, PADDED = 60, 300
NEGATIVE = 2
"""Tokens of the default negative prompt, roughly."""
TIMESTEP = 700
THEIRS, OURS = "diffusers", "sanakit"


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--quick", action="store_true", help="two blocks, 256 px, two rounds")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--float32", action="store_true", help="measure in float32")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.size, options.rounds = 2, 256, 2
    torch.set_num_threads(options.threads)
    dtype = torch.float32 if options.float32 else torch.bfloat16
    settings = {**CARDS["sana-0.6b-1024"].transformer.to_dict(), "num_layers": options.blocks}
    inputs = drawn(options.size // 32, dtype)
    cases, errors, notes = build(settings, inputs, dtype, options.compile)
    flops = necessary(settings, options.size // 32)
    timings = measure(cases, options.rounds, flops=flops, threads=options.threads)
    told = (
        f"{options.blocks} of 28 blocks",
        f"{options.size} px, {flops / 1e12:.2f} TFLOP a step",
        f"{str(dtype).removeprefix('torch.')}, {options.threads} thread(s), {options.rounds} rounds",
    )
    print(heading("Transformer: one step with guidance, 60 text tokens", *told))
    print(table(timings, peers=[name for name in cases if name.startswith(THEIRS)], errors=errors))
    print("".join(f"\n{note}" for note in notes))


def drawn(side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a latent and the padded captions with their mask, unconditional first."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 32, side, side, generator=generator)
    embeds = torch.randn(2, PADDED, 2304, generator=generator).to(dtype)
    return latent, embeds, (torch.arange(PADDED) < torch.tensor([[NEGATIVE], [TOKENS]])).long()


def build(
    settings: dict[str, Any], inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, compiled: bool
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], list[str]]:
    """Return the cases, how far each is from float32, and what compiling cost."""
    import diffusers

    peer = filled(lambda: diffusers.SanaTransformer2DModel(**settings), dtype)
    golden = theirs(filled(lambda: diffusers.SanaTransformer2DModel(**settings), dtype).float(), inputs)()
    cases = {f"{THEIRS}, eager": theirs(peer, inputs), f"{OURS}, eager": ours(twin(settings, peer), inputs)}
    notes = []
    if compiled:
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(transformer=twin(settings, peer))
            parts.compile(folder)
            cases[f"{OURS}, compiled"] = ours(parts.transformer, inputs)
            cases[f"{THEIRS}, compiled"] = theirs(torch.compile(peer, dynamic=False), inputs)
            for name in (f"{OURS}, compiled", f"{THEIRS}, compiled"):
                notes.append(f"First call of {name}: {cost(cases[name])}.")
    with torch.no_grad():
        return cases, {name: error(case(), golden) for name, case in cases.items()}, notes


def twin(settings: dict[str, Any], peer: torch.nn.Module) -> sana.SanaTransformer2DModel:
    """Return our model on the very weights of the peer."""
    with torch.device("meta"):
        model = sana.SanaTransformer2DModel(**settings)
    model.load_state_dict(peer.state_dict(), assign=True)
    return model.eval()


def ours(model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Return a step as the loop takes it: captions and time are ready."""
    latent, embeds, mask = inputs
    captions = Captions(embeds=embeds[:, :TOKENS], mask=mask[:, :TOKENS], rows=(0, 1))
    predict = Predictor(model, torch.tensor([TIMESTEP]), captions)
    return torch.no_grad()(lambda: predict(latent, 0, guided=True))


def theirs(model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Return a step as the pipeline of the reference takes it."""
    latent, embeds, mask = inputs
    embeds = embeds.to(next(model.parameters()).dtype)

    def call() -> Tensor:
        out: Tensor = model(
            torch.cat([latent, latent]).to(embeds.dtype),
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.tensor([TIMESTEP, TIMESTEP]),
            return_dict=False,
        )[0]
        return out

    return torch.no_grad()(call)


def necessary(settings: dict[str, Any], side: int) -> float:
    """Count the operations of our step: matrix products and convolutions of both rows."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        model = sana.SanaTransformer2DModel(**settings)
        captions = Captions(embeds=torch.zeros(2, TOKENS, 2304), mask=torch.ones(2, TOKENS), rows=(0, 1))
        kv = model.cross_attention_kv(model.encode_caption(captions.embeds))
        modulation = model.modulation(torch.zeros(1))
        with FlopCounterMode(display=False) as counter:
            model.denoise(torch.zeros(2, 32, side, side), modulation, kv)
    return float(counter.get_total_flops())


def cost(case: Callable[[], Tensor]) -> str:
    """Call a case for the first time and tell what that takes, compilers included."""
    before, wall = os.times(), time.perf_counter()
    case()
    after, wall = os.times(), time.perf_counter() - wall
    mine = after.user + after.system - before.user - before.system
    compilers = after.children_user + after.children_system - before.children_user - before.children_system
    return f"{mine:.0f} CPU s and {compilers:.0f} of compilers, {wall:.0f} s by the clock"


if __name__ == "__main__":
    main()
