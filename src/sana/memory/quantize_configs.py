"""How a model is to be quantised, as data: our own int8, and the two classes that users know from transformers.

Needs neither torch nor the libraries; objects of transformers and diffusers with the same meaning are taken too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sana.errors import InvalidInput, did_you_mean

INT8, BITSANDBYTES, TORCHAO = "sanakit_int8", "bitsandbytes", "torchao"
ENTRY = "quantization_config"
"""Key of `config.json` that says how the stored weights are quantised."""


class QuantizationConfig(Protocol):
    """One of the classes of this module."""

    @property
    def quant_method(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Our own int8: weights of linear layers and 1x1 convolutions, on any device, saved as plain safetensors."""

    modules_to_not_convert: tuple[str, ...] | None = None
    """Parts of layer names that stay as they are; None means the first and last layers and the embedding of time."""
    quant_method: str = field(default=INT8, init=False)


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """Linear layers by bitsandbytes: `load_in_8bit`, or `load_in_4bit` with `bnb_4bit_quant_type` "nf4" or "fp4"."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] | None = None
    bnb_4bit_compute_dtype: Any = None
    """Dtype of the products; None means that of the model."""
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    quant_method: str = field(default=BITSANDBYTES, init=False)

    def __post_init__(self) -> None:
        if self.load_in_8bit == self.load_in_4bit:
            given = "both" if self.load_in_8bit else "neither"
            raise InvalidInput(f"Of load_in_8bit and load_in_4bit {given} is set. Set one of them.")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InvalidInput(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}. Choose 'nf4' or 'fp4'.")


@dataclass(frozen=True)
class TorchAoConfig:
    """Linear layers by torchao: a name of TORCHAO_TYPES, or an object of `torchao.quantization`."""

    quant_type: Any
    modules_to_not_convert: tuple[str, ...] | None = None
    quant_method: str = field(default=TORCHAO, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.quant_type, str) and self.quant_type not in TORCHAO_TYPES:
            hint = did_you_mean(self.quant_type, TORCHAO_TYPES)
            text = f"quant_type {self.quant_type!r} is unknown.{hint} Choose one of {', '.join(TORCHAO_TYPES)}"
            raise InvalidInput(f"{text}, or give an object of torchao.quantization.")


def understood(config: Any) -> QuantizationConfig:
    """Return the configuration that is meant: one of ours, a name, a mapping, or an object of another library.

    Errors: InvalidInput naming the choices.
    """
    if isinstance(config, Int8Config | BitsAndBytesConfig | TorchAoConfig):
        return config
    if isinstance(config, str):
        if config in NAMES:
            return NAMES[config]
        raise InvalidInput(f"{ENTRY} is {config!r}.{did_you_mean(config, NAMES)} Choose one of {', '.join(NAMES)}.")
    values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    if method not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise InvalidInput(
            f"{ENTRY} is a {type(config).__name__}, whose method {method!r} is unknown. Choose one of {known}."
        )
    kind = CONFIGS[method]
    names = {one.name for one in dataclasses.fields(kind) if one.init}
    given = {name: _frozen(value) for name, value in values.items() if name in names}
    if method == TORCHAO:  # the mapping holds the type as JSON only
        given["quant_type"] = getattr(config, "quant_type", given.get("quant_type"))
    found: QuantizationConfig = kind(**given)
    return found


def name_of(config: QuantizationConfig) -> str:
    """Return the name in NAMES of a configuration, or of its method where it is a special one."""
    return next((name for name, known in NAMES.items() if known == config), config.quant_method)


def for_parts(config: Any) -> dict[str, QuantizationConfig]:
    """Return the configuration of each part: from a mapping by part names, or one for transformer and text encoder.

    Errors: InvalidInput for a part that is not quantised, or an unknown configuration.
    """
    if config is None:
        return {}
    by_part = getattr(config, "quant_mapping", None) or config
    if not isinstance(by_part, Mapping) or "quant_method" in by_part:
        return dict.fromkeys(("text_encoder", "transformer"), understood(by_part))
    for name in by_part:
        if name not in QUANTIZED_PARTS:
            reason = (
                "The autoencoder keeps its precision" if name == "vae" else f"There is no part {name!r} to quantise"
            )
            raise InvalidInput(
                f"{reason}. Choose from {', '.join(QUANTIZED_PARTS)}.{did_you_mean(name, QUANTIZED_PARTS)}"
            )
    return {name: understood(one) for name, one in by_part.items() if one is not None}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


QUANTIZED_PARTS = ("text_encoder", "transformer", "controlnet")
TORCHAO_TYPES = {
    "int8wo": "Int8WeightOnlyConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8dq": "Int8DynamicActivationInt8WeightConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "int4wo": "Int4WeightOnlyConfig",
    "int4_weight_only": "Int4WeightOnlyConfig",
    "float8wo": "Float8WeightOnlyConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8dq": "Float8DynamicActivationFloat8WeightConfig",
    "float8_dynamic_activation_float8_weight": "Float8DynamicActivationFloat8WeightConfig",
}
"""Names of quantisations and the classes of `torchao.quantization` behind them."""
CONFIGS: dict[str, Any] = {INT8: Int8Config, BITSANDBYTES: BitsAndBytesConfig, TORCHAO: TorchAoConfig}
NAMES: dict[str, QuantizationConfig] = {
    "int8": Int8Config(),
    "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao-int8": TorchAoConfig("int8wo"),
    "torchao-fp8": TorchAoConfig("float8wo"),
    "torchao-int4": TorchAoConfig("int4wo"),
}
"""Short names, for the command line and the tests over all of them."""
