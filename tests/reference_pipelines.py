"""The reference's pipelines with our weights, a run of either side with the latents of every step, and the gates."""

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

LATENT_GATE = 1e-5
PSNR_GATE = 90.0
OFF_BY_ONE_GATE = 1e-3

PROMPTS = ["a red fox in the snow", "Two CATS, sleeping!", "一只 🐼 eating 🎋"]
SIZE = {"height": 128, "width": 96, "use_resolution_binning": False}


def module_of(cls: Any, ours: Any) -> Any:
    """Return the reference's module with our configuration and weights."""
    model = cls(**ours.config.to_dict())
    model.load_state_dict(ours.state_dict(), strict=True)
    return model.to(ours.dtype).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def oracle_of(pipe: Any, scheduler: Any = None, **changes: Any) -> Any:
    """Return the reference pipeline of the same name with the same weights, tokenizer and settings."""
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    parts = {
        "tokenizer": copy.deepcopy(pipe.tokenizer),
        "text_encoder": pipe.text_encoder,
        "vae": module_of(diffusers.AutoencoderDC, pipe.vae),
        "transformer": module_of(diffusers.SanaTransformer2DModel, pipe.transformer),
        "scheduler": scheduler or getattr(diffusers, type(pipe.scheduler).__name__).from_config(config),
    }
    if "controlnet" in pipe.components:
        parts["controlnet"] = module_of(diffusers.SanaControlNetModel, pipe.controlnet)
    return quiet(getattr(diffusers, type(pipe).__name__)(**parts, **changes))


@dataclass
class Run:
    latents: list[Tensor]
    timesteps: list[float]
    images: np.ndarray


def run(pipe: Any, **arguments: Any) -> Run:
    """Call a pipeline, keeping the latents of every step."""
    latents, timesteps = [], []

    def keep(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert index == len(latents)
        latents.append(tensors["latents"].clone())
        timesteps.append(float(timestep))
        return tensors

    images = pipe(**arguments, callback_on_step_end=keep, output_type="np").images
    return Run(latents, timesteps, np.asarray(images))


def rms_rel(ours: Tensor, oracle: Tensor) -> float:
    return float((ours - oracle).double().pow(2).mean().sqrt() / oracle.double().pow(2).mean().sqrt())


def assert_same(ours: Run, oracle: Run) -> None:
    assert ours.timesteps == oracle.timesteps
    assert len(ours.latents) == len(oracle.latents)
    for mine, theirs in zip(ours.latents, oracle.latents, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert rms_rel(mine, theirs) < LATENT_GATE
    assert ours.images.shape == oracle.images.shape
    mean_square = float(((ours.images - oracle.images).astype(np.float64) ** 2).mean())
    assert mean_square == 0 or -10 * np.log10(mean_square) >= PSNR_GATE
    ours_8, oracle_8 = (np.round(run.images * 255).astype(np.int64) for run in (ours, oracle))
    assert np.abs(ours_8 - oracle_8).max() <= 1
    assert (ours_8 != oracle_8).mean() <= OFF_BY_ONE_GATE
    assert oracle.images.std() > 0.02, "a flat picture would prove nothing"


def seeded(seed: int = 11) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
