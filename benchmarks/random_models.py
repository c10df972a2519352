"""Random models of the published shapes, made fast enough for a benchmark."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn

from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

LAYERS = 26
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CHUNK = 1 << 24
HEAD = "\n".join(COMPLEX_HUMAN_INSTRUCTION)


def words(seed: int, count: int = 80) -> list[str]:
    """Return words of the instruction in random order, to make prompts of."""
    chosen = [word for word in " ".join(COMPLEX_HUMAN_INSTRUCTION).lower().split() if word.isalpha()]
    return random.Random(seed).choices(chosen, k=count)


def prompts(tokens: Any, length: int) -> Iterator[str]:
    """Yield endless new prompts of so many tokens of their own, without the instruction's."""
    for seed in itertools.count():
        chosen = words(seed)
        while len(tokens(HEAD + " ".join(chosen)).input_ids) > len(tokens(HEAD).input_ids) - 1 + length:
            chosen.pop()
        yield " ".join(chosen)


def tokenizer() -> Any:
    """Return a Gemma-like tokenizer that knows the words of the instruction."""
    from transformers import GemmaTokenizer

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[*SPECIAL, *BYTES], show_progress=False, max_token_length=16
    )
    texts = " ".join(COMPLEX_HUMAN_INSTRUCTION)
    plain = "".join(mark if mark.isalpha() else " " for mark in texts)
    backend.train_from_iterator([plain, plain.lower(), texts.replace(" ", "")] * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True, add_eos_token=False
    )


def text_encoder(layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a language model of Gemma-2-2B's shapes, or the first of its layers, with random weights."""
    from transformers import Gemma2Config, Gemma2Model

    def make(vocabulary: int, layers: int) -> Any:
        config = Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        )
        return Gemma2Model(config)

    return filled(lambda: make(256000, layers), dtype, constants=make(8, 1))


def filled(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0, constants: nn.Module | None = None) -> Any:
    """Return a model made without memory, whose weights are then filled from one chunk of noise at random offsets.

    Its buffers, which are no weights, are those of `constants`, a small model of the same kind.
    """
    from transformers import Gemma2Model

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(CHUNK, generator=generator).to(dtype)
    with torch.device("meta"):
        model = make().to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5
            flat = weight.view(-1)
            for start in range(0, flat.numel(), CHUNK // 2):
                part = flat[start : start + CHUNK // 2]
                offset = int(torch.randint(CHUNK - part.numel() + 1, (1,), generator=generator))
                torch.mul(noise[offset : offset + part.numel()], scale, out=part)
            if "norm" in name and weight.ndim == 1 and not isinstance(model, Gemma2Model):
                weight.add_(1)  # Gemma adds it itself
    found = dict(constants.named_buffers()) if constants is not None else {}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            path, _, last = name.rpartition(".")
            model.get_submodule(path).register_buffer(last, found[name].to(buffer.dtype), persistent=False)
    return model.eval()
