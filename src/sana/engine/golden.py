"""Golden checks: does a model, here and now, give the tokens, latents and pixels that were kept for it?

What is kept is small: the tokens of one prompt, some latents of one run and a thumbnail of its picture. Of models whose
weights could not be had where this was written nothing is kept, and the check says so instead of passing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sana.engine.generate import generate
from sana.engine.parts import Parts
from sana.engine.request import ControlRequest, Request, Result
from sana.flow.samplers import Step
from sana.text.gemma import prepare_prompt
from sana.text.instruction import tokenize

NOT_CHECKED = "not checked here: its weights could not be had where the golden values are made"
SAMPLES = 32
"""Latents that are kept, at equal distances."""
THUMBNAIL = 8
"""Side of the kept picture."""
_LATENTS = {torch.float32: 1e-3}
_ROUGH_LATENTS = 0.15
"""Greatest distance from the kept latents, as a share of their size: in float32 on any machine, and in half precision,
where the rounding of every step counts."""
_PIXELS = {torch.float32: 1.0}
_ROUGH_PIXELS = 24.0
"""Greatest difference of a value of the thumbnail, of 255. In half precision other processors round an edge by up to
16; without its control network a model is 100 away."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What one run of a model gave."""

    request: Mapping[str, object]
    """Fields of the request; a model with a control network follows `sketch` besides."""
    tokens: tuple[int, ...]
    """Tokens of the prompt alone."""
    latents: tuple[float, ...]
    """Final latents at `SAMPLES` places."""
    pixels: bytes
    """The picture at `THUMBNAIL` by `THUMBNAIL`, RGB."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one check."""

    check: str
    """tokens, latents or pixels."""
    passed: bool | None
    """None where nothing is kept to check it with."""
    said: str
    """A sentence with the figure that was seen."""


def verify(parts: Parts) -> tuple[Finding, ...]:
    """Run a model's golden check; one finding that says "not checked here" where nothing is kept for it.

    Errors: as `generate`.
    """
    golden = GOLDEN.get(parts.name)
    if golden is None:
        return (Finding(check="golden values", passed=None, said=f"{parts.name}: {NOT_CHECKED}."),)
    found = observe(parts, golden.request)
    exact = all(getattr(parts, name).dtype == torch.float32 for name in ("transformer", "text_encoder", "vae"))
    kind = torch.float32 if exact else torch.bfloat16
    same = found.tokens == golden.tokens
    kept, now = torch.tensor(golden.latents), torch.tensor(found.latents)
    away = float((now - kept).norm() / kept.norm())
    off = max(abs(one - other) for one, other in zip(found.pixels, golden.pixels, strict=True))
    most, widest = _LATENTS.get(kind, _ROUGH_LATENTS), _PIXELS.get(kind, _ROUGH_PIXELS)
    return (
        Finding(
            check="tokens",
            passed=same,
            said=f"{len(found.tokens)} tokens, {'as kept' if same else 'not those that are kept'}.",
        ),
        Finding(check="latents", passed=away <= most, said=f"{away:.1e} away from those kept; at most {most:g}."),
        Finding(check="pixels", passed=off <= widest, said=f"{off} of 255 away from those kept; at most {widest:g}."),
    )


def observe(parts: Parts, request: Mapping[str, object]) -> Golden:
    """Return what a model gives now: the golden values that would be kept for it."""
    kind: Any = parts.effective_card.control or "map"
    controls = (ControlRequest(kind=kind, image=sketch()),) if parts.controlnets else ()
    order = Request(**request, controls=controls)  # type: ignore[arg-type]
    latents, result = _run(parts, order)
    places = torch.linspace(0, latents.numel() - 1, SAMPLES).round().long()
    picture = result.images[0].convert("RGB").resize((THUMBNAIL, THUMBNAIL), resample=4)  # the mean of each box
    tokens = tokenize(parts.tokenizer, prepare_prompt(order.prompt), order.max_prompt_tokens).ids
    return Golden(
        request=dict(request),
        tokens=tokens,
        latents=tuple(round(float(value), 5) for value in latents.flatten()[places]),
        pixels=picture.tobytes(),
    )


def sketch() -> Image.Image:
    """Return the picture that a control network follows: a disc above a box, whose edges are where it shall draw."""
    picture = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((80, 32, 176, 112), fill="grey")
    pen.rectangle((64, 152, 192, 224), fill="grey")
    return picture


def _run(parts: Parts, request: Request) -> tuple[Tensor, Result]:
    """Return the final latents of a request for one picture, [1, C, h, w], and what came of it."""
    latents: Tensor | None = None
    steps = generate(parts, request)
    while True:
        try:
            found = next(steps)
        except StopIteration as finished:
            result: Result = finished.value
            assert latents is not None, "a request has at least one step"
            return latents.float().cpu(), result
        if isinstance(found, Step):
            latents = found.latents


GOLDEN: dict[str, Golden] = {
    "nano": Golden(
        request={"prompt": "a red fish above a yellow boat", "seed": 7, "steps": 6},
        tokens=(2, 277, 459, 537, 722, 392, 480, 489),
        latents=(
            -0.19743, 0.54988, 0.98842, 0.0524, -0.15494, -0.42669, -2.82903, 0.06751, -0.3148, -0.11925,
            -2.06061, 0.32812, 0.28208, 1.53302, 1.7338, 0.2599, 0.74006, -2.71538, -0.20242, -0.12199,
            0.2241, 5.83183, -0.79231, -0.10085, 1.11314, 3.10287, 0.74699, -0.38317, 0.24525, 0.82596,
            0.42407, 0.10191,
        ),
        pixels=bytes.fromhex(
            "d8f0ded8f0ded8f0ded8f0ded8f0ded8f0ded8f0ded8f0de"
            "d8f0ded8f0ded8d4c5d78983d8b9add6d9cad8f0ded8f0de"
            "d8f0ded8f0ded6bbafd53235d34344d3c5b7d8f0ded8f0de"
            "d8f0ded8f0ded8f0ded4e8d8d5ecdbd7e9d7d8f0ded8f0de"
            "d8f0ded8f0ded8f0dee2e59fd9ebcbd8f0ded8f0ded8f0de"
            "d8f0ded8f0dedaefd4f5d12ee9db70d8f0ded8f0ded8f0de"
            "d8f0ded8f0dee0e4a1eecd3aebcf43d8e8c7d8f0ded8f0de"
            "d8f0ded8f0ded8efdcd9e4b7d7e3b7d7efddd8f0ded8f0de"
        ),
    ),
    "nano-sprint": Golden(
        request={"prompt": "a red fish above a yellow boat", "seed": 7, "steps": 2},
        tokens=(2, 277, 459, 537, 722, 392, 480, 489),
        latents=(
            -0.13131, -0.87958, -0.01735, 0.51933, -0.10589, 1.52877, -4.16684, -0.0949, -0.09096, 0.80943,
            -1.75645, -0.34359, 0.41502, 0.88285, 1.35205, 0.37096, 1.00742, -3.40559, -0.1846, 0.09935,
            0.01898, 3.3597, 0.58198, -0.20553, 0.80603, 1.77786, -0.0503, -0.24533, -1.47167, 0.04979,
            -0.86236, 0.26521,
        ),
        pixels=bytes.fromhex(
            "faf3e2faf3e2faf3e2faf3e2faf3e2faf3e2faf3e2faf3e2"
            "faf3e2faf3e2ecb6abe06663eba69eedcbbefaf3e2faf3e2"
            "faf3e2faf3e2e6918ad62a2ed95a58edc2b6faf3e2faf3e2"
            "faf3e2faf3e2faf3e2f3e8d9f9f2e1f9f2e1faf3e2faf3e2"
            "faf3e2faf3e2faf3e2f9efcefaf3e2faf3e2faf3e2faf3e2"
            "faf3e2faf3e2f9f2def8d33af8eabcfaf3e2faf3e2faf3e2"
            "faf3e2faf3e2f7e49fefcb37edcf59f8f1dffaf3e2faf3e2"
            "faf3e2faf3e2f9f1def2e6bff2e9cbfaf3e2faf3e2faf3e2"
        ),
    ),
    "nano-controlnet": Golden(
        request={"prompt": "a red fish above a yellow boat", "seed": 7, "steps": 6},
        tokens=(2, 277, 459, 537, 722, 392, 480, 489),
        latents=(
            -0.27547, -0.77395, 0.60165, -0.37166, -0.12607, -1.9784, -2.96404, 1.33905, -0.22354, 0.61634,
            -3.22527, -0.84374, 0.27437, -1.83854, 2.24814, -0.05182, 0.63088, -1.44014, -1.091, -0.1276,
            -0.24063, 4.96708, -1.90867, -0.17576, 0.04974, 1.28782, 0.76158, -0.4407, 0.3987, 0.23827,
            -0.55854, 0.20709,
        ),
        pixels=bytes.fromhex(
            "d8f0ded8f0ded8f0ded8efded8efddd8f0ded8f0ded8f0de"
            "d8f0ded8f0ded8c9bbd54647d64949d4b9add8f0ded8f0de"
            "d8f0ded8f0ded7a098d43235d43133d0928ad8f0ded8f0de"
            "d8f0ded8f0ded8eddbd49f97d2a79fd6e1d1d8f0ded8f0de"
            "d8f0ded8f0ded8f0ded9efdddbecd0d8efdad8f0ded8f0de"
            "d8f0ded8f0ded8f0dee7e189f3d033dbe4add8f0ded8f0de"
            "d8f0ded8f0ded8f0deedd44ef4ce29e6db76d7efddd8f0de"
            "d8f0ded8f0ded8f0ded8e7c8d7e4c6d4e9d4d8f0ded8f0de"
        ),
    ),
}  # fmt: skip
"""Card -> what its model gave in float32 on the machine where this was written, with torch 2.13."""
