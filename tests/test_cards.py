"""The table of models: every row builds, and its parameters are those of the published files."""

import hashlib
import json
from typing import Any

import pytest
import torch

from sana.cards import CARDS, Card
from sana.checkpoints.built_in import folder_of, part_folder
from sana.models.controlnet import LinearControlNet
from sana.models.linear_dit import LinearDiT

# (parameters, tensors, hash of names and shapes) of the published transformers, counted apart from this package.
PUBLISHED = {
    "Sana_600M_512px": (591_747_872, 548, "2ea6be864142f457"),
    "Sana_600M_1024px": (591_747_872, 548, "2ea6be864142f457"),
    "Sana_1600M_512px": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_512px_MultiLing": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_1024px": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_1024px_MultiLing": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_1024px_BF16": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_2Kpx_BF16": (1_604_462_752, 396, "32c99d93db2ed123"),
    "Sana_1600M_4Kpx_BF16": (1_604_462_752, 396, "32c99d93db2ed123"),
    "SANA1.5_1.6B_1024px": (1_604_641_952, 476, "ea3089382865d026"),
    "SANA1.5_4.8B_1024px": (4_721_825_952, 1396, "749bca61dc7caa79"),
    "Sana_Sprint_0.6B_1024px": (593_501_216, 664, "3456795c71cd3062"),
    "Sana_Sprint_1.6B_1024px": (1_610_237_472, 480, "7d88da4ad7c2a0d0"),
    # A teacher is the 1.5 architecture of its size.
    "SANA_Sprint_1.6B_1024px_teacher": (1_604_641_952, 476, "ea3089382865d026"),
    "Sana_Sprint_0.6B_1024px_teacher": (591_876_896, 660, None),
}
PUBLISHED_CONTROL = {
    "ishan24/Sana_600M_1024px_ControlNetPlus_diffusers": (168_765_696, 162, "33de893ef612fcda"),
    "Efficient-Large-Model/Sana_600M_1024px_ControlNet_HED": (168_765_696, 162, "33de893ef612fcda"),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_ControlNet_HED": (631_576_960, 162, "97e521c66e3a0d7d"),
}
RELEASED = [card for card in CARDS.values() if card.hub_id and card.product != "controlnet"]
CONTROL = [card for card in CARDS.values() if card.hub_id and card.product == "controlnet"]
BUILT_IN = [card for card in CARDS.values() if card.folder is not None]
DTYPES = {"float32", "float16", "bfloat16"}


def meta_model(card: Card) -> LinearDiT:
    with torch.device("meta"):
        return LinearDiT(card.transformer)


def manifest(model: torch.nn.Module) -> str:
    shapes = sorted((name, "x".join(map(str, tensor.shape))) for name, tensor in model.state_dict().items())
    return hashlib.sha256("\n".join(f"{name}:{shape}" for name, shape in shapes).encode()).hexdigest()[:16]


def test_every_published_checkpoint_has_a_card() -> None:
    repositories = sorted(str(card.hub_id).removeprefix("Efficient-Large-Model/") for card in RELEASED)
    assert repositories == sorted(f"{name}_diffusers" for name in PUBLISHED)


@pytest.mark.parametrize("card", RELEASED, ids=lambda card: card.name)
def test_architecture_is_the_published_one(card: Card) -> None:
    name = str(card.hub_id).removeprefix("Efficient-Large-Model/").removesuffix("_diffusers")
    params, tensors, expected = PUBLISHED[name]
    model = meta_model(card)
    assert sum(parameter.numel() for parameter in model.parameters()) == params == card.params
    assert len(model.state_dict()) == tensors
    assert expected is None or manifest(model) == expected


@pytest.mark.parametrize("card", CONTROL, ids=lambda card: card.name)
def test_control_branch_is_the_published_one(card: Card) -> None:
    params, tensors, expected = PUBLISHED_CONTROL[str(card.hub_id)]
    assert card.controlnet is not None
    with torch.device("meta"):
        branch = LinearControlNet(card.controlnet)
    assert sum(parameter.numel() for parameter in branch.parameters()) == params == card.control_params
    assert (len(branch.state_dict()), manifest(branch)) == (tensors, expected)
    base = CARDS[card.base or "sana-0.6b-1024"]
    assert (card.transformer, card.params, card.flow_shift) == (base.transformer, base.params, base.flow_shift)
    assert card.control == "soft-edge"
    assert card.download_bytes["controlnet"] == params * (4 if card.is_single_file else 2)


def test_every_published_control_branch_has_a_card() -> None:
    assert sorted(str(card.hub_id) for card in CONTROL) == sorted(PUBLISHED_CONTROL)


def test_every_card_names_its_original_file() -> None:
    for card in RELEASED:
        assert card.original is not None
        repository, _, file = card.original.removeprefix("hf://").rpartition("/checkpoints/")
        assert repository == str(card.hub_id).removesuffix("_diffusers")
        # The small models have files of one training only, whose name says so.
        assert file.removesuffix(".pth").removesuffix("_MultiLing") == repository.rpartition("/")[2].removesuffix(
            "_MultiLing"
        )
    assert {card.original for card in BUILT_IN} == {None}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_pag_layers_are_those_of_the_original_applications(card: Card) -> None:
    expected = {20: 8, 28: 14, 60: 8, 6: 3}[card.transformer.num_layers]
    assert card.pag_layers == (f"transformer_blocks.{expected}",)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_card_is_consistent(card: Card) -> None:
    assert CARDS[card.name] is card
    assert (card.hub_id is None) != (card.folder is None)
    assert card.home == (card.base if card.is_single_file else card.name)
    assert CARDS[card.home].base is None or CARDS[card.home].shared
    assert not card.shared or (card.base in CARDS and card.folder is not None and not card.is_single_file)
    assert (card.product == "controlnet") == (card.controlnet is not None) == (card.control is not None)
    assert card.base_size == card.transformer.sample_size * card.autoencoder.spatial_compression_ratio
    assert card.transformer.in_channels == card.autoencoder.latent_channels
    assert set(card.dtypes) == {"transformer", "text_encoder", "vae"}
    assert set(card.dtypes.values()) <= DTYPES
    assert "float16" not in (card.dtypes["text_encoder"], card.dtypes["vae"])
    assert (card.product == "sprint") == card.transformer.guidance_embeds == (card.sampler == "scm")
    assert card.sizes is None or all(side % 32 == 0 for size in card.sizes for side in size)
    assert sum(parameter.numel() for parameter in meta_model(card).parameters()) == card.params


@pytest.mark.parametrize("card", RELEASED, ids=lambda card: card.name)
def test_variant_follows_the_repository(card: Card) -> None:
    name = str(card.hub_id)
    if "1.5" in name or "Sprint" in name:
        expected = (None, "bfloat16")
    else:
        expected = ("bf16", "bfloat16") if "BF16" in name else ("fp16", "float16")
    assert (card.variant, card.dtypes["transformer"]) == expected


def test_documented_exceptions() -> None:
    assert {name: card.flow_shift for name, card in CARDS.items() if card.hub_id and card.flow_shift != 3.0} == {
        "sana-1.6b-4k": 6.0
    }
    scales = {name: card.transformer.interpolation_scale for name, card in CARDS.items() if card.hub_id}
    assert {name: scale for name, scale in scales.items() if scale} == {"sana-1.6b-2k": 1.0, "sana-1.6b-4k": 2.0}
    assert {card.steps for card in RELEASED if card.product == "sprint"} == {2}
    assert {card.steps for card in RELEASED if card.product != "sprint"} == {20}
    assert {card.guidance for card in RELEASED} == {4.5}


@pytest.mark.parametrize("card", BUILT_IN, ids=lambda card: card.name)
def test_built_in_card_is_the_bundled_model(card: Card) -> None:
    folder = folder_of(card)
    configs: dict[str, Any] = {"transformer": card.transformer, "vae": card.autoencoder}
    if card.controlnet is not None:
        configs["controlnet"] = card.controlnet
        with torch.device("meta"):
            branch = LinearControlNet(card.controlnet)
        assert sum(parameter.numel() for parameter in branch.parameters()) == card.control_params
    for part, config in configs.items():
        values = json.loads((part_folder(folder, part) / "config.json").read_text())
        assert type(config).from_dict(values) == config
    index = json.loads((folder / "model_index.json").read_text())
    listed = {name for name, entry in index.items() if isinstance(entry, list)}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == listed - set(card.shared)
    assert set(card.shared) < listed
    assert index["_sanakit_card"] == card.name


def test_what_draws_the_drawn_world_is_what_is_built_in() -> None:
    assert [card.name for card in CARDS.values() if card.draws_cutouts] == [card.name for card in BUILT_IN]
    sprint, control, nano = CARDS["nano-sprint"], CARDS["nano-controlnet"], CARDS["nano"]
    assert sprint.transformer.timestep_scale == 1.0
    assert (control.transformer, control.params, control.flow_shift) == (nano.transformer, nano.params, nano.flow_shift)
    assert control.control == "ink"
