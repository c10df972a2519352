"""Depth growth: a trained transformer becomes a deeper one of the same width (SANA-1.5, arXiv 2501.18427, section 3).

What is not a block stays as it is. A strategy says what the new blocks are; most of them add residual branches that
end in a zeroed projection, so that a new block is the identity whatever its gates are, while gradients reach the
zeroed weights.

Shapes: N old blocks, M > N blocks afterwards, D width.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sana.config import TransformerConfig
from sana.errors import InvalidInput, did_you_mean
from sana.models.linear_dit import LinearBlock, LinearDiT, init_module
from sana.nn.norms import RMSNorm

SMALL = 0.02
"""Standard deviation of the tensors of a near-identity block that decide nothing at the start."""
DEPTHWISE = 0.2
"""That of its depthwise convolution, which would otherwise pass on almost nothing."""
JITTER = 0.01
"""That of the noise by which blocks of the progressive strategy differ from the one before."""
ADDED_NORM = "rms_norm_across_heads"

_ENDS = ("attn1.to_out.0.weight", "attn2.to_out.0.weight", "ff.conv_point.weight")
"""Where the three residual branches of a block end; the biases beside them are zeroed, too."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a transformer is to grow."""

    layers: int
    """Blocks afterwards."""
    strategy: str = "constant"
    """One of `STRATEGIES`."""
    keep: int | None = None
    """First blocks that stay; None: all. The published choice is all but the last two, which are tied to the output."""
    gate: bool = True
    """Whether copies begin as the identity (cyclic and block_expand)."""
    add_qk_norm: bool = False
    """Whether queries and keys of a model without such norms get them, with gain 1: it then needs a short training."""
    seed: int = 0
    """Start of the random numbers of new blocks."""


class Strategy(NamedTuple):
    """How new blocks are made, and what may be told to it."""

    make: Callable[[Sequence[LinearBlock], TransformerConfig, Growth, torch.Generator], list[LinearBlock]]
    summary: str
    settings: tuple[str, ...] = ()
    """Fields of `Growth` that it reads besides `layers` and `seed`."""
    identity: bool = False
    """Whether the grown model gives, to the last bit, what the blocks that stay gave."""


def grow(model: LinearDiT, growth: Growth) -> None:
    """Replace the blocks of a transformer by more of them, in place; its configuration follows.

    Errors: InvalidInput for a depth, a strategy or settings that do not fit the model or each other.
    """
    strategy = _checked(model, growth)
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(growth.seed)
    config = dataclasses.replace(model.config, num_layers=growth.layers)
    if growth.add_qk_norm:
        config = dataclasses.replace(config, qk_norm=ADDED_NORM)
        for block in model.transformer_blocks:
            _add_norms(cast(LinearBlock, block), config)
    old = [cast(LinearBlock, block) for block in model.transformer_blocks]
    with torch.no_grad():
        blocks = strategy.make(old, config, growth, generator)
    assert len(blocks) == growth.layers
    for block in blocks:
        if all(block is not one for one in old):
            block.to(device=first.device, dtype=first.dtype)
    model.transformer_blocks = nn.ModuleList(blocks).train(model.training)
    model.config = config


def _checked(model: LinearDiT, growth: Growth) -> Strategy:
    count = len(model.transformer_blocks)
    strategy = STRATEGIES.get(growth.strategy)
    if strategy is None:
        hint = did_you_mean(growth.strategy, STRATEGIES)
        raise InvalidInput(f"There is no strategy '{growth.strategy}'.{hint} There are: {', '.join(STRATEGIES)}.")
    if growth.layers <= count:
        raise InvalidInput(f"The model has {count} blocks already; give more than that, not {growth.layers}.")
    for name, default in (("keep", None), ("gate", True)):
        if getattr(growth, name) != default and name not in strategy.settings:
            raise InvalidInput(f"`{name}` has no effect on the strategy {growth.strategy}. Leave it out.")
    if growth.keep is not None and not 1 <= growth.keep <= count:
        raise InvalidInput(f"`keep` must lie between 1 and the {count} blocks of the model, but is {growth.keep}.")
    normed = model.config.qk_norm is not None
    if not normed and not growth.add_qk_norm:
        raise InvalidInput(
            "The model does not normalise queries and keys, without which deeper ones diverge. Let them be added, with "
            "gain 1 (`add_qk_norm`), and train it shortly; it draws otherwise until then."
        )
    if normed and growth.add_qk_norm:
        raise InvalidInput("`add_qk_norm` has no effect: the model normalises queries and keys already. Leave it out.")
    return strategy


def _add_norms(block: LinearBlock, config: TransformerConfig) -> None:
    """Put norms of gain 1 behind the query and key projections of both attentions."""
    dim = config.inner_dim
    for attention in (block.attn1, block.attn2):
        attention.norm_q, attention.norm_k = RMSNorm(dim, eps=1e-5), RMSNorm(dim, eps=1e-5)


def _kept(old: Sequence[LinearBlock], growth: Growth) -> list[LinearBlock]:
    return list(old[: growth.keep])


def _constant(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """The first blocks stay, new ones behind them are the identity."""
    kept = _kept(old, growth)
    return kept + [near_identity(config, generator) for _ in range(growth.layers - len(kept))]


def _random(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """The first blocks stay, new ones are drawn as for training from nothing."""
    kept = _kept(old, growth)
    new = [LinearBlock(config) for _ in range(growth.layers - len(kept))]
    for block in new:
        for module in block.modules():
            init_module(module, generator)
        nn.init.normal_(block.scale_shift_table, std=config.inner_dim**-0.5, generator=generator)
    return kept + new


def _cyclic(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """Block i is old block i modulo N."""
    repeats = [_copied(old[i % len(old)], growth.gate) for i in range(len(old), growth.layers)]
    return [*old, *repeats]


def _block_expand(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """Each old block becomes M / N consecutive ones."""
    copies, rest = divmod(growth.layers, len(old))
    if rest:
        raise InvalidInput(
            f"block_expand makes whole multiples of the {len(old)} blocks, not {growth.layers}. Give "
            f"{copies * len(old) if copies > 1 else 2 * len(old)}, or another strategy."
        )
    return [one for block in old for one in (block, *(_copied(block, growth.gate) for _ in range(copies - 1)))]


def _progressive(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """Block i is block i - 1 with a little noise."""
    blocks = list(old)
    while len(blocks) < growth.layers:
        block = copy.deepcopy(blocks[-1])
        for weight in block.parameters():
            weight.add_(_noise(weight, JITTER, generator))
        blocks.append(block)
    return blocks


def _interpolation(
    old: Sequence[LinearBlock], config: TransformerConfig, growth: Growth, generator: torch.Generator
) -> list[LinearBlock]:
    """Block i lies between the two old blocks around it; the first and the last are the old ones."""
    blocks = []
    for i in range(growth.layers):
        place = i * (len(old) - 1) / (growth.layers - 1)
        low = min(int(place), len(old) - 1)
        block = copy.deepcopy(old[low])
        if place > low:
            for weight, after in zip(block.parameters(), old[low + 1].parameters(), strict=True):
                weight.lerp_(after, place - low)
        blocks.append(block)
    return blocks


def near_identity(config: TransformerConfig, generator: torch.Generator) -> LinearBlock:
    """Return a new block whose three branches end in zeros, and which learns from the first step on."""
    block = LinearBlock(config)
    norms = {name for name, module in block.named_modules() if isinstance(module, RMSNorm | nn.LayerNorm)}
    with torch.no_grad():
        for name, weight in block.named_parameters():
            owner, _, kind = name.rpartition(".")
            if owner in norms:
                weight.fill_(float(kind == "weight"))
            elif name in _ENDS or (kind == "bias" and owner.startswith("attn")):
                weight.zero_()
            else:
                weight.copy_(_noise(weight, DEPTHWISE if owner == "ff.conv_depth" else SMALL, generator))
    return block


def _copied(block: LinearBlock, gate: bool) -> LinearBlock:
    """Return a copy; with `gate` its modulation and the ends of its branches are zero, so that it is the identity."""
    made = copy.deepcopy(block)
    if gate:
        zeroed = {*_ENDS, *(name.removesuffix("weight") + "bias" for name in _ENDS), "scale_shift_table"}
        for name, weight in made.named_parameters():
            if name in zeroed:
                weight.zero_()
    return made


def _noise(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return (torch.randn(like.shape, generator=generator) * std).to(like.device, like.dtype)


STRATEGIES: dict[str, Strategy] = {
    "constant": Strategy(_constant, "new blocks behind the old ones begin as the identity", ("keep",), identity=True),
    "random": Strategy(_random, "new blocks behind the old ones are drawn anew", ("keep",)),
    "cyclic": Strategy(_cyclic, "the old blocks again from the first on", ("gate",), identity=True),
    "block_expand": Strategy(_block_expand, "each old block several times in a row", ("gate",), identity=True),
    "progressive": Strategy(_progressive, "each new block is the one before with a little noise"),
    "interpolation": Strategy(_interpolation, "blocks between the old ones, blended from their neighbours"),
}
