"""Prompt to embeddings, beside the reference implementation.

    python benchmarks/text.py [--quick] [--layers 26] [--rounds 5]

A Gemma-2-2B with random weights in bfloat16 (5.2 GB; `--quick` and `--layers` take fewer layers) and a small tokenizer
that splits the instruction into about as many tokens as the published one. Both sides share the model. The reference
encodes the prompt padded to the instruction and 298 tokens more, and the negative prompt padded to 300, each time.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from harness import Timing, error, heading, measure, table
from random_models import HEAD, LAYERS, prompts, text_encoder, tokenizer

from sana.text.gemma import PromptEncoder
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

PEER = "diffusers, any prompt"
NEW = "new prompt of {} tokens"
LENGTHS = (20, 60)
ERROR_LAYERS = 4
"""So many fit in memory in float32 beside each other on a small machine."""


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two layers, two rounds")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = 2, 2
    torch.set_num_threads(options.threads)
    tokens = tokenizer()
    errors = measured_errors(tokens, min(options.layers, ERROR_LAYERS))
    timings = run(tokens, text_encoder(options.layers), options.rounds, options.threads)
    notes = (f"{options.layers} of {LAYERS} layers", f"bfloat16, {options.threads} thread(s), {options.rounds} rounds")
    print(heading("Text: a prompt and the default negative prompt", *notes))
    print(table(timings, peers=[PEER], errors=errors))
    print(f"\nThe instruction has {len(tokens(HEAD).input_ids)} tokens. Errors are of {ERROR_LAYERS} layers or less.")


def run(tokens: Any, model: Any, rounds: int, threads: int) -> dict[str, Timing]:
    """Measure all cases."""
    pipe, encoder = reference(tokens, model), PromptEncoder(tokens, model)
    cases: dict[str, Callable[[], Any]] = {}
    for length in LENGTHS:
        cases[NEW.format(length)] = partial(each, encoder, prompts(tokens, length))
    same = next(prompts(tokens, LENGTHS[-1]))
    cases["repeated prompt"] = lambda: ours(encoder, same)
    fresh, texts = PromptEncoder(tokens, model), prompts(tokens, LENGTHS[-1])

    def cold() -> Any:
        fresh.clear()
        return ours(fresh, next(texts))

    cases[f"first prompt of a process, {LENGTHS[-1]} tokens"] = cold
    cases[PEER] = lambda: theirs(pipe, next(texts))
    return measure(cases, rounds, threads=threads)


@torch.no_grad()
def measured_errors(tokens: Any, layers: int) -> dict[str, float]:
    """Return how far both sides are from float32, over the rows that carry a token."""
    model = text_encoder(layers)
    found: dict[str, Any] = {}
    for name in (PEER, NEW.format(LENGTHS[-1]), "golden"):
        if name == "golden":
            model.float()
        text = next(prompts(tokens, LENGTHS[-1]))
        sides = (
            ours(PromptEncoder(tokens, model), text)
            if name.startswith("new")
            else theirs(reference(tokens, model), text)
        )
        found[name] = torch.cat([sides[i][sides[i + 1].bool()] for i in (0, 2)])
    golden = found.pop("golden")
    return {name: error(rows, golden) for name, rows in found.items()}


def reference(tokens: Any, model: Any) -> Any:
    """Return the reference pipeline with nothing but the text parts."""
    from diffusers import SanaPipeline

    return SanaPipeline(tokenizer=tokens, text_encoder=model, vae=None, transformer=None, scheduler=None)


def each(encoder: PromptEncoder, texts: Iterator[str]) -> Any:
    """Encode the next of the prompts."""
    return ours(encoder, next(texts))


def ours(encoder: PromptEncoder, prompt: str) -> Any:
    """Encode a prompt and the default negative one."""
    positive = encoder.encode([prompt], COMPLEX_HUMAN_INSTRUCTION)
    negative = encoder.encode([""])
    return positive.embeds, positive.mask, negative.embeds, negative.mask


def theirs(pipe: Any, prompt: str) -> Any:
    """Encode the same with the reference."""
    return pipe.encode_prompt(
        prompt, True, negative_prompt="", device="cpu", complex_human_instruction=list(COMPLEX_HUMAN_INSTRUCTION)
    )


if __name__ == "__main__":
    main()
