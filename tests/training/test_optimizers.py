"""The optimisers: what they do to a weight, their rates, and their states on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sana.checkpoints.tensors import read_tensors, write_tensors
from sana.errors import InvalidInput, MissingDependency
from sana.training.config import NUMBERS, OptimizerSettings
from sana.training.optimizers import OPTIMIZERS, Optimizers, rate, scaled_rate


def module() -> nn.Module:
    """Matrices above and below what 8 bits are used for, a dense, a 1 x 1 and a depthwise kernel, and vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 80), nn.Unflatten(1, (5, 4, 4)), nn.Conv2d(5, 40, 3), nn.Conv2d(40, 40, 1),
        nn.Conv2d(40, 40, 3, padding=1, groups=40), nn.Flatten(), nn.Linear(160, 48), nn.LayerNorm(48),
    )  # fmt: skip


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def step(model: nn.Module, optimizers: Optimizers, seed: int, share: float = 1.0) -> None:
    gradients(model, seed)
    optimizers.step(share)


def test_the_registry_and_the_settings_name_the_same_optimisers() -> None:
    assert tuple(OPTIMIZERS) == tuple(NUMBERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_on_disk_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    settings = OptimizerSettings(name=name, lr=1e-2, weight_decay=0.1)
    whole, parts = module(), module()
    first, second = Optimizers(whole.named_parameters(), settings), Optimizers(parts.named_parameters(), settings)
    for seed in range(6):
        step(whole, first, seed, 1 / (1 + seed))
    for seed in range(3):
        step(parts, second, seed, 1 / (1 + seed))
    write_tensors(tmp_path / "optimizer.safetensors", second.tensors())
    again = Optimizers(parts.named_parameters(), settings)
    again.load({key: value.clone() for key, value in read_tensors(tmp_path / "optimizer.safetensors")})
    for seed in range(3, 6):
        step(parts, again, seed, 1 / (1 + seed))
    for (key, one), (_, other) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(one, other), key
    assert {k: v.dtype for k, v in first.tensors().items()} == {k: v.dtype for k, v in again.tensors().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_moves_every_parameter_against_its_gradient_and_forgets_it(name: str) -> None:
    model = module()
    optimizers = Optimizers(model.named_parameters(), OptimizerSettings(name=name, lr=1e-2))
    before = [p.detach().clone() for p in model.parameters()]
    gradients(model, 0)
    given = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizers.step(1.0)
    for p, old, gradient in zip(model.parameters(), before, given, strict=True):
        assert float(((p.detach() - old) * gradient).sum()) < 0
        assert p.grad is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_and_leaves_vectors(name: str) -> None:
    moved = {}
    for decay in (0.0, 0.5):
        model = nn.Linear(64, 64)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        torch.manual_seed(1)
        step(model, Optimizers(model.named_parameters(), OptimizerSettings(name=name, weight_decay=decay, lr=0.1)), 1)
        moved[decay] = model.weight.detach().mean().item(), model.bias.detach().clone()
    assert moved[0.5][0] == pytest.approx(moved[0.0][0] - 0.05, abs=1e-4)
    assert torch.equal(moved[0.0][1], moved[0.5][1])


def came(weight: Tensor, gradient: Tensor, steps: int) -> list[Tensor]:
    parameter = nn.Parameter(weight.clone())
    optimizers = Optimizers([("w", parameter)], OptimizerSettings(name="came", lr=1.0))
    seen = []
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizers.step(1.0)
        seen.append(before - parameter.detach())
    return seen


def test_came_takes_the_published_steps() -> None:
    first, second = came(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2)
    torch.testing.assert_close(first, torch.tensor([[9.69857, 12.09625], [12.22265, 10.16288]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(second, torch.tensor([[13.69727, 17.0835], [17.26202, 14.35301]]), rtol=1e-5, atol=0)


def test_the_first_step_of_came_under_a_constant_gradient_does_not_know_its_size() -> None:
    for size in (1e-3, 10.0):
        (change,) = came(torch.zeros(4, 3), torch.full((4, 3), size), 1)
        torch.testing.assert_close(change, torch.full((4, 3), 0.1 / (0.9 * 0.01)), rtol=1e-4, atol=0)


def test_came_factors_matrices_and_pointwise_kernels_only() -> None:
    model = module()
    optimizers = Optimizers(model.named_parameters(), OptimizerSettings(name="came"))
    step(model, optimizers, 0)
    shapes = {key: tuple(value.shape) for key, value in optimizers.tensors().items() if "exp_avg_sq" in key}
    assert (40,) in {shape for key, shape in shapes.items() if key.endswith("exp_avg_sq_col")}
    assert {shape for key, shape in shapes.items() if key.endswith("exp_avg_sq")} >= {(40 * 5 * 9,), (40 * 9,)}


def test_adamw8bit_keeps_large_moments_in_a_byte_each() -> None:
    model = module()
    optimizers = Optimizers(model.named_parameters(), OptimizerSettings(name="adamw8bit"))
    step(model, optimizers, 0)
    states = optimizers.tensors()
    assert {value.dtype for key, value in states.items() if value.shape == (80, 64)} == {torch.uint8}
    assert {value.dtype for key, value in states.items() if value.shape == (48,)} == {torch.float32}


@pytest.mark.parametrize(("name", "library"), [("came", "pytorch_optimizer"), ("adamw8bit", "bitsandbytes.optim")])
def test_a_missing_library_is_one_sentence(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingDependency, match=rf"'{name}' needs: pip install 'sanakit\[train\]'"):
        Optimizers(module().named_parameters(), OptimizerSettings(name=name))


def test_the_number_of_betas_is_the_optimisers() -> None:
    with pytest.raises(InvalidInput, match=r"betas of came takes 3 numbers, for example \[0.9, 0.999, 0.9999\]"):
        Optimizers(module().named_parameters(), OptimizerSettings(name="came", betas=(0.9, 0.99)))
    with pytest.raises(InvalidInput, match=r"eps of adamw takes 1 numbers"):
        Optimizers(module().named_parameters(), OptimizerSettings(eps=(1e-8, 1e-8)))


def test_schedules_warm_up_and_fall_as_they_are_named() -> None:
    shape = {
        name: [rate(k, 100, OptimizerSettings(warmup=10, schedule=name)) for k in range(100)]
        for name in ("linear", "cosine", "constant")
    }
    assert all(rates[0] == pytest.approx(0.1) and rates[9:60] == [1.0] * 51 for rates in shape.values())
    assert shape["constant"][60:] == [1.0] * 40
    assert shape["linear"][80] == pytest.approx(0.5)
    assert shape["cosine"][80] == pytest.approx(0.505)
    assert shape["cosine"][70] > shape["linear"][70] > shape["linear"][90] > shape["cosine"][90]
    assert min(shape["cosine"]) == shape["cosine"][-1] >= 0.01


def test_the_rate_grows_with_the_root_of_the_batch_where_asked() -> None:
    assert scaled_rate(OptimizerSettings(lr=1e-4), 1024) == 1e-4
    assert scaled_rate(OptimizerSettings(lr=1e-4, scale_lr=True), 1024) == pytest.approx(2e-4)
    assert scaled_rate(OptimizerSettings(lr=1e-4, scale_lr=True), 64) == pytest.approx(5e-5)
