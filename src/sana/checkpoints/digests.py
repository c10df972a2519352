"""Tensor files held to their SHA-256: that in their own header, or the one that names them in the hub's cache."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from sana.checkpoints.foreign import AGAIN
from sana.checkpoints.tensors import DIGEST, digest_of, head_of, opened
from sana.errors import CheckpointError

_HEX = re.compile(r"[0-9a-f]{64}")


def verify(path: Path, stop: Event | None = None) -> bool:
    """Compare a file with its digest: that in its header, or the one that names it in the hub's cache.

    Returns whether it has one and was read to its end.
    Errors: CheckpointError when the content is not what was saved.
    """
    expected = hub_digest(path)
    if expected:
        with path.open("rb", buffering=0) as data:
            found = digest_of(data, stop)
    else:
        with opened(path) as (file, data):
            expected = _own_digest(file)
            head_of(data)
            found = digest_of(data, stop) if expected else None
    if found and found != expected:
        raise CheckpointError(f"{path} is not as it was saved, its SHA-256 differs: {AGAIN}.")
    return bool(found)


@contextmanager
def verified(paths: Sequence[Path]) -> Iterator[None]:
    """Compare files with their digests on a second thread while the block reads them.

    Errors: CheckpointError at the end of the block.
    """
    stop = Event()
    with ThreadPoolExecutor(1, "sana-verify") as worker:
        checks = [worker.submit(verify, path, stop) for path in paths]
        try:
            yield
        except BaseException:
            stop.set()
            raise
    for check in checks:
        check.result()


def hub_digest(path: Path) -> str | None:
    """Return the SHA-256 that names a large file in the hub's cache, to which the names in its folders are links."""
    blob = path.resolve().name
    return blob if path.is_symlink() and _HEX.fullmatch(blob) else None


def has_digest(path: Path) -> bool:
    """Tell whether a safetensors file holds a digest of its own, which those that this package writes do."""
    if path.suffix == ".bin":
        return False
    with opened(path) as (file, _):
        return _own_digest(file) is not None


def _own_digest(file: Any) -> str | None:
    expected = (file.metadata() or {}).get(DIGEST, "")
    return expected if _HEX.fullmatch(expected) else None
