"""Weights in fewer bits, put in place of a module's layers, or tensor by tensor while a model is read.

Weight-only: what flows between the layers keeps its dtype. A quantised model is for inference.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sana.errors import CheckpointError, InvalidInput, MissingDependency
from sana.memory import int8
from sana.memory.int8 import Int8Linear
from sana.memory.quantize_configs import (
    BITSANDBYTES,
    ENTRY,
    INT8,
    TORCHAO,
    TORCHAO_TYPES,
    BitsAndBytesConfig,
    Int8Config,
    QuantizationConfig,
    TorchAoConfig,
    understood,
)
from sana.memory.trimming import give_back

SENSITIVE = ("patch_embed", "time_embed", "proj_out", "lm_head")
"""Parts of the names of layers that keep their precision unless told otherwise: small, first or last."""
_WEIGHT, _SCALE = ".weight", ".weight_scale"


class Quantizer(Protocol):
    """Turns layers into quantised ones."""

    def __init__(self, config: Any) -> None:
        """Raise MissingDependency unless what is needed is installed, InvalidInput if it does not run here."""

    @property
    def skip(self) -> tuple[str, ...]:
        """Parts of the names of layers that are left alone."""

    def fits(self, layer: nn.Module) -> bool:
        """Tell whether the layer is of a kind that is quantised."""

    def filled(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Return the quantised form of a layer with this weight on this device; its bias is taken over."""


class Int8:
    """Our own: one scale for each output channel (see `int8`)."""

    def __init__(self, config: Int8Config) -> None:
        self.skip = _skip(config.modules_to_not_convert)
        self.fits, self.filled = int8.fits, int8.filled


class BitsAndBytes:
    """Linear layers by the library of that name: 8 bits, or blocks of 64 values in 4 bits."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        self.config, self.package = config, _library("bitsandbytes")
        self.skip = _skip(config.llm_int8_skip_modules)

    def fits(self, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear

    def filled(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        modules, config = self.package.nn, self.config
        size: tuple[int, int] = (weight.shape[1], weight.shape[0])
        # The library quantises on the way to a device, also from the CPU to itself.
        host = weight.to("cpu", torch.float16 if config.load_in_8bit and dtype == torch.float32 else dtype).contiguous()
        with torch.device("meta"):
            if config.load_in_8bit:
                made = modules.Linear8bitLt(
                    *size, bias=False, has_fp16_weights=False, threshold=config.llm_int8_threshold
                )
            else:
                made = modules.Linear4bit(
                    *size, bias=False, compute_dtype=_named(config.bnb_4bit_compute_dtype) or dtype,
                    quant_type=config.bnb_4bit_quant_type, compress_statistics=config.bnb_4bit_use_double_quant,
                )  # fmt: skip
        if config.load_in_8bit:
            made.weight = modules.Int8Params(host, requires_grad=False, has_fp16_weights=False).to(device)
        else:
            made.weight = modules.Params4bit(
                host, requires_grad=False, quant_type=config.bnb_4bit_quant_type,
                compress_statistics=config.bnb_4bit_use_double_quant, module=made,
            ).to(device)  # fmt: skip
        made.bias = layer.bias
        return made.train(layer.training)  # type: ignore[no-any-return]


class TorchAo:
    """Linear layers by torchao: int8, fp8 and int4 where its kernels run."""

    def __init__(self, config: TorchAoConfig) -> None:
        self.package = _library("torchao.quantization")
        self.kind = config.quant_type
        if isinstance(self.kind, str):
            self.kind = getattr(self.package, TORCHAO_TYPES[self.kind])()
        self.skip = _skip(config.modules_to_not_convert)

    def fits(self, layer: nn.Module) -> bool:
        return type(layer) is nn.Linear

    def filled(self, layer: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)
        name = type(self.kind).__name__
        try:
            self.package.quantize_(made, self.kind)
        except (ImportError, AssertionError, RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidInput(f"torchao's {name} does not run on {device} ({reason}). Choose int8wo.") from error
        made.bias = layer.bias  # type: ignore[assignment]
        return made.train(layer.training)


def quantize(module: nn.Module, config: Any = "int8", *, skip: Iterable[str] | None = None) -> int:
    """Quantise the weights of a module in place, layer by layer, and return how many layers it were.

    Args:
        config: a name such as "int8", or one of the classes of `quantize_configs` or of transformers.
        skip: parts of the names of layers that keep their precision, in place of the configuration's.

    Raises:
        InvalidInput: the module is quantised already, has no layer that fits, or the kind does not run here.
        MissingDependency: the library is not installed.
    """
    refuse_quantized(module)
    chosen = understood(config)
    quantizer = make(chosen)
    targets = _targets(module, quantizer, quantizer.skip if skip is None else tuple(skip))
    for name, layer in targets.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        _put(module, name, quantizer.filled(layer, weight.detach(), weight.dtype, weight.device))
    note(module, chosen)
    give_back()
    return len(targets)


def make(config: QuantizationConfig) -> Quantizer:
    """Return the quantiser of a configuration. Errors: MissingDependency, InvalidInput."""
    return QUANTIZERS[config.quant_method](config)


class Reading:
    """Quantises a module on the meta device while its tensors are read: memory holds one tensor beside the result.

    Errors: InvalidInput when no layer fits.
    """

    def __init__(self, module: nn.Module, config: Any, dtype: torch.dtype, device: torch.device | str) -> None:
        self.module, self.config = module, understood(config)
        self.quantizer = make(self.config)
        self.dtype, self.device = dtype, device
        self.targets = {f"{name}{_WEIGHT}" for name in _targets(module, self.quantizer, self.quantizer.skip)}

    def take(self, name: str, tensor: Tensor) -> bool:
        """Put a tensor, floating as stored, into its place if it is to be quantised, and tell whether it was."""
        if name not in self.targets:
            return False
        path = name.removesuffix(_WEIGHT)
        layer = self.module.get_submodule(path)
        _put(self.module, path, self.quantizer.filled(layer, tensor, self.dtype, self.device))
        return True

    def skeleton(self) -> None:
        """Give the module its quantised layers without any weights, for reading them later.

        Errors: InvalidInput for a quantisation that cannot be done again and again.
        """
        if not isinstance(self.config, Int8Config):
            raise InvalidInput(
                f"Weights quantised by {self.config.quant_method} cannot be read piece by piece. Take sana's own int8,"
                " or another memory mode."
            )
        for name in self.targets:
            path = name.removesuffix(_WEIGHT)
            _put(self.module, path, _empty(self.module.get_submodule(path), self.dtype))

    def done(self) -> None:
        """Note on the module how it is quantised."""
        note(self.module, self.config)
        give_back()


def split(config: Mapping[str, Any]) -> tuple[Int8Config | None, dict[str, Any]]:
    """Part a `config.json` into how its weights were saved, if as our int8, and the rest; other entries stay in it.

    Errors: CheckpointError for an entry that is damaged.
    """
    told = config.get(ENTRY)
    if not isinstance(told, Mapping) or told.get("quant_method") != INT8:
        return None, dict(config)
    skip = told.get("modules_to_not_convert")
    if skip is not None and not (isinstance(skip, list) and all(isinstance(part, str) for part in skip)):
        raise CheckpointError(f"{ENTRY} of config.json names no layers with {skip!r}. Copy the file again.")
    found = Int8Config(modules_to_not_convert=None if skip is None else tuple(skip))
    return found, {name: value for name, value in config.items() if name != ENTRY}


def prepare(module: nn.Module, stored: Mapping[str, torch.dtype], config: Int8Config) -> None:
    """Give a module built on the meta device the layers for weights that were saved as int8.

    Args:
        stored: the tensors in the files and their dtypes; a layer with a `weight_scale` is quantised.
        config: what `split` found in `config.json`.

    Raises:
        CheckpointError: a tensor quantises a layer that has no int8 form, or codes are no int8.
    """
    for name in stored:
        if not name.endswith(_SCALE):
            continue
        path = name.removesuffix(_SCALE)
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue  # the comparison of names tells what does not belong
        if not int8.fits(layer):
            raise CheckpointError(f"Tensor '{name}' quantises a {type(layer).__name__}, which has no int8 form.")
        if stored.get(path + _WEIGHT, torch.int8) != torch.int8:
            raise CheckpointError(f"Tensor '{path}{_WEIGHT}' has a scale and must be int8. Copy the file again.")
        _put(module, path, _empty(layer))
    note(module, config)


def note(module: nn.Module, config: QuantizationConfig) -> None:
    """Remember on a module how it is quantised."""
    module._sana_quantization = config  # type: ignore[assignment]


def noted(module: nn.Module | None) -> QuantizationConfig | None:
    """Return how a module is quantised, or None."""
    found: QuantizationConfig | None = getattr(module, "_sana_quantization", None)
    return found


def entry(module: nn.Module | None) -> dict[str, Any] | None:
    """Return what `config.json` says about a module's quantisation; None for a plain one.

    Errors: InvalidInput for a quantisation whose tensors are not plain.
    """
    config = noted(module)
    if config is None:
        return None
    if not isinstance(config, Int8Config):
        raise InvalidInput(
            f"A model quantised with {config.quant_method} cannot be saved. Save the unquantised model, or quantise"
            " with sana's own int8."
        )
    skip = config.modules_to_not_convert
    return {"quant_method": INT8, **({} if skip is None else {"modules_to_not_convert": list(skip)})}


def refuse_quantized(module: nn.Module) -> None:
    """Raise InvalidInput for a module that is quantised already."""
    if noted(module) is not None or any(isinstance(one, Int8Linear) for one in module.modules()):
        raise InvalidInput(
            f"This {type(module).__name__} is quantised already. Load the unquantised model to quantise it otherwise."
        )


def _targets(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...]) -> dict[str, nn.Module]:
    found = {
        name: layer
        for name, layer in module.named_modules()
        if name and quantizer.fits(layer) and not any(part in name for part in skip)
    }
    if not found:
        text = f"This {type(module).__name__} has no layer that can be quantised"
        raise InvalidInput(f"{text}{' besides those left out' if skip else ''}. Leave it as it is.")
    return found


def _empty(layer: nn.Module, dtype: torch.dtype | None = None) -> Int8Linear:
    made = int8.replacement(layer)
    if dtype is not None:
        made.weight_scale.data = made.weight_scale.data.to(dtype)
    return made


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._modules[leaf] = layer


def _skip(given: tuple[str, ...] | None) -> tuple[str, ...]:
    return SENSITIVE if given is None else tuple(given)


def _named(dtype: Any) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    return found if isinstance(found, torch.dtype) else None


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_told(package))
        return importlib.import_module(name)


@contextlib.contextmanager
def _told(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependency(
            f"This quantisation needs {package}, which is not installed or does not load. Run: pip install"
            f" 'sanakit[quant]' - or take sana's own int8, which needs nothing."
        ) from error


QUANTIZERS: dict[str, Callable[[Any], Quantizer]] = {INT8: Int8, BITSANDBYTES: BitsAndBytes, TORCHAO: TorchAo}
