"""What a denoising step and a decode cost, counted where no machine can blur it: operators and the bytes they touch.

Every operator but views counts, with the bytes of the tensors it reads and writes. The models are published ones in
bfloat16, made of fake tensors: on the meta device, so nothing is computed, but like on a CPU to look at, so that its
ways are taken. With gradients the general way is taken, which is also that of a GPU. A figure may not grow: one percent
of room is for other releases of torch. To pin anew after a change that saves something, or that is worth its cost, run
this file with `python` and copy what it prints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana.cards import CARDS
from sana.models import dc_ae
from sana.models.dc_ae import DCAutoencoder
from sana.models.linear_dit import LinearDiT
from sana.nn import mixffn

TOKENS = 60
ROOM = 1.01
PINNED: dict[str, tuple[int, int]] = {
    "step, general way": (936, 14_733_247_256),
    "step, CPU": (1_944, 16_582_935_320),
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
    plain = [patch.object(module, "bare", lambda *_: True) for module in (mixffn, dc_ae)]
    one_thread = patch.object(torch, "get_num_threads", lambda: 1)
    try:
        with FakeTensorMode(), plain[0], plain[1], one_thread:
            yield
    finally:
        torch.set_default_dtype(before)


def step(general: bool) -> tuple[int, int]:
    """Count a step of a pair of latents of 1024 px, unconditional and conditional, with 60 text tokens."""
    config = CARDS["sana-0.6b-1024"].transformer
    with faked():
        model = LinearDiT(config).eval()
        with torch.no_grad():
            kv = model.cross_attention_kv(model.encode_caption(torch.empty(2, TOKENS, config.caption_channels)))
            modulation = model.modulation(torch.empty(1))
        latents, mask = torch.empty(2, 32, 32, 32), torch.empty(2, TOKENS)
        return counted(lambda: model.denoise(latents, modulation, kv, mask), general)


def decoding(general: bool) -> tuple[int, int]:
    """Count the decoding of a picture of 512 px."""
    with faked():
        model = DCAutoencoder(CARDS["sana-0.6b-1024"].autoencoder).eval()
        latents = torch.empty(1, 32, 16, 16)
        return counted(lambda: model.decode(latents), general)


WORK: dict[str, tuple[Callable[[bool], tuple[int, int]], bool]] = {
    "step, general way": (step, True),
    "step, CPU": (step, False),
    "decode, general way": (decoding, True),
    "decode, CPU": (decoding, False),
}


@pytest.mark.parametrize("work", WORK)
def test_nothing_costs_more_than_it_did(work: str) -> None:
    count, general = WORK[work]
    (operators, size), (pinned_operators, pinned_size) = count(general), PINNED[work]
    assert operators <= pinned_operators * ROOM, "more operators than pinned"
    assert size <= pinned_size * ROOM, "more bytes than pinned"


def test_the_counter_itself() -> None:
    x = torch.zeros(4, 8)
    assert counted(lambda: x.view(32).add_(1), True) == (1, 2 * 4 * 8 * 4)
    assert counted(lambda: x.t() @ x + torch.empty(8, 8), False) == (2, (2 * 32 + 64 + 3 * 64) * 4)


if __name__ == "__main__":
    for name, (count, general) in WORK.items():
        operators, size = count(general)
        print(f'    "{name}": ({operators:_}, {size:_}),')  # noqa: T201
