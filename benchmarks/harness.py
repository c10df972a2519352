"""Measure cases side by side on a machine that may be busy.

The cases of one `measure` take turns, round by round, and a bfloat16 matrix product takes its turn with them. So a
change of clock or load meets all of them, and each figure can be given as a share of what the machine reached in that
minute. CPU seconds of one thread are the figure to compare; wall seconds mean something on a quiet machine only.
"""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CEILING_SHAPE = (2048, 1152, 1152)
"""Rows, inner and outer width of the matrix product: a linear layer of the 0.6B transformer."""
CEILING_SECONDS = 0.15


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One case: a value per round, in the order of the rounds."""

    cpu: tuple[float, ...]
    """CPU seconds of the process, all its threads."""
    wall: tuple[float, ...]
    ceiling: tuple[float, ...] = ()
    """Floating point operations per second of the matrix product of that round."""
    flops: float | None = None
    """Floating point operations of one call, multiply and add counted separately."""
    peak: int | None = None
    """Bytes of resident memory beyond those before the call, at most; Linux only."""

    @property
    def median(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)

    @property
    def share(self) -> float | None:
        """Share of the matrix product's speed, median over the rounds."""
        if self.flops is None or not self.ceiling:
            return None
        return statistics.median(self.flops / s / c for s, c in zip(self.cpu, self.ceiling, strict=True))

    def ratio(self, peer: "Timing") -> float:
        """How many times longer the peer takes, median over pairs of one round."""
        return statistics.median(b / a for a, b in zip(self.cpu, peer.cpu, strict=True))


def measure(
    cases: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    *,
    warmups: int = 2,
    flops: Mapping[str, float] | float | None = None,
    threads: int = 1,
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Call the cases in turn, `warmups` times uncounted and `rounds` times counted.

    `flops` is that of one call, for all cases or by name. `before` runs uncounted ahead of each call, to empty caches.
    """
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    peaks: dict[str, int | None] = dict.fromkeys(cases)
    ceiling, rates = Ceiling(), []
    with _threads(threads), torch.no_grad():
        for i in range(warmups + rounds):
            rate = ceiling()
            for name, case in cases.items():
                if before is not None:
                    before()
                if i < warmups:
                    peaks[name] = _peak_of(case)
                else:
                    values[name].append(_times_of(case))
            if i >= warmups:
                rates.append((rate + ceiling()) / 2)
    return {
        name: Timing(
            cpu=tuple(value[0] for value in values[name]),
            wall=tuple(value[1] for value in values[name]),
            ceiling=tuple(rates),
            flops=flops.get(name) if isinstance(flops, Mapping) else flops,
            peak=peaks[name],
        )
        for name in cases
    }


def once(case: Callable[[], object]) -> tuple[float, float, int | None]:
    """Return CPU seconds, wall seconds and peak memory of one call, the first: for work that is too long to repeat."""
    gc.collect()
    start = _reset_peak()
    cpu, wall = _times_of(case)
    end = peak_memory()
    return cpu, wall, end - start if start is not None and end is not None else None


def _times_of(case: Callable[[], object]) -> tuple[float, float]:
    """Return CPU and wall seconds of one call."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = case()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del result
    return cpu, wall


def _peak_of(case: Callable[[], object]) -> int | None:
    """Return by how much memory grows in one call, which is not timed: memory is given back to the system before it."""
    gc.collect()
    start = _reset_peak()
    result = case()
    end = peak_memory()
    del result
    return end - start if start is not None and end is not None else None


class Ceiling:
    """The matrix product that the cases are compared to."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        rows, inner, outer = CEILING_SHAPE
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, inner, generator=generator).to(dtype)
        self.weight = torch.randn(outer, inner, generator=generator).to(dtype)
        self.flops = 2.0 * rows * inner * outer

    def __call__(self) -> float:
        """Return operations per CPU second, best third of the products of a short while."""
        times: list[float] = []
        until = time.process_time() + CEILING_SECONDS
        while time.process_time() < until or len(times) < 3:
            start = time.process_time()
            torch.nn.functional.linear(self.x, self.weight)
            times.append(time.process_time() - start)
        return self.flops / statistics.median(sorted(times)[: max(1, len(times) // 3)])


def child(words: Sequence[str]) -> tuple[float, str]:
    """Run `python` with these words on one thread; return the CPU seconds it took and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, env=environment, text=True, timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words)} failed:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def error(actual: torch.Tensor, golden: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `golden`, the result in float32."""
    golden = golden.double()
    return float((actual.double() - golden).square().mean().sqrt() / golden.square().mean().sqrt())


def table(
    timings: Mapping[str, Timing], *, peers: Iterable[str] = (), errors: Mapping[str, float] | None = None
) -> str:
    """Return a Markdown table: a row per case, a column per peer with how many times longer that one takes."""
    peers = list(peers)
    shares = any(timing.share is not None for timing in timings.values())
    head = ["work", "CPU s, median (min - max)", "wall s", *(f"against {peer}" for peer in peers)]
    head += ["of the matmul ceiling"] * shares + ["peak memory"] + ["error to float32"] * (errors is not None)
    lines = [head, ["---"] * len(head)]
    for name, timing in timings.items():
        line = [name, f"{timing.median:.3f} ({min(timing.cpu):.3f} - {max(timing.cpu):.3f})"]
        line.append(f"{statistics.median(timing.wall):.3f}" if timing.wall else "-")
        line += [f"{timing.ratio(timings[peer]):.2f}x" if peer != name else "1" for peer in peers]
        line += [f"{timing.share:.0%}" if timing.share is not None else "-"] * shares
        line.append(f"{timing.peak / 2**20:.0f} MiB" if timing.peak is not None else "-")
        if errors is not None:
            line.append(f"{errors[name]:.1e}" if name in errors else "-")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(title: str, *notes: str) -> str:
    """Return a title with the versions and the machine, ready to stand over a table."""
    found = []
    for package in ("torch", "transformers", "diffusers", "Pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return f"## {title}\n\n{', '.join([*found, f'Python {platform.python_version()}', processor(), *notes])}\n"


def processor() -> str:
    """Return what is known of the processor: its matrix instructions and the number of cores."""
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return f"{platform.machine()}{' with AMX' if amx else ''}, {os.cpu_count()} cores"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reset_peak() -> int | None:
    """Set the kernel's mark of the peak to what is resident now, and return that; None where this is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else a buffer kept from the last round hides that of this one
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return peak_memory()


def peak_memory() -> int | None:
    """Return the most bytes this process had resident so far, or since the mark was reset; Linux only."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
