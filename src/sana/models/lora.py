"""Low-rank adapters on linear layers and convolutions: attached beside the weights, or merged into them.

A layer under an adapter keeps its parameters, their names and their values. Only its class changes while an adapter
acts on it, so `state_dict` is that of the base, fast ways that look for a plain layer step aside, and compiled code
notices. Without adapters the layer is what it was. Sources: LoRA arXiv 2106.09685, DoRA arXiv 2402.09353,
rank-stabilised scaling arXiv 2312.03732.

Shapes: I inputs, O outputs, r rank, k x k kernel (a linear layer has none).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.errors import InvalidInput
from sana.nn.inference import autocast_dtype

_SIDES = "lora_sides"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an adapter must know about a layer."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    """Sides of the kernel of a convolution; empty for a linear layer."""
    groups: int = 1

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Shape of the projection down to rank 1."""
        return 1, self.inputs, *self.kernel

    @property
    def kind(self) -> str:
        """What a message calls it."""
        return f"{'x'.join(map(str, self.kernel))} convolution" if self.kernel else "linear layer"


@dataclass(kw_only=True, eq=False)
class LowRank:
    """The update of one layer: W + scaling · up · down; with `magnitude` its rows are brought to that length (DoRA)."""

    down: Tensor
    """[r, I], or [r, I, k, k]."""
    up: Tensor
    """[O, r]."""
    alpha: float
    rank_stabilised: bool = False
    magnitude: Tensor | None = None
    """[O], the lengths of the rows of the updated weight."""
    bias: Tensor | None = None
    """[O], scaled like the update."""

    @property
    def rank(self) -> int:
        """Width between the two projections."""
        return len(self.down)

    @property
    def scaling(self) -> float:
        """Factor of the product: alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those tensors that are there, by field name."""
        named = {"down": self.down, "up": self.up, "magnitude": self.magnitude, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def changes(self) -> bool:
        """Whether the layer is another with it."""
        moved = bool(self.up.any()) or (self.bias is not None and bool(self.bias.any()))
        return self.magnitude is not None or (self.alpha != 0 and moved)

    @property
    def trained(self) -> bool:
        """Whether it learns, so that its own tensors must be used."""
        return any(tensor.requires_grad for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors in place."""
        for name, tensor in self.tensors.items():
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(device)
            else:
                setattr(self, name, tensor.to(device))
        return self


class _Side:
    """One update as a layer uses it: in the layer's dtype, on its device, with the strength folded in."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None

    def __init__(self, layer: nn.Module, update: LowRank, strength: float, dtype: torch.dtype, rank: int) -> None:
        self.update, self.dtype = update, dtype
        self.scale = strength * update.scaling
        self.extra = max(0, rank - update.rank)
        self.learns = update.trained
        self.ready = False
        device = next(held_tensors(layer)).device
        away = device.type == "meta"  # weights that come only while the layer is used
        if not self.learns and not (away and update.magnitude is not None):
            self._fold(layer, update.down.device if away else device)

    def _fold(self, layer: nn.Module, device: torch.device) -> None:
        """Compute what is the same at every call."""
        update = self.update
        down, up = (tensor.detach().to(device) for tensor in (update.down, update.up))
        gain = _gain(layer, update, self.scale).detach() if update.magnitude is not None else None
        factor: Any = self.scale if gain is None else (gain * self.scale)[:, None]
        if gain is not None or self.scale != 1:
            up = up.to(torch.promote_types(up.dtype, torch.float32)) * factor
        # Zeros up to a common rank let compiled code serve adapters of several ranks.
        if self.extra:
            down = F.pad(down, (*(0, 0) * (down.ndim - 1), 0, self.extra))
            up = F.pad(up, (0, self.extra))
        bias = None if update.bias is None else update.bias.detach().to(device) * self.scale
        self.down, self.up = down.to(self.dtype), up.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.gain = None if gain is None else gain.to(self.dtype)
        self.ready = True

    def moved(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follow the layer to another device or dtype."""
        if self.learns:
            for tensor in self.update.tensors.values():
                tensor.data = function(tensor.data)
        for name in ("down", "up", "bias", "gain"):
            held = self.__dict__.get(name)
            if held is not None:
                changed = function(held)
                if not changed.is_meta:
                    setattr(self, name, changed)
                    self.dtype = changed.dtype

    def __call__(self, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """Return the output of the layer with the update on top: x [..., I] or [B, I, H, W], out likewise with O."""
        if self.learns:
            return self._learning(layer, x, out)
        if not self.ready:
            self._fold(layer, x.device)
        if self.down.device != x.device:
            self.moved(lambda tensor: tensor.to(x.device))
        if self.gain is not None:
            out = _scaled(out, self.gain, layer.bias)
        return _added(layer, out, _project(layer, x.to(self.down.dtype), self.down), self.up, self.bias)

    def _learning(self, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        update = self.update
        gain = None
        if update.magnitude is not None:
            gain = _gain(layer, update, self.scale)
            out = _scaled(out, gain.to(out.dtype), layer.bias)
        # What autocast will narrow need not be widened before.
        entered = x.to(autocast_dtype(x.device.type) or update.down.dtype)
        hidden = _project(layer, entered, update.down) * self.scale
        if gain is None and update.bias is None and not _is_conv(layer) and hidden.dtype == out.dtype:
            rows = torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), update.up.to(out.dtype).t())
            return rows.view(out.shape)
        delta = _raise(layer, hidden, update.up)
        delta = delta if gain is None else delta * _shaped(gain, layer)
        if update.bias is not None:
            delta = delta + _shaped(update.bias * self.scale, layer)
        return out + delta.to(out.dtype)


class Adapted(nn.Module):
    """Mixed into the class of a layer while adapters act on it."""

    lora_sides: list[_Side]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        for side in self.lora_sides:
            out = side(self, x, out)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for side in self.lora_sides:
            side.moved(fn)
        return self


def targets(model: nn.Module) -> dict[str, Target]:
    """Return the layers that adapters can name: linear ones and convolutions, quantised ones too, by their path."""
    found = {}
    for name, layer in model.named_modules():
        described = _described(layer)
        if described is not None:
            found[name] = described
    return found


def attach(model: nn.Module, updates: Mapping[str, Sequence[tuple[LowRank, float]]], *, rank: int = 0) -> None:
    """Let exactly these updates, each with its strength, act on the named layers; other layers are as they were.

    Several updates of a layer act in their order. A strength of 0 is as good as none, of DoRA too, where peft goes on
    scaling the base's weights to the trained magnitudes: who turns an adapter off wants the model
    without it. `rank` pads all to at least that.
    Errors: InvalidInput for a layer whose weights are needed (DoRA) and cannot be read.
    """
    chosen = {name: [(u, s) for u, s in pairs if s != 0] for name, pairs in updates.items()}
    sides = {}
    for name, pairs in chosen.items():
        if pairs:
            layer = model.get_submodule(name)
            dtype = _compute_dtype(layer, model)
            sides[layer] = [_Side(layer, update, strength, dtype, rank) for update, strength in pairs]
    changed: Any
    for changed in list(model.modules()):
        if changed in sides:
            changed.__dict__[_SIDES] = sides[changed]
            kind: Any = plain_class(changed)
            changed.__class__ = _adapted(kind)
        elif _SIDES in vars(changed):
            changed.__class__ = plain_class(changed)
            del changed.__dict__[_SIDES]


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without adapters."""
    return type(layer).__mro__[2] if isinstance(layer, Adapted) else type(layer)


def merged(layer: Any, updates: Sequence[tuple[LowRank, float]], name: str) -> dict[str, Tensor]:
    """Return weight, and bias where it changes, of a layer with the updates in it; computed in float32 at least.

    Errors: InvalidInput for a layer that is quantised, that has no bias although an update brings one, or whose result
    is not finite.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if weight.is_meta:
        text = f"The weights of layer '{name}' are not in memory, so nothing can be merged into them"
        raise InvalidInput(f"{text}: merge before the memory mode is set.")
    if plain_class(layer) not in (nn.Linear, nn.Conv2d) or type(weight) is not nn.Parameter:
        text = f"Layer '{name}' is quantised, so nothing can be merged into it"
        raise InvalidInput(f"{text}: use the adapter unfused, or merge before the model is quantised.")
    wide = torch.promote_types(weight.dtype, torch.float32)
    mixed, shift = weight.detach().to(wide), None if bias is None else bias.detach().to(wide)
    for update, strength in updates:
        scale = strength * update.scaling
        mixed = mixed + scale * _product(update, mixed)
        if update.bias is not None:
            if shift is None:
                text = f"Layer '{name}' has no bias, but the adapter brings one"
                raise InvalidInput(f"{text}: use the adapter unfused.")
            shift = shift + scale * update.bias.detach().to(shift)
        if update.magnitude is not None:
            mixed = mixed * _gain(layer, update, scale).to(mixed).view(-1, *[1] * (mixed.ndim - 1))
    made = {"weight": mixed.to(weight.dtype)}
    if bias is not None and shift is not None and any(update.bias is not None for update, _ in updates):
        made["bias"] = shift.to(bias.dtype)
    for kind, tensor in made.items():
        if not bool(torch.isfinite(tensor).all()):
            told = f"The merged {kind} of layer '{name}' is not finite in {str(tensor.dtype).removeprefix('torch.')}"
            raise InvalidInput(f"{told} (NaN or infinity): lower the scale, or cast the model to float32.")
    return made


def check_supported(name: str, target: Target) -> None:
    """Raise InvalidInput for a layer that low-rank updates make no sense for."""
    if target.groups != 1:
        text = f"Layer '{name}' is a depthwise {target.kind}, one small kernel for each channel"
        raise InvalidInput(f"{text}: adapters of it are not supported; train the layers around it.")


def dense_weight(layer: Any) -> Tensor:
    """Return the weight of a layer in float32, [O, I] or [O, I, k, k]; quantised layers offer `dequantized()`.

    Errors: InvalidInput when a quantised layer does not tell.
    """
    weight: Tensor = layer.weight
    plain = type(weight) is nn.Parameter and weight.is_floating_point()
    if not plain and hasattr(layer, "dequantized"):
        weight = layer.dequantized()
    elif not plain and type(weight).dequantize is not Tensor.dequantize:  # a tensor with its own way to pack values
        weight = weight.dequantize()
    elif not plain:
        raise InvalidInput("DoRA needs the weights themselves, which this quantisation hides: load them unquantised.")
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _described(layer: Any) -> Target | None:
    # By attributes, for quantised layers are classes of their own.
    weight = getattr(layer, "weight", None)
    names = ("in_features", "out_features") if hasattr(layer, "in_features") else ("in_channels", "out_channels")
    inputs, outputs = (getattr(layer, name, None) for name in names)
    if not isinstance(weight, Tensor) or not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    kernel = tuple(weight.shape[2:]) if weight.ndim == 4 else ()
    return Target(inputs=inputs, outputs=outputs, kernel=kernel, groups=getattr(layer, "groups", 1))


@cache
def _adapted(kind: Any) -> Any:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__module__": __name__})


def held_tensors(layer: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers of a layer."""
    yield from layer.parameters(recurse=False)
    yield from layer.buffers(recurse=False)


def _compute_dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """Return the dtype that a layer works in; an integer weight works in that of the model."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return weight.dtype
    return next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())


def _product(update: LowRank, like: Tensor) -> Tensor:
    """Return up · down in the shape, dtype and device of a weight."""
    down, up = (tensor.detach().to(like) for tensor in (update.down, update.up))
    return (up @ down.flatten(1)).view(like.shape)


def row_lengths(weight: Tensor) -> Tensor:
    """Return [O], the lengths of the rows of a weight [O, ...]."""
    lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return lengths


def _gain(layer: Any, update: LowRank, scale: float) -> Tensor:
    """Return [O], wanted over actual length of the rows; without a gradient of the actual one (DoRA, 4.3)."""
    weight = dense_weight(layer)
    assert update.magnitude is not None
    lengths = row_lengths(weight + scale * _product(update, weight))
    gain: Tensor = update.magnitude.to(weight.device) / lengths
    return gain


def _shaped(values: Tensor, layer: Any) -> Tensor:
    """Return [O] such that it acts on the outputs of the layer."""
    return values[:, None, None] if _is_conv(layer) else values


def _scaled(out: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain · (out - bias) + bias along the outputs."""
    conv = out.ndim == 4
    wide = gain[:, None, None] if conv else gain
    if bias is None:
        return out * wide
    shift = bias[:, None, None] if conv else bias
    return torch.addcmul(shift.to(out.dtype), out - shift.to(out.dtype), wide)


def _is_conv(layer: Any) -> bool:
    return bool(layer.weight.ndim == 4)


def _project(layer: Any, x: Tensor, down: Tensor) -> Tensor:
    if not _is_conv(layer):
        return F.linear(x, down)
    return F.conv2d(
        x, down, None, getattr(layer, "stride", 1), getattr(layer, "padding", 0), getattr(layer, "dilation", 1)
    )


def _raise(layer: Any, hidden: Tensor, up: Tensor) -> Tensor:
    return F.conv2d(hidden, up[:, :, None, None]) if _is_conv(layer) else F.linear(hidden, up)


def _added(layer: Any, out: Tensor, hidden: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """Return out + up · hidden + bias."""
    if _is_conv(layer):
        return out + F.conv2d(hidden, up[:, :, None, None], bias).to(out.dtype)
    plain = bias is None and out.dtype == hidden.dtype == up.dtype and not torch.is_grad_enabled()
    if plain and out.is_contiguous():
        # One product that adds to what is there, instead of a product and a sum.
        return out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t()).view(out.shape)
    return out + F.linear(hidden, up, bias).to(out.dtype)
