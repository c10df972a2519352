"""Random parts of a SANA pipeline, small enough to save and load hundreds of times."""

from pathlib import Path
from typing import Any

import torch

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.schedulers import DPMSolverMultistepScheduler

FILE = "diffusion_pytorch_model.safetensors"
INDEX = FILE + ".index.json"
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 8,
    "sample_size": 32,
}
AUTOENCODER: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
SCHEDULER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def stir(model: Any, seed: int = 0) -> Any:
    """Give every parameter a value that no initialisation would give it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + 0.1)
    return model.eval()


def transformer(**changes: Any) -> SanaTransformer2DModel:
    made: SanaTransformer2DModel = stir(SanaTransformer2DModel(**{**TRANSFORMER, **changes}))
    return made


def autoencoder(**changes: Any) -> AutoencoderDC:
    made: AutoencoderDC = stir(AutoencoderDC(**{**AUTOENCODER, **changes}), seed=1)
    return made


def tokenizer() -> Any:
    from transformers import GemmaTokenizer

    return GemmaTokenizer()


def text_encoder() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
    )
    return stir(Gemma2Model(config), seed=2)


def parts() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": autoencoder(),
        "transformer": transformer(),
        "scheduler": DPMSolverMultistepScheduler(**SCHEDULER),
    }


def load(folder: Path, **options: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel.from_pretrained(folder, **options)


def same(one: Any, other: Any) -> bool:
    """Tell whether two modules hold the same tensors, bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
