"""From the prompt's string to the bytes of a PNG file, beside the reference implementation.

    python benchmarks/prompt_to_png.py [--quick] [--size 1024] [--steps 2] [--rounds 3] [--compile]

SANA 0.6B, Gemma-2-2B and the DC-AE with random weights in bfloat16, classifier-free guidance, a new prompt of 60
tokens each time; both sides hold the same tensors (about 8 GB). Few steps, because the steps are alike; the more there
are, the nearer the whole comes to the line of the denoising. `--compile` adds both sides compiled and tells what that
costs once. The PNG is written into memory, by Pillow's default on the side of the reference.
"""

import argparse
import io
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from harness import Timing, heading, measure, table
from random_models import LAYERS, filled, prompts, text_encoder, tokenizer

import sana
from sana.cards import CARDS
from sana.engine.png import write_png

OURS, OURS_COMPILED = "sanakit", "sanakit, compiled"
EAGER, COMPILED = "diffusers", "diffusers, compiled, channels_last VAE"
STAGES = ("text", "denoise", "decode", "png")


class Side:
    """One implementation: from a prompt to bytes, with the CPU seconds of each stage."""

    def __init__(self, pipe: Any, options: argparse.Namespace, texts: Iterator[str], fast: bool) -> None:
        self.pipe, self.options, self.texts, self.fast = pipe, options, texts, fast
        self.spent: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        pipe.set_progress_bar_config(disable=True)
        if isinstance(pipe, sana.SanaPipeline):
            self._clock(pipe.parts.prompts, "encode", "text")
        else:
            self._clock(pipe, "encode_prompt", "text")
        self._clock(pipe.vae, "decode", "decode")

    def _clock(self, owner: Any, name: str, stage: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            result = work(*arguments, **options)
            self.spent[stage] += time.process_time() - start
            return result

        setattr(owner, name, clocked)

    def image(self, prompt: str) -> Any:
        """Draw one picture."""
        pixels = self.options.size
        return self.pipe(
            prompt,
            height=pixels,
            width=pixels,
            num_inference_steps=self.options.steps,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
        ).images[0]

    def __call__(self) -> bytes:
        self.spent.clear()
        start = time.process_time()
        image = self.image(next(self.texts))
        drawn = time.process_time()
        file = io.BytesIO()
        if self.fast:
            write_png(file, image)
        else:
            image.save(file, format="PNG")
        self.spent["png"] = time.process_time() - drawn
        self.spent["denoise"] = drawn - start - self.spent["text"] - self.spent["decode"]
        for stage in STAGES:
            self.seconds[stage].append(self.spent[stage])
        return file.getvalue()


def main() -> None:
    """Print the table and, below, how far the two pictures are from each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also both sides compiled")
    parser.add_argument("--quick", action="store_true", help="256 px, two layers of text and transformer, one round")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = 256, 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    sides = all_sides(options)
    same = "a red fox above a yellow boat"
    ours, theirs = (np.asarray(sides[name].image(same)).astype(float) for name in (OURS, EAGER))
    costs = {name: first_call(side) for name, side in sides.items() if name in (OURS_COMPILED, COMPILED)}
    timings = measure(sides, options.rounds, warmups=1, threads=options.threads)
    size, steps = f"{options.size} px", f"{options.steps} steps"
    notes = ("two layers of text and transformer",) if options.quick else ()
    threads = f"{options.threads} thread(s), {options.rounds} rounds"
    print(heading("Prompt to PNG", "SANA 0.6B", "bfloat16", size, steps, threads, *notes))
    print(with_stages(timings, sides))
    print(f"\nMean difference of the two eager pictures: {np.abs(ours - theirs).mean():.2f} of 255.")
    for name, seconds in costs.items():
        print(f"First picture of '{name}': {seconds:.0f} CPU s.")


def with_stages(timings: dict[str, Timing], sides: dict[str, Side]) -> str:
    """Return a table of the whole way and one of the median CPU seconds of each stage."""
    peers = [name for name in (EAGER, COMPILED) if name in sides]
    rounds = len(next(iter(timings.values())).cpu)
    lines = [["stage, CPU s", *sides], ["---"] * (1 + len(sides))]
    for stage in STAGES:
        lines.append([stage, *(f"{statistics.median(side.seconds[stage][-rounds:]):.3f}" for side in sides.values())])
    stages = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table(timings, peers=peers)}\n\n{stages}"


def first_call(side: Side) -> float:
    """Return the CPU seconds of the first picture, compilation included, and those of the compiler's processes."""
    before = sum(os.times()[:4])
    side()
    return sum(os.times()[:4]) - before


def all_sides(options: argparse.Namespace) -> dict[str, Side]:
    """Make both implementations over the same tensors."""
    tokens = tokenizer()
    card = CARDS["sana-0.6b-1024"]
    fields = card.transformer.to_dict()
    encoder = text_encoder(2 if options.quick else LAYERS)
    if options.quick:
        fields["num_layers"] = 2
    transformer = filled(lambda: sana.SanaTransformer2DModel(**fields), torch.bfloat16, 1)
    vae = filled(lambda: sana.AutoencoderDC(**card.autoencoder.to_dict()), torch.bfloat16, 2)

    def side(pipe: Any, fast: bool) -> Side:
        return Side(pipe, options, prompts(tokens, 60), fast)

    def ours() -> Any:
        parts = twin(transformer, sana.SanaTransformer2DModel), twin(vae, sana.AutoencoderDC)
        return sana.SanaPipeline(tokens, encoder, parts[1], parts[0], scheduler(sana))

    def theirs() -> Any:
        parts = twin(transformer, diffusers.SanaTransformer2DModel), twin(vae, diffusers.AutoencoderDC)
        return diffusers.SanaPipeline(tokens, encoder, parts[1], parts[0], scheduler(diffusers))

    sides = {OURS: side(ours(), True), EAGER: side(theirs(), False)}
    if options.compile:
        pipe = ours()
        pipe.parts.compile()
        sides[OURS_COMPILED] = side(pipe, True)
        pipe = theirs()
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.transformer.compile()
        pipe.vae.decoder.compile()
        sides[COMPILED] = side(pipe, False)
    return sides


def twin(model: Any, kind: Any) -> Any:
    """Return a model of another class with the very same tensors."""
    with torch.device("meta"):
        made = kind(**{name: value for name, value in dict(model.config).items() if not name.startswith("_")})
    made.load_state_dict(model.state_dict(), assign=True)
    return made.requires_grad_(False).eval()


def scheduler(package: Any) -> Any:
    """Return the published sampler."""
    return package.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )


if __name__ == "__main__":
    main()
