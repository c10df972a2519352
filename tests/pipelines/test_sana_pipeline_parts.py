"""Loading, saving, moving and replacing the parts of a pipeline."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import sana
from sana import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from sana.engine.model_card import CARD_KEY
from sana.engine.parts import load
from sana.errors import CheckpointError, InvalidInput, ModelNotFound

SMALL = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1, "output_type": "latent"}
NAMES = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


def dtypes(pipe: SanaPipeline) -> tuple[torch.dtype, ...]:
    return tuple(part.dtype for part in (pipe.text_encoder, pipe.vae, pipe.transformer))


def quiet(pipe: SanaPipeline) -> SanaPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SanaPipeline, prompt: str = "a fox") -> torch.Tensor:
    made: torch.Tensor = quiet(pipe)(prompt, generator=torch.Generator().manual_seed(0), **SMALL).images
    return made


def edited_folder(source: Path, target: Path, **keys: Any) -> Path:
    """A folder of links to the parts of another, with other keys in its model_index.json."""
    target.mkdir()
    for name in NAMES:
        (target / name).symlink_to(source / name)
    index = json.loads((source / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, **keys}))
    return target


def test_a_saved_pipeline_loads_to_the_same_pictures(tiny_parts: Any, tiny_folder: Path) -> None:
    loaded = SanaPipeline.from_pretrained(tiny_folder)
    assert tuple(loaded.components) == NAMES
    assert dtypes(loaded) == (torch.float32,) * 3
    assert not any(part.training for part in (loaded.text_encoder, loaded.vae, loaded.transformer))
    assert torch.equal(draw(loaded), draw(SanaPipeline(**tiny_parts.components)))


@pytest.mark.parametrize(
    ("torch_dtype", "expected"),
    [
        (torch.bfloat16, (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
        ("bfloat16", (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
        ({"transformer": torch.bfloat16, "default": torch.float32}, (torch.float32, torch.float32, torch.bfloat16)),
        (
            {"transformer": torch.float16, "text_encoder": torch.bfloat16},
            (torch.bfloat16, torch.float32, torch.float16),
        ),
        ({"vae": torch.float16}, (torch.float32, torch.float16, torch.float32)),
        ("auto", (torch.float32, torch.float32, torch.float32)),
    ],
)
def test_dtypes_for_all_or_per_part(tiny_folder: Path, torch_dtype: Any, expected: tuple[torch.dtype, ...]) -> None:
    assert dtypes(SanaPipeline.from_pretrained(tiny_folder, torch_dtype=torch_dtype)) == expected
    assert dtypes(SanaPipeline.from_pretrained(tiny_folder, dtype=torch_dtype)) == expected


def test_half_precision_for_all_spares_text_encoder_and_vae(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sana"):
        loaded = SanaPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)
    assert dtypes(loaded) == (torch.bfloat16, torch.bfloat16, torch.float16)
    told = [record.message for record in caplog.records if "float16" in record.message]
    assert len(told) == 1
    assert "text_encoder" in told[0]
    assert "vae" in told[0]
    assert torch.isfinite(draw(loaded)).all()


def test_variants(tiny_folder: Path) -> None:
    loaded = SanaPipeline.from_pretrained(tiny_folder, variant="bf16", torch_dtype="auto")
    assert dtypes(loaded) == (torch.bfloat16,) * 3
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=int8`, but no such"):
        SanaPipeline.from_pretrained(tiny_folder, variant="int8")


def test_parts_given_by_keyword_are_not_loaded(tiny_parts: Any, tiny_folder: Path) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    loaded = SanaPipeline.from_pretrained(
        tiny_folder, transformer=tiny_parts.transformer, scheduler=euler, vae=None, text_encoder=None, tokenizer=None
    )
    assert loaded.transformer is tiny_parts.transformer
    assert loaded.scheduler is euler
    assert loaded.vae is None
    assert loaded.components["text_encoder"] is None


def test_assigned_parts_are_used_at_once(tiny_folder: Path) -> None:
    pipe = SanaPipeline.from_pretrained(tiny_folder)
    before = draw(pipe)
    pipe.transformer = pipe.transformer.to(torch.bfloat16)
    after = draw(pipe)
    assert 0 < (after - before).abs().max() < 0.2
    pipe.text_encoder.to(torch.bfloat16)
    assert pipe.encode_prompt("a fox")[0].dtype == torch.bfloat16
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not torch.equal(draw(pipe), after)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder).to(torch.float32)
    assert pipe.encode_prompt("a fox")[0].dtype == torch.float32


def test_changed_text_encoder_weights_are_noticed(tiny_parts: Any) -> None:
    pipe = SanaPipeline(**{**tiny_parts.components, "text_encoder": copy.deepcopy(tiny_parts.text_encoder)})
    before = draw(pipe)
    with torch.no_grad():
        pipe.text_encoder.norm.weight.mul_(1.5)
    assert not torch.equal(draw(pipe), before)


def test_components_build_another_pipeline(tiny_parts: Any) -> None:
    first = SanaPipeline(**tiny_parts.components)
    second = SanaPipeline(**first.components)
    assert all(second.components[name] is part for name, part in first.components.items())
    assert "transformer=SanaTransformer2DModel" in repr(second)


def test_to_moves_and_casts(tiny_parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = SanaPipeline(**copy.deepcopy(tiny_parts).components)
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    assert dtypes(pipe.to(torch.bfloat16)) == (torch.bfloat16,) * 3
    assert dtypes(pipe.to("cpu", torch.float32)) == (torch.float32,) * 3
    assert pipe.dtype == torch.float32
    with caplog.at_level(logging.WARNING, "sana"):
        assert dtypes(pipe.to(device="cpu", dtype=torch.float16)) == (torch.bfloat16, torch.bfloat16, torch.float16)
    assert [record.message for record in caplog.records] == [
        "text_encoder and vae: cast to bfloat16 because float16 overflows there"
    ]
    pipe.vae.to(torch.float16)
    assert pipe.vae.dtype == torch.float16, "one by one a user may insist"
    with pytest.raises(InvalidInput, match="`device`"):
        pipe.to("quantum")


@pytest.mark.parametrize(("kind", "unchanged"), [("slicing", "tiling"), ("tiling", "slicing")])
def test_vae_switches_are_forwarded(tiny_parts: Any, kind: str, unchanged: str) -> None:
    pipe = SanaPipeline(**copy.deepcopy(tiny_parts).components)
    for verb, state in (("enable", True), ("disable", False)):
        getattr(pipe, f"{verb}_vae_{kind}")()
        assert getattr(pipe.vae, f"use_{kind}") is state
        assert getattr(pipe.vae, f"use_{unchanged}") is False


def test_unknown_arguments_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'torch_dtype'"):
        SanaPipeline.from_pretrained(tiny_folder, torch_dtyp=torch.float32)
    assert SanaPipeline.from_pretrained(tiny_folder, low_cpu_mem_usage=True).vae is not None


@pytest.mark.parametrize("device_map", ["cpu", "balanced", "auto", torch.device("cpu")])
def test_device_map_names_one_device(tiny_folder: Path, device_map: Any) -> None:
    assert SanaPipeline.from_pretrained(tiny_folder, device_map=device_map).device.type in ("cpu", "cuda")


def test_unknown_models_are_named() -> None:
    with pytest.raises(ModelNotFound, match="no model"):
        SanaPipeline.from_pretrained("sana-2.6b-1024")
    with pytest.raises(OSError, match="offline"):
        SanaPipeline.from_pretrained("Efficient-Large-Model/Sana_1600M_1024px_diffusers", local_files_only=True)


def test_single_parts_load_from_their_subfolder(tiny_folder: Path, tiny_parts: Any) -> None:
    part = SanaTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer", torch_dtype=torch.float32)
    for name, tensor in tiny_parts.transformer.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor)
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    assert scheduler.config.flow_shift == 3.0


# The engine's own way to a model


def test_load_keeps_name_and_flow_shift(tiny_folder: Path) -> None:
    parts = load(tiny_folder, device="cpu")
    assert parts.name == "model"
    assert parts.card is None
    assert parts.flow_shift == 3.0
    assert parts.effective_card.base_size == 256
    assert str(tiny_folder) not in json.dumps(parts.describe())
    assert sana.load is load


def test_a_card_named_in_the_folder_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    folder = edited_folder(tiny_folder, tmp_path / "a", **{CARD_KEY: "nano"})
    assert load(folder, device="cpu").card is None, "the tiny transformer is not nano's: its card would mislead"
    with pytest.raises(CheckpointError, match=r"names the card 'nanno'.*Did you mean 'nano'"):
        load(edited_folder(tiny_folder, tmp_path / "b", **{CARD_KEY: "nanno"}))


def test_a_card_that_fits_is_kept_when_saving(
    tiny_folder: Path, tiny_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    from sana import cards
    from sana.config import TransformerConfig

    config = TransformerConfig.from_dict(tiny_parts.transformer.config.to_dict())
    card = dataclasses.replace(cards.CARDS["nano"], name="pet", transformer=config)
    monkeypatch.setitem(cards.CARDS, "pet", card)
    pipe = SanaPipeline.from_pretrained(edited_folder(tiny_folder, tmp_path / "a", **{CARD_KEY: "pet"}))
    assert pipe.parts.card is card
    assert pipe.parts.name == "a", "the card rules, but the model is the folder's own"
    rename, told = Path.rename, []

    def watched(stage: Path, target: Path) -> Path:
        told.append(json.loads((stage / "model_index.json").read_text())[CARD_KEY])
        return rename(stage, target)

    monkeypatch.setattr(Path, "rename", watched)
    pipe.save_pretrained(tmp_path / "b")
    assert told == ["pet"], "the card is there at the moment of the save, so that no kill can lose it"
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())[CARD_KEY] == "pet"
    assert load(tmp_path / "b").card is card
