"""What a denoising step and a decode cost, counted where no machine can blur it: operators and the bytes they touch.

Every operator but views counts, with the bytes of the tensors it reads and writes. The models are published ones in
bfloat16, made of fake tensors: on the meta device, so nothing is computed, but like on a CPU to look at, so that its
ways are taken. With gradients the general way is taken, which is also that of a GPU. A figure may not grow: one percent
of room is for other releases of torch. To pin anew after a change that saves something, or that is worth its cost, run
this file with `python` and copy what it prints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sana.cards import CARDS
from sana.config import ControlNetConfig, TransformerConfig
from sana.models import dc_ae_blocks
from sana.models.controlnet import LinearControlNet
from sana.models.dc_ae import DCAutoencoder
from sana.models.linear_dit import LinearDiT
from sana.nn import mixffn

TOKENS = 60
ROOM = 1.01
PINNED: dict[str, tuple[int, int]] = {
    "step, general way": (936, 14_733_247_256),
    "step, CPU": (1_944, 16_582_935_320),
    "step with PAG, general way": (938, 18_097_046_772),
    "step with PAG, CPU": (1_946, 20_409_156_852),
    "step with ControlNet, general way": (1_189, 18_612_134_464),
    "step with ControlNet, CPU": (2_449, 20_924_244_544),
    "decode, general way": (541, 12_573_453_062),
    "decode, CPU": (8_536, 13_289_439_596),
}

aten = torch.ops.aten
FREE = {aten.empty.memory_format, aten.new_empty.default, aten.detach.default, aten._unsafe_view.default}


class Counter(TorchDispatchMode):
    """Count operators that touch memory, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if tensors and func.namespace == "aten" and not func.is_view and func not in FREE:
            self.operators += 1
            self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return out


def counted(call: Callable[[], object], general: bool) -> tuple[int, int]:
    """Return how many operators a call runs, and their bytes."""
    with torch.set_grad_enabled(general), Counter() as counter:
        call()
    return counter.operators, counter.bytes


@contextmanager
def faked() -> Iterator[None]:
    """Make tensors fake, and bfloat16 unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    # Fake weights have a class of their own, as quantised ones have, for which no CPU has a way of its own.
    plain = [patch.object(module, "bare", lambda *_: True) for module in (mixffn, dc_ae_blocks)]
    one_thread = patch.object(torch, "get_num_threads", lambda: 1)
    try:
        with FakeTensorMode(), plain[0], plain[1], one_thread:
            yield
    finally:
        torch.set_default_dtype(before)


def step(general: bool, perturbed_layer: int | None = None, controlled: bool = False) -> tuple[int, int]:
    """Count a step of a pair of latents of 1024 px, unconditional and conditional, with 60 text tokens.

    With a perturbed layer a third row joins there; a control network of 7 blocks has its condition ready.
    """
    config = CARDS["sana-0.6b-1024"].transformer
    rows = 2 if perturbed_layer is None else 3
    given: dict[str, Any] = {}
    if perturbed_layer is not None:
        given = {"perturbed_layers": (perturbed_layer,), "perturbed_rows": 1}
    with faked():
        # Frozen, so that the general way is not that of training on a CPU, whose gradients are written by hand.
        model = LinearDiT(config).eval().requires_grad_(False)
        branch = LinearControlNet(ControlNetConfig(**_shared(config))).eval().requires_grad_(False)
        with torch.no_grad():
            text = torch.empty(rows, TOKENS, config.caption_channels)
            kv = model.cross_attention_kv(model.encode_caption(text))
            own = branch.cross_attention_kv(branch.encode_caption(text[:2]))
            modulation = model.modulation(torch.empty(1))
            told = branch.modulation(torch.empty(1))
            condition = branch.condition(torch.empty(1, 32, 32, 32))
        latents, mask = torch.empty(2, 32, 32, 32), torch.empty(rows, TOKENS)

        def call() -> object:
            samples = None
            if controlled:
                tokens = branch.embed(latents[:1]) + condition
                samples = branch.residuals(torch.cat([tokens, tokens]), (32, 32), told, own, mask[:2])
            return model.denoise(latents, modulation, kv, mask, samples, **given)

        return counted(call, general)


def _shared(config: TransformerConfig) -> dict[str, Any]:
    names = ControlNetConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in names and name != "num_layers"}


def decoding(general: bool) -> tuple[int, int]:
    """Count the decoding of a picture of 512 px."""
    with faked():
        model = DCAutoencoder(CARDS["sana-0.6b-1024"].autoencoder).eval().requires_grad_(False)
        latents = torch.empty(1, 32, 16, 16)
        return counted(lambda: model.decode(latents), general)


WORK: dict[str, tuple[Callable[[bool], tuple[int, int]], bool]] = {
    "step, general way": (step, True),
    "step, CPU": (step, False),
    "step with PAG, general way": (partial(step, perturbed_layer=14), True),
    "step with PAG, CPU": (partial(step, perturbed_layer=14), False),
    "step with ControlNet, general way": (partial(step, controlled=True), True),
    "step with ControlNet, CPU": (partial(step, controlled=True), False),
    "decode, general way": (decoding, True),
    "decode, CPU": (decoding, False),
}


@pytest.mark.parametrize("work", WORK)
def test_nothing_costs_more_than_it_did(work: str) -> None:
    count, general = WORK[work]
    (operators, size), (pinned_operators, pinned_size) = count(general), PINNED[work]
    assert operators <= pinned_operators * ROOM, "more operators than pinned"
    assert size <= pinned_size * ROOM, "more bytes than pinned"


def multiplied(blocks: int = 6, **options: Any) -> int:
    """Return the operations of the products and convolutions of a step of two rows through narrow blocks."""
    width = {"num_attention_heads": 4, "cross_attention_dim": 128, "num_cross_attention_heads": 2}
    config = TransformerConfig(num_layers=blocks, **width)
    with torch.device("meta"), torch.no_grad():
        model = LinearDiT(config).eval()
        text = torch.empty(2 + options.get("perturbed_rows", 0), 20, config.caption_channels)
        kv = model.cross_attention_kv(model.encode_caption(text))
        modulation = model.modulation(torch.empty(1))
        with FlopCounterMode(display=False) as counter:
            model.denoise(torch.empty(2, 32, 8, 8), modulation, kv, **options)
            return int(counter.get_total_flops())


def test_perturbed_rows_cost_what_they_compute_and_nothing_before_they_exist() -> None:
    plain, row = multiplied(), (multiplied() - multiplied(5)) / 2
    first, middle, last = (multiplied(perturbed_layers=(layer,), perturbed_rows=1) for layer in (0, 3, 5))
    assert first - middle == 3 * row, "three blocks more"
    assert middle - last == 2 * row
    # In the perturbed block a row needs neither queries, keys nor sums, and has its values from the conditional one.
    assert last - plain < 0.9 * row


def test_the_counter_itself() -> None:
    x = torch.zeros(4, 8)
    assert counted(lambda: x.view(32).add_(1), True) == (1, 2 * 4 * 8 * 4)
    assert counted(lambda: x.t() @ x + torch.empty(8, 8), False) == (2, (2 * 32 + 64 + 3 * 64) * 4)


if __name__ == "__main__":
    for name, (count, general) in WORK.items():
        operators, size = count(general)
        print(f'    "{name}": ({operators:_}, {size:_}),')  # noqa: T201
