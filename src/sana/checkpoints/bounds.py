"""What a configuration file may ask for, checked before anything is built from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.errors import CheckpointError

MAX_INTEGER = 1 << 24
"""No honest configuration holds a larger number; it bounds what a hostile one can ask for."""
MAX_TEXT = 1 << 12
MAX_ITEMS = 1 << 12
MAX_DEPTH = 8

_CODE = {
    "auto_map": "brings code of its own, which is never run: use a model without it",
    "custom_pipeline": "brings code of its own, which is never run: use a model without it",
    "quantization_config": "is quantised in a way that is not read: use the original model",
}


def check_config(config: Mapping[str, Any], where: Path, *, num_tensors: int, classes: Sequence[str] = ()) -> None:
    """Refuse a configuration of another class, one that wants code run, or one that asks for absurd sizes.

    `classes` are the names that `_class_name` may have (empty: any); every count of layers is at most `num_tensors`.
    Errors: CheckpointError naming the file and the key.
    """
    named = config.get("_class_name", next(iter(classes), None))
    if classes and named not in classes:
        text = f"{where} is the configuration of {shown(named)}, not of {classes[0]}"
        raise CheckpointError(f"{text}: load it with the class it names.")
    check_no_code(config, where)
    _check_value("it", config, where, MAX_DEPTH)
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if "layers" in key and isinstance(number, int) and number > num_tensors:
                text = f"{where} asks for {number} {shown(key)} but the files hold only {num_tensors} tensors"
                raise CheckpointError(f"{text}: configuration and weights do not belong together.")


def check_no_code(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a configuration that names code or a foreign storage format.

    Errors: CheckpointError.
    """
    for key, fault in _CODE.items():
        if config.get(key):
            raise CheckpointError(f"{where} holds {key}: the model {fault}.")


def shown(value: object) -> str:
    """Return a value from a file as a message may repeat it: one line, at most 80 characters."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_value(key: str, value: object, where: Path, depth: int) -> None:
    fault = None
    if isinstance(value, Mapping | list):
        if len(value) > MAX_ITEMS:
            fault = f"{len(value)} entries"
        elif not depth:
            fault = "lists inside lists too deep"
        else:
            for name, item in value.items() if isinstance(value, Mapping) else ((key, item) for item in value):
                _check_value(str(name), item, where, depth - 1)
    elif isinstance(value, str):
        fault = f"a text of {len(value)} letters" if len(value) > MAX_TEXT else None
    elif isinstance(value, int | float) and not abs(value) <= MAX_INTEGER:
        fault = shown(value)
    if fault:
        raise CheckpointError(f"{where} sets {shown(key)} to {fault}, which no real model has.")
