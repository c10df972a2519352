"""Every projection is reached by calling its module, so that adapters and quantised layers can take its place."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana.checkpoints.controlnet import SanaControlNetModel
from sana.engine.predictor import Captions, Control, Predictor
from sana.errors import InvalidInput
from sana.nn import mixffn
from sana.nn.inference import bare
from tiny_model import tiny_transformer


class Standing(nn.Module):
    """Stands where a layer was, without any of its attributes, and notes that it was called."""

    def __init__(self, layer: nn.Module, name: str, called: set[str]) -> None:
        super().__init__()
        self.inner = [layer]  # in a list: it has no parameters and no submodule, as packed weights have none
        self.name, self.called = name, called

    def forward(self, x: Tensor) -> Tensor:
        self.called.add(self.name)
        out: Tensor = self.inner[0](x)
        return out


def replaced(model: nn.Module, called: set[str]) -> set[str]:
    """Put a `Standing` where each linear layer and convolution is; return their names."""
    names = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name in names:
        layer = model.get_submodule(name)
        path, _, last = name.rpartition(".")
        parent: Any = model.get_submodule(path)
        standing = Standing(layer, name, called)
        if isinstance(parent, nn.ModuleList):
            parent[int(last)] = standing
        else:
            parent.add_module(last, standing)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wiring", ["diffusers", "native"])
def test_no_projection_is_read_past_its_module(dtype: torch.dtype, wiring: str) -> None:
    base = tiny_transformer(num_layers=3, qk_norm="rms_norm_across_heads").to(dtype)
    network = SanaControlNetModel.from_transformer(base, num_layers=2)
    network.wiring = wiring
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    text = Captions(embeds=embeds, mask=torch.ones(2, 5), rows=(0, 1))
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        control = Control(network=network, latents=x)
        predict = Predictor(base, torch.tensor([500]), text, perturbed_layers=(1,), controls=[control])
        with torch.no_grad():
            return predict(x, 0, guided=True, perturbed=True)

    plain, called = run(), set[str]()
    own, beside = set[str](), set[str]()
    names = replaced(base, own), replaced(network, beside)
    found = run()
    called = own | beside
    assert own == names[0], sorted(names[0] - called)
    assert beside == names[1], sorted(names[1] - called)
    assert torch.allclose(found, plain, atol=1e-5 if dtype == torch.float32 else 5e-2)


def test_fast_ways_are_taken_only_by_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    rows = mixffn.GLUMBConv._mix_rows
    monkeypatch.setattr(mixffn.GLUMBConv, "_mix_rows", lambda self, x: ways.append("rows") or rows(self, x))
    block = mixffn.GLUMBConv(4, 4, 2.0)
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = block(x)
        assert ways == ["rows"]
        for name in ("conv_inverted", "conv_depth", "conv_point"):
            layer = getattr(block, name)
            setattr(block, name, Standing(layer, name, set()))
            assert torch.allclose(block(x), expected, atol=1e-6)
            setattr(block, name, layer)
            handle = layer.register_forward_hook(lambda module, args, out: out + 1)
            assert not torch.allclose(block(x), expected, atol=1e-3), "a hook on a layer counts"
            handle.remove()
    assert ways == ["rows"]


def test_subclasses_and_other_dtypes_are_not_bare() -> None:
    class Own(nn.Linear):
        pass

    assert bare(torch.float32, nn.Linear(2, 2))
    assert not bare(torch.float32, Own(2, 2))
    assert not bare(torch.bfloat16, nn.Linear(2, 2))
    assert not bare(torch.float32, nn.Linear(2, 2), nn.Identity())
    with pytest.raises(InvalidInput, match="no `encode_caption`"):
        Predictor(Own(2, 2), torch.tensor([1]), Captions(embeds=torch.ones(1, 1, 2), mask=torch.ones(1, 1), rows=(0,)))
