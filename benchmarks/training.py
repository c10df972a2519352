"""A step of flow-matching training at the width of the 0.6B transformer, beside the reference's DreamBooth script.

    python benchmarks/training.py [--quick] [--blocks 4] [--rounds 5] [--threads 1] [--sizes 512 1024] [--kinds lora]

Both sides take the same weights, latents, texts, noise and rank, bfloat16 autocast, a clipped gradient and AdamW. LoRA
has rank 4 on queries, keys and values and a bfloat16 base; full has float32 weights. The reference's side does what its
LoRA script does: peft's adapters, texts padded to 300 tokens with a mask. Ours pads a batch to its longest text. There
are 4 pictures in a batch at 512 px, the script's defaults, and 1 at 1024 px. In the column of the process's peak each
case runs in a process of its own: weights, gradients and optimiser included, above what the libraries take.

The last table is a LoRA of the built-in model on new pictures of 256 px: encoded in the step that uses them, as every
picture is once, and read from features that were computed before.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Timing, child, heading, measure, peak_memory, table
from PIL import Image
from random_models import filled
from torch import Tensor

import sana
from sana.cards import CARDS
from sana.data import cutout_captions, cutouts
from sana.flow.density import sample_levels
from sana.training.batches import Batch, collated
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.ledger import Ledger
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.optimizers import Optimizers
from sana.training.trainables import FullTrainable, LoraSettings, LoraTrainable, Trainable

LENGTHS = (60, 24, 48, 36)
"""Tokens of the captions of a batch: a sentence or two each."""
PADDED, WIDTH = 300, 2304
PICTURES = {256: 4, 512: 4, 1024: 1}
"""By size, how many make a batch."""
SHIFT, RATE, CLIP, DECAY = 3.0, 1e-4, 1.0, 1e-4
THEIRS, OURS = "diffusers", "sanakit"
KINDS = ("lora", "full")
WARMUPS = 2
CPU = torch.device("cpu")
Inputs = tuple[Tensor, list[Tensor]]
Step = Callable[[], float]


def main() -> None:
    """Print Markdown tables, or one number for a parent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="sides of the pictures in pixels")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the captions")
    parser.add_argument("--quick", action="store_true", help="one block, 256 px, two rounds")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.sizes, options.rounds = 1, [256], 2
    torch.set_num_threads(options.threads)
    settings = {**CARDS["sana-0.6b-1024"].transformer.to_dict(), "num_layers": options.blocks}
    for size in options.sizes:
        for kind in options.kinds:
            if options.peak_of:
                print(own_peak(options.peak_of, kind, settings, drawn(size, options.lengths)))
            else:
                print(compared(kind, size, settings, options), flush=True)
    if not options.peak_of:
        print(encoding(options))


def compared(kind: str, size: int, settings: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the table of one kind of training at one size."""
    inputs = drawn(size, options.lengths)
    cases = {name: build(name, kind, settings, inputs) for name in names()}
    count = len(inputs[0])
    told = (
        f"{options.blocks} of 28 blocks",
        f"{count} picture(s) of {size} px a step",
        f"captions of {', '.join(str(len(text)) for text in inputs[1])} tokens",
        f"{options.threads} thread(s), {options.rounds} rounds",
    )
    flops = {name: operations(case) for name, case in cases.items()}
    steps = {name: torch.enable_grad()(case) for name, case in cases.items()}
    timings = measure(steps, options.rounds, flops=flops, threads=options.threads)
    del cases, steps
    words = [
        __file__,
        "--kinds",
        kind,
        "--sizes",
        str(size),
        "--blocks",
        str(options.blocks),
        "--lengths",
        *map(str, options.lengths),
    ]
    peaks = {name: int(child([*words, "--peak-of", name])[1]) for name in timings}
    return heading(f"Training, {kind}, {size} px", *told) + "\n" + rows(timings, peaks, count) + "\n"


def operations(step: Step) -> float:
    """Return the floating point operations of the products of a step, those computed again with them."""
    ledger = Ledger()
    with ledger:
        step()
    return float(ledger.flop)


def names() -> list[str]:
    """Return the cases in the order of their turns."""
    return [f"{side}{more}" for more in ("", ", gradient checkpointing") for side in (THEIRS, OURS)]


def rows(timings: Mapping[str, Timing], peaks: Mapping[str, int], count: int) -> str:
    """Return the table: each of ours against the reference's of the same kind."""
    lines = [
        "| step | pictures per CPU s | CPU s, median (min - max) | against diffusers | peak of the process | share |"
        " TFLOP | of the matmul ceiling |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, timing in timings.items():
        peer = name.replace(OURS, THEIRS)
        spread = f"{timing.median:.3f} ({min(timing.cpu):.3f} - {max(timing.cpu):.3f})"
        ratio = f"{timing.ratio(timings[peer]):.2f}x" if peer != name else "1"
        lines.append(
            f"| {name} | {count / timing.median:.3f} | {spread} | {ratio} | {peaks[name] / 2**20:.0f} MiB |"
            f" {peaks[name] / peaks[peer]:.2f} | {(timing.flops or 0) / 1e12:.2f} | {timing.share or 0:.0%} |"
        )
    return "\n".join(lines)


def drawn(size: int, lengths: Sequence[int]) -> Inputs:
    """Return latents and texts without padding."""
    generator = torch.Generator().manual_seed(1)
    side = size // 32
    latents = torch.randn(PICTURES[size], 32, side, side, generator=generator)
    return latents, [torch.randn(lengths[i % len(lengths)], WIDTH, generator=generator) for i in range(len(latents))]


def build(name: str, kind: str, settings: dict[str, Any], inputs: Inputs) -> Step:
    """Return the step of a case, on a model of its own."""
    make = theirs if name.startswith(THEIRS) else ours
    return torch.enable_grad()(make(kind, settings, inputs, "checkpointing" in name))


def ours(kind: str, settings: dict[str, Any], inputs: Inputs, checkpointing: bool) -> Step:
    """Return a step as the trainer takes it."""
    model = filled(lambda: sana.SanaTransformer2DModel(**settings), torch.bfloat16 if kind == "lora" else torch.float32)
    model.train().gradient_checkpointing = checkpointing
    trainable: Trainable = LoraTrainable(model, LoraSettings(), 0) if kind == "lora" else FullTrainable(model)
    learning = [(name, p) for name, p in trainable.module.named_parameters() if p.requires_grad]
    optimizers = Optimizers(learning, OptimizerSettings(name="adamw", lr=RATE, weight_decay=DECAY))
    latents, texts = inputs
    embeds, mask = collated(texts)
    batch = Batch(latents=latents, embeds=embeds, mask=mask)

    def step() -> float:
        generator = torch.Generator().manual_seed(2)
        levels = sample_levels(len(latents), SHIFT, generator)
        noise = torch.randn(latents.shape, generator=generator)
        sigma = levels.sigmas.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = trainable.velocity((1 - sigma) * latents + sigma * noise, batch, levels.timesteps.float())
            loss = (predicted.float() - (noise - latents)).square().mean((1, 2, 3)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in learning], CLIP)
        optimizers.step(1.0)
        return float(loss.detach())

    return step


def theirs(kind: str, settings: dict[str, Any], inputs: Inputs, checkpointing: bool) -> Step:
    """Return a step with the arithmetic of the reference's script."""
    import diffusers
    from peft import LoraConfig

    dtype = torch.bfloat16 if kind == "lora" else torch.float32
    model = filled(lambda: diffusers.SanaTransformer2DModel(**settings), dtype).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    if kind == "lora":
        model.requires_grad_(False)
        names = ["to_k", "to_q", "to_v"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=names))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=DECAY)
    latents, (embeds, mask) = inputs[0].to(dtype), collated(inputs[1], PADDED)
    embeds = embeds.to(dtype)

    def step() -> float:
        generator = torch.Generator().manual_seed(2)
        levels = sample_levels(len(latents), SHIFT, generator)
        noise = torch.randn(latents.shape, generator=generator).to(dtype)
        sigma = levels.sigmas.to(dtype).view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(
                (1.0 - sigma) * latents + sigma * noise,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                timestep=levels.timesteps,
                return_dict=False,
            )[0].float()
        target = noise - latents
        loss = ((predicted - target.float()) ** 2).reshape(len(target), -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def encoding(options: argparse.Namespace) -> str:
    """Return the table of what it costs to encode in the step."""
    count = 4 * (options.rounds + WARMUPS)
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder) / "pictures", count)
        cases = {
            "encoded in the step": nano(Path(folder), count, features=False),
            "precomputed": nano(Path(folder), count, features=True),
        }
        timings = measure(cases, options.rounds, warmups=WARMUPS, threads=options.threads)
    told = ("built-in model", "4 pictures of 256 px a step", f"{options.threads} thread(s), {options.rounds} rounds")
    return (
        heading("Training, LoRA, pictures and captions encoded or read", *told)
        + "\n"
        + table(timings, peers=["encoded in the step"])
    )


def pictures(folder: Path, count: int) -> None:
    """Draw pictures with captions of their own."""
    folder.mkdir()
    rng = random.Random(0)
    for number in range(count):
        scene = cutouts.sample_scene(rng)
        Image.fromarray(cutouts.render(scene)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}: {cutout_captions.caption(scene, rng).text}")


def nano(folder: Path, count: int, features: bool) -> Step:
    """Return a step of the trainer's objective on new pictures."""
    data: dict[str, Any] = {"path": str(folder / "pictures"), "square": True}
    if features:
        data["features"] = str(folder / "features")
    run = RunSettings(steps=count, batch_size=4)
    objective = FlowMatchingObjective(FlowMatchingSettings(start="nano", train="lora", data=data), run, CPU)
    learning = list(objective.parameters_of("main"))
    optimizers = Optimizers(learning, OptimizerSettings(name="adamw", lr=RATE))
    draws = iter(range(count))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective.loss(next(draws))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in learning], CLIP)
        optimizers.step(1.0)
        return float(loss.detach())

    return torch.enable_grad()(step)


def own_peak(name: str, kind: str, settings: dict[str, Any], inputs: Inputs) -> int:
    """Return the most bytes this process takes in three steps, above what it takes with the libraries loaded."""
    import diffusers
    import peft

    assert diffusers.SanaTransformer2DModel
    assert peft.LoraConfig
    before = peak_memory() or 0
    step = build(name, kind, settings, inputs)
    for _ in range(3):
        step()
    return (peak_memory() or 0) - before


if __name__ == "__main__":
    main()
