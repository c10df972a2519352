"""The built-in model beside the reference implementation, and what starting the command costs.

    python benchmarks/first_picture.py [--rounds 5] [--steps 20]

Both pipelines load the same folder and draw the same prompt from the same seed in float32 on one thread, in turn
(A B A B ...). CPU seconds of this process; medians and the ratio pair by pair. Needs diffusers (the `test` extra).
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.resources import files

import torch

PROMPT = "a red fish above a yellow boat"


def cpu_of(command: list[str]) -> float:
    """CPU seconds, user and system, of a finished child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Medians of both and the median ratio theirs / ours, after one uncounted round."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def main() -> None:
    """Print one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    import diffusers

    import sana

    folder = str(files("sana") / "assets" / "nano")
    pipes = [
        kind.from_pretrained(folder, torch_dtype=torch.float32) for kind in (sana.SanaPipeline, diffusers.SanaPipeline)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe: object, output: str) -> Callable[[], float]:
        def once() -> float:
            return timed(
                lambda: pipe(  # type: ignore[operator]
                    PROMPT,
                    height=256,
                    width=256,
                    use_resolution_binning=False,
                    num_inference_steps=options.steps,
                    generator=torch.Generator().manual_seed(0),
                    output_type=output,
                )
            )

        return once

    latents = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))

    def decode(pipe: object) -> Callable[[], float]:
        @torch.no_grad()
        def once() -> float:
            return timed(lambda: pipe.vae.decode(latents))  # type: ignore[attr-defined]

        return once

    python = sys.executable
    rows = [
        (f"prompt to picture, {options.steps} steps", draw(pipes[0], "pil"), draw(pipes[1], "pil")),
        (f"prompt to latents, {options.steps} steps", draw(pipes[0], "latent"), draw(pipes[1], "latent")),
        ("decode", decode(pipes[0]), decode(pipes[1])),
        (
            "import the package",
            lambda: cpu_of([python, "-c", "import sana"]),
            lambda: cpu_of([python, "-c", "import diffusers"]),
        ),
        (
            "import the pipeline",
            lambda: cpu_of([python, "-c", "from sana import SanaPipeline"]),
            lambda: cpu_of([python, "-c", "from diffusers import SanaPipeline"]),
        ),
    ]
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds, CPU seconds\n")
    print("| work | sanakit | diffusers | ratio |\n|---|---|---|---|")
    for name, ours, theirs in rows:
        a, b, ratio = paired(ours, theirs, options.rounds)
        print(f"| {name} | {a:.3f} | {b:.3f} | {ratio:.2f}x |")
    for name, command in (
        ("sana --help", [python, "-m", "sana", "--help"]),
        ("python -c pass", [python, "-c", "pass"]),
    ):
        print(f"| {name} | {statistics.median(cpu_of(command) for _ in range(options.rounds)):.3f} | - | - |")


if __name__ == "__main__":
    main()
