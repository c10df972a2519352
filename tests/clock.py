"""How long a call takes, told apart from what else the machine and the collector of garbage do meanwhile."""

import gc
import time
from collections.abc import Callable


def wall_seconds(work: Callable[[], object], calls: int = 3) -> float:
    """Return the least time that a call takes by the clock on the wall, as a measure for how long to wait for one."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def cpu_seconds(work: Callable[[], object], enough: float = 0.0, calls: int = 5) -> float:
    """Return the least CPU time of some calls; the first that takes no more than `enough` is the last.

    A neighbour on the same core, a cold cache or a passage through all objects of a long test run each make one call
    slow. Work that is too slow is so every time.
    """
    least, collecting = float("inf"), gc.isenabled()
    gc.disable()
    try:
        for _ in range(calls):
            began = time.process_time()
            work()
            least = min(least, time.process_time() - began)
            if least <= enough:
                break
    finally:
        if collecting:
            gc.enable()
    return least
