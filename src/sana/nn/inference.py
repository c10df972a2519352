"""When a module may take a faster way that is only right on a CPU, in plain inference or in plain training."""

import torch
from torch import Tensor, nn


def lean(x: Tensor) -> bool:
    """Whether `x` is computed on a CPU step by step, without gradients or autocast, so buffers may be overwritten."""
    return inference(x) and not torch.compiler.is_compiling()


def inference(x: Tensor) -> bool:
    """Whether `x` is computed on a CPU without gradients or autocast, be it step by step or compiled."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def learning(*tensors: Tensor) -> bool:
    """Whether gradients of these will be asked for on a CPU, in plain reverse mode, so they may be written by hand.

    Tensors of other classes, such as those without values that a rehearsal for an accelerator computes with, answer
    False.
    """
    return (
        torch.is_grad_enabled()
        and all(tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def transformed() -> bool:
    """Whether forward-mode differentiation or another function transform is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a kind of device, or None where it is off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def as_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype of autocast, if it is on: each of several layers would convert the same `x` again."""
    return x.to(autocast_dtype(x.device.type) or x.dtype)


def bare(dtype: torch.dtype, *layers: nn.Module) -> bool:
    """Whether using the layers' weights is the same as calling them: plain linear or convolution layers of this dtype.

    Wrappers of adapters, quantised weights, parametrisations, hooks and offloading all answer False.
    """
    return all(
        (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and _ordinary(layer)))
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype == dtype
        and unhooked(layer)
        for layer in layers
    )


def unhooked(layer: nn.Module) -> bool:
    """Whether calling the layer runs its own forward and nothing else."""
    everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    return not (layer._forward_hooks or layer._forward_pre_hooks or everywhere or "forward" in vars(layer))


def _ordinary(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads with zeros and leaves nothing out; another padding makes pictures that tile."""
    return conv.padding_mode == "zeros" and conv.stride == (1, 1) and conv.dilation == (1, 1)
