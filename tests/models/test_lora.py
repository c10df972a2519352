"""Adapters on layers: beside the weights, merged, learning, on other dtypes, and gone without a trace."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from sana.checkpoints.lora.files import read_lora
from sana.errors import InvalidInput
from sana.memory.int8 import filled, fits
from sana.models.lora import LowRank, attach, dense_weight, merged, targets
from sana.models.lora_start import LoraSettings, new_updates
from tiny_lora import EVERYWHERE, off, random_lora, velocity
from tiny_model import tiny_transformer


def updates_of(model: nn.Module, **options: Any) -> dict[str, LowRank]:
    return read_lora(random_lora(model, **options), targets(model)).updates


def living_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def attach_all(model: nn.Module, updates: dict[str, LowRank], strength: float = 1.0) -> None:
    attach(model, {name: [(update, strength)] for name, update in updates.items()})


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dora", [False, True])
def test_an_attached_adapter_does_what_the_merged_weights_do(dora: bool) -> None:
    model = tiny_transformer()
    updates = updates_of(model, ends=EVERYWHERE, dora=dora, bias=True)
    updates = {n: u for n, u in updates.items() if model.get_submodule(n).bias is not None}
    other = copy.deepcopy(model)
    attach_all(model, updates, 0.7)
    with torch.no_grad():
        for name, update in updates.items():
            layer = other.get_submodule(name)
            for kind, tensor in merged(layer, [(update, 0.7)], name).items():
                getattr(layer, kind).copy_(tensor)
    assert off(velocity(model), velocity(other)) < 1e-6
    assert off(velocity(model), velocity(tiny_transformer())) > 0.1


def test_names_values_and_objects_of_the_base_stay() -> None:
    model = tiny_transformer()
    before, parameters = bits(model), {name: id(p) for name, p in model.named_parameters()}
    answer = velocity(model)
    attach_all(model, updates_of(model, ends=EVERYWHERE))
    assert bits(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not torch.equal(velocity(model), answer)
    attach(model, {})
    assert bits(model) == before
    assert torch.equal(velocity(model), answer)
    layer = model.get_submodule("transformer_blocks.0.attn1.to_q")
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()


def test_a_thousand_times_on_and_off_leaves_nothing_behind() -> None:
    model = tiny_transformer()
    before, answer = bits(model), velocity(model)
    tensors = random_lora(model)
    known: list[weakref.ref[torch.Tensor]] = []
    gc.collect()
    count = 0
    for turn in range(1000):
        updates = read_lora(tensors, targets(model)).updates
        attach_all(model, updates)
        if turn % 100 == 0:
            side = model.get_submodule("transformer_blocks.0.attn1.to_q").lora_sides[0]  # type: ignore[index,union-attr]
            known += [weakref.ref(side.up), weakref.ref(next(iter(updates.values())).down)]
        attach(model, {})
        del updates
        if turn == 10:
            gc.collect()
            count = living_tensors()
    del side
    gc.collect()
    assert all(reference() is None for reference in known)
    assert living_tensors() <= count
    assert bits(model) == before
    assert torch.equal(velocity(model), answer)


def test_strength_zero_is_the_base_bit_by_bit_with_its_fast_ways() -> None:
    model = tiny_transformer()
    answer = velocity(model)
    attach_all(model, updates_of(model, ends=EVERYWHERE, dora=True), 0.0)
    assert torch.equal(velocity(model), answer)


def test_several_act_in_their_order() -> None:
    model = tiny_transformer()
    first, second = updates_of(model, seed=1), updates_of(model, seed=2, dora=True)
    attach(model, {name: [(first[name], 0.5), (second[name], 2.0)] for name in first})
    both = velocity(model)
    attach(model, {})
    for name in first:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(merged(layer, [(first[name], 0.5), (second[name], 2.0)], name)["weight"])
    assert off(both, velocity(model)) < 1e-6


def test_a_common_rank_changes_nothing() -> None:
    model = tiny_transformer()
    updates = updates_of(model, ends=EVERYWHERE, rank=3)
    attach_all(model, updates)
    plain = velocity(model)
    attach(model, {name: [(update, 1.0)] for name, update in updates.items()}, rank=8)
    assert len(model.patch_embed.proj.lora_sides[0].down) == 8
    assert off(velocity(model), plain) < 1e-6


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_an_adapter_follows_its_layer_to_another_dtype(kind: torch.dtype) -> None:
    model = tiny_transformer()
    updates = updates_of(model, ends=EVERYWHERE, dora=True)
    attach_all(model, updates)
    exact = velocity(model)
    later = copy.deepcopy(model).to(kind)
    attach(model, {})
    model.to(kind)
    attach_all(model, updates)
    bound = 2e-2 if kind == torch.bfloat16 else 1e-6
    assert off(velocity(model), exact) < bound
    assert off(velocity(later), exact) < bound


def test_bfloat16_is_as_close_as_the_base_alone() -> None:
    model = tiny_transformer()
    exact_base = velocity(model)
    updates = updates_of(model)
    attach_all(model, updates)
    exact = velocity(model)
    model.to(torch.bfloat16)
    with_adapter = off(velocity(model), exact)
    attach(model, {})
    assert with_adapter < 2 * off(velocity(model), exact_base)


@pytest.mark.parametrize("dora", [False, True])
def test_quantised_layers_are_adapted_and_never_merged_into(dora: bool) -> None:
    model = tiny_transformer()
    exact = tiny_transformer()
    updates = updates_of(model, ends=("to_q", "conv_point", "conv_inverted"), dora=dora)
    for name, layer in list(model.named_modules()):
        if fits(layer) and name in updates:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_module(leaf, filled(layer, layer.weight, torch.float32, "cpu"))
            values = model.get_submodule(name).dequantized()  # type: ignore[operator,union-attr]
            exact.get_submodule(name).weight.data.copy_(values.view_as(exact.get_submodule(name).weight))
    answer = velocity(model)
    attach_all(model, updates)
    attach_all(exact, updates)
    assert off(velocity(model), velocity(exact)) < 1e-5
    name = "transformer_blocks.0.attn1.to_q"
    with pytest.raises(InvalidInput, match="quantised, so nothing can be merged"):
        merged(model.get_submodule(name), [(updates[name], 1.0)], name)
    attach(model, {})
    assert torch.equal(velocity(model), answer)


def test_under_autocast() -> None:
    model = tiny_transformer()
    attach_all(model, updates_of(model, ends=EVERYWHERE))
    exact = velocity(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert off(velocity(model), exact) < 2e-2


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_learns(dora: bool) -> None:
    model = tiny_transformer().requires_grad_(False)
    answer = velocity(model)
    settings = LoraSettings(r=2, target_modules=["to_q", "conv_point"], use_dora=dora)
    updates = new_updates(model, settings, torch.Generator().manual_seed(0))
    attach_all(model, updates)
    assert off(velocity(model), answer) < 1e-6
    learned = [tensor for update in updates.values() for tensor in update.tensors.values()]
    optimizer = torch.optim.SGD(learned, lr=0.5)
    before = bits(model)
    for _ in range(2):
        x = model(torch.ones(1, 4, 8, 8), torch.ones(1, 3, 32), torch.tensor([100.0])).sample
        optimizer.zero_grad()
        x.square().mean().backward()
        optimizer.step()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in learned)
    assert bits(model) == before
    assert off(velocity(model), answer) > 1e-5


def test_gradients_are_those_of_the_merged_weight() -> None:
    model = tiny_transformer().requires_grad_(False)
    updates = new_updates(model, LoraSettings(r=2, target_modules=["attn1.to_q"]), torch.Generator().manual_seed(0))
    for update in updates.values():
        update.up.data.normal_(generator=torch.Generator().manual_seed(1))
    attach_all(model, updates)

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        out: torch.Tensor = model(latents, torch.ones(1, 3, 32), torch.tensor([100.0])).sample
        return out.square().sum()

    loss().backward()
    name, update = next(iter(updates.items()))
    attach(model, {other: [(u, 1.0)] for other, u in updates.items() if other != name})
    layer: Any = model.get_submodule(name)
    kept = layer.weight
    del layer._parameters["weight"]
    down, up = update.down.detach().requires_grad_(), update.up.detach().requires_grad_()
    layer.weight = kept + update.scaling * up @ down
    loss().backward()
    assert update.down.grad is not None
    assert update.up.grad is not None
    assert off(update.down.grad, down.grad) < 1e-5  # type: ignore[arg-type]
    assert off(update.up.grad, up.grad) < 1e-5  # type: ignore[arg-type]


def test_a_depthwise_convolution_is_refused() -> None:
    with pytest.raises(InvalidInput, match="depthwise 3x3 convolution, one small kernel for each channel"):
        new_updates(tiny_transformer(), LoraSettings(target_modules=["conv_depth"]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"r": 0}, "must be at least 1"),
        ({"target_modules": ["to_z"]}, "'to_z', which is no layer"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        new_updates(tiny_transformer(), LoraSettings.read(settings))


def test_weights_that_would_not_be_finite_are_not_merged() -> None:
    model = tiny_transformer().half()
    updates = updates_of(model, std=300.0)
    name = next(iter(updates))
    with pytest.raises(InvalidInput, match="is not finite in float16"):
        merged(model.get_submodule(name), [(updates[name], 10.0)], name)


def test_lengths_need_weights_that_can_be_read() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidInput, match="hides"):
        dense_weight(layer)


@pytest.mark.slow
def test_compiled_blocks_notice_adapters_and_keep_their_code() -> None:
    import torch._dynamo.utils as counting

    model = tiny_transformer()
    first, second = updates_of(model, seed=1), updates_of(model, seed=2)
    answers = [velocity(model)]
    for updates in (first, second):
        attach_all(model, updates)
        answers.append(velocity(model))
    attach(model, {})
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    made = []
    for turn in (0, 1, 2, 0, 1):
        attach_all(model, ({}, first, second)[turn])
        assert off(velocity(model), answers[turn]) < 1e-6
        made.append(counting.counters["stats"]["unique_graphs"])
    assert made[1] == made[0] + 1  # one for adapted layers
    assert made[1:] == [made[1]] * 4  # which serves all adapters of that rank, and the base is still there


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_come_and_go(dora: bool) -> None:
    """As a memory mode has it: the layers are empty when the adapter is attached, and have weights while they run."""
    model = tiny_transformer()
    updates = updates_of(model, dora=dora)
    attach_all(model, updates)
    expected = velocity(model)
    attach(model, {})
    kept = {name: parameter for name, parameter in model.named_parameters() if "transformer_blocks" in name}

    def place(name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    for turn in range(2):
        for name, parameter in kept.items():
            place(name, parameter.detach().to("meta"))
        if turn == 0:
            attach_all(model, updates)
            with pytest.raises(InvalidInput, match="not in memory"):
                merged(model.get_submodule("transformer_blocks.0.attn1.to_q"), [], "x")
        for name, parameter in kept.items():
            place(name, parameter.detach())
        assert torch.equal(velocity(model), expected)
