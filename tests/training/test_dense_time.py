"""Telling a model time on another scale."""

import copy

import torch

from sana.models.linear_dit import LinearDiT
from sana.training.dense_time import retime
from sana.training.starting import StartModel
from tiny_model import tiny_transformer


def test_a_model_told_time_on_another_scale_predicts_nearly_the_same() -> None:
    model: LinearDiT = tiny_transformer(timestep_scale=0.004)
    before = copy.deepcopy(model)
    assert retime(model, 0.004, 0.001, steps=600) < 0.15
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 4, 4, 4, generator=generator), torch.randn(4, 3, 32, generator=generator)
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0])
    with torch.no_grad():
        wanted, found = before(x, text, 4 * sigma)[0], model(x, text, sigma)[0]
        untouched = before(x, text, sigma)[0]
    assert float((found - wanted).norm()) < 0.1 * float((untouched - wanted).norm())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed
    assert all("timestep_embedder" in name for name in changed)


def test_the_fit_is_deterministic() -> None:
    one, other = (tiny_transformer(timestep_scale=0.004) for _ in range(2))
    retime(one, 0.004, 0.001, steps=20)
    retime(other, 0.004, 0.001, steps=20)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_built_in_model_becomes_a_teacher_without_fine_tuning() -> None:
    start = StartModel("nano", torch.device("cpu"))
    base, dense = (start.transformer(torch.float32, changes) for changes in ({}, {"timestep_scale": 0.001}))
    assert dense.config.timestep_scale == 0.001
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 32, 8, 8, generator=generator), torch.randn(4, 6, 192, generator=generator)
    sigma = torch.tensor([0.3, 0.5, 0.7, 0.9])
    with torch.no_grad():
        wanted, found = base(x, text, 1000 * sigma)[0], dense(x, text, sigma)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    # Weights that cancel each other would not survive rounding: bfloat16 keeps eight bits of them.
    rounded = copy.deepcopy(dense).to(torch.bfloat16).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = dense(x, text, sigma)[0].float()
    with torch.no_grad():
        near = rounded(x, text, sigma)[0]
    assert float((near - found).norm() / found.norm()) < 0.02
    assert float((autocast - found).norm() / found.norm()) < 0.03
