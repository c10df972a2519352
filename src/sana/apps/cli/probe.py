"""What the heavy packages say when they are tried: run by `sana doctor` as a program of its own.

It prints one line of JSON for every stage named on the command line. A stage that fails, or ends the program, does no
harm to the one who asked.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def probe_torch() -> dict[str, Any]:
    """Return version, build, devices and what the processor can do."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    has = {name: bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()) for name in _FEATURES}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "mps": bool(torch.backends.mps.is_available()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": sorted(name for name, there in has.items() if there),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def probe_torchvision() -> dict[str, Any]:
    """Return its version; its operators are registered, or not, while it is imported."""
    import torchvision  # type: ignore[import-not-found, import-untyped, unused-ignore]  # not among what is installed

    return {"version": torchvision.__version__}


def probe_transformers() -> dict[str, Any]:
    """Return its version, having imported what it is needed for."""
    import transformers
    from transformers import AutoTokenizer, Gemma2Model

    return {"version": transformers.__version__, "classes": [AutoTokenizer.__name__, Gemma2Model.__name__]}


def probe_drawing() -> dict[str, Any]:
    """Draw with the built-in model and return how it went; a picture without any difference in it is an error."""
    import numpy as np

    import sana
    from sana.engine.generate import generate_images
    from sana.engine.parts import load
    from sana.engine.request import Request

    began = time.perf_counter()
    parts = load(Path(sana.__file__).parent / "assets" / "nano")
    loaded = time.perf_counter()
    result = generate_images(parts, Request(prompt="a red fish", steps=2, seed=7))
    pixels = np.asarray(result.images[0])
    if pixels.std() < 1:
        raise ValueError("the picture is of one colour")
    return {
        "device": parts.device.type,
        "load_seconds": round(loaded - began, 2),
        "draw_seconds": round(time.perf_counter() - loaded, 2),
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def main(names: list[str]) -> int:
    """Try the stages in order; one that fails does not keep the next from being tried."""
    for name in names:
        try:
            answer = {"stage": name, "facts": STAGES[name]()}
        except Exception as error:  # whatever a broken package raises is what is looked for
            first = (str(error).strip().splitlines() or ["no message"])[0]
            answer = {"stage": name, "error": f"{type(error).__name__}: {first}"[:300]}
        print(json.dumps(answer), flush=True)
    return 0


_FEATURES = ("avx2", "avx512", "vnni", "avx512_bf16", "amx_tile", "amx_fp16")
STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "transformers": probe_transformers,
    "drawing": probe_drawing,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
