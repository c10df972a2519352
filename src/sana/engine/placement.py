"""Where the parts of a model are, and when: on several devices, or on the device only while they are used.

The plan has three stages: encode, denoise, decode. In mode "low" a part is there from its stage on until another stage
needs the memory; in mode "lowest" transformer, control networks and text encoder are there block by block only. Away
from an accelerator means in main memory; away from a CPU means in the files, from which the weights are read again. The
pictures are the same to the last bit.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sana.checkpoints.origins import FileTensors, origin_of
from sana.checkpoints.weights import read_state
from sana.engine.fingerprint import SAMPLED, sample
from sana.errors import InvalidInput, did_you_mean
from sana.memory.offload import HostTensors, Shelf, Source, StreamingShelf, WholeShelf, restore, streams
from sana.memory.trimming import give_back

MODES = ("low", "lowest")
WEIGHTED = ("text_encoder", "transformer", "controlnet", "vae")
"""The parts that have weights."""
_log = logging.getLogger(__name__)


class Placement:
    """Brings the modules of a model to a device for as long as they are used.

    Args:
        mode: "low" for whole parts, "lowest" for single blocks.
        device: where everything is computed.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        if mode not in MODES:
            raise InvalidInput(f"The memory mode is {mode!r}.{did_you_mean(mode, MODES)} Choose low or lowest.")
        self.mode, self.device = mode, device
        self._shelves: WeakKeyDictionary[nn.Module, Shelf | None] = WeakKeyDictionary()
        self._users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def take(self, module: nn.Module) -> bool:
        """Take charge of a module, and tell whether its weights can be let go of."""
        if module not in self._shelves:
            self._shelves[module] = shelf = self._shelf(module)
            if shelf is not None:
                _free(shelf)
            elif self.device.type != "cpu":
                module.to(self.device)
        return self._shelves[module] is not None

    def _shelf(self, module: nn.Module) -> WholeShelf | StreamingShelf | None:
        source: Source
        origin = origin_of(module)
        if self.device.type != "cpu":
            source = HostTensors(module.to("cpu"))
        elif origin is None:
            return None
        else:
            source = FileTensors(origin)
            changed = _survey(module, source)
        kind = StreamingShelf if self.mode == "lowest" and streams(module) else WholeShelf
        shelf = kind(module, source, self.device)
        if self.device.type == "cpu":
            shelf.keep(changed)
        return shelf if shelf.names else None

    @contextmanager
    def using(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Have these modules on the device inside the `with` block; others are let go of if the mode says so."""
        wanted = list(modules)
        for module in wanted:
            self.take(module)
            self._users[module] = self._users.get(module, 0) + 1
        try:
            for module, shelf in self._shelves.items():
                if shelf is not None and not self._users.get(module):
                    _free(shelf)
            give_back()
            for module in wanted:
                shelf = self._shelves[module]
                if isinstance(shelf, WholeShelf | StreamingShelf):
                    shelf.enter()
            yield
        finally:
            for module in wanted:
                self._users[module] -= 1
                shelf = self._shelves[module]
                if self.mode == "lowest" and shelf is not None and not self._users[module]:
                    _free(shelf)

    def end(self) -> None:
        """Bring everything back for good."""
        for module, shelf in self._shelves.items():
            if shelf is not None:
                _free(shelf)
                restore(module)
                shelf.bring()
        self._shelves = WeakKeyDictionary()

    @contextmanager
    def whole(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Have all the weights of these modules there inside the `with` block, for saving them."""
        there = [shelf for module in modules if self.take(module) and (shelf := self._shelves[module]) is not None]
        for shelf in there:
            shelf.bring()
        try:
            yield
        finally:
            for shelf in there:
                _free(shelf)


def offload(parts: Any, mode: str, device: torch.device) -> None:
    """Let the parts of a model come and go as `mode` says, computing on `device`.

    Errors: InvalidInput for an unknown mode, compiled or spread parts, and where no part can be let go of.
    """
    placement = Placement(mode, device)
    modules = {name: list(modules_of(getattr(parts, name))) for name in WEIGHTED}
    _refuse_unfit(modules)
    if parts.placement is not None:
        parts.placement.end()
    kept = [name for name, found in modules.items() for module in found if not placement.take(module)]
    if kept and len(kept) == sum(map(len, modules.values())):
        raise InvalidInput(
            f"Memory mode {mode!r} would have no effect: on a CPU, weights are let go of and read again from"
            " safetensors files, and no part of this model came from such. Save it with save_pretrained and load it."
        )
    if kept:
        names = " and ".join(name.replace("_", " ") for name in dict.fromkeys(kept))
        _log.warning("memory mode %s: %s cannot be read again from safetensors files and stay in memory", mode, names)
    parts.placement = placement


def _refuse_unfit(modules: Mapping[str, Sequence[nn.Module]]) -> None:
    for name, found in modules.items():
        for module in found:
            if any(one._compiled_call_impl is not None for one in module.modules()):
                raise InvalidInput(f"The {name} is compiled, so its weights must stay. Load it without compiling it.")


def modules_of(part: Any) -> Iterator[nn.Module]:
    """Yield the modules of a part: itself, or those of a list."""
    for one in part if isinstance(part, list | tuple) else (part,):
        if isinstance(one, nn.Module):
            yield one


def spread(device_map: Any, names: Sequence[str], sizes: Mapping[str, int] | None = None) -> dict[str, torch.device]:
    """Return the device of each part.

    Args:
        device_map: "balanced" puts the parts on all GPUs, the largest first, each where most is free; with one GPU that
            is it, with none the CPU. "auto" is the same. Otherwise one device, or a mapping from part names.
        sizes: bytes of the parts; None takes the usual ones.

    Raises:
        InvalidInput: an unknown device or part.
    """
    if isinstance(device_map, Mapping):
        for name in device_map:
            if name not in (*WEIGHTED, "tokenizer", "scheduler"):
                hint = did_you_mean(str(name), WEIGHTED)
                raise InvalidInput(f"device_map names '{name}', which is no part of a pipeline.{hint}")
        return {name: pick_device(device_map.get(name, "cpu")) for name in names}
    if device_map not in ("balanced", "auto"):
        return dict.fromkeys(names, pick_device(device_map))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return dict.fromkeys(names, pick_device("auto"))
    free = {torch.device("cuda", i): torch.cuda.mem_get_info(i)[0] for i in range(count)}
    return balanced(sizes or USUAL, names, free)


def balanced(
    sizes: Mapping[str, int], names: Sequence[str], free: Mapping[torch.device, int]
) -> dict[str, torch.device]:
    """Give the largest part to the device with the most free memory, and so on."""
    left, chosen = dict(free), dict[str, torch.device]()
    for name in sorted(names, key=lambda name: -sizes.get(name, 0)):
        chosen[name] = max(left, key=lambda device: left[device])
        left[chosen[name]] -= sizes.get(name, 0)
    return chosen


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device of that name; "auto" and "balanced" take a GPU if there is one, else the CPU.

    Raises:
        InvalidInput: there is no such device.
    """
    if device in ("auto", "balanced"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(
            f"`device` {str(device)!r} cannot be used ({str(error).splitlines()[0]}). Use 'cpu'."
        ) from error
    return place


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes can still be had on a device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free(shelf: Shelf) -> None:
    if isinstance(shelf, WholeShelf | StreamingShelf):
        shelf.leave()
    else:
        shelf.release()


@torch.no_grad()
def _survey(module: nn.Module, source: FileTensors) -> list[str]:
    """Read all files of a module once, with all checks of loading, and note on it what its fingerprint needs.

    Returns the names of the weights that are not as in the files: cast otherwise, fused, or trained since.
    """
    back = {stored: name for name, stored in source.origin.files.items()}
    held, samples, changed = module.state_dict(), dict[str, Tensor](), list[str]()

    def look(stored: str, raw: Tensor) -> bool:
        for name, tensor in source.finished(back.get(stored, stored), raw).items():
            known = held.get(name)
            if known is None or known.is_meta:
                seen = sample(tensor)
                if seen is not None:
                    samples[name] = seen.clone()
            elif known.dtype != tensor.dtype or not torch.equal(known, tensor.to(known.device)):
                changed.append(name)
            else:
                seen = sample(tensor)
                if seen is not None:
                    samples[name] = seen.clone()
        return True

    read_state(source.origin.weights, dtype=source.origin.dtype, take=look)
    object.__setattr__(module, SAMPLED, samples)
    give_back()
    return changed


USUAL = {"text_encoder": 5_230_000_000, "transformer": 3_210_000_000, "controlnet": 1_260_000_000, "vae": 620_000_000}
"""Bytes of the parts of the 1.6B model in bfloat16."""
