"""Adapters against PEFT on diffusers' transformer: same weights, same answers, files both ways."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from sana.checkpoints.lora.files import read_lora
from sana.checkpoints.lora.writing import save_lora
from sana.engine.adapters import Adapters
from sana.models.lora import targets
from tiny_lora import EVERYWHERE, off, random_lora, velocity
from tiny_model import tiny_transformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),  # it takes biases for projections
]

GATE = 2e-6
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["to_q", "to_k", "to_v"]},
    "everywhere": {"target_modules": list(EVERYWHERE)},
    "alpha": {"lora_alpha": 7, "target_modules": ["to_q", "to_out.0"]},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 2, "target_modules": ["to_q", "conv_point"]},
    "bias": {"lora_bias": True, "target_modules": ["attn2.to_q", "conv_inverted"]},
    "dora": {"use_dora": True, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    "dora everywhere": {"use_dora": True, "lora_alpha": 9, "target_modules": list(EVERYWHERE)},
    "patterns": {
        "target_modules": ["to_q", "conv_point", "proj_out"],
        "rank_pattern": {"transformer_blocks.1.attn1.to_q": 2, "proj_out": 6},
        "alpha_pattern": {"conv_point": 3, "^transformer_blocks.0.attn2.to_q": 12},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patch": {"patch_size": 2},
    "sprint": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
}


def pair(**changes: Any) -> tuple[Any, Any]:
    """Return our transformer and the reference's with the same weights."""
    ours = tiny_transformer(**changes)
    reference = diffusers.SanaTransformer2DModel(**{**ours.config.to_dict(), **changes}).eval()
    reference.load_state_dict(ours.state_dict())
    return ours, reference


def enliven(reference: Any, name: str, seed: int) -> None:
    """Redraw an adapter, whose fresh up-projections are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in reference.named_parameters():
            if name in key.split("."):
                noise = 0.2 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor * (1 + noise) if "magnitude" in key else noise)


def add(reference: Any, name: str, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    reference.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, **config}), name)
    enliven(reference, name, seed)
    return {f"transformer.{k}": v.clone() for k, v in get_peft_model_state_dict(reference, adapter_name=name).items()}


def settings(reference: Any, name: str) -> dict[str, Any]:
    told: dict[str, Any] = reference.peft_config[name].to_dict()
    return told


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_one_adapter(config: str, kind: str) -> None:
    ours, reference = pair(**MODELS[kind])
    tensors = add(reference, "a", CONFIGS[config])
    adapters = Adapters(ours)
    report = adapters.load(tensors, "a", config=settings(reference, "a"))
    assert report.unmatched == ()
    assert len(report.matched) == sum("lora_A" in name for name in tensors)
    expected = velocity(reference)
    assert off(velocity(ours), expected) < GATE
    if "bias" not in config:
        adapters.fuse()
        assert off(velocity(ours), expected) < GATE


@pytest.mark.parametrize("config", ["everywhere", "dora everywhere"])
def test_the_documented_scale(config: str) -> None:
    ours, reference = pair()
    adapters = Adapters(ours)
    adapters.load(add(reference, "a", CONFIGS[config]), "a", config=settings(reference, "a"))
    for scale in (0.5, 1.7, -1.0):
        with adapters.using(None, scale), torch.no_grad():
            expected = reference(
                torch.ones(1, 4, 8, 8) / 3,
                encoder_hidden_states=torch.ones(1, 3, 32),
                timestep=torch.tensor([50.0]),
                attention_kwargs={"scale": scale},
            ).sample
            found = ours(torch.ones(1, 4, 8, 8) / 3, torch.ones(1, 3, 32), torch.tensor([50.0])).sample
        assert off(found, expected) < GATE


@pytest.mark.parametrize(("first", "second"), [("everywhere", "alpha"), ("dora", "everywhere"), ("alpha", "dora")])
def test_several_with_weights_and_fused(first: str, second: str) -> None:
    ours, reference = pair()
    adapters = Adapters(ours)
    for name, config, seed in (("a", first, 1), ("b", second, 2)):
        tensors = add(reference, name, CONFIGS[config], seed)
        adapters.load(tensors, name, config=settings(reference, name))
    assert reference.active_adapters() == list(adapters.active) == ["b"]
    assert off(velocity(ours), velocity(reference)) < GATE
    reference.set_adapters(["a", "b"], [0.7, 1.3])
    adapters.set({"a": 0.7, "b": 1.3})
    both = velocity(ours)
    assert off(both, velocity(reference)) < GATE
    reference.fuse_lora(lora_scale=0.8)
    adapters.fuse(scale=0.8)
    assert off(velocity(ours), velocity(reference)) < GATE
    # The reference keeps the scale of the fusing afterwards; here all is as it was, bit by bit.
    reference.unfuse_lora()
    adapters.unfuse()
    assert torch.equal(velocity(ours), both)
    assert off(velocity(reference), both) > 1e-3


def test_weights_of_blocks() -> None:
    ours, reference = pair()
    adapters = Adapters(ours)
    adapters.load(add(reference, "a", CONFIGS["attention"]), "a")
    weights = {"transformer_blocks.1": 0.25, "transformer_blocks.0.attn2": 0.0}
    # The reference looks for blocks of UNets where a layer is not named, so all of them are.
    reference.set_adapters(["a"], [{**weights, "transformer_blocks.0": 1.0}])
    reference.set_adapters(["a"], [{**weights, "transformer_blocks.0.attn1": 1.0}])
    adapters.set({"a": weights})
    assert off(velocity(ours), velocity(reference)) < GATE


def test_a_block_is_not_another_that_begins_with_its_number() -> None:
    """The reference takes "transformer_blocks.1" for 10 and 11 as well."""
    ours, reference = pair(num_layers=11)
    adapters = Adapters(ours)
    adapters.load(add(reference, "a", {"target_modules": ["attn1.to_q"]}), "a")
    weights = {f"transformer_blocks.{i}": float(i != 1) for i in range(11)}
    adapters.set({"a": weights})
    right = velocity(ours)
    adapters.set({"a": {f"transformer_blocks.{i}": float(i not in (1, 10)) for i in range(11)}})
    reference.set_adapters(["a"], [weights])
    assert off(velocity(ours), velocity(reference)) < GATE
    assert off(right, velocity(reference)) > 1e-4


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "bias"])
def test_what_we_write_the_reference_reads(config: str, tmp_path: Path) -> None:
    ours, source = pair()
    adapters = Adapters(ours)
    adapters.load(add(source, "a", CONFIGS[config]), "a", config=settings(source, "a"))
    adapters.save("a", tmp_path / "pytorch_lora_weights.safetensors")
    _, reference = pair()
    reference.load_lora_adapter(str(tmp_path), adapter_name="b", use_safetensors=True)
    assert off(velocity(ours), velocity(reference)) < GATE
    assert off(velocity(reference), velocity(source)) < GATE


@pytest.mark.parametrize("config", CONFIGS)
def test_what_the_reference_writes_we_read(config: str, tmp_path: Path) -> None:
    ours, reference = pair()
    add(reference, "a", CONFIGS[config])
    reference.save_lora_adapter(tmp_path, adapter_name="a")
    assert len(Adapters(ours).load(tmp_path).matched) > 0
    assert off(velocity(ours), velocity(reference)) < GATE


def test_the_folder_of_peft_with_its_settings(tmp_path: Path) -> None:
    ours, reference = pair()
    tensors = add(reference, "a", CONFIGS["patterns"])
    from safetensors.torch import save_file

    renamed = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    reference.peft_config["a"].save_pretrained(tmp_path)
    Adapters(ours).load(tmp_path)
    assert off(velocity(ours), velocity(reference)) < GATE


def test_settings_are_what_peft_would_write(tmp_path: Path) -> None:
    ours = tiny_transformer()
    tensors = random_lora(ours)
    file = tmp_path / "a.safetensors"
    save_lora(file, read_lora(tensors, targets(ours)).updates)
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in told.items()})
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 4, False)
    assert config.target_modules == set(targets(ours)) & {
        key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in tensors
    }


@pytest.mark.parametrize("config", ["attention", "dora everywhere"])
def test_gradients(config: str) -> None:
    ours, reference = pair()
    ours.requires_grad_(False)
    tensors = add(reference, "a", CONFIGS[config])
    adapters = Adapters(ours)
    adapters.load(tensors, "a", config=settings(reference, "a"))
    for update in adapters.updates("a").values():
        for tensor in update.tensors.values():
            tensor.requires_grad_()
    adapters.set({"a": 1.0})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for model in (ours, reference):
        model(
            latents, encoder_hidden_states=torch.ones(1, 3, 32), timestep=torch.tensor([50.0])
        ).sample.sum().backward()
    expected = {
        name.replace(".a.", ".").replace("vector.weight", "vector"): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    for name, parameter in adapters.parameters("a").items():
        found, wanted = parameter.grad, expected[name]
        assert found is not None
        if float(wanted.norm()) > 1e-4:
            assert off(found.flatten(), wanted.flatten()) < 1e-4, name


def test_strength_zero_of_dora_is_the_base_where_peft_still_scales_it() -> None:
    ours, reference = pair()
    base = velocity(ours)
    tensors = add(reference, "a", CONFIGS["dora everywhere"])
    adapters = Adapters(ours)
    adapters.load(tensors, "a", config=settings(reference, "a"))
    reference.set_adapters("a", 0.0)
    adapters.set({"a": 0.0})
    assert torch.equal(velocity(ours), base)
    assert off(velocity(reference), base) > 1e-2, "theirs has the trained magnitudes"
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "lora_B" in name:
                weight.zero_()  # the directions are the base's then, as with a strength of 0
    reference.set_adapters("a", 1.0)
    still = velocity(reference)
    reference.set_adapters("a", 0.0)
    assert off(velocity(reference), still) < 1e-5, "their strength scales the low-rank part alone"
