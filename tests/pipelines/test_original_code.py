"""The documented snippet of the original code runs, on the same loop, with the numbers of this package's pipelines."""

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.folder import save_parts
from sana.checkpoints.original.settings import OriginalConfig, read_original_config
from sana.checkpoints.schedulers import DPMSolverMultistepScheduler, SCMScheduler
from sana.config import TransformerConfig
from sana.engine.parts import Parts
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.pipelines import SanaPAGPipeline
from sana.pipelines import SanaPipeline as FolderPipeline
from sana.pipelines import SanaSprintPipeline as FolderSprint
from sana.pipelines.original import SanaPipeline, SanaSprintPipeline, save_image
from tiny_model import make_tiny_parts

# Written anew for the tests: keys and values as the published files have them, sizes of the tiny model.
YAML = """
data: {data_dir: [data/toy_data], image_size: 256, load_vae_feat: false, type: SanaWebDatasetMS}
model:
  model: SanaMS_1600M_P1_D2
  image_size: 256
  mixed_precision: fp16
  fp32_attention: true
  load_from:
  aspect_ratio_type: ASPECT_RATIO_1024
  multi_scale: true
  mlp_acts: [silu, silu, null]
  mlp_ratio: 2.5
  use_pe: false
  qk_norm: false
  pag_applied_layers: [1]
vae: {vae_type: dc-ae, vae_pretrained: mit-han-lab/dc-ae-f32c32-sana-1.0, scale_factor: 0.41407}
text_encoder:
  text_encoder_name: gemma-2-2b-it
  model_max_length: 64
  chi_prompt: ['Say "it" well: ']
scheduler: {predict_flow_v: true, noise_schedule: linear_flow, flow_shift: 4.0, vis_sampler: flow_dpm-solver}
train:
  seed: 1
  train_batch_size: 64
  gradient_clip: 0.1
  optimizer: {betas: [0.9, 0.999, 0.9999], eps: [1.0e-30, 1.0e-16], lr: 0.0001, type: CAMEWrapper, weight_decay: 0.0}
  lr_schedule_args: {num_warmup_steps: 2000}
  save_model_steps: 500
"""
PROMPT = 'a cyberpunk cat with a neon sign that says "Sana"'
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "use_resolution_binning": False}
CODE = """
from torchvision.utils import save_image

device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
generator = torch.Generator(device=device).manual_seed(42)

sana = SanaPipeline("configs/sana_config/1024ms/Sana_1600M_img1024.yaml")
sana.from_pretrained("hf://Efficient-Large-Model/Sana_1600M_1024px_BF16/checkpoints/Sana_1600M_1024px_BF16.pth")
prompt = 'a cyberpunk cat with a neon sign that says "Sana"'

image = sana(
    prompt=prompt,
    height=1024,
    width=1024,
    guidance_scale=5.0,
    pag_guidance_scale=2.0,
    num_inference_steps=18,
    generator=generator,
)
save_image(image, 'output/sana.png', nrow=1, normalize=True, value_range=(-1, 1))
"""
"""The documented lines after their imports."""


def made(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = YAML, **changes: Any) -> tuple[Path, Path, Parts]:
    """Save a tiny model, its transformer as an original file too, and a YAML; return both files and the model."""
    parts = make_tiny_parts(**changes)
    save_parts(folder / "model", parts.components)
    (folder / "model" / "checkpoints").mkdir()
    file = folder / "model" / "checkpoints" / "mine.safetensors"
    convert(Conversion(source=folder / "model", target=file))
    (folder / "mine.yaml").write_text(text)
    transformer = TransformerConfig.from_dict(parts.transformer.config.to_dict())

    def tiny(path: str | Path) -> OriginalConfig:
        """Put the tiny widths in place of the published ones, for which the names in a YAML stand."""
        return dataclasses.replace(
            read_original_config(path), transformer=transformer, pag_layers=("transformer_blocks.1",)
        )

    monkeypatch.setattr("sana.pipelines.original.read_original_config", tiny)
    return folder / "mine.yaml", file, parts


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(42)


def test_the_documented_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file, _ = made(tmp_path, monkeypatch, sample_size=32)
    monkeypatch.chdir(tmp_path)
    torchvision, utils = types.ModuleType("torchvision"), types.ModuleType("torchvision.utils")
    utils.save_image = save_image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.utils", utils)
    code = re.sub(r'"hf://[^"]*"', repr(str(file)), CODE).replace("num_inference_steps=18", "num_inference_steps=1")
    names: dict[str, Any] = {"torch": torch, "SanaPipeline": SanaPipeline}
    exec(code, names)
    assert names["image"].shape == (1, 3, 1024, 1024)
    assert names["image"].min() >= -1
    assert names["image"].max() <= 1
    with Image.open("output/sana.png") as picture:
        assert picture.size == (1024, 1024)


def test_it_gives_the_numbers_of_the_documented_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml, file, parts = made(tmp_path, monkeypatch)
    face = SanaPipeline(yaml, dtype="float32")
    assert face.from_pretrained(file) is None  # type: ignore[func-returns-value]
    assert face.pipe.scheduler.config["flow_shift"] == 4.0
    assert face.pipe.pag_applied_layers == ["transformer_blocks.1"]
    image = face(PROMPT, guidance_scale=5.0, pag_guidance_scale=2.0, generator=seeded(), **SMALL)
    parts.scheduler = DPMSolverMultistepScheduler(flow_shift=4.0)
    options = {
        **SMALL,
        "max_sequence_length": 64,
        "complex_human_instruction": ['Say "it" well: '],
        "output_type": "pt",
    }
    perturbed = SanaPAGPipeline(**parts.components, pag_applied_layers="transformer_blocks.1")
    expected = perturbed(PROMPT, guidance_scale=5.0, pag_scale=2.0, generator=seeded(), **options).images
    assert torch.equal(image, expected * 2 - 1)
    plain = FolderPipeline(**parts.components)(PROMPT, guidance_scale=4.5, generator=seeded(), **options).images
    # As in the original, it perturbs above 1 only.
    assert torch.equal(face(PROMPT, generator=seeded(), **SMALL), plain * 2 - 1)
    assert torch.equal(face(PROMPT, pag_guidance_scale=1.0, generator=seeded(), **SMALL), plain * 2 - 1)
    assert not torch.equal(image, plain * 2 - 1)


def test_every_prompt_gets_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml, file, _ = made(tmp_path, monkeypatch)
    face = SanaPipeline(yaml)
    face.from_pretrained(file)
    images = face(["a cat", "a dog"], num_images_per_prompt=2, generator=seeded(), **SMALL)
    assert images.shape == (4, 3, 64, 64)


def test_sprint_as_in_the_original_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = YAML.replace("SanaMS_1600M", "SanaMSCM_1600M").replace("qk_norm: false", "qk_norm: true\n  cfg_embed: true")
    text = text.replace("flow_shift: 4.0, vis_sampler: flow_dpm-solver", "vis_sampler: scm, sigma_data: 0.5")
    yaml, file, parts = made(tmp_path, monkeypatch, text, qk_norm="rms_norm_across_heads", guidance_embeds=True)
    face = SanaSprintPipeline(yaml, dtype="float32")
    face.from_pretrained(file)
    image = face((PROMPT,), generator=seeded(), **SMALL)  # type: ignore[arg-type]
    parts.scheduler = SCMScheduler()
    options = {
        **SMALL,
        "max_sequence_length": 64,
        "complex_human_instruction": ['Say "it" well: '],
        "output_type": "pt",
    }
    expected = FolderSprint(**parts.components)([PROMPT], generator=seeded(), **options).images
    assert torch.equal(image, expected * 2 - 1)
    with pytest.raises(InvalidInput, match="a model for SanaSprintPipeline; use that"):
        SanaPipeline(yaml)


def test_what_is_wrong_is_said_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml, _, _ = made(tmp_path, monkeypatch)
    face = SanaPipeline(yaml)
    with pytest.raises(InvalidInput, match="Call from_pretrained on this pipeline first"):
        face(PROMPT)
    with pytest.raises(InvalidInput, match="no reference to a file on the hub"):
        face.from_pretrained("hf://somebody")
    with pytest.raises(ModelNotFound, match="There is no"):
        face.from_pretrained(str(tmp_path / "nowhere.pth"))
    other = make_tiny_parts(num_layers=3)
    save_parts(tmp_path / "other", other.components)
    with pytest.raises(CheckpointError, match="not the model of the configuration: its num_layers is 3, there it is 2"):
        face.from_pretrained(tmp_path / "other")
    with pytest.raises(ModelNotFound, match="no published one of that name"):
        SanaPipeline("configs/Sana_1600M_img102.yaml")
    face.from_pretrained(tmp_path / "model")
    assert face.pipe is not None


def test_pictures_are_saved_as_the_documented_function_does(tmp_path: Path) -> None:
    image = torch.linspace(-1, 1, 3 * 4 * 5).view(1, 3, 4, 5)
    save_image(image, tmp_path / "new" / "one.png", nrow=1, normalize=True, value_range=(-1, 1))
    with Image.open(tmp_path / "new" / "one.png") as picture:
        assert picture.size == (5, 4)
        assert picture.getpixel((0, 0))[0] == 0
        assert picture.getpixel((4, 3))[2] == 255
    save_image(image.expand(3, -1, -1, -1), tmp_path / "grid.png", nrow=2)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (2 * 7 + 2, 2 * 6 + 2)
    save_image(image[0], tmp_path / "plain.png", normalize=True)
    for wrong in (torch.zeros(2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(0, 3, 2, 2)):
        with pytest.raises(InvalidInput, match="A picture has the shape"):
            save_image(wrong, tmp_path / "x.png")


def test_the_weights_of_another_model_are_named_by_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, _ = made(tmp_path, monkeypatch)
    monkeypatch.setattr("sana.pipelines.original.read_original_config", read_original_config)
    monkeypatch.setattr("sana.pipelines.original.load_examined", None)  # nothing is built for that
    with pytest.raises(CheckpointError, match=r"mine.safetensors is not the model of the configuration: its \w+ is"):
        SanaPipeline("Sana_1600M_img1024.yaml").from_pretrained(file)


def test_no_picture_is_saved_of_what_is_none(tmp_path: Path) -> None:
    for tensor, options in ((torch.full((3, 4, 4), torch.nan), {}), (torch.zeros(3, 4, 4), {"nrow": 0})):
        with pytest.raises(InvalidInput):
            save_image(tensor, tmp_path / "x.png", **options)
    assert not (tmp_path / "x.png").exists()
