"""What a run of the command leaves behind."""

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Sana = Callable[..., Said]
