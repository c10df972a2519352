"""Files that are no safetensors: recognised by their first bytes, and pickles where the caller allowed them."""

import re
from pathlib import Path

import torch
from torch import Tensor

from sana.errors import CheckpointError

AGAIN = "delete it and download or copy it again"
_FOREIGN = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.I), f"a web page, not a model: {AGAIN}"),
    (
        re.compile(rb"PK[\x01\x03\x05]|\x80[\x02-\x05][^\x00]|7z\xbc\xaf|\x1f\x8b|Rar!|BZh|\xfd7zXZ|.{257}ustar", re.S),
        "a pickle or an archive under a safetensors name; it is not opened: ask its author for safetensors",
    ),
)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text without its full stop, or the error's name."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def foreign(start: bytes) -> str | None:
    """Say what a file is that begins with these bytes, if it is one of the usual mistakes."""
    return next((kind for pattern, kind in _FOREIGN if pattern.match(start)), None)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a `.bin` that the caller allowed, with the unpickler that only makes tensors.

    Errors: CheckpointError when it holds anything else.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a hostile or cut pickle may raise anything
        raise CheckpointError(f"{path} cannot be read as plain tensors: {first_line(error)}.") from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise CheckpointError(f"{path} must hold a mapping of names to tensors and nothing else.")
    return {str(name): tensor for name, tensor in value.items()}
