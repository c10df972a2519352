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
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.engine.request import ResolvedRequest
from sana.engine.resolution import BINS, nearest_bin
from sana.engine.stages import BYTES as BYTES
from sana.engine.stages import PROCESS as PROCESS
from sana.engine.stages import SHARES as SHARES
from sana.engine.stages import Rates as Rates
from sana.engine.stages import Stage as Stage
from sana.engine.stages import memory as memory
from sana.engine.stages import seconds as seconds

PREFIX_TOKENS = 215
"""Length of the instruction in the published tokenizer."""
CALIBRATION, LONGEST_CALIBRATION = 0.06, 1.0
"""Seconds for each measured rate, at least and about at most."""
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


def stages(
    card: Card,
    settings: ResolvedRequest,
    dtypes: Mapping[str, str],
    *,
    text: TextShape | None = None,
    prompt_tokens: int = 60,
    quantized: Collection[str] = (),
    accelerator: bool = False,
    controlnets: Sequence[ControlNetConfig] | None = None,
) -> tuple[Stage, ...]:
    """Return the stages of one batch of a request.

    Args:
        dtypes: name of the dtype of text_encoder, transformer and vae.
        text: the text encoder; None means the published one.
        prompt_tokens: length of the prompt, about; it changes little.
        quantized: names of the parts whose layers are in 8 bits.
        accelerator: whether memory is that of a GPU, where the program itself needs none.
        controlnets: the control networks that are loaded, whether the request has controls or not; None means the
            card's own. A request with controls has one of the usual size, if it has none.
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
    own = [card.controlnet] if card.controlnet is not None else []
    networks = own if controlnets is None else list(controlnets)
    if controls and not networks:
        networks = [usual_control(card.transformer)]
    if networks:
        found.append(_control(networks, controls, found[-1], latents, rows, prompt_tokens))
    found.append(_decode(card.autoencoder, vae, latents, count))
    if "text_encoder" in quantized:
        found[0] = _in_int8(found[0], text_shape.layer_params, text_shape.num_hidden_layers)
    return tuple(dataclasses.replace(stage, device_only=accelerator) for stage in found)


def drawn(card: Card, settings: ResolvedRequest) -> tuple[int, int]:
    """Return the (height, width) that is drawn, before the picture is resized to what was asked for."""
    if settings.binning and card.transformer.sample_size in BINS:
        return nearest_bin(settings.height, settings.width, card.transformer.sample_size)
    return settings.height, settings.width


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
    ends = 2 * n * c.patch_size**2 * d * (c.in_channels + c.prediction_channels)
    all_rows = rows + perturbed
    stage = Stage(
        name="denoise",
        dtype=dtype,
        flops=float(all_rows * (c.num_layers * _layer_flops(c, n, tokens) + ends)),
        traffic=size * (all_rows * _layers_traffic(c, n) + card.params),
        ops=OPS_PER_LAYER * c.num_layers + 40,
        weights=size * card.params,
        live=float((rows + (perturbed > 0) * rows / 2) * n * _live_of_token(c, size, int8)),
        times=steps,
        streamed=size * (card.params - (c.num_layers - 2) * _layer_params(c)),
        part="transformer",
    )
    return _in_int8(stage, c.num_layers * _layer_params(c), c.num_layers) if int8 else stage


def _layer_flops(c: TransformerConfig | ControlNetConfig, n: int, tokens: int) -> int:
    """Multiplications and additions of a block, for one row of n image tokens."""
    d, hidden = c.inner_dim, int(c.mlp_ratio * c.inner_dim)
    cross = c.num_cross_attention_heads * c.cross_attention_head_dim
    self_attention = 2 * n * d * (4 * d + 2 * c.attention_head_dim)  # q k v o; the d x d core of each head, twice
    cross_attention = 2 * n * cross * (2 * d + 2 * tokens)  # q o; scores and sums; k and v are kept between steps
    return self_attention + cross_attention + 2 * n * hidden * (3 * d + 18)  # in (twice as wide), out; 3 x 3 depthwise


def _layers_traffic(c: TransformerConfig | ControlNetConfig, n: int) -> int:
    """Elements that all blocks read and write, for one row."""
    return c.num_layers * n * (TOKEN_TRAFFIC * c.inner_dim + HIDDEN_TRAFFIC * int(c.mlp_ratio * c.inner_dim))


def _layer_params(c: TransformerConfig | ControlNetConfig) -> int:
    d, hidden = c.inner_dim, int(c.mlp_ratio * c.inner_dim)
    return 8 * d * d + 3 * d * hidden + 18 * hidden


def _live_of_token(c: TransformerConfig, size: int, int8: bool) -> float:
    """Bytes of a token at the fullest moment of a block, which is in its feed-forward."""
    d, hidden = c.inner_dim, int(c.mlp_ratio * c.inner_dim)
    return size * (TOKEN_LIVE * d + (INT8_HIDDEN_LIVE if int8 else HIDDEN_LIVE) * hidden)


def _in_int8(stage: Stage, params: int, blocks: int) -> Stage:
    """Return a stage whose `params` weights in `blocks` blocks are whole numbers of 8 bits."""
    saved = (BYTES[stage.dtype] - 1) * params
    unpacking = params * BYTES[stage.dtype] * UNPACKED
    streamed = None if stage.streamed is None else stage.streamed - 2 * saved // blocks
    return dataclasses.replace(
        stage, weights=stage.weights - saved, streamed=streamed, traffic=stage.traffic + unpacking - saved
    )


def usual_control(c: TransformerConfig) -> ControlNetConfig:
    """Return a control network of the usual number of blocks for a transformer."""
    shared = {name: value for name, value in c.to_dict().items() if name in ControlNetConfig.__dataclass_fields__}
    return ControlNetConfig(**{**shared, "num_layers": min(ControlNetConfig().num_layers, c.num_layers - 1)})


def control_params(c: ControlNetConfig) -> int:
    """Return about how many weights a control network has."""
    d = c.inner_dim
    ends = d * (c.caption_channels + 9 * d + TIME_CHANNELS + c.in_channels * c.patch_size**2)  # caption, time, tokens
    return c.num_layers * (_layer_params(c) + d * d) + ends


def _control(
    networks: Sequence[ControlNetConfig], controls: int, base: Stage, latents: int, rows: int, tokens: int
) -> Stage:
    """Control networks: copies of the first blocks with a projection each, for the rows that are not perturbed.

    Several controls have a network each, or all the same. Without controls the weights are there and do nothing.
    """
    size = BYTES[base.dtype]
    used = [networks[i % len(networks)] for i in range(controls)]
    flops = traffic = residuals = 0
    for c in used:
        n, d = latents // c.patch_size**2, c.inner_dim
        flops += rows * c.num_layers * (_layer_flops(c, n, tokens) + 2 * n * d * d)
        traffic += size * (rows * _layers_traffic(c, n) + control_params(c))
        residuals += size * rows * n * d * c.num_layers
    return Stage(
        name="control",
        dtype=base.dtype,
        flops=float(flops),
        traffic=traffic,
        ops=sum(OPS_PER_LAYER * c.num_layers for c in used),
        weights=size * sum(control_params(c) for c in networks),
        live=base.live + residuals if controls else 0.0,
        times=base.times if controls else 0,
        streamed=size * sum(control_params(c) - max(c.num_layers - 2, 0) * _layer_params(c) for c in networks),
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
        best, calls, start = float("inf"), 0, time.perf_counter()
        # On a busy machine a single call says nothing; where a dtype is emulated, a single one takes a second.
        while (began := time.perf_counter()) < start + CALIBRATION or calls < LEAST_CALLS:
            if calls and began > start + LONGEST_CALIBRATION:
                break
            calls += 1
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
TIME_CHANNELS = 256
"""Width of the sines that tell the time."""
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
