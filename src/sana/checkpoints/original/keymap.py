"""The tensor names of the original SANA files and ours: reversible rules as data, and what they do to shapes.

A rule pairs the path of a module (or of a bare table) in the original code with one path of ours, or with several when
the original holds them fused along the first axis. `{}` stands for the number of a block. Sources: the published
conversion tables of SANA, its ControlNet and DC-AE.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_LEAVES = r"(?:\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One module of the original and what it is called here."""

    original: str
    ours: tuple[str, ...]
    """Several names are the equal parts of the original along its first axis, in that order."""
    squeeze: bool = False
    """Whether the original weight is a 1×1 convolution and ours a linear layer."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where one of our tensors comes from: part `index` of `parts` of an original tensor."""

    original: str
    index: int = 0
    parts: int = 1
    squeeze: bool = False

    def shape_of(self, original: Sequence[int]) -> tuple[int, ...]:
        """Return our shape for the shape of the original, which must divide into the parts."""
        shape = tuple(original[:-2]) if self._is_convolution(original) else tuple(original)
        return (shape[0] // self.parts, *shape[1:]) if self.parts > 1 and shape else shape

    def fits(self, original: Sequence[int]) -> bool:
        """Tell whether an original of that shape can be taken apart."""
        return self.parts == 1 or (len(original) > 0 and original[0] % self.parts == 0)

    def take(self, original: Tensor) -> Tensor:
        """Return our tensor as a view of the original one."""
        flat = original[..., 0, 0] if self._is_convolution(original.shape) else original
        return flat.chunk(self.parts)[self.index] if self.parts > 1 else flat

    def _is_convolution(self, shape: Sequence[int]) -> bool:
        return self.squeeze and len(shape) == 4 and tuple(shape[-2:]) == (1, 1)


@dataclass(frozen=True, kw_only=True)
class Keymap:
    """All rules of one kind of file, and the names that have no counterpart here."""

    rules: tuple[Rule, ...]
    dropped: tuple[str, ...] = ()
    """Patterns of original names that are not needed: what they hold is computed here, or was needed in training."""

    def pieces(self, names: Iterable[str]) -> tuple[dict[str, Piece], list[str], list[str]]:
        """Return our name -> where it comes from, the dropped names and the unknown ones, for names of a file."""
        pieces: dict[str, Piece] = {}
        dropped: list[str] = []
        unknown: list[str] = []
        for name in names:
            found = _matched(name, tuple((rule.original, rule) for rule in self.rules))
            if found is not None:
                rule, numbers, leaf = found
                for index, ours in enumerate(rule.ours):
                    pieces[_filled(ours, numbers) + leaf] = Piece(
                        original=name, index=index, parts=len(rule.ours), squeeze=rule.squeeze and leaf == ".weight"
                    )
            elif any(_pattern(pattern).fullmatch(name) for pattern in self.dropped):
                dropped.append(name)
            else:
                unknown.append(name)
        return pieces, dropped, unknown

    def sources(self, names: Iterable[str]) -> tuple[dict[str, tuple[Piece, tuple[str, ...]]], list[str]]:
        """Return original name -> (its piece, our names in the order they are joined), and our unknown names."""
        joined: dict[str, tuple[Piece, dict[int, str]]] = {}
        unknown: list[str] = []
        table = tuple((ours, (rule, index)) for rule in self.rules for index, ours in enumerate(rule.ours))
        for name in names:
            found = _matched(name, table)
            if found is None:
                unknown.append(name)
                continue
            (rule, index), numbers, leaf = found
            original = _filled(rule.original, numbers) + leaf
            piece = Piece(original=original, parts=len(rule.ours), squeeze=rule.squeeze and leaf == ".weight")
            joined.setdefault(original, (piece, {}))[1][index] = name
        whole = {
            original: (piece, tuple(parts[index] for index in sorted(parts)))
            for original, (piece, parts) in joined.items()
        }
        return whole, unknown

    def originals(self, names: Iterable[str]) -> dict[str, str]:
        """Return our name -> the original name it would come from."""
        sources, _ = self.sources(names)
        return {name: original for original, (_, ours) in sources.items() for name in ours}


def join(piece: Piece, tensors: Sequence[Tensor]) -> Tensor:
    """Return the original tensor that holds ours: `Piece.take` the other way."""
    whole = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
    return whole[..., None, None] if piece.squeeze and whole.ndim == 2 else whole


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\{\}", r"(\d+)") + f"({_LEAVES})")


def _matched(name: str, table: tuple[tuple[str, _T], ...]) -> tuple[_T, tuple[str, ...], str] | None:
    for path, value in table:
        if match := _pattern(path).fullmatch(name):
            *numbers, leaf = match.groups()
            return value, tuple(numbers), leaf or ""
    return None


def _filled(path: str, numbers: Sequence[str]) -> str:
    return path.format(*numbers)


def _named(pairs: Mapping[str, str | tuple[str, ...]], original: str = "", ours: str = "") -> tuple[Rule, ...]:
    """Return rules for `pairs`, each side behind its prefix."""
    return tuple(
        Rule(
            original=original + name,
            ours=tuple(ours + other for other in ((names,) if isinstance(names, str) else names)),
        )
        for name, names in pairs.items()
    )


_BLOCK: dict[str, str | tuple[str, ...]] = {
    "scale_shift_table": "scale_shift_table",
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": "attn1.to_out.0",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
_INPUTS: dict[str, str | tuple[str, ...]] = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "t_block.1": "time_embed.linear",
}
_TIME: dict[str, str | tuple[str, ...]] = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
_GUIDANCE: dict[str, str | tuple[str, ...]] = {
    "cfg_embedder.mlp.0": "guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "guidance_embedder.linear_2",
}
_OUTPUT: dict[str, str | tuple[str, ...]] = {
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
NULL_CAPTION = "y_embedder.y_embedding"
POSITIONS = "pos_embed"
_DROPPED = (NULL_CAPTION, POSITIONS, "logvar_linear", "base_size")


@cache
def transformer_keys(guidance: bool) -> Keymap:
    """Return the rules of a transformer; one that embeds the guidance scale nests its time embedder less deep."""
    time = "time_embed." if guidance else "time_embed.emb."
    return Keymap(
        rules=(
            *_named(_BLOCK, "blocks.{}.", "transformer_blocks.{}."),
            *_named(_INPUTS),
            *_named(_TIME, "", time),
            *(_named(_GUIDANCE, "", "time_embed.") if guidance else ()),
            *_named(_OUTPUT),
        ),
        dropped=_DROPPED,
    )


@cache
def controlnet_keys() -> Keymap:
    """Return the rules of a control branch; its embedders are those of the base in the same file."""
    return Keymap(
        rules=(
            *_named(_BLOCK, "controlnet.{}.copied_block.", "transformer_blocks.{}."),
            *_named(_INPUTS),
            *_named(_TIME, "", "time_embed.emb."),
            *_named({"controlnet.0.before_proj": "input_block", "controlnet.{}.after_proj": "controlnet_blocks.{}"}),
        ),
        dropped=_DROPPED,
    )


_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "context_module.main.aggreg.{}.0": "attn.to_qkv_multiscale.{}.proj_in",
    "context_module.main.aggreg.{}.1": "attn.to_qkv_multiscale.{}.proj_out",
    "context_module.main.proj.norm": "attn.norm_out",
    "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
    "local_module.main.depth_conv.conv": "conv_out.conv_depth",
    "local_module.main.point_conv.conv": "conv_out.conv_point",
    "local_module.main.point_conv.norm": "conv_out.norm",
}
_FLATTENED: dict[str, tuple[str, ...]] = {
    "context_module.main.qkv.conv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_module.main.proj.conv": ("attn.to_out",),
}
_RESIDUAL: dict[str, str | tuple[str, ...]] = {
    "main.conv1.conv": "conv1",
    "main.conv2.conv": "conv2",
    "main.conv2.norm": "norm",
}


@cache
def autoencoder_keys(*, unshuffle: bool, halved: bool, out_shortcut: bool, in_shortcut: bool) -> Keymap:
    """Return the rules of a DC-AE.

    `unshuffle`: its encoder shrinks by pixel-unshuffle blocks. `halved`: its first and last stage are empty, so that
    the convolutions at both ends change the size. The shortcuts are those of encoder output and decoder input.
    """
    rules: list[Rule] = []
    for side, stages in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        original, ours = f"{side}.stages.{{}}.op_list.{{}}.", f"{side}.{stages}.{{}}.{{}}."
        resized = "main.conv.conv" if unshuffle or side == "decoder" else "main.conv"
        rules += _named({**_RESIDUAL, **_ATTENTION, resized: "conv"}, original, ours)
        rules += [
            Rule(original=original + name, ours=tuple(ours + other for other in names), squeeze=True)
            for name, names in _FLATTENED.items()
        ]
    first = {
        (False, False): ("conv", "conv_in"),
        (False, True): ("conv", "conv_in"),
        (True, False): ("conv", "conv_in.conv"),
        (True, True): ("conv.conv", "conv_in.conv"),
    }[halved, unshuffle]
    last = ("conv.conv", "conv_out.conv") if halved else ("conv", "conv_out")
    rules += _named(
        {
            f"encoder.project_in.{first[0]}": f"encoder.{first[1]}",
            f"encoder.project_out.{'main.' if out_shortcut else ''}op_list.0.conv": "encoder.conv_out",
            f"decoder.project_in.{'main.' if in_shortcut else ''}conv": "decoder.conv_in",
            "decoder.project_out.op_list.0": "decoder.norm_out",
            f"decoder.project_out.op_list.2.{last[0]}": f"decoder.{last[1]}",
        }
    )
    return Keymap(rules=tuple(rules))
