"""Adapters by name: chosen, scaled, swapped per request, fused and taken out again, and what records say of them."""

import copy
import gc
import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from sana.checkpoints.lora.files import read_lora
from sana.checkpoints.lora.writing import save_lora
from sana.engine import adapters as adapters_module
from sana.engine.adapters import Adapters
from sana.engine.fingerprint import fingerprint
from sana.errors import CheckpointError, InvalidInput
from sana.models.lora import targets
from tiny_lora import EVERYWHERE, off, random_lora, velocity
from tiny_model import tiny_transformer


def loaded(*names: str, **options: Any) -> tuple[Any, Adapters]:
    """Return a transformer with adapters of these names, the last of them active."""
    model = tiny_transformer()
    adapters = Adapters(model)
    for seed, name in enumerate(names):
        adapters.load(random_lora(model, seed=seed, **options), name)
    return model, adapters


def alone(name: str, seed: int, weight: float = 1.0, **options: Any) -> torch.Tensor:
    """Return the answer of a fresh transformer with one adapter only."""
    model = tiny_transformer()
    Adapters(model).load(random_lora(model, seed=seed, **options), name, weight=weight)
    return velocity(model)


def test_the_newest_acts_alone_and_all_views_agree() -> None:
    model, adapters = loaded("a", "b")
    assert adapters.active == {"b": 1.0}
    assert Adapters(model).names == ("a", "b")
    assert torch.equal(velocity(model), alone("b", 1))


def test_names_are_given() -> None:
    model = tiny_transformer()
    adapters = Adapters(model)
    assert [adapters.load(random_lora(model)).name for _ in range(3)] == ["default_0", "default_1", "default_2"]


def test_hot_swapping_for_a_request_is_as_good_as_loading_alone() -> None:
    model, adapters = loaded("a", "b")
    adapters.set({})
    base, weights = velocity(model), fingerprint(model)
    for _ in range(3):
        with adapters.using({"a": 0.5}):
            assert torch.equal(velocity(model), alone("a", 0, 0.5))
            assert fingerprint(model) == weights
        with adapters.using({"b": 1.0}):
            assert torch.equal(velocity(model), alone("b", 1))
        assert torch.equal(velocity(model), base)


def test_using_nests_and_comes_back_after_an_error() -> None:
    model, adapters = loaded("a", "b")
    active = velocity(model)
    with adapters.using({"a": 2.0}):
        inside = velocity(model)
        with adapters.using(None, 0.5):
            assert adapters.acting == {"a": 1.0}
            assert torch.equal(velocity(model), alone("a", 0))
        assert torch.equal(velocity(model), inside)
        with adapters.using({}):
            assert torch.equal(velocity(model), velocity(tiny_transformer()))
        with pytest.raises(ZeroDivisionError), adapters.using({}):
            raise ZeroDivisionError
        assert torch.equal(velocity(model), inside)
    assert torch.equal(velocity(model), active)


def test_a_choice_made_inside_holds_from_then_on() -> None:
    model, adapters = loaded("a", "b")
    with adapters.using({"b": 0.1}):
        adapters.set({"a": 1.0})
        assert torch.equal(velocity(model), alone("a", 0))
    assert torch.equal(velocity(model), alone("a", 0))


def test_off_and_on() -> None:
    model, adapters = loaded("a")
    on = velocity(model)
    adapters.disable()
    assert torch.equal(velocity(model), velocity(tiny_transformer()))
    with adapters.using(None, 0.5):
        assert torch.equal(velocity(model), velocity(tiny_transformer()))
    adapters.enable()
    assert torch.equal(velocity(model), on)


def test_put_in_the_place_of_another() -> None:
    model, adapters = loaded("a", "b")
    adapters.set({"a": 0.5, "b": 0.25})
    adapters.load(random_lora(model, seed=7, rank=2), "a", hotswap=True)
    assert adapters.active == {"a": 0.5, "b": 0.25}
    other = tiny_transformer()
    both = Adapters(other)
    both.load(random_lora(model, seed=7, rank=2), "x")
    both.load(random_lora(model, seed=1), "y")
    both.set({"x": 0.5, "y": 0.25})
    assert torch.equal(velocity(model), velocity(other))
    with pytest.raises(InvalidInput, match="Trying to hotswap LoRA adapter 'c'"):
        adapters.load(random_lora(model), "c", hotswap=True)
    with pytest.raises(InvalidInput, match="Adapter name a already in use"):
        adapters.load(random_lora(model), "a")


def test_a_failed_replacement_leaves_the_old_one() -> None:
    model, adapters = loaded("a")
    answer = velocity(model)
    with pytest.raises(CheckpointError):
        adapters.load({"transformer.proj_out.lora_A.weight": torch.ones(1, 1)}, "a", hotswap=True)
    assert torch.equal(velocity(model), answer)


def test_forgetting() -> None:
    model, adapters = loaded("a", "b")
    adapters.set({"a": 1.0, "b": 1.0})
    adapters.remove("a")
    assert torch.equal(velocity(model), alone("b", 1))
    with adapters.using({"b": 2.0}):
        adapters.remove("b")
        assert torch.equal(velocity(model), velocity(tiny_transformer()))
    assert adapters.names == ()
    with pytest.raises(InvalidInput, match="not in the list of present adapters"):
        adapters.remove("b")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_fused_and_bit_by_bit_back(kind: torch.dtype, dora: bool) -> None:
    model, adapters = loaded("a", "b", ends=EVERYWHERE, dora=dora)
    model.to(kind)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    adapters.set({"a": 0.7, "b": 1.3})
    unfused = velocity(model)
    adapters.fuse(["a"])
    adapters.fuse(["b"])
    assert adapters.fused == {"a": 0.7, "b": 1.3}
    assert off(velocity(model), unfused) < (1e-6 if kind == torch.float32 else 3e-2)
    assert not torch.equal(model.state_dict()["proj_out.weight"], weights["proj_out.weight"])
    adapters.unfuse()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert torch.equal(velocity(model), unfused)


def test_fusing_one_lets_the_other_go_on() -> None:
    model, adapters = loaded("a", "b")
    adapters.set({"a": 1.0, "b": 1.0})
    both = velocity(model)
    adapters.fuse(["a"])
    assert off(velocity(model), both) < 1e-6
    with adapters.using({}):
        assert off(velocity(model), alone("a", 0)) < 1e-6


def test_fused_then_cast_then_back() -> None:
    model, adapters = loaded("a")
    adapters.fuse()
    model.to(torch.bfloat16)
    adapters.unfuse()
    plain = tiny_transformer().to(torch.bfloat16)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_what_stays_when_all_are_forgotten() -> None:
    model, adapters = loaded("a")
    adapters.clear()
    assert fingerprint(model) == fingerprint(tiny_transformer())
    adapters.load(random_lora(model), "a")
    adapters.fuse()
    fused = velocity(model)
    adapters.clear()
    assert torch.equal(velocity(model), fused)
    assert fingerprint(model) != fingerprint(tiny_transformer())


def test_faults_of_fusing_leave_the_weights() -> None:
    model, adapters = loaded("a")
    with pytest.raises(InvalidInput, match="not in the list"):
        adapters.fuse(["z"])
    adapters.fuse()
    for call in (lambda: adapters.fuse(["a"]), lambda: adapters.remove("a")):
        with pytest.raises(InvalidInput, match="fused"):
            call()
    with pytest.raises(InvalidInput, match="before a hotswap"):
        adapters.load(random_lora(model), "a", hotswap=True)
    adapters.unfuse()
    adapters.set({})
    with pytest.raises(InvalidInput, match="no active adapter to fuse"):
        adapters.fuse()
    before = fingerprint(model)
    adapters.set({"a": 1e38})
    with pytest.raises(InvalidInput, match="not finite"):
        adapters.fuse(scale=1e5)
    assert fingerprint(model) == before
    adapters.set({"a": 1.0})
    adapters.fuse()
    with pytest.warns(UserWarning, match="The scale is ignored"), adapters.using(None, 0.5):
        pass


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True, {"attn1": float("nan")}])
def test_a_weight_that_is_no_number(weight: Any) -> None:
    _, adapters = loaded("a")
    with pytest.raises(InvalidInput, match="must be a finite number"):
        adapters.set({"a": weight})
    with pytest.raises(InvalidInput, match="finite number"), adapters.using({"a": weight}):
        pass
    with pytest.raises(InvalidInput, match="finite number"), adapters.using(None, weight):
        pass


def test_weights_of_layers() -> None:
    model, adapters = loaded("a")
    adapters.set({"a": {"attn1": 0.0, "transformer_blocks.1": 0.5}})
    whole = adapters.updates("a")
    other = tiny_transformer()
    both = Adapters(other)
    both.load({k: v for k, v in random_lora(other).items() if ".0.attn2" in k}, "x")
    both.load({k: v for k, v in random_lora(other).items() if ".1.attn2" in k}, "y")
    both.set({"x": 1.0, "y": 0.5})
    assert torch.equal(velocity(model), velocity(other))
    assert len(whole) == 16
    with adapters.using(None, 2.0):
        scaled = velocity(model)
    both.set({"x": 2.0, "y": 1.0})
    assert torch.equal(scaled, velocity(other))
    for part in ("attn", "transformer_blocks.11", "to_z"):
        with pytest.raises(InvalidInput, match="which is none of its layers"):
            adapters.set({"a": {part: 1.0}})


@pytest.mark.parametrize("name", ["", " ", "a/b", "../../x", "x" * 300, 3])
def test_names_that_are_none(name: Any) -> None:
    model = tiny_transformer()
    with pytest.raises(InvalidInput, match="cannot be called"):
        Adapters(model).load(random_lora(model), name)


def test_no_effect_is_told() -> None:
    model = tiny_transformer()
    dead = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in random_lora(model).items()}
    with pytest.warns(UserWarning, match="changes nothing"):
        Adapters(model).load(dead)


def stored(folder: Path, name: str, seed: int = 0) -> Path:
    model = tiny_transformer()
    file = folder / f"{name}.safetensors"
    save_lora(file, read_lora(random_lora(model, seed=seed), targets(model)).updates)
    return file


def test_a_file_is_loaded_once_and_again_when_it_changes(tmp_path: Path) -> None:
    model = tiny_transformer()
    adapters = Adapters(model)
    file = stored(tmp_path, "fox")
    name = adapters.ensure(file)
    assert (name, adapters.active) == ("fox", {})
    assert adapters.ensure(file) == name
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with adapters.using({name: 0.5}):
        assert adapters.describe() == [{"name": "fox", "sha256": digest, "scale": 0.5}]
        assert torch.equal(velocity(model), alone("a", 0, 0.5))
    assert adapters.describe() == []
    stored(tmp_path, "fox", seed=3)
    newer = adapters.ensure(file)
    assert newer != name
    with adapters.using({newer: 1.0}):
        assert torch.equal(velocity(model), alone("a", 3))


def test_only_some_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters_module, "KEPT", 2)
    model, adapters = loaded("mine")
    files = [stored(tmp_path, f"f{i}", seed=i) for i in range(4)]
    names = [adapters.ensure(file) for file in files[:3]]
    assert adapters.names == ("mine", names[1], names[2])
    adapters.ensure(files[1])
    adapters.ensure(files[3])
    assert adapters.names == ("mine", "f1", "f3")
    kept = [adapters.ensure(file, keep=("f0", "f1")) for file in files[:3]]
    assert set(kept) <= set(adapters.names)
    assert torch.equal(velocity(model), alone("mine", 0))


def test_nothing_is_kept_of_what_is_gone(tmp_path: Path) -> None:
    model = tiny_transformer()
    adapters = Adapters(model)
    references = []
    for turn in range(50):
        adapters.load(random_lora(model, seed=turn), "a")
        adapters.fuse()
        adapters.unfuse()
        references.append(weakref.ref(next(iter(adapters.updates("a").values())).up))
        adapters.remove("a")
    gc.collect()
    assert all(reference() is None for reference in references)
    assert fingerprint(model) == fingerprint(tiny_transformer())


def test_an_adapter_that_learns(tmp_path: Path) -> None:
    model, adapters = loaded()
    base = velocity(model)
    report = adapters.add({"r": 2, "target_modules": ["to_q"]}, "new", torch.Generator().manual_seed(0))
    assert (report.rank, len(report.matched)) == (2, 4)
    assert off(velocity(model), base) < 1e-6
    parameters = adapters.parameters("new")
    assert "transformer_blocks.0.attn1.to_q.lora_A.weight" in parameters
    assert all(parameter.requires_grad for parameter in parameters.values())
    before = adapters.describe()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    assert adapters.describe() != before
    trained = velocity(model)
    assert off(trained, base) > 1e-3
    adapters.save("new", tmp_path / "new.safetensors")
    adapters.clear()
    adapters.load(tmp_path / "new.safetensors")
    assert off(velocity(model), trained) < 1e-6
    with pytest.raises(InvalidInput, match="already in use"):
        adapters.add(None, "default_0")


def test_peft_settings_are_understood() -> None:
    from peft import LoraConfig

    _, adapters = loaded()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_k", "conv_point"], init_lora_weights="gaussian")
    assert adapters.add(config).alpha == 6
    assert len(adapters.updates("default")) == 6


def test_a_copied_transformer_has_adapters_of_its_own() -> None:
    model, adapters = loaded("a")
    answer = velocity(model)
    other = copy.deepcopy(model)
    adapters.clear()
    assert torch.equal(velocity(other), answer)
    Adapters(other).clear()
    assert torch.equal(velocity(other), velocity(tiny_transformer()))


def test_where_the_tensors_are_kept_does_not_matter() -> None:
    model, adapters = loaded("a")
    answer = velocity(model)
    adapters.move(["a"], "cpu")
    assert torch.equal(velocity(model), answer)
    with pytest.raises(InvalidInput, match="not in the list"):
        adapters.move(["b"], "cpu")


def test_room_for_a_rank() -> None:
    model, adapters = loaded("a")
    answer = velocity(model)
    adapters.share_compiled(16)
    assert len(model.transformer_blocks[0].attn1.to_q.lora_sides[0].down) == 16
    assert off(velocity(model), answer) < 1e-6
    with pytest.raises(InvalidInput, match="at least 1"):
        adapters.share_compiled(0)


@pytest.mark.parametrize("scale", [float("nan"), "1", True, None])
def test_a_scale_to_fuse_with_must_be_a_number(scale: Any) -> None:
    model, adapters = loaded("a")
    with pytest.raises(InvalidInput, match=r"scale of adapters is .* must be a finite number"):
        adapters.fuse(scale=scale)
    assert adapters.fused == {}
    assert torch.equal(velocity(model), alone("a", 0))


def test_one_name_to_fuse_may_be_a_text() -> None:
    _, adapters = loaded("style", "other")
    adapters.fuse("style")
    assert adapters.fused == {"style": 1.0}


def test_an_alpha_of_zero_is_told_to_change_nothing() -> None:
    model = tiny_transformer()
    with pytest.warns(UserWarning, match="'a' changes nothing"):
        Adapters(model).load(random_lora(model), "a", config={"lora_alpha": 0})
    Adapters(model).load(random_lora(model, bias=True), "b")
