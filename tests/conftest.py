"""Fixtures for the whole suite: a small random model, in memory and as a folder."""

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Read by the hub library when it is imported; no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read by setuptools, which torch's compiler imports: it would replace a distutils that other packages imported before.
os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
# Read by torch when it is imported. On models this small a second thread only waits, and on a busy machine it spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, and as long as a busy machine takes for each.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tiny_parts():  # type: ignore[no-untyped-def]
    """The tiny model. Tests that change it work on `copy.deepcopy(tiny_parts)`."""
    from tiny_model import make_tiny_parts

    return make_tiny_parts()


@pytest.fixture(scope="session")
def tiny_folder(tiny_parts, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """The tiny model in the published layout, with bf16 and fp16 variants beside the plain files. Read only."""
    import copy

    import torch

    from sana import SanaPipeline

    folder: Path = tmp_path_factory.mktemp("tiny") / "model"
    for variant, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        cast = copy.deepcopy(tiny_parts)
        for part in (cast.text_encoder, cast.vae, cast.transformer):
            part.to(dtype)
        SanaPipeline(**cast.components).save_pretrained(folder, variant=variant)
    SanaPipeline(**tiny_parts.components).save_pretrained(folder)  # last: config.json then names the plain files' dtype
    return folder


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Let what a test draws without a generator of its own depend on nothing that ran before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
