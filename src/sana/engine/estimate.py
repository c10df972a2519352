"""What a picture will cost, before any weight is read: arithmetic, traffic and memory of every stage, from the configs.

A stage takes flops / arithmetic rate + bytes / memory rate + operators / operator rate; the rates are measured on the
machine in a fraction of a second, or stated. Counts follow the layers of `models`; each formula names its terms.
Legend: B rows of the transformer (latents, twice with guidance), N image tokens, L text tokens, D width, P pixels.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
    streamed: int | None = None
    """Bytes of weights that are in memory when its blocks come one by one; None where they do not."""
    part: str = ""
    """Which part of the model it uses; stages of one part share the weights."""
    device_only: bool = False
    """Whether memory means that of an accelerator, without the program."""


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
    quantized: Collection[str] = (),
    accelerator: bool = False,
) -> tuple[Stage, ...]:
    """Return the stages of one batch of a request.

    Args:
        dtypes: name of the dtype of text_encoder, transformer and vae.
        text: the text encoder; None means the published one.
        prompt_tokens: length of the prompt, about; it changes little.
        quantized: names of the parts whose layers are in 8 bits.
        accelerator: whether memory is that of a GPU, where the program itself needs none.
    """
    height, width = drawn(card, settings)
    side = card.autoencoder.spatial_compression_ratio
    latents = (height // side) * (width // side)
    guided = settings.guidance > 1 and card.product != "sprint"
    count, controls = settings.batch_size, len(settings.controls)
    rows = count * (1 + guided)
    perturbed = count * _perturbed_share(card, settings) if settings.pag_scale else 0.0
    kind, vae = dtypes["transformer"], dtypes["vae"]
    text_shape = text or TextShape()
    found = [_text(text_shape, dtypes["text_encoder"], prompt_tokens, settings.instruction, guided)]
    if settings.image is not None or controls:
        found.append(_encode(card.autoencoder, vae, latents, (settings.image is not None) + controls))
    share = 1.0 if settings.image is None else (settings.strength or DEFAULT_STRENGTH)
    steps = max(1, round(settings.steps * share))
    found.append(_denoise(card, kind, latents, rows, perturbed, prompt_tokens, steps, "transformer" in quantized))
    if controls:
        found.append(_control(card, found[-1], controls, perturbed / max(rows, 1)))
    found.append(_decode(card.autoencoder, vae, latents, count))
    if "text_encoder" in quantized:
        found[0] = _in_int8(found[0], text_shape.layer_params, text_shape.num_hidden_layers)
    return tuple(dataclasses.replace(stage, device_only=accelerator) for stage in found)


def drawn(card: Card, settings: ResolvedRequest) -> tuple[int, int]:
    """Return the (height, width) that is drawn, before the picture is resized to what was asked for."""
    if settings.binning and card.transformer.sample_size in BINS:
        return nearest_bin(settings.height, settings.width, card.transformer.sample_size)
    return settings.height, settings.width


def seconds(stage: Stage, rates: Rates, mode: str | None = None, reading: float = 1e9) -> float:
    """Return about how long a stage takes, all its repetitions together.

    Args:
        mode: in a memory mode the weights are read each time that the stage begins; in "lowest" a step waits for those
            of its blocks, which are read meanwhile.
        reading: bytes a second from where the weights are kept.
    """
    once = (
        stage.flops / (rates.flops[stage.dtype] * SHARES[stage.dtype])
        + stage.traffic / rates.traffic
        + stage.ops / rates.ops
    )
    if mode == "lowest" and stage.streamed is not None:
        return max(once, stage.weights / reading) * stage.times
    return once * stage.times + (0.0 if mode is None else stage.weights / reading)


def memory(parts: Sequence[Stage], mode: str | None = None) -> float:
    """Return about how many bytes are in use at the worst moment.

    Args:
        mode: None for all weights and the fullest stage; "low" for the stage that needs most with its own weights;
            "lowest" for the same with only some blocks of them.
    """
    program = 0 if any(stage.device_only for stage in parts) else PROCESS
    weights = {stage.part: stage.weights for stage in parts}
    if mode is None:
        return program + sum(weights.values()) + max(stage.live for stage in parts)
    together = {"transformer": weights.get("controlnet", 0), "controlnet": weights.get("transformer", 0)}

    def held(stage: Stage) -> float:
        if mode == "lowest" and stage.streamed is not None:
            return stage.streamed + stage.live
        return stage.weights + (together.get(stage.part, 0) if mode == "low" else 0) + stage.live

    return program + max(held(stage) for stage in parts)


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
        streamed=2 * size * shape.layer_params // shape.num_hidden_layers,
        part="text_encoder",
    )


def _perturbed_share(card: Card, settings: ResolvedRequest) -> float:
    """Return for what part of the blocks the rows of PAG exist: from the first of its layers on."""
    names = settings.pag_layers or card.pag_layers
    numbers = [
        int(found) for name in ((names,) if isinstance(names, str) else names) for found in _NUMBER.findall(name)
    ]
    return 1 - min(numbers, default=0) / card.transformer.num_layers


def _denoise(
    card: Card, dtype: str, latents: int, rows: int, perturbed: float, tokens: int, steps: int, int8: bool
) -> Stage:
    c: TransformerConfig = card.transformer
    size, n, d = BYTES[dtype], latents // c.patch_size**2, c.inner_dim
    hidden = int(c.mlp_ratio * d)
    cross = c.num_cross_attention_heads * c.cross_attention_head_dim
    self_attention = 2 * n * d * (4 * d + 2 * c.attention_head_dim)  # q k v o; the d x d core of each head, twice
    cross_attention = 2 * n * cross * (2 * d + 2 * tokens)  # q o; scores and sums; k and v are kept between steps
    feed_forward = 2 * n * hidden * (3 * d + 18)  # in (twice as wide), out; 3 x 3 depthwise
    ends = 2 * n * c.patch_size**2 * d * (c.in_channels + c.prediction_channels)
    touched = c.num_layers * n * (TOKEN_TRAFFIC * d + HIDDEN_TRAFFIC * hidden)
    layer = 8 * d * d + 3 * d * hidden + 18 * hidden
    all_rows = rows + perturbed
    stage = Stage(
        name="denoise",
        dtype=dtype,
        flops=float(all_rows * (c.num_layers * (self_attention + cross_attention + feed_forward) + ends)),
        traffic=size * (all_rows * touched + card.params),
        ops=OPS_PER_LAYER * c.num_layers + 40,
        weights=size * card.params,
        live=float((rows + (perturbed > 0) * rows / 2) * n * _live_of_token(d, hidden, size, int8)),
        times=steps,
        streamed=size * (card.params - (c.num_layers - 2) * layer),
        part="transformer",
    )
    return _in_int8(stage, c.num_layers * layer, c.num_layers) if int8 else stage


def _live_of_token(d: int, hidden: int, size: int, int8: bool) -> float:
    """Bytes of a token at the fullest moment of a block, which is in its feed-forward."""
    return size * (TOKEN_LIVE * d + (INT8_HIDDEN_LIVE if int8 else HIDDEN_LIVE) * hidden)


def _in_int8(stage: Stage, params: int, blocks: int) -> Stage:
    """Return a stage whose `params` weights in `blocks` blocks are whole numbers of 8 bits."""
    saved = (BYTES[stage.dtype] - 1) * params
    unpacking = params * BYTES[stage.dtype] * UNPACKED
    streamed = None if stage.streamed is None else stage.streamed - 2 * saved // blocks
    return dataclasses.replace(
        stage, weights=stage.weights - saved, streamed=streamed, traffic=stage.traffic + unpacking - saved
    )


def _control(card: Card, base: Stage, count: int, perturbed: float) -> Stage:
    """Control networks: copies of the first blocks, for the rows that are not perturbed."""
    c = card.transformer
    part = min(1.0, CONTROL_BLOCKS / c.num_layers)
    d, size = c.inner_dim, BYTES[base.dtype]
    rows = count / (1 + perturbed)
    latents = base.live / _live_of_token(d, int(c.mlp_ratio * d), size, False)
    return dataclasses.replace(
        base,
        name="control",
        flops=base.flops * part * rows,
        traffic=base.traffic * part * rows,
        ops=int(base.ops * part) * count,
        weights=int(size * card.params * part),
        streamed=None,
        live=base.live + count * CONTROL_BLOCKS * d * latents * size,
        part="controlnet",
    )


def _encode(c: AutoencoderConfig, dtype: str, latents: int, count: int) -> Stage:
    """Pictures to latents: less work than the way back, on the same weights."""
    back = _decode(c, dtype, latents, 1)
    return dataclasses.replace(
        back, name="encode", flops=count * ENCODE_SHARE * back.flops, traffic=count * ENCODE_SHARE * back.traffic
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
    return Stage(
        part="vae",
        name="decode",
        dtype=dtype,
        flops=count * flops,
        traffic=size * (count * touched + weights),
        ops=ops,
        weights=int(size * 2 * weights),  # the encoder is loaded too, and about as large
        live=_live_of_pictures(maps, size, count, latents * DECODER_STEP_UP ** (depth - 1)),
    )


def _live_of_pictures(maps: Sequence[float], size: int, count: int, pixels: int) -> float:
    """Bytes in use while pictures are decoded: the outermost stage is done strip by strip, the next one is whole.

    Of many pixels all stages are done in strips, one picture after the other (see `STREAMED_PIXELS`).
    """
    if count * pixels > STREAMED_PIXELS:
        return STREAM_ROOM * size + STREAM_SHARE * size * maps[0] + 3.0 * size * (count - 1) * pixels
    inner = count * (maps[1] if len(maps) > 1 else 0.0)
    return min(16.0 * count * maps[0], LARGEST_STRIP) + INNER_WHOLE * size * inner


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


_NUMBER = re.compile(r"\d+")
LEAST_CALLS = 8
CONTROL_BLOCKS = 7
ENCODE_SHARE = 0.62
"""Work of the encoder in that of the decoder."""
DEFAULT_STRENGTH = 0.6
TOKEN_LIVE, HIDDEN_LIVE, INT8_HIDDEN_LIVE = 8, 5, 7
"""Elements of a token in use at once, as multiples of the width and of the hidden width."""
UNPACKED = 1.0
"""Passes over the weights in the dtype of the products that 8 bits cost."""
OPS_PER_LAYER = 60
OPERATOR_SHARE = 0.2
"""An operator of a network costs about five times the smallest addition: arguments, memory, Python around it."""
TOKEN_TRAFFIC, HIDDEN_TRAFFIC = 50, 20
"""Elements read and written for each token of a layer, as multiples of the width and of the hidden width."""
BLOCK_TRAFFIC, ATTENTION_TRAFFIC = 22, 70
"""The same for a pixel of a block of the decoder."""
LARGEST_STRIP = 170_000_000
"""Bytes in use while the outermost stage of the decoder runs, which is done strip by strip, at most."""
INNER_WHOLE = 3.05
"""Maps of the next stage that are in use at once; measured at 512 and 1024 px in bfloat16."""
STREAM_ROOM, STREAM_SHARE = 275_000_000, 0.254
"""Elements in use while a picture is decoded in strips: always, and of its outermost map; measured at 2048, 4096 px."""
STREAMED_PIXELS = 2 << 20
"""From here on the decoder works in strips (`models.dc_ae`, which is not imported here: it needs torch)."""
SHARES = {"float32": 0.9, "bfloat16": 0.6, "float16": 0.6}
"""What part of the speed of a large multiplication the layers reach, convolutions and small ones among them."""
