"""Our reading of original files beside the reference's converter, where that works, and where it does not."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from originals import FAMILIES, TOLD, original_state, small_autoencoder
from tiny_pipeline import transformer

from sana.checkpoints.original.loading import load_single_file


def loaded(path: Path, state: dict[str, torch.Tensor], **told: Any) -> dict[str, torch.Tensor]:
    torch.save({"state_dict": state}, path)
    (model,) = load_single_file(path, **told).parts.values()
    return dict(model.state_dict())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["1.0", "1.0 of 512 px", "2K", "4K"])
def test_first_generation_equals_the_reference(tmp_path: Path, family: str) -> None:
    state = original_state(transformer(**FAMILIES[family]))
    expected = convert_sana_transformer_to_diffusers(dict(state))
    assert equal(loaded(tmp_path / "m.pth", state, **TOLD), expected)


@pytest.mark.parametrize("family", ["1.5", "sprint"])
def test_later_generations_load_here_only(tmp_path: Path, family: str) -> None:
    model = transformer(**FAMILIES[family])
    state = original_state(model)
    theirs = convert_sana_transformer_to_diffusers(dict(state))
    assert theirs.keys() != model.state_dict().keys()  # it knows neither the norms nor the guidance
    assert equal(loaded(tmp_path / "m.pth", state, **TOLD), dict(model.state_dict()))


def test_files_without_a_table_of_positions_load_here_only(tmp_path: Path) -> None:
    state = original_state(transformer())
    del state["pos_embed"]
    with pytest.raises(KeyError, match="pos_embed"):
        convert_sana_transformer_to_diffusers(dict(state))
    assert equal(loaded(tmp_path / "m.pth", state, **TOLD), dict(transformer().state_dict()))


@pytest.mark.parametrize("kind", ["f32-sana", "f32-in", "f64-mix", "f128-in"])
def test_autoencoders_equal_the_reference(tmp_path: Path, kind: str) -> None:
    model = small_autoencoder(kind)
    state = original_state(model)
    expected = convert_autoencoder_dc_checkpoint_to_diffusers(dict(state))
    assert equal(
        loaded(tmp_path / "vae.pth", state, **({} if kind == "f32-sana" else {"attention_head_dim": 4})), expected
    )


def test_the_reference_loads_what_is_converted(tmp_path: Path) -> None:
    """From an original file to a folder, and from there into the reference: one forward is the same."""
    from sana.checkpoints.convert import Conversion, convert

    model = transformer(**FAMILIES["sprint"])
    torch.save({"state_dict": original_state(model)}, tmp_path / "m.pth")
    convert(Conversion(source=tmp_path / "m.pth", target=tmp_path / "folder", told=TOLD))
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "folder").eval()
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 5, 8, generator=generator)
    inputs = (latents, text, torch.tensor([0.7]))
    with torch.no_grad():
        expected = theirs(*inputs, guidance=torch.tensor([0.45])).sample
        got = model(*inputs, guidance=torch.tensor([0.45])).sample
    assert (got - expected).norm() <= 2e-6 * expected.norm()
