"""Frozen descriptions of the models: what `config.json` of a model folder holds, checked and typed. Torch-free."""

import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Self

from sana.errors import InvalidInput, did_you_mean

QK_NORMS = ("rms_norm_across_heads", "layer_norm_across_heads", "l2")
BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
UPSAMPLE_TYPES = ("pixel_shuffle", "interpolate")
AUTOENCODER_NORMS = ("rms_norm", "batch_norm")
AUTOENCODER_ACTIVATIONS = ("silu", "swish", "relu", "gelu", "mish")


def _matches(value: object, hint: Any) -> bool:
    """Tell whether `value` has the annotated type; an int may stand for a float, a bool is never a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Reading, writing and checking shared by the model configurations."""

    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not _matches(value, hints[field.name]):
                raise self._error(field.name, value, f"be {_hint_name(hints[field.name])}")
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise self._error(name, value, "be greater than 0")
        self._check()

    def _check(self) -> None:
        """Raise InvalidInput for values that contradict each other."""

    def _error(self, name: str, value: object, rule: str) -> InvalidInput:
        end = "" if rule.endswith("?") else "."
        return InvalidInput(f"{type(self).__name__}.{name} is {value!r}; it must {rule}{end}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the mapping read from a `config.json`.

        Keys that begin with an underscore are skipped, missing ones take their default, lists become tuples, unknown
        keys are skipped with a warning. Errors: InvalidInput naming the field of a wrong type or value.
        """
        names = [field.name for field in fields(cls)]
        known = {key: _freeze(value) for key, value in values.items() if key in names}
        unknown = [key for key in values if key not in names and not key.startswith("_")]
        for key in unknown:
            text = f"{cls.__name__} has no field '{key}'; it is ignored.{did_you_mean(key, names)}"
            warnings.warn(text, stacklevel=2)
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values, in the order of declaration."""
        return {field.name: _thaw(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class _BackboneConfig(_Config):
    """The fields that the linear diffusion transformer and its ControlNet have in common."""

    positive = (
        "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers",
        "num_cross_attention_heads", "cross_attention_head_dim", "cross_attention_dim", "caption_channels", "mlp_ratio",
        "sample_size", "patch_size", "norm_eps", "interpolation_scale",
    )  # fmt: skip

    in_channels: int = 32
    """Channels of the latents that come in."""
    out_channels: int | None = 32
    """Channels of the predicted velocity; None means as many as come in."""
    num_attention_heads: int = 70
    """Heads of the linear self-attention."""
    attention_head_dim: int = 32
    """Width of one linear-attention head."""
    num_layers: int = 20
    """Number of transformer blocks."""
    num_cross_attention_heads: int = 20
    """Heads of the attention to the caption."""
    cross_attention_head_dim: int = 112
    """Width of one cross-attention head."""
    cross_attention_dim: int = 2240
    """Width of the projected caption; equals the inner width."""
    caption_channels: int = 2304
    """Width of the text encoder's states."""
    mlp_ratio: float = 2.5
    """Hidden width of the gated convolutional feed-forward, as a multiple of the inner width."""
    dropout: float = 0.0
    """Dropout after each attention, in training mode."""
    attention_bias: bool = False
    """Whether q, k and v of the self-attention have a bias."""
    sample_size: int = 32
    """Side of the latent the model was made for: image size / 32."""
    patch_size: int = 1
    """Side of the latent patch that becomes one token."""
    norm_elementwise_affine: bool = False
    """Whether the norm before the feed-forward has weight and bias."""
    norm_eps: float = 1e-6
    """Epsilon of the two norms of a block."""
    interpolation_scale: float | None = None
    """Divisor of the token positions of the sin-cos table; None means that no positions are added."""

    @property
    def inner_dim(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def prediction_channels(self) -> int:
        """Channels of the prediction, with the None of `out_channels` resolved."""
        return self.in_channels if self.out_channels is None else self.out_channels

    def _check(self) -> None:
        if self.cross_attention_dim != self.inner_dim:
            rule = f"equal num_attention_heads * attention_head_dim = {self.inner_dim}"
            raise self._error("cross_attention_dim", self.cross_attention_dim, rule)
        if not 0 <= self.dropout < 1:
            raise self._error("dropout", self.dropout, "lie in [0, 1)")
        if self.interpolation_scale is not None and self.inner_dim % 4:
            raise self._error("interpolation_scale", self.interpolation_scale, "be None unless the width is 4 * k")

    def _check_qk_norm(self, qk_norm: str | None) -> None:
        if qk_norm is not None and qk_norm not in QK_NORMS:
            hint = did_you_mean(qk_norm, QK_NORMS)
            rule = f"be None or one of {', '.join(QK_NORMS)}{'.' if hint else ''}{hint}"
            raise self._error("qk_norm", qk_norm, rule)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(_BackboneConfig):
    """The linear diffusion transformer. Defaults: SANA 1.6B at 1024 px (arXiv 2410.10629, table 1)."""

    guidance_embeds: bool = False
    """Whether the guidance scale is an embedded input (SANA-Sprint)."""
    guidance_embeds_scale: float = 0.1
    """Factor that the pipeline puts on the guidance scale before it is embedded."""
    qk_norm: str | None = None
    """Normalisation of queries and keys over all heads: None, rms_norm_across_heads, layer_norm_across_heads or l2."""
    timestep_scale: float = 1.0
    """Factor that the pipeline puts on the timestep before it is embedded."""

    def _check(self) -> None:
        super()._check()
        self._check_qk_norm(self.qk_norm)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(_BackboneConfig):
    """The control branch: a copy of the first blocks of a transformer."""

    num_layers: int = 7
    """Number of copied blocks."""
    qk_norm: str | None = None
    """As in the transformer; published branches have none, and their files do not name it."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values, in the order of declaration, `qk_norm` only where there is one."""
        return {name: value for name, value in super().to_dict().items() if (name, value) != ("qk_norm", None)}

    def _check(self) -> None:
        super()._check()
        self._check_qk_norm(self.qk_norm)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(_Config):
    """The deep-compression autoencoder (DC-AE, arXiv 2410.10733). Per-stage fields run from the image inwards."""

    positive = ("in_channels", "latent_channels", "attention_head_dim", "scaling_factor")

    in_channels: int = 3
    """Channels of the image."""
    latent_channels: int = 32
    """Channels of the latent."""
    attention_head_dim: int = 32
    """Width of one head of the multi-scale linear attention."""
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    """ResBlock or EfficientViTBlock, for all stages or per stage."""
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    """ResBlock or EfficientViTBlock, for all stages or per stage."""
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Widths of the encoder's stages."""
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Widths of the decoder's stages."""
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    """Blocks in each encoder stage; 0 in the first makes the input convolution a downsampling one."""
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    """Blocks in each decoder stage; 0 in the first makes the output convolution an upsampling one."""
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    """Kernel sizes of the extra attention scales of each encoder stage."""
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    """Kernel sizes of the extra attention scales of each decoder stage."""
    upsample_block_type: str = "pixel_shuffle"
    """pixel_shuffle or interpolate (nearest, then a convolution)."""
    downsample_block_type: str = "pixel_unshuffle"
    """pixel_unshuffle; every other word means a strided convolution, as in the published files."""
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    """rms_norm or batch_norm, for all stages or per stage."""
    decoder_act_fns: str | tuple[str, ...] = "silu"
    """silu (or swish), relu, gelu or mish, for all stages or per stage."""
    encoder_out_shortcut: bool = True
    """Whether the encoder's last convolution has a channel-averaging shortcut."""
    decoder_in_shortcut: bool = True
    """Whether the decoder's first convolution has a channel-repeating shortcut."""
    decoder_conv_act_fn: str = "relu"
    """Activation before the decoder's last convolution."""
    scaling_factor: float = 1.0
    """Factor from encoder output to the latents that the transformer sees."""

    @property
    def spatial_compression_ratio(self) -> int:
        """Image pixels per latent pixel along one side."""
        return 1 << (len(self.encoder_block_out_channels) - 1)

    def per_stage(self, name: str) -> tuple[str, ...]:
        """Return a field that may be one word for all stages as one word per stage."""
        value: str | tuple[str, ...] = getattr(self, name)
        return (value,) * len(self.encoder_block_out_channels) if isinstance(value, str) else value

    def _check(self) -> None:
        if len(self.decoder_block_out_channels) != len(self.encoder_block_out_channels):
            rule = f"have as many stages as the encoder, {len(self.encoder_block_out_channels)}"
            raise self._error("decoder_block_out_channels", self.decoder_block_out_channels, rule)
        for side in ("encoder", "decoder"):
            self._check_stages(side)
            self._check_widths(side)
        choices = {
            "encoder_block_types": BLOCK_TYPES,
            "decoder_block_types": BLOCK_TYPES,
            "decoder_norm_types": AUTOENCODER_NORMS,
            "decoder_act_fns": AUTOENCODER_ACTIVATIONS,
            "decoder_conv_act_fn": AUTOENCODER_ACTIVATIONS,
            "upsample_block_type": UPSAMPLE_TYPES,
        }
        for name, known in choices.items():
            for word in self.per_stage(name):
                if word not in known:
                    rule = f"be one of {', '.join(known)}.{did_you_mean(word, known)}"
                    raise self._error(name, word, rule.rstrip("."))

    def _check_stages(self, side: str) -> None:
        widths, layers = getattr(self, f"{side}_block_out_channels"), getattr(self, f"{side}_layers_per_block")
        if not widths or min(widths) < 1:
            raise self._error(f"{side}_block_out_channels", widths, "hold at least one width, all greater than 0")
        for name in ("block_types", "layers_per_block", "qkv_multiscales", "norm_types", "act_fns"):
            value = getattr(self, f"{side}_{name}", "")
            if isinstance(value, tuple) and len(value) != len(widths):
                raise self._error(f"{side}_{name}", value, f"have one entry for each of the {len(widths)} stages")
        if min(layers) < 0 or not all(layers[1:-1]) or (len(layers) == 1 and not layers[0]):
            rule = "hold no negative number, and a 0 only at the first or last of several stages"
            raise self._error(f"{side}_layers_per_block", layers, rule)
        scales = getattr(self, f"{side}_qkv_multiscales")
        if any(kernel < 1 or kernel % 2 == 0 for kernels in scales for kernel in kernels):
            raise self._error(f"{side}_qkv_multiscales", scales, "hold odd kernel sizes")

    def _check_widths(self, side: str) -> None:
        """Check what the shortcuts need: they average or repeat whole groups of channels."""
        name = f"{side}_block_out_channels"
        shortcut = {"encoder": "encoder_out_shortcut", "decoder": "decoder_in_shortcut"}[side]
        widths, layers = getattr(self, name), getattr(self, f"{side}_layers_per_block")
        used = widths if layers[0] else widths[1:]
        if any(4 * wide % deep for wide, deep in pairwise(used)):
            raise self._error(name, widths, "let each width divide four times the width before it")
        if side == "encoder" and self.downsample_block_type == "pixel_unshuffle" and any(w % 4 for w in widths[1:]):
            raise self._error(name, widths, "hold multiples of 4 for the pixel_unshuffle blocks")
        if getattr(self, shortcut) and widths[-1] % self.latent_channels:
            rule = f"end with a multiple of latent_channels = {self.latent_channels}, or {shortcut} be False"
            raise self._error(name, widths, rule)
        for width, block in zip(widths, self.per_stage(f"{side}_block_types"), strict=True):
            if block == "EfficientViTBlock" and width < self.attention_head_dim:
                rule = f"hold at least attention_head_dim = {self.attention_head_dim} in attention stages"
                raise self._error(name, widths, rule)
