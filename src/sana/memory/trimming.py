"""Giving freed memory back to the system at once, where the C library would keep it for later."""

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Return what has been freed to the system; only where the C library is glibc, which needs to be told."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
