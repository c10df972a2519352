"""The same adapter in the words of several tools: read, written, and there and back without a changed bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.checkpoints.lora.dialects import Dialect, join, read_names, split, write_names
from sana.checkpoints.lora.files import read_lora
from sana.checkpoints.lora.writing import model_spec, save_lora, write_file
from sana.checkpoints.original.keymap import transformer_keys
from sana.engine.adapters import Adapters
from sana.errors import CheckpointError, InvalidInput
from sana.models.lora import LowRank, targets
from tiny_lora import EVERYWHERE, off, random_lora, velocity
from tiny_model import tiny_transformer

DIALECTS: tuple[Dialect, ...] = ("peft", "kohya", "comfyui")
LAYER = "transformer_blocks.0.attn1.to_q"


def same(one: dict[str, LowRank], other: dict[str, LowRank]) -> bool:
    """Tell whether two adapters have the same tensors, bit by bit, and scale them alike."""
    return one.keys() == other.keys() and all(
        one[name].tensors.keys() == other[name].tensors.keys()
        and all(torch.equal(tensor, other[name].tensors[kind]) for kind, tensor in one[name].tensors.items())
        and one[name].scaling == pytest.approx(other[name].scaling, rel=1e-15)
        for name in one
    )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 7}, {"lora_alpha": 3, "use_rslora": True}])
@pytest.mark.parametrize("kind", [{}, {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}])
def test_there_and_back(
    dialect: Dialect, dora: bool, settings: dict[str, Any], kind: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_transformer(**kind)
    found = targets(model)
    ends = (*EVERYWHERE, "linear_1", "linear_2")
    updates = read_lora(random_lora(model, ends=ends, dora=dora), found, config=settings).updates
    file = tmp_path / "a.safetensors"
    save_lora(file, updates, dialect=dialect)
    again = read_lora(file, found)
    assert again.dialect == dialect
    assert again.unmatched == ()
    assert same(updates, again.updates)
    save_lora(tmp_path / "b.safetensors", again.updates, dialect=dialect)
    assert read_lora(tmp_path / "b.safetensors", found).sha256 == again.sha256 or settings.get("use_rslora")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_only_some_of_the_fused_layers(dialect: Dialect, tmp_path: Path) -> None:
    model = tiny_transformer()
    updates = read_lora(random_lora(model, ends=("to_q", "to_v")), targets(model)).updates
    save_lora(tmp_path / "a.safetensors", updates, dialect=dialect)
    assert same(updates, read_lora(tmp_path / "a.safetensors", targets(model)).updates)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = tiny_transformer()
    tensors = {name: tensor.bfloat16() for name, tensor in random_lora(model).items()}
    updates = read_lora(tensors, targets(model)).updates
    for dialect in DIALECTS:
        save_lora(tmp_path / "a.safetensors", updates, dialect=dialect)
        again = read_lora(tmp_path / "a.safetensors", targets(model)).updates
        assert same(updates, again)
        assert {t.dtype for u in again.values() for t in u.tensors.values()} == {torch.bfloat16}


def original_names(layers: list[str]) -> dict[str, str]:
    return transformer_keys(False).originals(f"{name}.weight" for name in layers)


@pytest.mark.parametrize("words", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "", "lora_unet_"])
def test_an_adapter_that_was_trained_on_the_fused_layers(words: tuple[str, str], prefix: str) -> None:
    """It does what its product, cut into three, does to the weights of queries, keys and values."""
    model = tiny_transformer()
    down, up = torch.randn(4, 32), torch.randn(96, 4) * 0.2
    name = "blocks.1.attn.qkv"
    name = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
    tensors = {f"{name}.{words[0]}.weight": down, f"{name}.{words[1]}.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    if not prefix:
        tensors = {key: tensor for key, tensor in tensors.items() if "alpha" not in key}
    scale = 0.5 if prefix else 1.0
    adapters = Adapters(model)
    report = adapters.load(tensors)
    assert report.dialect == ("kohya" if prefix == "lora_unet_" else "comfyui")
    assert [layer.rsplit(".", 1)[1] for layer in report.matched] == ["to_q", "to_k", "to_v"]
    found = velocity(model)
    adapters.clear()
    with torch.no_grad():
        for layer, part in zip(report.matched, (scale * up @ down).chunk(3), strict=True):
            model.get_submodule(layer).weight += part
    assert off(found, velocity(model)) < 1e-6


def flattened(name: str) -> str:
    return "lora_unet_" + name.removeprefix("transformer.").rsplit(".lora_", 1)[0].replace(".", "_")


RENAMED = {
    "base_model.model.": lambda n: n.replace("transformer.", "base_model.model.", 1),
    "both prefixes": lambda n: f"base_model.model.{n}",
    "bare": lambda n: n.removeprefix("transformer."),
    "compiled": lambda n: n.replace("transformer.", "transformer._orig_mod.", 1),
    ".default.": lambda n: n.replace(".weight", ".default.weight"),
    "comfyui, our names": lambda n: n.replace("transformer.", "diffusion_model.", 1),
    "lora.down": lambda n: n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "lora_down": lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "kohya": lambda n: flattened(n) + (".lora_down.weight" if "lora_A" in n else ".lora_up.weight"),
    "onetrainer": lambda n: (
        flattened(n).replace("lora_unet", "lora_transformer")
        + (".lora_down.weight" if "lora_A" in n else ".lora_up.weight")
    ),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_every_way_to_name_a_layer(kind: str) -> None:
    model = tiny_transformer()
    tensors = random_lora(model)
    renamed = {RENAMED[kind](name): tensor for name, tensor in tensors.items()}  # type: ignore[no-untyped-call]
    expected = read_lora(tensors, targets(model)).updates
    assert same(expected, read_lora(renamed, targets(model)).updates)


def test_lengths_of_rows_under_their_other_name() -> None:
    model = tiny_transformer()
    tensors = random_lora(model, dora=True)
    renamed = {
        name.replace("lora_magnitude_vector", "dora_scale"): tensor.view(-1, 1) if "magnitude" in name else tensor
        for name, tensor in tensors.items()
    }
    assert same(read_lora(tensors, targets(model)).updates, read_lora(renamed, targets(model)).updates)


def test_what_belongs_to_no_layer_is_told() -> None:
    model = tiny_transformer()
    extra = {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1, 1)}
    with pytest.warns(UserWarning, match=r"16 of 17 layers matched.*text_encoder\.layers\.0"):
        report = Adapters(model).load({**random_lora(model), **extra})
    assert len(report.matched) == 16
    assert report.unmatched == ("text_encoder.layers.0.self_attn.q_proj",)


def test_split_and_join_are_each_others_opposite() -> None:
    parts = [LowRank(down=torch.randn(r, 8), up=torch.randn(6, r), alpha=2.0 * r) for r in (2, 3)]
    for there in ([*parts, None], [None, *parts], [parts[0], None, parts[1]]):
        again = split(join(there, "x"), 3)
        for part, other in zip(there, again, strict=True):
            assert (part is None) == (other is None)
            if part is not None and other is not None:
                assert torch.equal(part.down, other.down)
                assert torch.equal(part.up, other.up)
                assert part.scaling == other.scaling
    shared = [LowRank(down=parts[0].down, up=torch.randn(6, 2), alpha=1.0) for _ in range(3)]
    assert join(shared, "x").rank == 2
    different = [parts[0], LowRank(down=parts[1].down, up=parts[1].up, alpha=9.0), None]
    whole = join(different, "x")
    product = whole.scaling * whole.up @ whole.down
    for index, part in enumerate(different[:2]):
        assert part is not None
        assert torch.allclose(product.chunk(3)[index], part.scaling * part.up @ part.down, atol=1e-6)


def test_what_a_dialect_cannot_say_is_refused() -> None:
    model = tiny_transformer()
    biased = read_lora(random_lora(model, bias=True), targets(model)).updates
    for dialect in ("kohya", "comfyui"):
        with pytest.raises(InvalidInput, match="write it as peft"):
            write_names(biased, dialect)
    halved = read_lora(random_lora(model, ends=("to_q",), dora=True), targets(model)).updates
    with pytest.raises(InvalidInput, match=r"fuses 3 layers of which only some have a magnitude"):
        write_names(halved, "comfyui")
    unknown = {"somewhere.else": next(iter(biased.values()))}
    with pytest.raises(InvalidInput, match="has no name in the original code"):
        write_names(unknown, "comfyui")


def test_metadata_survive_and_hashes_are_new(tmp_path: Path) -> None:
    model = tiny_transformer()
    updates = read_lora(random_lora(model), targets(model)).updates
    said = {**model_spec("sana-1.6b", title="Foxes", trigger_phrase="sks fox"), "ss_steps": "500", "sha256": "stale"}
    file = tmp_path / "a.safetensors"
    save_lora(file, updates, metadata=said)
    told = read_lora(file, targets(model)).metadata
    assert told["modelspec.architecture"] == "sana-1.6b/lora"
    assert told["modelspec.trigger_phrase"] == "sks fox"
    assert told["ss_steps"] == "500"
    assert told["modelspec.hash_sha256"] == "0x" + told["sha256"] != "0xstale"


def test_the_same_content_is_the_same_file_and_others_read_it(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2, dtype=torch.float64), "c": torch.tensor(2.0).bfloat16()}
    for name in ("one", "two"):
        write_file(tmp_path / name, dict(sorted(tensors.items(), reverse=name == "two")), {"k": 'a "quote"\n'})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = load_file(tmp_path / "one")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata()["k"] == 'a "quote"\n'


def test_a_flipped_bit_in_our_file_is_noticed(tmp_path: Path) -> None:
    model = tiny_transformer()
    file = tmp_path / "a.safetensors"
    save_lora(file, read_lora(random_lora(model), targets(model)).updates)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        read_lora(file, targets(model))


def patterned(alphas: dict[str, Any], **more: Any) -> dict[str, float]:
    model = tiny_transformer()
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": alphas, **more}
    return {n: u.alpha for n, u in read_lora(random_lora(model), targets(model), config=config).updates.items()}


def peft_takes(alphas: dict[str, float]) -> float:
    return alphas[get_pattern_key(alphas.keys(), LAYER)]


def test_patterns_of_alpha() -> None:
    assert patterned({"attn1.to_q": 9})[LAYER] == 9
    assert patterned({"^transformer_blocks.0.attn1.to_q": 9})[LAYER] == 9
    assert patterned({r".*attn1\.to_q": 9})[LAYER] == 9
    assert patterned({"n1.to_q": 9})[LAYER] == 4
    assert patterned({"^attn1.to_q": 9})[LAYER] == 4


def test_of_several_patterns_that_name_a_layer_the_first_counts_as_in_peft() -> None:
    assert patterned({LAYER: 9, "to_q": 2})[LAYER] == peft_takes({LAYER: 9, "to_q": 2}) == 9
    assert patterned({"to_q": 2, LAYER: 9})[LAYER] == peft_takes({"to_q": 2, LAYER: 9}) == 2


@pytest.mark.parametrize("key", ["(a+)+$", "[a-z]*", "x|y", ".*.*.*.*.*.*a"])
def test_patterns_that_could_take_forever_are_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match="is not understood"):
        patterned({key: 9})


@pytest.mark.parametrize("alpha", ["4", True, float("nan"), 1e300, [1]])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(CheckpointError, match="it must be a number"):
        patterned({}, lora_alpha=alpha)


def test_names_are_enough(tmp_path: Path) -> None:
    names = ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"]
    reading = read_names([*names, names[0].replace("lora_A", "lora_B")], targets(tiny_transformer()), "x")
    assert reading.groups[0].ours == (LAYER,)
    assert set(reading.groups[0].keys) == {"down", "up"}


def test_settings_in_the_file_go_before_none(tmp_path: Path) -> None:
    model = tiny_transformer()
    file = tmp_path / "a.safetensors"
    told = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})
    tensors: dict[str, Tensor] = random_lora(model)
    save_file(tensors, file, metadata={"lora_adapter_metadata": told})
    assert read_lora(file, targets(model)).updates[LAYER].scaling == 3
