"""The documented members of pipelines besides the calls. Oracle: diffusers 0.42.1."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from reference_pipelines import PROMPTS, SIZE, oracle_of, quiet, seeded
from sana import SanaControlNetPipeline, SanaPAGPipeline, SanaPipeline, SanaSprintImg2ImgPipeline, SanaSprintPipeline
from sana.engine.resolution import bins_of
from sana.errors import CheckpointError, InvalidInput
from tiny_model import make_tiny_parts, tiny_controlnet

KINDS = (SanaPipeline, SanaPAGPipeline, SanaSprintPipeline, SanaSprintImg2ImgPipeline, SanaControlNetPipeline)
CONTRACT = (
    *("from_pretrained", "save_pretrained", "from_pipe", "to", "components", "device", "dtype", "vae_scale_factor"),
    *("image_processor", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"),
    *("enable_attention_slicing", "disable_attention_slicing", "set_progress_bar_config", "progress_bar"),
    *("maybe_free_model_hooks", "remove_all_hooks", "hf_device_map", "reset_device_map", "register_modules"),
    *(
        "download",
        "push_to_hub",
        "load_config",
        "config",
        "name_or_path",
        "guidance_scale",
        "num_timesteps",
        "interrupt",
    ),
)


@pytest.fixture(scope="module")
def pipe() -> SanaPipeline:
    return quiet(SanaPipeline(**make_tiny_parts().components))


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_has_the_documented_members(kind: Any) -> None:
    assert [name for name in CONTRACT if not hasattr(kind, name)] == []


def test_the_configuration_names_the_parts_as_the_reference_does(pipe: SanaPipeline, tmp_path: Path) -> None:
    assert pipe.config == dict(oracle_of(pipe).config)
    assert SanaPipeline(*[None] * 5).config["vae"] == (None, None)
    pipe.save_pretrained(tmp_path)
    stored = SanaPipeline.load_config(tmp_path)
    assert {name: tuple(stored[name]) for name in pipe.components} == pipe.config
    assert SanaPipeline.download(tmp_path) == str(tmp_path)


def test_modules_are_registered(pipe: SanaPipeline) -> None:
    other = SanaPipeline.from_pipe(pipe)
    other.register_modules(vae=None)
    assert (other.vae, other.transformer) == (None, pipe.transformer)
    with pytest.raises(InvalidInput, match="register_modules has no argument 'vea'"):
        other.register_modules(vea=None)


def test_the_image_processor_is_the_reference_s(pipe: SanaPipeline) -> None:
    ours, theirs = pipe.image_processor, oracle_of(pipe).image_processor
    made = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    picture, numbers = Image.fromarray(made), made.astype(np.float32) / 255
    tensor = torch.from_numpy(numbers).permute(2, 0, 1)
    for image in (picture, [picture, picture], numbers[None], tensor[None], [tensor]):
        for size in ({}, {"height": 64, "width": 32}):
            torch.testing.assert_close(ours.preprocess(image, **size), theirs.preprocess(image, **size))
    decoded = 1.2 * torch.randn(2, 3, 40, 50, generator=seeded())
    assert np.array_equal(ours.postprocess(decoded, "np"), theirs.postprocess(decoded, "np"))
    for mine, other in zip(ours.postprocess(decoded), theirs.postprocess(decoded), strict=True):
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1
    assert ours.postprocess(decoded, "latent") is decoded
    torch.testing.assert_close(
        ours.resize_and_crop_tensor(decoded, 30, 33), theirs.resize_and_crop_tensor(decoded, 30, 33)
    )
    bins = {str(key): value for key, value in bins_of(32).items()}
    assert ours.classify_height_width_bin(720, 1280, bins) == theirs.classify_height_width_bin(720, 1280, bins)
    assert np.array_equal(np.asarray(pipe.numpy_to_pil(numbers)[0]), made)
    for bad, message in ((Image.new("RGB", (20, 90)), "no side of 32"), ("x.png", "no side of 32")):
        with pytest.raises(InvalidInput, match=message):
            ours.preprocess(bad)
    with pytest.raises(InvalidInput, match="only support pytorch tensor"):
        ours.postprocess(made)


def test_places_and_hooks(pipe: SanaPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert pipe.hf_device_map == {"text_encoder": "cpu", "vae": "cpu", "transformer": "cpu"}
    network = tiny_controlnet(pipe.transformer)
    assert SanaControlNetPipeline.from_pipe(pipe, controlnet=[network]).hf_device_map["controlnet"] == "cpu"
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "latent", **SIZE}
    plain = pipe(generator=seeded(), **call).images
    pipe.save_pretrained(tmp_path)
    for switch in ("enable_model_cpu_offload", "enable_group_offload"):
        saving = quiet(SanaPipeline.from_pretrained(tmp_path))
        getattr(saving, switch)("cpu") if switch.endswith("group_offload") else getattr(saving, switch)(device="cpu")
        assert torch.equal(saving(generator=seeded(), **call).images, plain)
        saving.maybe_free_model_hooks()
        assert all(weight.is_meta for weight in saving.transformer.parameters())
        assert saving.hf_device_map["transformer"] == "cpu"
        saving.reset_device_map()
        assert not any(weight.is_meta for weight in saving.transformer.parameters())
        assert torch.equal(saving(generator=seeded(), **call).images, plain)
    with caplog.at_level(logging.WARNING):
        pipe.enable_attention_slicing()
    assert "no effect" in caplog.text
    for bad in ({"offload_type": "layers"}, {"offload_device": "meta"}, {"streams": True}):
        with pytest.raises(InvalidInput):
            pipe.enable_group_offload("cpu", **bad)
    assert hasattr(diffusers.SanaPipeline, "enable_group_offload")


def test_push_to_hub_saves_what_can_be_loaded(pipe: SanaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo: str, **options: Any) -> Any:
            seen.update(repo=repo, **options)
            return SimpleNamespace(repo_id=repo)

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.safetensors")}
            seen.update(files=files, message=commit_message)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr("sana.checkpoints.hub.HfApi", Api)
    assert pipe.push_to_hub("me/mine", private=True, commit_message="first", variant="bf16").endswith("/commit/1")
    assert (seen["repo"], seen["private"], seen["message"]) == ("me/mine", True, "first")
    assert "transformer/diffusion_pytorch_model.bf16.safetensors" in seen["files"]
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError, match=r"'me/mine' could not be written on the hub .*hf auth login"):
        pipe.push_to_hub("me/mine")
