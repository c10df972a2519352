"""The processes that train together: accelerate's, whether `accelerate launch`, `torchrun` or nobody started them."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule

from sana.errors import InvalidInput, ProcessLost
from sana.training.config import RunSettings
from sana.training.objectives.base import Objective
from sana.training.sharding import shard


def device_of(run: RunSettings) -> torch.device:
    """The device that the settings name, for this one of the processes; auto takes the accelerator that is there.

    Joins the other processes, if there are any.
    Errors: InvalidInput for a device that there is not.
    """
    from accelerate import PartialState

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if run.device == "auto":
        device = accelerator or torch.device("cpu")
    else:
        try:
            device = torch.device(run.device)
        except RuntimeError as error:
            raise InvalidInput(f"run.device must be auto, cpu, cuda or mps, but is '{run.device}'.") from error
        if device.type not in ("cpu", accelerator.type if accelerator else "cpu"):
            raise InvalidInput(f"run.device is '{run.device}', but this computer has no such device.")
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(seconds=run.timeout))
    return cast(torch.device, state.device) if state.num_processes > 1 else device


def world_of() -> int:
    """How many processes train together; they have met in `device_of`."""
    from accelerate import PartialState

    return int(PartialState().num_processes)


def rank_of() -> int:
    """Which of the processes that train together this one is; they have met in `device_of`."""
    from accelerate import PartialState

    return int(PartialState().process_index)


class _Call(nn.Module):
    """An objective's methods behind one `forward`, where the libraries put their hooks."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self._objective = objective

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self._objective, method)(*arguments)


class Processes:
    """What the trainer asks of all processes at once; alone, it is all done at once."""

    def __init__(self, objective: Objective, run: RunSettings, device: torch.device) -> None:
        """Meet the others, and split the objective's weights, frozen ones too, between them where the settings say so.

        Errors: InvalidInput when there is nobody to split them with.
        """
        self.run = run
        self.accelerator = _accelerator(run, device)
        self.rank, self.world = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.is_first = self.rank == 0
        self._objective, self._call = objective, _Call(objective)
        self._copies: dict[str, nn.Module] = {}
        check_shard(run, self.world)
        if run.shard:
            # Keys, values and logits are views, which nothing changes in place.
            warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view")
            for number, part in enumerate(getattr(objective, "frozen", ())):
                self._call.add_module(f"frozen{number}", part)
            shard(self._call, device, self.world)

    def prepare(self, turn: str) -> None:
        """Let the gradients of a turn, whose parameters alone require them now, be averaged over the processes."""
        if self.run.shard and len(self._objective.turns) > 1:
            # Put together, a weight learns from then on whether it requires gradients: inside of a derivative in
            # forward mode, where the turn may begin, it must not.
            for part in self._call.modules():
                if isinstance(part, FSDPModule):
                    part.unshard()
                    part.reshard()
        if self.world > 1 and not self.run.shard and turn not in self._copies:
            # Axes of length 1 have no one stride; that is all that differs in the weights of a depthwise convolution.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self._copies[turn] = self.accelerator.prepare_model(_Call(self._objective))

    def loss(self, draw: int, turn: str, *, is_last: bool) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of a micro-batch, and its backward pass; gradients meet those of the others after the last one."""
        torch.manual_seed((self.run.seed * 1_000_003 + draw) % (1 << 63))
        call = self._copies.get(turn, self._call)
        if self.run.shard:
            cast(Any, self._call).set_requires_gradient_sync(is_last)
        alone = self.accelerator.no_sync(call) if turn in self._copies and not is_last else contextlib.nullcontext()
        with alone:
            with self.accelerator.autocast():
                loss, logged = call("loss", draw, turn)
            self.accelerator.backward(loss)
        return loss.detach(), logged

    def look(self, method: str, *arguments: Any) -> Any:
        """Call a method of the objective that needs the weights but no gradients."""
        return self._call(method, *arguments)

    def forget(self) -> None:
        """Drop the whole weights that split ones were put together to for a look."""
        if self.run.shard:
            for part in self._call.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def total(self, *numbers: float) -> list[float]:
        """Sum numbers over the processes; all hear the same."""
        if self.world == 1:
            return list(numbers)
        device = self.accelerator.device
        found = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        distributed.all_reduce(found)
        return [float(number) for number in found]

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the process that writes do something before the others; they hear if it could not.

        Errors: ProcessLost in the others.
        """
        if self.world > 1 and not self.is_first and self.total(0.0)[0]:
            raise ProcessLost("The first process could not begin; what it says is the reason.")
        done = False
        try:
            yield
            done = True
        finally:
            if self.world > 1 and self.is_first:
                self.total(float(not done))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what the libraries say when another process is gone or silent into one sentence.

        Errors: ProcessLost.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, distributed.DistError) or _LOST.search(str(error))):
                raise
            raise ProcessLost(
                f"Process {self.rank} of {self.world} stops: another one has ended, or was silent for "
                f"{self.run.timeout} s (run.timeout). Run the same command again to go on from the last state."
            ) from error


def check_shard(run: RunSettings, world: int) -> None:
    """Raise InvalidInput where there is nobody to split the weights with."""
    if run.shard and world == 1:
        raise InvalidInput(
            "run.shard splits the weights over several processes, but there is one; start them with torchrun or "
            "accelerate launch, or remove run.shard."
        )


def _accelerator(run: RunSettings, device: torch.device) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # one for the whole interpreter, but the recipes of a command differ in precision
    return Accelerator(
        mixed_precision="bf16" if wants_bf16(run, device) else "no",
        gradient_accumulation_steps=run.accumulate,
        cpu=device.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.timeout))],
    )


def wants_bf16(run: RunSettings, device: torch.device) -> bool:
    """Whether settings and device want bf16 autocast."""
    native = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return run.precision == "bf16" or (run.precision == "auto" and native)


_LOST = re.compile(r"gloo|nccl|connection (reset|closed)|timed? ?out|broken pipe|peer", re.IGNORECASE)
