"""A folder of the published size: Sana 0.6B at 512 px with its Gemma-2-2B, random weights, written by the reference.

Sharded, in a variant, loaded by both and drawn by both, then drawn by the command. About 7 GB on disk while it runs.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sana.apps.cli import main
from sana.cards import CARDS
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from tiny_model import tiny_tokenizer

CARD = CARDS["sana-0.6b-512"]
NEEDED = 12 * 10**9
PROMPT = "A cute 🐼 eating 🎋, ink drawing style"


def fill(module: nn.Module, seed: int) -> Any:
    """Give every weight of a large module a plausible scale, quickly: one block of noise, repeated."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim < 2 or "table" in name:
                weight.fill_(0.0 if name.endswith("bias") or "text" in name else 1.0)
                if "table" in name:
                    weight.copy_(noise[: weight.numel()].view_as(weight) * 0.1)
                continue
            tiles = -(-weight.numel() // len(noise))
            scale = weight[0].numel() ** -0.5
            weight.copy_((noise.repeat(tiles)[: weight.numel()] * scale).view_as(weight))
    return module.eval()


def distance(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    difference = (value.float() - reference.float()).square().mean().sqrt()
    return float(difference / reference.float().square().mean().sqrt())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, written by diffusers in bfloat16 shards of 1 GB."""
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    target = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(target).free < NEEDED:
        pytest.skip("not enough free disk for the full-size folder")
    with torch.device("meta"):
        empty = (
            diffusers.SanaTransformer2DModel(**CARD.transformer.to_dict()),
            diffusers.AutoencoderDC(**CARD.autoencoder.to_dict()),
            Gemma2Model(
                Gemma2Config(
                    vocab_size=256000,
                    hidden_size=2304,
                    intermediate_size=9216,
                    num_hidden_layers=26,
                    num_attention_heads=8,
                    num_key_value_heads=4,
                    head_dim=256,
                )
            ),
        )
    parts = [fill(part.to(torch.bfloat16).to_empty(device="cpu"), seed) for seed, part in enumerate(empty)]
    # Buffers that are in no file: computed by the constructors, so made again off the meta device.
    rotary = parts[2].rotary_emb
    parts[2].rotary_emb = type(rotary)(parts[2].config)
    pipe = diffusers.SanaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=parts[2],
        vae=parts[1],
        transformer=parts[0],
        scheduler=diffusers.DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )
    pipe.save_pretrained(target, variant="bf16", max_shard_size="1GB")
    fill_vocabulary(target / "tokenizer" / "tokenizer.json", parts[2].config.vocab_size)
    return target


def fill_vocabulary(file: Path, size: int) -> None:
    """Give a tokenizer as many tokens as its text encoder has: they are loaded together only if they fit."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])}
    vocabulary.update({f"<unused{number}>": number for number in range(size) if number not in taken})
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def all_threads() -> Iterator[None]:
    """Compute on all cores for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_python_and_the_command_draw_with_it_what_the_reference_draws(folder: Path, tmp_path: Path) -> None:
    import diffusers

    import sana

    shards = list((folder / "text_encoder").glob("model.bf16-*-of-*.safetensors"))
    assert len(shards) >= 5
    pipes = [
        kind.from_pretrained(folder, variant="bf16", torch_dtype=torch.bfloat16)
        for kind in (sana.SanaPipeline, diffusers.SanaPipeline)
    ]
    ours, theirs = pipes
    assert sum(p.numel() for p in ours.transformer.parameters()) == CARD.params
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    encode = {"max_sequence_length": 60, "complex_human_instruction": list(COMPLEX_HUMAN_INSTRUCTION)}
    with torch.no_grad():
        texts = [pipe.encode_prompt(PROMPT, **encode) for pipe in pipes]
    embeds, mask, negative, negative_mask = texts[1]
    assert torch.equal(texts[0][1], mask)
    # 26 layers in bfloat16; in float32 both agree to the last bits (tests/parity/test_text.py).
    assert distance(texts[0][0][mask.bool()], embeds[mask.bool()]) < 4e-2

    given = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
    }
    options = {"height": 512, "width": 512, "num_inference_steps": 2, "output_type": "latent"}
    latents = [pipe(generator=torch.Generator().manual_seed(42), **given, **options).images for pipe in pipes]
    x = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    time = torch.tensor([500.0])
    with torch.no_grad():
        one, two = (pipe.transformer(x, embeds, time, encoder_attention_mask=mask)[0] for pipe in pipes)
        exact = ours.transformer.float()(x.float(), embeds.float(), time, encoder_attention_mask=mask)[0]
    # The rule for half precision: no further from float32 than the reference, and from it no further than that noise.
    noise = distance(two, exact)
    assert distance(one, exact) <= 1.2 * noise
    assert distance(one, two) <= noise
    assert distance(*latents) <= 1.5 * noise
    del pipes, ours, theirs, pipe

    words = [
        PROMPT,
        "-m",
        str(folder),
        "--dtype",
        "bfloat16",
        "--steps",
        "1",
        "--seed",
        "42",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert main(words) == 0
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (512, 512, 3)
    assert picture.std() > 0
