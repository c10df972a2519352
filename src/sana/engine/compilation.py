"""Compiled forms of the two networks that take the time: opt-in, kept on disk, equal to the plain ones up to rounding.

The blocks of the transformer share one compiled block; of the VAE's decoder the part is compiled that gains by it. The
modules, their parameters and their names stay as they are; only the way they are called changes.
"""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import nn

from sana.errors import MissingDependency

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch looks for compiled code; there is no other way to tell it."""


def compile_modules(
    transformer: Any, vae: Any, cache_dir: str | Path | None = None, controlnets: Sequence[Any] = ()
) -> None:
    """Let the transformer's blocks and the decoder run compiled from their next call on; either may be None.

    The first call of a size, a batch and a text of up to 64, 128, ... tokens compiles; later ones reuse it. What was
    compiled is kept in `cache_dir`, where other processes find it. After eight of these a process runs further ones
    as they are, uncompiled. The 28 blocks of the 0.6B transformer take about 25 CPU seconds at first and 5 in a later
    process. Perturbed rows make up to three forms of a block: before, at and behind the first perturbed one. The blocks
    of control networks share their form with the transformer's. On a GPU the kernels are fused, but no graph of
    launches is recorded.

    Args:
        cache_dir: None takes torch's own setting if there is one, else a folder beside the downloaded models.

    Raises:
        MissingDependency: the compiler that torch needs on this device is not there.
    """
    networks = [network for network in (transformer, vae, *controlnets) if network is not None]
    for kind in sorted({next(network.parameters()).device.type for network in networks}):
        require_compiler(kind)
    set_cache(cache_dir)
    for network in (transformer, *controlnets):
        for block in network.transformer_blocks if network is not None else ():
            block.compile(dynamic=False)
    if vae is not None:
        compile_decoder(vae.decoder)


def is_compiled(module: nn.Module | None) -> bool:
    """Tell whether a transformer or an autoencoder runs compiled."""
    if module is None:
        return False
    return any(part._compiled_call_impl is not None or getattr(part, "fused_rows", False) for part in module.modules())


def compile_decoder(decoder: Any) -> None:
    """Compile the norms of the decoder's strips on a CPU, and the decoder as a whole elsewhere.

    On a CPU the strips keep everything in the cache, which a decoder compiled as a whole does not: 2.7 s against 3.9 s.
    """
    if next(decoder.parameters()).device.type == "cpu":
        decoder.compile_rows()
    else:
        decoder.compile(dynamic=False)


def require_compiler(device_type: str) -> None:
    """Raise MissingDependency, saying what to install, unless torch can compile for this kind of device."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    if device_type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise MissingDependency("Compiling for a GPU needs Triton, which is not installed. Run: pip install triton")
        return
    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise MissingDependency(
            "Compiling needs a C++ compiler, and there is none. Install g++ or clang, or go on without compiling."
        ) from error
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        raise MissingDependency(
            "Compiling needs the C headers of Python, which are not installed. Install the package python3-dev, or go"
            " on without compiling."
        )


def set_cache(folder: str | Path | None) -> Path:
    """Tell torch where compiled code is kept, and return it.

    Raises:
        OSError: the folder cannot be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    if folder is None:
        known = Path(cache_dir())
        if known != Path(default_cache_dir()):
            return known
        folder = Path(constants.HF_HOME, "sanakit", "compiled")
    place = Path(folder).expanduser().resolve()
    place.mkdir(parents=True, exist_ok=True)
    os.environ[CACHE_VARIABLE] = str(place)
    return place
