"""Compiled parts: the same pictures, the same names, a clear word where there is no compiler."""

import copy
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana import Request, generate_images
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.engine import compilation
from sana.engine.compilation import CACHE_VARIABLE, compile_modules, is_compiled, require_compiler, set_cache
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Control, Predictor
from sana.errors import MissingDependency
from tiny_model import tiny_transformer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "set by the user"))
    yield
    torch.compiler.reset()


def captions(length: int) -> Captions:
    embeds = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[length], [1]])).long()
    return Captions(embeds=embeds, mask=mask, rows=(0, 1))


def predicted(parts: Parts, length: int) -> Tensor:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Predictor(parts.transformer, torch.tensor([500]), captions(length))(x, 0, guided=True)


def test_one_graph_serves_all_blocks_and_short_texts(tiny_parts: Parts) -> None:
    parts = copy.deepcopy(tiny_parts)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    for block in parts.transformer.transformer_blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    assert is_compiled(parts.transformer)
    assert not is_compiled(parts.vae)
    for length in (3, 20, 63):
        assert torch.allclose(predicted(parts, length), predicted(tiny_parts, length), atol=1e-5)
    assert len(parts.transformer.transformer_blocks) > 1
    assert len(graphs) == 1


def test_perturbed_rows_and_control_networks_make_few_more_graphs(tiny_parts: Parts) -> None:
    parts = copy.deepcopy(tiny_parts)
    parts.transformer = plain = tiny_transformer(num_layers=5)
    compiled = copy.deepcopy(plain)
    network = SanaControlNetModel.from_transformer(plain, num_layers=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled_network = copy.deepcopy(network)
    for block in (*compiled.transformer_blocks, *compiled_network.transformer_blocks):
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))

    def step(transformer: Any, network: Any, length: int) -> Tensor:
        control = Control(network=network, latents=x, scale=0.7)
        given = {"perturbed_layers": (2,), "controls": [control]}
        with torch.no_grad():
            predict = Predictor(transformer, torch.tensor([500]), captions(length), **given)
            return predict(x, 0, guided=True, perturbed=True)

    for length in (3, 20):
        assert torch.allclose(step(compiled, compiled_network, length), step(plain, network, length), atol=1e-5)
    assert len(graphs) == 3, "before, at and behind the perturbed block; the control network shares the first"


def test_a_control_network_is_compiled_with_the_rest(tiny_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(tiny_parts)
    network = SanaControlNetModel.from_transformer(parts.transformer, num_layers=1)
    for given in (network, [network]):
        parts.controlnet = copy.deepcopy(given)
        assert not is_compiled(network)
        parts.compile(tmp_path / "cache")
        one = parts.controlnet[0] if isinstance(parts.controlnet, list) else parts.controlnet
        assert is_compiled(one)


def test_names_and_copies_stay(tiny_parts: Parts, tmp_path: Path) -> None:
    parts = copy.deepcopy(tiny_parts)
    parts.compile(tmp_path / "cache")
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "cache")
    assert is_compiled(parts.transformer)
    assert is_compiled(parts.vae)
    assert parts.transformer.state_dict().keys() == tiny_parts.transformer.state_dict().keys()
    assert parts.vae.state_dict().keys() == tiny_parts.vae.state_dict().keys()
    assert parts.describe() == {**tiny_parts.describe(), "compiled": "yes"}
    assert not is_compiled(tiny_parts.transformer)
    assert not is_compiled(None)


def test_parts_may_be_absent() -> None:
    compile_modules(None, None)
    assert not is_compiled(None)


def test_where_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert set_cache(None) == tmp_path / "set by the user"
    monkeypatch.setattr(compilation.constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())
    assert set_cache(None) == tmp_path / "hub" / "sanakit" / "compiled"
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "hub" / "sanakit" / "compiled")
    assert set_cache(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        set_cache(tmp_path / "file")


def test_without_a_compiler(tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(MissingDependency, match="Install g"):
        tiny_parts.compile()
    assert not is_compiled(tiny_parts.transformer)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(MissingDependency, match="headers of Python"):
        require_compiler("cpu")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(MissingDependency, match="Triton"):
        require_compiler("cuda")


def decoded(parts: Parts) -> Tensor:
    latent = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out: Tensor = parts.vae.decode(latent.to(parts.vae.dtype)).sample
    return out


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_parts_draw_the_same(tiny_parts: Parts, tmp_path: Path, dtype: torch.dtype) -> None:
    plain, parts = copy.deepcopy(tiny_parts), copy.deepcopy(tiny_parts)
    for one in (plain, parts):
        one.transformer.to(dtype)
        one.vae.to(dtype)
    parts.compile(tmp_path / "cache")
    for draw in (lambda parts: predicted(parts, 20), decoded):
        exact = draw(tiny_parts)
        assert error(draw(parts), exact) < 1.2 * max(error(draw(plain), exact), 1e-6)
    request = Request(prompt="a fox", steps=2, seed=1, width=64, height=64, binning=False)
    assert generate_images(parts, request).images[0].size == (64, 64)
    assert any((tmp_path / "cache").rglob("*.so")), "the compiled code is on the disk"
