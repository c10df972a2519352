"""A stage of the road from prompt to pixels as the estimate sees it, and the sums over stages: seconds and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 450_000_000
"""Bytes of the program and its libraries before any weight."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the road from prompt to pixels, done `times` times."""

    name: str
    dtype: str
    flops: float
    traffic: float
    """Bytes read and written, weights included."""
    ops: int
    weights: int
    """Bytes of its part of the model, which stay in memory."""
    live: float
    """Bytes of activations at its fullest moment."""
    times: int = 1
    streamed: int | None = None
    """Bytes of weights that are in memory when its blocks come one by one; None where they do not."""
    part: str = ""
    """Which part of the model it uses; stages of one part share the weights."""
    device_only: bool = False
    """Whether memory means that of an accelerator, without the program."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine is."""

    flops: Mapping[str, float]
    """Multiplications and additions a second in a large matrix product, by dtype."""
    traffic: float
    """Bytes read and written a second."""
    ops: float
    """Small operators a second."""


def seconds(stage: Stage, rates: Rates, mode: str | None = None, reading: float = 1e9) -> float:
    """Return about how long a stage takes, all its repetitions together.

    Args:
        mode: in a memory mode the weights are read each time that the stage begins; in "lowest" a step waits for those
            of its blocks, which are read meanwhile.
        reading: bytes a second from where the weights are kept.
    """
    once = (
        stage.flops / (rates.flops[stage.dtype] * SHARES[stage.dtype])
        + stage.traffic / rates.traffic
        + stage.ops / rates.ops
    )
    if mode == "lowest" and stage.streamed is not None:
        return max(once, stage.weights / reading) * stage.times
    if not stage.times:
        return 0.0
    return once * stage.times + (0.0 if mode is None else stage.weights / reading)


def memory(parts: Sequence[Stage], mode: str | None = None) -> float:
    """Return about how many bytes are in use at the worst moment.

    Args:
        mode: None for all weights and the fullest stage; "low" for the stage that needs most with its own weights;
            "lowest" for the same with only some blocks of them.
    """
    program = 0 if any(stage.device_only for stage in parts) else PROCESS
    if mode is None:
        weights = {stage.part: stage.weights for stage in parts}
        return program + sum(weights.values()) + max(stage.live for stage in parts)
    at_work = [stage for stage in parts if stage.times]
    held = {
        stage.part: stage.streamed if mode == "lowest" and stage.streamed is not None else stage.weights
        for stage in at_work
    }
    beside = {"transformer": held.get("controlnet", 0), "controlnet": held.get("transformer", 0)}
    return program + max(held[stage.part] + beside.get(stage.part, 0) + stage.live for stage in at_work)


SHARES = {"float32": 0.9, "bfloat16": 0.6, "float16": 0.6}
"""What part of the speed of a large multiplication the layers reach, convolutions and small ones among them."""
