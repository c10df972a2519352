"""How much memory an order takes, in which memory mode it will run, and what would make it fit."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sana.apps.cli.controlnets import shape
from sana.apps.cli.machine import Machine
from sana.apps.cli.values import bytes_of
from sana.cards import Card
from sana.config import ControlNetConfig
from sana.engine import estimate
from sana.engine.estimate import Stage, TextShape
from sana.engine.request import ResolvedRequest

if TYPE_CHECKING:
    import torch

MODES = ("low", "lowest")
IN_BITS = ("text_encoder", "transformer")
"""The parts that --quantize is about."""
SMALLER = (2048, 1024, 512)
"""Sides of pictures that are proposed in place of larger ones."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What the memory of an order depends on."""

    card: Card
    requests: Sequence[ResolvedRequest]
    dtypes: dict[str, str]
    text: TextShape | None
    device: "torch.device"
    limit: int | None
    """Bytes that may be used; None where nothing is known."""
    mode: str | None
    quantized: tuple[str, ...] = ()
    controlnet: ControlNetConfig | None = None
    """The control network beside the model, in place of its own; None where there is none or nothing is known."""

    @classmethod
    def of(
        cls,
        machine: Machine,
        card: Card,
        requests: Sequence[ResolvedRequest],
        dtypes: dict[str, str],
        text: TextShape | None,
        device: "torch.device",
    ) -> "Sizing":
        """Return the sizing of an order; --memory auto is decided as it is when the model is loaded."""
        from sana.engine.placement import free_memory
        from sana.engine.sparing import first_that_fits

        limit = bytes_of(machine.max_vram) if machine.max_vram is not None else free_memory(device)
        quantized = () if machine.quantize == "none" else IN_BITS
        found = cls(
            card=card,
            requests=requests,
            dtypes=dtypes,
            text=text,
            device=device,
            limit=limit,
            mode=machine.memory_mode,
            quantized=quantized,
            controlnet=shape(machine.controlnet) if machine.controlnet is not None else None,
        )
        if found.mode == "auto":
            needed = {mode: dataclasses.replace(found, mode=mode).bytes for mode in (None, *MODES)}
            found = dataclasses.replace(found, mode=first_that_fits(needed, limit))
        return found

    def stages(self) -> list[tuple[Stage, ...]]:
        """Return the stages of one batch of each request."""
        return [
            estimate.stages(
                self.card,
                request,
                self.dtypes,
                text=self.text,
                quantized=self.quantized,
                accelerator=self.device.type != "cpu",
                controlnets=None if self.controlnet is None else [self.controlnet],
            )
            for request in self.requests
        ]

    @property
    def bytes(self) -> int:
        """What is in use at the worst moment."""
        return round(max(estimate.memory(job, self.mode) for job in self.stages()))

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.limit is None or self.bytes <= self.limit

    def nearest(self) -> "tuple[str, int] | None":
        """Return the flags that change least and make it fit, with the memory then; None where nothing does."""
        for flags, other in self._others():
            if other.fits:
                return flags, other.bytes
        return None

    def _others(self) -> "Iterator[tuple[str, Sizing]]":
        """Yield other settings: first those that keep the picture, then those that change it, then smaller ones."""
        later = MODES[0 if self.mode is None else MODES.index(self.mode) + 1 :]
        alone = [dataclasses.replace(one, batch_size=1) for one in self.requests]
        batches = any(one.batch_size > 1 for one in self.requests)
        for flag, requests in (("", list(self.requests)), *([("--batch-size 1", alone)] if batches else [])):
            for mode in (self.mode, *later):
                words = [flag] if flag else []
                words += [f"--memory {mode}"] if mode != self.mode else []
                if words:
                    yield " ".join(words), dataclasses.replace(self, mode=mode, requests=requests)
        last = later[-1] if later else self.mode
        words = [f"--memory {last}"] if last != self.mode else []
        if not self.quantized and self.card.folder is None:
            for mode in dict.fromkeys((self.mode, *later)):
                named = [f"--memory {mode}"] if mode != self.mode else []
                yield " ".join(["--quantize int8", *named]), self._with(mode, IN_BITS, alone)
        for side in SMALLER:
            small = [dataclasses.replace(one, width=side, height=side) for one in alone]
            if self.card.sizes is None and side * side < min(one.width * one.height for one in alone):
                yield " ".join([f"--size {side}x{side}", *words]), self._with(last, self.quantized, small)

    def _with(self, mode: str | None, quantized: Collection[str], requests: list[ResolvedRequest]) -> "Sizing":
        return dataclasses.replace(self, mode=mode, quantized=tuple(quantized), requests=requests)
