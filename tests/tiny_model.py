"""A complete random SANA model of our own classes: two layers, 32 times compression, a Gemma-2 and its tokenizer."""

import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn

from sana import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)
from sana.engine.parts import Parts
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

WIDTH = 32
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def lively(module: nn.Module, seed: int) -> Any:
    """Redraw norms and tables, which are trivial at initialisation, and return the module in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "norm" in name or "table" in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(weight + 0.3 * noise)
    return module.eval()


def tiny_transformer(**changes: Any) -> SanaTransformer2DModel:
    """Return two layers of width 32 over 4 latent channels; 256 px, unless `sample_size` says otherwise."""
    torch.manual_seed(1)
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "sample_size": 8,
    }
    model: SanaTransformer2DModel = lively(SanaTransformer2DModel(**{**settings, **changes}), 1)
    return model


def tiny_vae() -> AutoencoderDC:
    """Return six narrow stages in the published SANA layout."""
    torch.manual_seed(2)
    widths = (8, 8, 8, 16, 16, 16)
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    model: AutoencoderDC = lively(
        AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41407,
        ),
        2,
    )
    return model


def tiny_tokenizer() -> Any:
    """Return a Gemma tokenizer whose merges take a space into the next word, as the published one does."""
    from transformers import GemmaTokenizer

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False, max_token_length=16
    )
    backend.train_from_iterator([*COMPLEX_HUMAN_INSTRUCTION, "User Prompt: a red fox in the snow"] * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


def tiny_text_encoder(vocab_size: int) -> Any:
    """Return a two-layer Gemma-2 of width 32."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4096,
        max_position_embeddings=2048,
    )
    model = Gemma2Model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.3 if "norm" in name else 0.2)
    return model.eval()


def make_tiny_parts(**changes: Any) -> Parts:
    """Return a fresh model; `changes` are fields of the transformer."""
    tokenizer = tiny_tokenizer()
    return Parts(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(len(tokenizer)),
        vae=tiny_vae(),
        transformer=tiny_transformer(**changes),
        scheduler=DPMSolverMultistepScheduler(flow_shift=3.0),
        name="tiny",
    )


def make_tiny_sprint(**changes: Any) -> Parts:
    """Return a fresh SANA-Sprint model: guidance embedded, queries and keys normalised, its own scheduler."""
    parts = make_tiny_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads", **changes)
    parts.scheduler = SCMScheduler()
    return parts


def tiny_controlnet(transformer: Any, seed: int = 4) -> Any:
    """Return a control network for a tiny transformer, with projections that are not zero."""
    torch.manual_seed(seed)
    branch = SanaControlNetModel.from_transformer(transformer, num_layers=len(transformer.transformer_blocks) - 1)
    with torch.no_grad():
        for name, weight in branch.named_parameters():
            if name.startswith(("input_block.", "controlnet_blocks.")):
                weight.normal_(std=0.2)
            elif "transformer_blocks" in name:
                weight.mul_(1.1)
    return branch.eval()
