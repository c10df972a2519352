"""A Gemma-like tokenizer of some hundred tokens and a random Gemma-2 of some thousand weights, made in a blink."""

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
INSTRUCTION = ("Describe the user prompt in detail:", "- Add colors and shapes to it.", "User Prompt: ")
SENTENCES = [
    *INSTRUCTION,
    "User Prompt: a cat sleeping on a sunny windowsill, a photo of a red fox in the snow",
    "User Prompt: a busy city street at dusk with a bus and street lamps, a small house",
]
PROMPTS = [
    "a Cat sleeping ",
    "",
    "RED fox, in the snow; a photo of a busy street at dusk with street lamps",
    "一只猫在窗台上睡觉",
    "🦊 in the ❄️",
    "-- a house",
    "ÉCOLE été ß İstanbul",
]


def tiny_tokenizer(style: str = "words", *, bos: bool = True, eos: bool = False) -> Any:
    """Make a tokenizer. `words` merges a space into the next word, `phrases` merges across words, `letters` nothing."""
    from transformers import GemmaTokenizer

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    if style == "words":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    size = {"words": 500, "phrases": 500, "letters": 0}[style]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *BYTES], show_progress=False, max_token_length=16
    )
    backend.train_from_iterator(SENTENCES * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=bos,
        add_eos_token=eos,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )


def tiny_gemma(vocab_size: int, *, sliding_window: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Make a Gemma-2 of 4 layers, 4 heads sharing 2 key/value heads, with soft-capping that bites and lively norms."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        sliding_window=sliding_window,
        max_position_embeddings=2048,
    )
    model = Gemma2Model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if "norm" in name else 0.4)
    return model.to(dtype).eval()
