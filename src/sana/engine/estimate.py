"""What a picture will cost, before any weight is read: arithmetic, traffic and memory of every stage, from the configs.

A stage takes flops / arithmetic rate + bytes / memory rate + operators / operator rate; the rates are measured on the
machine in a fraction of a second, or stated. Counts follow the layers of `models`; each formula names its terms.
Legend: B rows of the transformer (latents, twice with guidance), N image tokens, L text tokens, D width, P pixels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana.cards import Card
from sana.config import AutoencoderConfig, TransformerConfig
from sana.engine.request import ResolvedRequest
from sana.engine.resolution import BINS, nearest_bin

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PREFIX_TOKENS = 215
"""Length of the instruction in the published tokenizer."""
PROCESS = 450_000_000
"""Bytes of the program and its libraries before any weight."""
CALIBRATION = 0.06
"""Seconds for each measured rate."""
DECODER_STEP_UP = 4
"""Pixels of a stage of the decoder for each pixel of the one inside it."""


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The text encoder's sizes, as its config.json names them. Defaults: Gemma-2-2B."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 256_000

    @property
    def layer_params(self) -> int:
        """Weights of all layers: q and o, k and v, the three of the feed-forward."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.num_hidden_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def params(self) -> int:
        """Weights with the embedding."""
        return self.layer_params + self.vocab_size * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the road from prompt to pixels, done `times` times."""

    name: str
    dtype: str
    flops: float
    traffic: float
    """Bytes read and written, weights included."""
    ops: int
    weights: int
    """Bytes of its part of the model, which stay in memory."""
    live: float
    """Bytes of activations at its fullest moment."""
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is."""

    flops: Mapping[str, float]
    """Multiplications and additions a second in a large matrix product, by dtype."""
    traffic: float
    """Bytes read and written a second."""
    ops: float
    """Small operators a second."""


def stages(
    card: Card,
    settings: ResolvedRequest,
    dtypes: Mapping[str, str],
    *,
    text: TextShape | None = None,
    prompt_tokens: int = 60,
) -> tuple[Stage, ...]:
    """Return the stages of one batch of a request.

    Args:
        dtypes: name of the dtype of text_encoder, transformer and vae.
        text: the text encoder; None means the published one.
        prompt_tokens: length of the prompt, about; it changes little.
    """
    height, width = drawn(card, settings)
    side = card.autoencoder.spatial_compression_ratio
    latents = (height // side) * (width // side)
    guided = settings.guidance > 1 and card.product != "sprint"
    rows = settings.batch_size * (2 if guided else 1)
    return (
        _text(text or TextShape(), dtypes["text_encoder"], prompt_tokens, settings.instruction, guided),
        _denoise(card, dtypes["transformer"], latents, rows, prompt_tokens, settings.steps),
        _decode(card.autoencoder, dtypes["vae"], latents, settings.batch_size),
    )


def drawn(card: Card, settings: ResolvedRequest) -> tuple[int, int]:
    """Return the (height, width) that is drawn, before the picture is resized to what was asked for."""
    if settings.binning and card.transformer.sample_size in BINS:
        return nearest_bin(settings.height, settings.width, card.transformer.sample_size)
    return settings.height, settings.width


def seconds(stage: Stage, rates: Rates) -> float:
    """Return about how long a stage takes, all its repetitions together."""
    once = (
        stage.flops / (rates.flops[stage.dtype] * SHARES[stage.dtype])
        + stage.traffic / rates.traffic
        + stage.ops / rates.ops
    )
    return once * stage.times


def memory(parts: Sequence[Stage]) -> float:
    """Return about how many bytes are in use at the worst moment: all weights, and the fullest stage."""
    return PROCESS + sum(stage.weights for stage in parts) + max(stage.live for stage in parts)


def _text(shape: TextShape, dtype: str, tokens: int, instruction: bool, guided: bool) -> Stage:
    """Prompt and, with guidance, the empty negative prompt: every weight is read once for each."""
    size, passes = BYTES[dtype], 2 if guided else 1
    read = tokens + (PREFIX_TOKENS if instruction else 0) + (2 if guided else 0)
    wide = shape.hidden_size + shape.intermediate_size
    return Stage(
        name="text",
        dtype=dtype,
        flops=2.0 * shape.layer_params * read,
        traffic=size * (passes * shape.layer_params + 8.0 * read * wide * shape.num_hidden_layers),
        ops=passes * 45 * shape.num_hidden_layers,
        weights=size * shape.params,
        live=size * 6.0 * read * wide,
    )


def _denoise(card: Card, dtype: str, latents: int, rows: int, tokens: int, steps: int) -> Stage:
    c: TransformerConfig = card.transformer
    size, n, d = BYTES[dtype], latents // c.patch_size**2, c.inner_dim
    hidden = int(c.mlp_ratio * d)
    cross = c.num_cross_attention_heads * c.cross_attention_head_dim
    self_attention = 2 * n * d * (4 * d + 2 * c.attention_head_dim)  # q k v o; the d x d core of each head, twice
    cross_attention = 2 * n * cross * (2 * d + 2 * tokens)  # q o; scores and sums; k and v are kept between steps
    feed_forward = 2 * n * hidden * (3 * d + 18)  # in (twice as wide), out; 3 x 3 depthwise
    ends = 2 * n * c.patch_size**2 * d * (c.in_channels + c.prediction_channels)
    touched = c.num_layers * n * (TOKEN_TRAFFIC * d + HIDDEN_TRAFFIC * hidden)
    return Stage(
        name="denoise",
        dtype=dtype,
        flops=float(rows * (c.num_layers * (self_attention + cross_attention + feed_forward) + ends)),
        traffic=size * (rows * touched + card.params),
        ops=OPS_PER_LAYER * c.num_layers + 40,
        weights=size * card.params,
        live=size * float(rows * n * (8 * d + 5 * hidden)),
        times=steps,
    )


def _decode(c: AutoencoderConfig, dtype: str, latents: int, count: int) -> Stage:
    size, depth = BYTES[dtype], len(c.decoder_block_out_channels)
    flops, touched, ops, weights, maps = 0.0, 0.0, 20, 0.0, list[float]()
    for i, (width, blocks) in enumerate(zip(c.decoder_block_out_channels, c.decoder_layers_per_block, strict=True)):
        pixels = latents * DECODER_STEP_UP ** (depth - 1 - i)
        attention = c.per_stage("decoder_block_types")[i] == "EfficientViTBlock"
        scales = len(c.decoder_qkv_multiscales[i])
        block = _attention_block(width, scales, c.attention_head_dim) if attention else 2 * 9 * width * width
        up = 9 * width * c.decoder_block_out_channels[i + 1] if i + 1 < depth and blocks else 0
        flops += 2.0 * pixels * (blocks * block + up)
        touched += pixels * width * (blocks * (ATTENTION_TRAFFIC if attention else BLOCK_TRAFFIC) + (6 if up else 0))
        ops += blocks * (40 if attention else 9) + 6
        weights += blocks * block + up
        maps += [float(pixels * width)] if blocks else []
    flops += 2.0 * latents * 9 * c.latent_channels * c.decoder_block_out_channels[-1]
    inner = maps[1] if len(maps) > 1 else 0.0
    return Stage(
        name="decode",
        dtype=dtype,
        flops=count * flops,
        traffic=size * (count * touched + weights),
        ops=ops,
        weights=int(size * 2 * weights),  # the encoder is loaded too, and about as large
        live=count * (min(16.0 * maps[0], LARGEST_STRIP) + 2 * size * inner),
    )


def _attention_block(width: int, scales: int, head: int) -> float:
    """Weights that each pixel meets: q k v and o of all scales, the grouped convolutions, the feed-forward."""
    attention = 3 * width * width + scales * 3 * width * (25 + head) + (1 + scales) * width * (width + 2 * head)
    return attention + 12 * width * width + 72 * width


def measure(device: str, dtypes: Sequence[str]) -> Rates:
    """Return the rates of this machine with the threads that are set, measured in a fraction of a second."""
    import torch

    def rate(work: Callable[[], Any], amount: float) -> float:
        work()
        _wait(device)
        best, end, calls = float("inf"), time.perf_counter() + CALIBRATION, 0
        while time.perf_counter() < end or calls < LEAST_CALLS:  # on a busy machine a single call says nothing
            calls += 1
            began = time.perf_counter()
            work()
            _wait(device)
            best = min(best, time.perf_counter() - began)
        return amount / best

    flops: dict[str, float] = {}
    with torch.no_grad():
        for name in dict.fromkeys(dtypes):
            a = torch.ones(768, 1152, dtype=getattr(torch, name), device=device)
            b = torch.ones(1152, 1152, dtype=getattr(torch, name), device=device)
            flops[name] = rate(lambda a=a, b=b: a @ b, 2.0 * 768 * 1152 * 1152)  # type: ignore[misc]
        source = torch.ones(2**24, device=device)
        target = torch.empty_like(source)
        traffic = rate(lambda: target.copy_(source), 8.0 * source.numel())
        small = torch.ones(64, 64, device=device)
        ops = rate(lambda: [small + small for _ in range(100)], 100.0)
    return Rates(flops=flops, traffic=traffic, ops=ops * OPERATOR_SHARE)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


LEAST_CALLS = 8
OPS_PER_LAYER = 60
OPERATOR_SHARE = 0.2
"""An operator of a network costs about five times the smallest addition: arguments, memory, Python around it."""
TOKEN_TRAFFIC, HIDDEN_TRAFFIC = 50, 20
"""Elements read and written for each token of a layer, as multiples of the width and of the hidden width."""
BLOCK_TRAFFIC, ATTENTION_TRAFFIC = 22, 70
"""The same for a pixel of a block of the decoder."""
LARGEST_STRIP = 450_000_000
"""Bytes in use while the outermost stage of the decoder runs, which is done strip by strip; the next stage is whole."""
SHARES = {"float32": 0.9, "bfloat16": 0.5, "float16": 0.5}
"""What part of the speed of a large multiplication the layers reach, convolutions and small ones among them."""
