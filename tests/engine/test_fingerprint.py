import copy

import torch
from torch import nn

from sana.engine.fingerprint import SAMPLES, fingerprint


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.Linear(40, 2), nn.BatchNorm1d(2))


def test_it_names_what_is_in_memory() -> None:
    first = fingerprint(network())
    assert len(first) == 16
    assert fingerprint(network()) == first
    assert fingerprint(network(seed=1)) != first
    assert fingerprint(network().bfloat16()) != first
    assert fingerprint(network().to(memory_format=torch.channels_last)) == first
    assert fingerprint(torch.compile(network())) == first


def test_it_follows_every_tensor() -> None:
    whole = network()
    first = fingerprint(whole)
    for name in whole.state_dict():
        changed = copy.deepcopy(whole)
        changed.state_dict()[name].add_(1)
        assert fingerprint(changed) != first, name


def test_small_tensors_are_read_whole() -> None:
    layer = nn.Linear(SAMPLES, 1, bias=False)
    first = fingerprint(layer)
    with torch.no_grad():
        layer.weight[0, SAMPLES // 2] += 1
    assert fingerprint(layer) != first


def test_parts_that_are_absent_or_empty() -> None:
    assert fingerprint(None) == fingerprint() == "none"
    assert fingerprint(None, network()) == fingerprint(network())
    with torch.device("meta"):
        assert fingerprint(nn.Linear(3, 2)) != fingerprint(nn.Linear(2, 3))
    assert fingerprint(nn.Embedding(0, 4)) != "none"
