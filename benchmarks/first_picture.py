"""The built-in model beside the reference implementation, and what starting costs.

    python benchmarks/first_picture.py [--quick] [--rounds 5] [--steps 20]

Both pipelines load the same folder and draw the same prompt from the same seed in float32 on one thread, in turn. The
second table is of whole processes, from a cold start to their end; drawing is compared with the import it cannot do
without. Needs diffusers (the `test` extra).
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from harness import Timing, child, heading, measure

import sana

PROMPT = "a red fish above a yellow boat"
LIBRARY = "import torch; from transformers import Gemma2Model"
PEER = "diffusers"


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two steps, two rounds")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 2
    warnings.simplefilter("ignore")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print(heading("The built-in model, 256 px", "float32, 1 thread", f"{options.rounds} rounds"))
    print(drawing(options.steps, options.rounds))
    print(f"\n{starting(options.rounds)}")


def drawing(steps: int, rounds: int) -> str:
    """Return a table of the stages, both sides in one process."""
    folder = str(files("sana") / "assets" / "nano")
    kinds: dict[str, Any] = {"sanakit": sana.SanaPipeline, PEER: diffusers.SanaPipeline}
    pipes = {name: kind.from_pretrained(folder, torch_dtype=torch.float32) for name, kind in kinds.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(pipe: Any, output: str) -> Callable[[], object]:
        return lambda: pipe(
            PROMPT,
            height=256,
            width=256,
            use_resolution_binning=False,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type=output,
        )

    stages: dict[str, Callable[[Any], Callable[[], object]]] = {
        f"prompt to picture, {steps} steps": lambda pipe: draw(pipe, "pil"),
        f"prompt to latents, {steps} steps": lambda pipe: draw(pipe, "latent"),
        "decode": lambda pipe: lambda: pipe.vae.decode(latents),
    }
    lines = [f"| work | sanakit, CPU s | {PEER}, CPU s | ratio |", "| --- | --- | --- | --- |"]
    for stage, make in stages.items():
        ours, theirs = measure({name: make(pipe) for name, pipe in pipes.items()}, rounds).values()
        lines.append(f"| {stage} | {ours.median:.3f} | {theirs.median:.3f} | {ours.ratio(theirs):.2f}x |")
    return "\n".join(lines)


def starting(rounds: int) -> str:
    """Return a table of processes."""
    with tempfile.TemporaryDirectory() as folder:
        picture = str(Path(folder) / "a.png")
        processes = {
            f"`{LIBRARY}`": ["-c", LIBRARY],
            "`sana PROMPT`": ["-m", "sana", PROMPT, "-o", picture, "--force"],
            "`from sana import SanaPipeline`": ["-c", "from sana import SanaPipeline"],
            "`from diffusers import SanaPipeline`": ["-c", "from diffusers import SanaPipeline"],
            "`import sana`": ["-c", "import sana"],
            "`sana --help`": ["-m", "sana", "--help"],
            "`python -c pass`": ["-c", "pass"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in processes}
        for i in range(rounds + 1):
            for name, words in processes.items():
                cpu = child(words)[0]
                if i:  # the first round reads the files from the disk
                    seconds[name].append(cpu)
    timings = {name: Timing(cpu=tuple(cpu), wall=()) for name, cpu in seconds.items()}
    library = timings[f"`{LIBRARY}`"]
    lines = ["| process | CPU s, median (min - max) | of the first line |", "| --- | --- | --- |"]
    for name, timing in timings.items():
        spread = f"{timing.median:.3f} ({min(timing.cpu):.3f} - {max(timing.cpu):.3f})"
        lines.append(f"| {name} | {spread} | {library.ratio(timing):.2f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
