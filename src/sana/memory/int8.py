"""Layers whose weights are whole numbers from -127 to 127 with one scale for each output channel.

A quarter of the bytes of float32 and half of those of bfloat16; activations stay as they are. Works on any device.
Shapes: O output and I input channels, M rows of inputs, B batch, H W image size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.inference import lean

LARGEST = 127
SLICE = 1 << 20
"""Weights turned back into numbers at a time on a CPU: so many stay in a core's cache, and more take no less time."""
_UP = 1 + 2**-8
"""Rounding to bfloat16 takes away less than this adds, so that no code exceeds 127."""


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix or a 1x1 kernel [O, I, ...] to (codes [O, I, ...] int8, scales [O] float32).

    The weight is about codes * scales, at most half a scale off. Scales are numbers of bfloat16, so that casting a
    module to it and back changes nothing; a row of zeros has the scale 0. Source: symmetric absmax quantisation per
    row, as in LLM.int8() (arXiv 2208.07339, section 2.1).
    """
    rows_OI = weight.detach().flatten(1)
    codes = torch.empty(rows_OI.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(rows_OI), device=weight.device)
    step = max(1, SLICE // max(1, rows_OI.shape[1]))
    for start in range(0, len(rows_OI), step):  # no float copy of the whole weight is ever there
        part = slice(start, start + step)
        low, high = torch.aminmax(rows_OI[part].float(), dim=1)
        scale[part] = (torch.maximum(-low, high) / LARGEST * _UP).to(torch.bfloat16)
        steps = scale[part, None].clamp_min(torch.finfo(torch.float32).tiny)
        codes[part] = (rows_OI[part].float() / steps).round_().clamp_(-LARGEST, LARGEST)
    return codes.view(weight.shape), scale


def product(x: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply inputs by quantised weights, [..., I] -> [..., O], in the dtype of the inputs.

    The codes are exact in every floating dtype; the scale comes after the sum.
    """
    if not (lean(x) and codes_OI.numel() > SLICE):
        out = F.linear(x, codes_OI.to(x.dtype)) * scale_O.to(x.dtype)
        return out if bias_O is None else out + bias_O
    rows_MI, scale = x.reshape(-1, x.shape[-1]), scale_O.to(x.dtype)
    out = x.new_empty(len(rows_MI), len(codes_OI))
    step = max(64, SLICE // codes_OI.shape[1] // 64 * 64)
    for start in range(0, len(codes_OI), step):
        part = slice(start, start + step)
        torch.mul(F.linear(rows_MI, codes_OI[part].to(x.dtype)), scale[part], out=out[:, part])
    if bias_O is not None:
        out += bias_O
    return out.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight, [..., I] -> [..., O]; tensors `weight`, `weight_scale` and `bias`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _still(torch.zeros(self._shape(), dtype=torch.int8))
        self.weight_scale = _still(torch.zeros(out_features))
        self.bias = _still(torch.zeros(out_features)) if bias else None

    def _shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.weight_scale, self.bias)

    def dequantized(self) -> Tensor:
        """Return the weight that the codes stand for, in the dtype of the scales."""
        codes = self.weight.to(self.weight_scale.dtype)
        return codes * self.weight_scale.view(-1, *[1] * (codes.ndim - 1))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Conv1x1(Int8Linear):
    """A 1x1 convolution with an int8 kernel, [B, I, H, W] -> [B, O, H, W], the result with its channels last."""

    def _shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return product(rows, self.weight.flatten(1), self.weight_scale, self.bias).permute(0, 3, 1, 2)


def replacement(layer: nn.Module) -> Int8Linear:
    """Return the empty int8 form of a layer that `fits` accepts, on the same device, its bias taken over."""
    kind: type[Int8Linear] = Int8Linear if isinstance(layer, nn.Linear) else Int8Conv1x1
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    with torch.device("meta"):
        made = kind(weight.shape[1], weight.shape[0], bias is not None)
    made.weight_scale = _still(torch.empty(len(weight), dtype=weight.dtype, device="meta"))
    made.bias = bias  # type: ignore[assignment]  # None, or the very parameter of the layer
    made.train(layer.training)
    return made


def filled(layer: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> Int8Linear:
    """Return the int8 form of a layer with the given weight in place of its own; `dtype` is that of the scales."""
    made = replacement(layer)
    codes, scale = encode(weight.to(device))
    made.weight, made.weight_scale = _still(codes), _still(scale.to(dtype))
    return made


def fits(layer: nn.Module) -> bool:
    """Tell whether a layer has an int8 form: plain linear layers, and 1x1 convolutions without stride or groups."""
    if type(layer) is nn.Linear:
        return True
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.groups == 1
        and layer.padding in ((0, 0), 0)
    )


def _still(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
