"""What the tensors of an original file say about the model they belong to, and what must be known otherwise.

Shapes: D width, E text width, C latent channels, P patch side, F hidden width of the feed-forward.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sana.checkpoints.bounds import shown
from sana.checkpoints.original.keymap import POSITIONS, Keymap, autoencoder_keys, controlnet_keys, transformer_keys
from sana.checkpoints.weights import Stored
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.errors import CheckpointError, InvalidInput

Entries = Mapping[str, Stored]

LINEAR_HEAD_DIM = 32
"""Width of one head of the linear attention in every model of the family; the weights do not tell."""
CROSS_HEADS = {1152: 16, 2240: 20}
"""Width -> heads of the attention to the caption in the published models; the weights do not tell."""
SCALING_FACTORS = {
    ("f32", "in"): 0.3189, ("f32", "mix"): 0.4552, ("f32", "sana"): 0.41407,
    ("f64", "in"): 0.2889, ("f64", "mix"): 0.4538,
    ("f128", "in"): 0.4883, ("f128", "mix"): 0.3620,
}  # fmt: skip
"""(compression, training pictures) -> factor from encoder output to latents, of the published autoencoders."""
KNOWN_BY_CARD = (
    "sample_size", "interpolation_scale", "timestep_scale", "num_attention_heads", "attention_head_dim",
    "num_cross_attention_heads", "cross_attention_head_dim",
)  # fmt: skip
"""Fields of a transformer that its tensors leave open."""

_SIZES = (("4kpx", 128), ("4096", 128), ("2kpx", 64), ("2048", 64), ("1024", 32), ("512", 16))


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """A model as its file describes it."""

    config: Any
    keys: Keymap
    assumed: tuple[str, ...] = ()
    """A sentence for each setting that neither the tensors nor the caller told."""


def kinds_of(entries: Entries) -> tuple[str, ...]:
    """Return what an original file holds: "transformer", with or without "controlnet", or "vae"; empty if neither."""
    if "x_embedder.proj.weight" in entries and any(name.startswith("blocks.") for name in entries):
        controlled = any(name.startswith("controlnet.") for name in entries)
        return ("transformer", "controlnet") if controlled else ("transformer",)
    if any(name.startswith(("encoder.stages.", "decoder.stages.")) for name in entries):
        return ("vae",)
    return ()


def infer_transformer(entries: Entries, name: str, told: Mapping[str, Any], where: str) -> Inferred:
    """Return configuration and name rules of a transformer; `told` are fields that the caller or a card knows.

    `name` is the name of the file, which is looked at for sizes last.
    Errors: CheckpointError for tensors that no model of the family has; InvalidInput for impossible fields.
    """
    guidance = "cfg_embedder.mlp.0.weight" in entries
    common, assumed = _backbone(entries, told, where)
    width = common["cross_attention_dim"]
    normed = "blocks.0.attn.q_norm.weight" in entries
    fields: dict[str, Any] = {
        **common,
        "num_layers": _count(entries, "blocks", where),
        "guidance_embeds": guidance,
        "qk_norm": _norm(entries) if normed else None,
    }
    if _dims(entries, POSITIONS, 3, where, optional=True)[-1:] not in ((), (width,)):
        raise CheckpointError(f"{where}: '{POSITIONS}' is not as wide as the model, {width}: {_WRONG}.")
    size, origin = _sample_size(entries, name)
    fields["sample_size"] = size
    if origin is None and "sample_size" not in told:
        assumed.append(f"sample_size {size} ({32 * size} px)")
    scale = {64: 1.0, 128: 2.0}.get(size)
    fields["interpolation_scale"] = scale
    if "interpolation_scale" not in told and scale is not None:
        assumed.append(f"interpolation_scale {scale:g}, as in the published model of {32 * size} px")
    teacher = "teacher" in name.lower()
    fields["timestep_scale"] = 0.001 if teacher else 1.0
    if normed and not guidance and not teacher and "timestep_scale" not in told:
        assumed.append("timestep_scale 1 (a Sprint teacher needs 0.001)")
    return Inferred(
        config=_config(TransformerConfig, {**fields, **told}, where),
        keys=transformer_keys(guidance),
        assumed=tuple(assumed),
    )


def infer_controlnet(entries: Entries, transformer: TransformerConfig, where: str) -> Inferred:
    """Return configuration and name rules of the control branch beside a transformer."""
    shared = {field.name: getattr(transformer, field.name) for field in dataclasses.fields(ControlNetConfig)}
    fields = {**shared, "num_layers": _count(entries, "controlnet", where)}
    return Inferred(config=_config(ControlNetConfig, fields, where), keys=controlnet_keys())


def infer_autoencoder(entries: Entries, name: str, told: Mapping[str, Any], where: str) -> Inferred:
    """Return configuration and name rules of a DC-AE, for published and other numbers of stages and blocks.

    Errors: as `infer_transformer`.
    """
    stages = max(_count(entries, f"{side}.stages", where, first=1) for side in ("encoder", "decoder"))
    encoder = [_stage(entries, f"encoder.stages.{i}", where) for i in range(stages)]
    decoder = [_stage(entries, f"decoder.stages.{i}", where) for i in range(stages)]
    halved = not encoder[0]["width"]
    out_shortcut = "encoder.project_out.main.op_list.0.conv.weight" in entries
    in_shortcut = "decoder.project_in.main.conv.weight" in entries
    main = "main." if in_shortcut else ""
    deep = _dims(entries, f"decoder.project_in.{main}conv.weight", 4, where)
    unshuffle = any(re.match(r"encoder\.stages\.\d+\.op_list\.\d+\.main\.conv\.conv\.", key) for key in entries)
    unshuffle = unshuffle or "encoder.project_in.conv.conv.weight" in entries
    first = _dims(entries, f"encoder.project_in.{'conv.conv' if halved and unshuffle else 'conv'}.weight", 4, where)
    fields: dict[str, Any] = {
        "in_channels": first[1],
        "latent_channels": deep[1],
        **_sides(encoder, "encoder", where),
        **_sides(decoder, "decoder", where),
        "decoder_norm_types": _alike(stage["norm"] for stage in decoder),
        "decoder_act_fns": _alike("relu" if stage["norm"] == "batch_norm" else "silu" for stage in decoder),
        "downsample_block_type": "pixel_unshuffle" if unshuffle else "Conv",
        "upsample_block_type": _upsampling(entries, decoder, where),
        "encoder_out_shortcut": out_shortcut,
        "decoder_in_shortcut": in_shortcut,
    }
    heads = {stage["head_dim"] for stage in (*encoder, *decoder)} - {None}
    if len(heads) == 1:
        fields["attention_head_dim"] = heads.pop()
    fields["scaling_factor"], assumed = _scaling(stages, halved, name)
    if "scaling_factor" in told:
        assumed = ()
    return Inferred(
        config=_config(AutoencoderConfig, {**fields, **told}, where),
        keys=autoencoder_keys(unshuffle=unshuffle, halved=halved, out_shortcut=out_shortcut, in_shortcut=in_shortcut),
        assumed=assumed,
    )


def keys_of_autoencoder(config: AutoencoderConfig) -> Keymap:
    """Return the name rules of the original file of a DC-AE with this configuration."""
    return autoencoder_keys(
        unshuffle=config.downsample_block_type == "pixel_unshuffle",
        halved=not config.encoder_layers_per_block[0],
        out_shortcut=config.encoder_out_shortcut,
        in_shortcut=config.decoder_in_shortcut,
    )


_WRONG = "it is no SANA model, or a damaged one"


def _backbone(entries: Entries, told: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that transformer and control branch share."""
    patch = _dims(entries, "x_embedder.proj.weight", 4, where)
    caption = _dims(entries, "y_embedder.y_proj.fc1.weight", 2, where)
    output = _dims(entries, "final_layer.linear.weight", 2, where)
    point = _dims(entries, "blocks.0.mlp.point_conv.conv.weight", 4, where)
    width, hidden = patch[0], point[1]
    for name in ("attention_head_dim", "num_cross_attention_heads"):
        if name in told and (type(told[name]) is not int or told[name] < 1):
            raise InvalidInput(f"{name} is {shown(repr(told[name]))}; it must be a whole number above 0.")
    head_dim = told.get("attention_head_dim", LINEAR_HEAD_DIM)
    if not all((*patch, *caption, *output, *point)) or width % head_dim or output[0] % patch[2] ** 2:
        raise CheckpointError(f"{where} holds a model of width {width}, which no SANA model has: {_WRONG}.")
    cross = told.get("num_cross_attention_heads") or CROSS_HEADS.get(width)
    assumed: list[str] = []
    if cross is None:
        cross = next(heads for heads in (20, 16, 8, 4, 2, 1) if width % heads == 0)
        assumed.append(f"{cross} heads of the attention to the caption")
    fields = {
        "in_channels": patch[1],
        "out_channels": output[0] // patch[2] ** 2,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": width // cross,
        "cross_attention_dim": width,
        "caption_channels": caption[1],
        "mlp_ratio": _ratio(hidden, width),
        "attention_bias": "blocks.0.attn.qkv.bias" in entries,
        "patch_size": patch[2],
    }
    return fields, assumed


def _ratio(hidden: int, width: int) -> float:
    """Return the ratio r for which int(r * width) is the hidden width."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _norm(entries: Entries) -> str:
    biased = "blocks.0.attn.q_norm.bias" in entries
    return "layer_norm_across_heads" if biased else "rms_norm_across_heads"


def _sample_size(entries: Entries, name: str) -> tuple[int, str | None]:
    """Return the latent side the model was made for, and whether the table of positions or the name says so."""
    found = entries.get(POSITIONS)
    if found is not None and len(found.shape) == 3 and math.isqrt(found.shape[1]) ** 2 == found.shape[1] > 0:
        return math.isqrt(found.shape[1]), "positions"
    for word, size in _SIZES:
        if word in name.lower():
            return size, "name"
    return 32, None


def _stage(entries: Entries, prefix: str, where: str) -> dict[str, Any]:
    """Describe one stage of an autoencoder: kind of its blocks, their number and width, extra attention scales."""
    blocks = {
        int(match[1])
        for name in entries
        if (match := re.match(re.escape(prefix) + r"\.op_list\.(\d+)\.(?:main\.conv1|context_module)\.", name))
    }
    stage: dict[str, Any] = {"kind": None, "width": 0, "count": len(blocks), "scales": (), "norm": "rms_norm"}
    stage["head_dim"] = None
    if not blocks:
        return stage
    first = f"{prefix}.op_list.{min(blocks)}"
    if f"{first}.main.conv1.conv.weight" in entries:
        stage["kind"] = "ResBlock"
        stage["width"] = _dims(entries, f"{first}.main.conv1.conv.weight", 4, where)[0]
        batch = f"{first}.main.conv2.norm.running_mean" in entries
    else:
        stage["kind"] = "EfficientViTBlock"
        attention = f"{first}.context_module.main"
        stage["width"] = _dims(entries, f"{attention}.qkv.conv.weight", 4, where)[1]
        kernels = (f"{attention}.aggreg.{m}.0.weight" for m in range(_count(entries, f"{attention}.aggreg", where)))
        stage["scales"] = tuple(_dims(entries, kernel, 4, where)[-1] for kernel in kernels)
        if stage["scales"]:
            stage["head_dim"] = _dims(entries, f"{attention}.aggreg.0.1.weight", 4, where)[1]
        batch = f"{attention}.proj.norm.running_mean" in entries
    stage["norm"] = "batch_norm" if batch else "rms_norm"
    return stage


def _sides(stages: list[dict[str, Any]], side: str, where: str) -> dict[str, Any]:
    """Return the fields per stage; an empty first stage takes half the width and the kind of the second."""
    widths = [stage["width"] for stage in stages]
    kinds = [stage["kind"] for stage in stages]
    if not widths[0] and len(widths) > 1:
        widths[0], kinds[0] = widths[1] // 2, kinds[1]
        stages[0]["norm"] = stages[1]["norm"]
    if not all(widths) or not all(kinds):
        raise CheckpointError(f"{where}: a stage of the {side} has no blocks: {_WRONG}.")
    return {
        f"{side}_block_types": tuple(kinds),
        f"{side}_block_out_channels": tuple(widths),
        f"{side}_layers_per_block": tuple(stage["count"] for stage in stages),
        f"{side}_qkv_multiscales": tuple(stage["scales"] for stage in stages),
    }


def _alike(words: Iterable[str]) -> str | tuple[str, ...]:
    """Return one word for all stages where they agree, as the published configurations do."""
    per_stage = tuple(words)
    return per_stage[0] if len(set(per_stage)) == 1 else per_stage


def _upsampling(entries: Entries, decoder: list[dict[str, Any]], where: str) -> str:
    """Tell from the width of an upsampling convolution what it is followed by."""
    for i, stage in enumerate(decoder):
        name = f"decoder.stages.{i}.op_list.0.main.conv.conv.weight"
        if name in entries and stage["width"]:
            return "interpolate" if _dims(entries, name, 4, where)[0] == stage["width"] else "pixel_shuffle"
    return "pixel_shuffle"


def _scaling(stages: int, halved: bool, name: str) -> tuple[float, tuple[str, ...]]:
    """Return the scaling factor by the number of stages and the name; and what was assumed."""
    compression = f"f{1 << (stages - 1)}"
    if not halved:
        factor = SCALING_FACTORS["f32", "sana"]
        known = compression == "f32"
        return factor, () if known else (f"scaling_factor {factor:g}",)
    pictures = next((word for word in ("in", "mix") if re.search(rf"[-_]{word}[-_.]", name.lower())), None)
    factor = SCALING_FACTORS.get((compression, pictures or "mix"), 1.0)
    known = pictures is not None and (compression, pictures) in SCALING_FACTORS
    return factor, () if known else (f"scaling_factor {factor:g}, that of the 'mix' model",)


def _count(entries: Iterable[str], prefix: str, where: str, *, first: int = 0) -> int:
    """Return how many numbered modules follow a prefix; those before the `first` may be empty.

    Errors: CheckpointError when a number is left out; so a name alone cannot ask for a huge model.
    """
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,5})\.")
    numbers = {int(match[1]) for name in entries if (match := pattern.match(name))}
    for number in range(first, len(numbers | set(range(first)))):
        if number not in numbers:
            raise CheckpointError(f"{where} holds '{prefix}.{max(numbers)}' but not '{prefix}.{number}': {_WRONG}.")
    return max(numbers, default=-1) + 1


def _dims(entries: Entries, name: str, rank: int, where: str, *, optional: bool = False) -> tuple[int, ...]:
    if name not in entries:
        if optional:
            return ()
        raise CheckpointError(f"{where} has no tensor '{name}': {_WRONG}.")
    shape = entries[name].shape
    if len(shape) != rank:
        text = f"{where}: tensor '{name}' has the shape {shown(str(list(shape)))}, where {rank} sides belong"
        raise CheckpointError(f"{text}: {_WRONG}.")
    return shape


def _config(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    known = {name: value for name, value in values.items() if name in names}
    try:
        return kind.from_dict(known)
    except InvalidInput as error:
        raise CheckpointError(f"{where} describes no model that can be built: {error}") from error
