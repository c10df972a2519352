"""The operations of a training step: counted with and without values, and held against counts by hand."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana.config import TransformerConfig
from sana.models.linear_dit import LinearDiT
from sana.training import flops
from sana.training.estimate import SHARE, Estimate
from sana.training.flops import product_rate
from sana.training.ledger import Ledger

CONFIG = TransformerConfig(
    num_attention_heads=4,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=24,
    in_channels=8,
    out_channels=8,
)
BATCH, SIDE, TEXT = 3, 6, 5


def block_by_hand() -> tuple[int, int]:
    """Operations forward of a block: all but those of the fused attention to the caption, and those."""
    d, n, hidden, heads = CONFIG.inner_dim, SIDE * SIDE, int(CONFIG.mlp_ratio * CONFIG.inner_dim), 4
    rows, width = BATCH * n, CONFIG.attention_head_dim
    projections = 4 * 2 * rows * d * d  # q, k, v, out
    linear = 2 * BATCH * heads * n * width * width + 2 * BATCH * heads * n * width * (width + 1)
    caption = 2 * 2 * rows * d * d + 2 * 2 * BATCH * TEXT * d * d  # q and out; k and v
    attention = 2 * 2 * rows * TEXT * d
    mix = 2 * rows * d * 2 * hidden + 2 * rows * 2 * hidden * 9 + 2 * rows * hidden * d
    return projections + linear + caption + mix, attention


def counted(checkpointing: bool) -> tuple[int, int]:
    """Operations forward, and in all, of a step of the tiny model without values."""
    with FakeTensorMode():
        model = LinearDiT(CONFIG).train()
        model.gradient_checkpointing = checkpointing
        x, text = torch.zeros(BATCH, 8, SIDE, SIDE), torch.zeros(BATCH, TEXT, 24)
        mask = torch.ones(BATCH, TEXT, dtype=torch.int64)
        with Ledger() as ledger:
            loss: Tensor = model(x, text, torch.zeros(BATCH), encoder_attention_mask=mask)[0].square().mean()
            forward = ledger.flop
            loss.backward()  # type: ignore[no-untyped-call]
    return forward, ledger.flop


def test_a_step_of_a_tiny_model_takes_what_is_counted_by_hand() -> None:
    d, rows = CONFIG.inner_dim, BATCH * SIDE * SIDE
    block, attention = block_by_hand()
    time_embedding = 2 * BATCH * (256 * d + d * d + d * 6 * d)
    captions = 2 * BATCH * TEXT * (24 * d + d * d)
    edges = 2 * 2 * rows * 8 * d  # the patches in, the velocity out
    forward, whole = counted(checkpointing=False)
    by_hand = 2 * (block + attention) + time_embedding + captions + edges
    assert forward == by_hand
    # Backward every product is met twice, but for the three whose inputs need no gradient, and that which the fused
    # attention computes again.
    spared = 2 * BATCH * 256 * d + 2 * BATCH * TEXT * 24 * d + edges // 2
    assert whole == 3 * by_hand - spared + 2 * attention // 2
    forward_kept, recomputed = counted(checkpointing=True)
    assert forward_kept == forward
    assert whole < recomputed <= whole + 2 * (block + attention)
    assert recomputed > whole + 1.7 * (block + attention)


@pytest.mark.parametrize("groups", [1, 8])
def test_the_gradients_of_a_convolution_take_what_the_convolution_takes(groups: int) -> None:
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=groups), torch.zeros(2, 8, 5, 5, requires_grad=True)
    with Ledger() as ledger:
        layer(x).sum().backward()
    assert ledger.flop == 3 * 2 * (2 * 8 * 5 * 5) * (8 // groups) * 9


def test_fused_attention_is_counted() -> None:
    q, k = torch.zeros(2, 3, 7, 16, requires_grad=True), torch.zeros(2, 3, 5, 16, requires_grad=True)
    product = 2 * 2 * 3 * 7 * 5 * 16
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), Ledger() as ledger:
        F.scaled_dot_product_attention(q, k, k).sum().backward()
    assert ledger.flop == (2 + 5) * product


def test_a_rate_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "CPU_SHAPE", (64, 64, 64))
    before, began = torch.get_num_threads(), time.perf_counter()
    # Two threads wait for each other where other tests run: a small product is then slow.
    assert 1e6 < product_rate(torch.device("cpu"), torch.float32, 2) < 1e14
    assert time.perf_counter() - began >= flops.SHORT
    assert torch.get_num_threads() == before


def test_seconds_of_a_step_follow_from_operations_and_rate() -> None:
    bare = {"weights": 0, "frozen": 0, "gradients": 0, "optimizer": 0, "average": 0, "activations": 0}
    told = Estimate(**bare, flop=8 * 10**12, rate=2e12)
    assert told.least_step_seconds == 4
    assert told.step_seconds == pytest.approx(4 / SHARE)
    assert Estimate(**bare).step_seconds is None
