"""Parts that come and go: the same pictures in every memory mode, what is away when, and what is refused."""

import copy
import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sana import Request, generate_images
from sana.checkpoints.folder import save_parts
from sana.config import ControlNetConfig
from sana.engine import placement, sparing
from sana.engine.parts import Parts, load
from sana.engine.placement import Placement, balanced, spread
from sana.engine.sparing import Plan, first_that_fits, needs
from sana.errors import CheckpointError, InvalidInput
from sana.memory.offload import HostTensors, StreamedBlocks, StreamingShelf, WholeShelf
from tiny_model import make_tiny_parts, tiny_transformer

MODES = ("low", "lowest")
WEIGHTED = ("text_encoder", "transformer", "vae")
REQUEST = Request(prompt="a red fox", seed=3, steps=3, width=64, height=64, binning=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placement") / "model"
    save_parts(path, make_tiny_parts(num_layers=3).components)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return generate_images(load(folder, device="cpu"), REQUEST)


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(one.images, other.images, strict=True))


def away(parts: Parts) -> dict[str, bool]:
    return {name: all(weight.is_meta for weight in getattr(parts, name).parameters()) for name in WEIGHTED}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lazily", [True, False])
def test_pictures_are_the_same_in_every_mode(folder: Path, reference: Any, mode: str, lazily: bool) -> None:
    parts = load(folder, device="cpu", memory=mode if lazily else None)
    if not lazily:
        parts.save_memory(mode, "cpu")
    assert all(away(parts).values())
    for _ in range(2):
        made = generate_images(parts, REQUEST)
        assert same(made, reference)
        assert made.model == reference.model  # the weights' name, too
    assert away(parts) == {"text_encoder": True, "transformer": True, "vae": mode == "lowest"}


def test_batches_guidance_and_several_pictures(folder: Path) -> None:
    request = dataclasses.replace(REQUEST, count=3, batch_size=2, guidance=3.0, pag_scale=2.0, pag_layers="1")
    plain = generate_images(load(folder, device="cpu"), request)
    for mode in MODES:
        assert same(generate_images(load(folder, device="cpu", memory=mode), request), plain)


@pytest.mark.parametrize("mode", MODES)
def test_int8_in_every_mode(folder: Path, reference: Any, mode: str) -> None:
    """Quantised again at each reading, and read from files that hold int8."""
    options: dict[str, Any] = {"device": "cpu", "quantization_config": "int8"}
    plain = load(folder, **options)
    made = generate_images(plain, REQUEST)
    assert not same(made, reference)
    spared = generate_images(load(folder, memory=mode, **options), REQUEST)
    assert same(spared, made)
    assert spared.model == made.model


def test_int8_files_in_every_mode(folder: Path, tmp_path: Path) -> None:
    plain = load(folder, device="cpu", quantization_config="int8")
    save_parts(tmp_path / "m", plain.components)
    made = generate_images(plain, REQUEST)
    for mode in MODES:
        spared = load(tmp_path / "m", device="cpu", memory=mode)
        assert same(generate_images(spared, REQUEST), made)
        save_parts(tmp_path / mode, _whole(spared))
        assert same(generate_images(load(tmp_path / mode, device="cpu"), REQUEST), made)


def _whole(parts: Parts) -> dict[str, Any]:
    parts.stay()
    return parts.components


def test_only_one_block_and_the_next_are_there(folder: Path) -> None:
    parts = load(folder, device="cpu", memory="lowest")
    blocks = parts.transformer.transformer_blocks
    assert isinstance(blocks, StreamedBlocks)
    held: list[int] = []
    for mode_on in (False, True):
        for block in blocks:
            there = [not next(one.parameters()).is_meta for one in blocks._modules.values()]
            assert there.count(True) == (1 if mode_on and not next(block.parameters()).is_meta else 0)
        if not mode_on:
            using = parts.using("transformer")
            using.__enter__()
    for block in blocks[1:]:
        there = [not next(one.parameters()).is_meta for one in blocks._modules.values()]
        held.append(there.index(True))
        assert there.count(True) == 1
        assert not next(block.parameters()).is_meta
    assert held == [1, 2]
    using.__exit__(None, None, None)
    assert all(away(parts).values())


def test_of_the_embeddings_only_the_rows_of_the_text_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load(folder, device="cpu", memory="lowest")
    table = parts.text_encoder.embed_tokens
    seen: list[int] = []
    table.register_forward_pre_hook(lambda layer, args: seen.append(len(layer.weight)))
    with parts.using("text_encoder"):
        parts.prompts.encode(["a red fox"])
    assert table.weight.is_meta
    assert table.weight.shape[0] == table.num_embeddings
    assert 0 < seen[0] < 20 < table.num_embeddings


def test_changed_weights_are_never_lost(folder: Path, reference: Any) -> None:
    """What was fused, trained or cast before or meanwhile stays in memory, and the picture is that of those weights."""
    plain, spared = load(folder, device="cpu"), load(folder, device="cpu")
    for parts in (plain, spared):
        with torch.no_grad():
            parts.transformer.transformer_blocks[1].attn1.to_q.weight.add_(0.5)
    wanted = generate_images(plain, REQUEST)
    assert not same(wanted, reference)
    spared.save_memory("lowest", "cpu")
    assert same(generate_images(spared, REQUEST), wanted)
    assert spared.describe()["weights"] == plain.describe()["weights"]
    later = load(folder, device="cpu", memory="low")
    with later.using("transformer"), torch.no_grad():
        later.transformer.transformer_blocks[1].attn1.to_q.weight.add_(0.5)
    assert same(generate_images(later, REQUEST), wanted)
    kept = [name for name, weight in later.transformer.named_parameters() if not weight.is_meta]
    assert kept == ["transformer_blocks.1.attn1.to_q.weight"]


def test_adapters_while_memory_is_saved(folder: Path) -> None:
    def adapted(parts: Parts) -> Any:
        generator = torch.Generator().manual_seed(5)
        name = "transformer.transformer_blocks.1.attn1.to_q"
        width = parts.transformer.config.inner_dim
        state = {
            f"{name}.lora_A.weight": torch.randn(2, width, generator=generator),
            f"{name}.lora_B.weight": torch.randn(width, 2, generator=generator),
        }
        parts.adapters.load(state, "one")
        parts.adapters.set({"one": 1.0})
        return generate_images(parts, REQUEST)

    wanted = adapted(load(folder, device="cpu"))
    for mode in MODES:
        assert same(adapted(load(folder, device="cpu", memory=mode)), wanted)


def test_what_was_fused_before_stays_fused(folder: Path) -> None:
    def fused(mode: str | None) -> Any:
        parts = load(folder, device="cpu")
        config = parts.transformer.config
        shapes = {"proj_out": (config.in_channels, config.inner_dim), "transformer_blocks.1.attn1.to_q": None}
        generator, state = torch.Generator().manual_seed(6), {}
        for name, shape in shapes.items():
            rows, columns = shape or (config.inner_dim, config.inner_dim)
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
        parts.adapters.load(state, "one")
        parts.adapters.set({"one": 1.0})
        parts.adapters.fuse()
        if mode is not None:
            parts.save_memory(mode, "cpu")
        return generate_images(parts, REQUEST)

    wanted = fused(None)
    for mode in MODES:
        assert same(fused(mode), wanted)


def test_bundles_of_the_same_parts_share_the_way_they_are_kept(folder: Path, reference: Any) -> None:
    first = load(folder, device="cpu", memory="lowest")
    second = copy.copy(first)
    assert same(generate_images(second, REQUEST), reference)
    second.stay()
    assert first.placement is None
    assert same(generate_images(first, REQUEST), reference)
    assert same(generate_images(second, REQUEST), reference)
    second.save_memory("low", "cpu")
    assert same(generate_images(first, REQUEST), reference)


def test_replaced_parts_and_ends(folder: Path, reference: Any) -> None:
    parts = load(folder, device="cpu", memory="lowest")
    old = weakref.ref(parts.transformer)
    parts.transformer = load(folder, device="cpu").transformer
    gc.collect()
    assert old() is None  # nothing keeps it alive
    assert same(generate_images(parts, REQUEST), reference)
    parts.transformer = tiny_transformer(num_layers=3)  # from no files: stays in memory
    made = generate_images(parts, REQUEST)
    assert not away(parts)["transformer"]
    parts.stay()
    assert parts.placement is None
    assert type(parts.text_encoder.layers) is nn.ModuleList
    assert not any(weight.is_meta for name in WEIGHTED for weight in getattr(parts, name).parameters())
    assert same(generate_images(parts, REQUEST), made)


def test_switching_modes(folder: Path, reference: Any) -> None:
    parts = load(folder, device="cpu")
    for mode in ("low", "lowest", "lowest", "low"):
        parts.save_memory(mode, "cpu")
        assert parts.placement is not None
        assert parts.placement.mode == mode
        assert same(generate_images(parts, REQUEST), reference)


def test_a_shelf_in_main_memory() -> None:
    """As on an accelerator, here with the CPU as both places."""
    module = tiny_transformer()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([5.0])
    with torch.no_grad():
        wanted = module(*x).sample
        for kind in (WholeShelf, StreamingShelf):
            shelf = kind(module, HostTensors(module), torch.device("cpu"))
            shelf.leave()
            shelf.enter()
            assert torch.equal(module(*x).sample, wanted)
            shelf.leave()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_files_that_change_meanwhile(folder: Path, tmp_path: Path) -> None:
    save_parts(tmp_path / "m", make_tiny_parts().components)
    parts = load(tmp_path / "m", device="cpu", memory="low")
    file = tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="was changed while the model was in use"):
        generate_images(parts, REQUEST)
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 0x40
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="not as it was saved"):
        load(tmp_path / "m", device="cpu", memory="low")


def test_refusals(folder: Path, tiny_parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="would have no effect"):
        make_tiny_parts().save_memory("low", "cpu")
    with pytest.raises(InvalidInput, match="Did you mean 'lowest'"):
        load(folder, device="cpu", memory="lowes")
    with pytest.raises(InvalidInput, match=r"Did you mean 'lowest'|Did you mean 'low'"):
        load(folder, device="cpu").save_memory("lower", "cpu")
    for memory in (None, "low"):
        with pytest.raises(InvalidInput, match="`max_memory` has no effect"):
            load(folder, device="cpu", memory=memory, max_memory=10)
    with pytest.raises(InvalidInput, match="above 0"):
        load(folder, device="cpu", memory="auto", max_memory=0)
    with pytest.raises(InvalidInput, match="cannot be used"):
        load(folder, device="cpu").save_memory("low", "cuda:99")
    parts = load(folder, device="cpu", memory="low")
    with pytest.raises(InvalidInput, match="must stay in memory"):
        parts.compile()
    save_parts(tmp_path / "bin", make_tiny_parts().components, safe_serialization=False)
    with pytest.raises(InvalidInput, match="not stored as safetensors"):
        load(tmp_path / "bin", device="cpu", memory="low", use_safetensors=False)
    with pytest.raises(InvalidInput, match="memory mode is 'x'"):
        Placement("x", torch.device("cpu"))


def test_auto_takes_the_first_mode_that_fits(folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needs(load(folder, device="cpu"), torch.device("cpu"))
    assert needed[None] > needed["low"] >= needed["lowest"]
    for limit, mode in ((1e12, None), (needed["low"] + 1, "low"), (needed["low"] - 1, "lowest"), (1, "lowest")):
        parts = load(folder, device="cpu", memory="auto", max_memory=int(limit))
        assert (parts.placement and parts.placement.mode) == mode
    monkeypatch.setattr(sparing, "free_memory", lambda device: int(needed["low"]) + 1)
    parts = load(folder, device="cpu", memory="auto")
    assert parts.placement is not None
    assert parts.placement.mode == "low"
    assert same(generate_images(parts, REQUEST), reference)
    assert first_that_fits(needed, None) is None


def test_spreading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    cpu, one, two = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    names = ("text_encoder", "transformer", "vae", "scheduler")
    sizes = {"text_encoder": 50, "transformer": 30, "vae": 6}
    assert balanced(sizes, names[:3], {one: 100, two: 100}) == {"text_encoder": one, "transformer": two, "vae": two}
    assert balanced(sizes, names[:3], {one: 100, two: 10}) == dict.fromkeys(("text_encoder", "transformer", "vae"), one)
    if not torch.cuda.is_available():
        assert spread("balanced", names) == dict.fromkeys(names, cpu)
    assert spread({"vae": "cpu"}, names) == dict.fromkeys(names, cpu)
    with pytest.raises(InvalidInput, match="Did you mean 'vae'"):
        spread({"va": "cpu"}, names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (80_000_000_000 >> i, 80_000_000_000))
    assert set(spread("balanced", names).values()) == {one}  # the second has room for less than is left on the first
    with pytest.raises(InvalidInput, match="all parts on one device"):
        sparing.sparing(lambda place: make_tiny_parts(), "low", None, {"transformer": one, "vae": two})


def test_free_memory_is_known() -> None:
    free = placement.free_memory(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14


def test_auto_makes_room_for_what_is_planned(folder: Path) -> None:
    large = Request(prompt="x", width=512, height=512, binning=False)
    skeleton = load(folder, device="cpu")
    plain, planned = (needs(skeleton, torch.device("cpu"), plan) for plan in (None, Plan(requests=[REQUEST, large])))
    assert planned[None] > plain[None]
    limit = int((plain[None] + planned[None]) / 2)
    for plan, mode in (
        (None, None),
        (Plan(requests=[REQUEST, large]), "lowest"),
        (Plan(requests=lambda _: [large]), "lowest"),
    ):
        parts = load(folder, device="cpu", memory="auto", max_memory=limit, plan=plan)
        assert (parts.placement and parts.placement.mode) == mode
    network = ControlNetConfig(num_attention_heads=64, attention_head_dim=8, cross_attention_dim=512)
    assert needs(skeleton, torch.device("cpu"), Plan(controlnet=network))[None] > plain[None] + 4 * 7 * 512**2
    for memory in (None, "low"):
        with pytest.raises(InvalidInput, match="`plan` has no effect with `memory`"):
            load(folder, memory=memory, plan=Plan())
