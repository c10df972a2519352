"""Original files made of our own modules: no published weights can be reached where the tests run."""

from pathlib import Path
from typing import Any

import torch
from tiny_pipeline import autoencoder, stir, transformer
from torch import Tensor

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.original.architecture import keys_of_autoencoder
from sana.checkpoints.original.examine import original_tensors
from sana.checkpoints.original.keymap import controlnet_keys, transformer_keys

TOLD: dict[str, Any] = {"attention_head_dim": 8, "num_cross_attention_heads": 2}
"""What the tensors of the tiny transformer leave open, besides what they leave open of every one."""
FAMILIES: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.0 of 512 px": {"sample_size": 16},
    "2K": {"sample_size": 64, "interpolation_scale": 1.0},
    "4K": {"sample_size": 128, "interpolation_scale": 2.0},
    "1.5": {"qk_norm": "rms_norm_across_heads"},
    "sprint": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
}
"""Fields of the transformer by which the published families differ."""


def small_autoencoder(kind: str) -> AutoencoderDC:
    """Return a narrow DC-AE in the layout of a published kind, f32-sana, f32-in, f64-mix or f128-in."""
    compression, _, pictures = kind.partition("-")
    stages = {"f32": 6, "f64": 7, "f128": 8}[compression]
    widths = (4,) * (stages - 3) + (8, 8, 8)
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3)
    fields: dict[str, Any] = {
        "latent_channels": 4,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "attention_head_dim": 4,
        "decoder_conv_act_fn": "relu",
    }
    if pictures == "sana":
        scales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
        fields |= {"encoder_layers_per_block": (1,) * 6, "decoder_layers_per_block": (2,) * 6}
        fields |= {"encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales}
        fields |= {"upsample_block_type": "interpolate", "downsample_block_type": "Conv", "scaling_factor": 0.41407}
        return autoencoder(**{**fields, "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"})
    empty: tuple[tuple[int, ...], ...] = ((),) * stages
    factor = {"f32-in": 0.3189, "f32-mix": 0.4552, "f64-mix": 0.4538, "f128-in": 0.4883}[kind]
    fields |= {
        "encoder_block_out_channels": (2, *widths[1:]),
        "decoder_block_out_channels": (2, *widths[1:]),
        "encoder_layers_per_block": (0, *(1,) * (stages - 1)),
        "decoder_layers_per_block": (0, *(2,) * (stages - 1)),
        "encoder_qkv_multiscales": empty,
        "decoder_qkv_multiscales": empty,
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (stages - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (stages - 3),
        "scaling_factor": factor,
    }
    return autoencoder(**fields)


def original_state(model: Any) -> dict[str, Tensor]:
    """Return the tensors of the original file of a transformer or an autoencoder."""
    if isinstance(model, AutoencoderDC):
        return dict(original_tensors(model.state_dict(), keys_of_autoencoder(model.config), model.config))
    state = dict(original_tensors(model.state_dict(), transformer_keys(model.config.guidance_embeds), model.config))
    caption = state["y_embedder.y_embedding"]
    state["y_embedder.y_embedding"] = torch.randn(caption.shape, generator=torch.Generator().manual_seed(5))
    return state


def controlled_state(base: Any, branch: SanaControlNetModel) -> dict[str, Tensor]:
    """Return the tensors of the one original file of a transformer and its control branch."""
    state = original_state(base)
    control = dict(original_tensors(branch.state_dict(), controlnet_keys(), branch.config))
    return {**state, **{name: tensor for name, tensor in control.items() if name.startswith("controlnet.")}}


def tiny_branch(base: Any) -> SanaControlNetModel:
    """Return a control branch of one block whose projections are not zero, beside a transformer of two."""
    branch = SanaControlNetModel.from_transformer(base, num_layers=1)
    own = {name for name in branch.state_dict() if name.startswith(("input_block", "controlnet_blocks"))}
    kept = {name: tensor.clone() for name, tensor in branch.state_dict().items() if name not in own}
    stir(branch, seed=7).load_state_dict(kept, strict=False)
    return branch


def save_pth(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """Save as the original code does, nested beside what training needs."""
    torch.save({"state_dict": state, "epoch": 1, "step": 7, **more}, path)
    return path


def tiny_original(path: Path, **changes: Any) -> tuple[Path, Any]:
    """Save a tiny transformer as an original file; return its path and the model."""
    model = transformer(**changes)
    return save_pth(path, original_state(model)), model
