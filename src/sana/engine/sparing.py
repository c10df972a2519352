"""Loading a model into as little memory as asked for, or as there is."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sana.cards import Card
from sana.checkpoints.origins import origin_of
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.engine import estimate
from sana.engine.placement import MODES, WEIGHTED, free_memory, modules_of, offload
from sana.engine.request import Request
from sana.errors import InvalidInput, did_you_mean
from sana.memory.quantize import noted

if TYPE_CHECKING:
    from sana.engine.parts import Parts

AUTO = "auto"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What memory mode "auto" is to make room for."""

    requests: Sequence[Request] | Callable[[Card], Sequence[Request]] = ()
    """What will be drawn, or what tells it by the model's card; nothing means one picture of the model's own size."""
    controlnet: ControlNetConfig | None = None
    """A control network that will be attached in place of the model's own."""

    def of(self, card: Card) -> Sequence[Request]:
        """Return the requests."""
        return (self.requests(card) if callable(self.requests) else self.requests) or (Request(prompt="x"),)


def check_memory(memory: str | None, max_memory: int | None, plan: Plan | None = None) -> None:
    """Raise InvalidInput for a mode, a limit or a plan that means nothing."""
    if memory is not None and memory not in (AUTO, *MODES):
        hint = did_you_mean(str(memory), (AUTO, *MODES))
        raise InvalidInput(f"`memory` is {memory!r}.{hint} Choose auto, low or lowest, or leave it out.")
    if max_memory is not None and memory != AUTO:
        raise InvalidInput(f"`max_memory` has no effect with `memory` {memory!r}. It guides 'auto' only: drop one.")
    if plan is not None and memory != AUTO:
        raise InvalidInput(f"`plan` has no effect with `memory` {memory!r}. It is for 'auto' only: drop one.")
    if max_memory is not None and max_memory <= 0:
        raise InvalidInput(f"`max_memory` is {max_memory}. Give a number of bytes above 0.")


def sparing(
    read: Callable[[Any], "Parts"],
    memory: str,
    max_memory: int | None,
    places: Mapping[str, torch.device],
    plan: Plan | None = None,
) -> "Parts":
    """Load a model in a memory mode.

    Args:
        read: loads to the devices it is given; to "meta" it reads no weights.
        places: the device of each part.
        plan: what "auto" is to make room for.

    Raises:
        InvalidInput: the parts are to be on several devices, or cannot be read piece by piece.
    """
    device = places["transformer"]
    if any(place != device for place in places.values()):
        raise InvalidInput("A memory mode needs all parts on one device. Drop `memory`, or name one device.")
    mode: str | None = memory
    skeleton = read("meta") if device.type == "cpu" or memory == AUTO else None
    if memory == AUTO:
        assert skeleton is not None
        free = free_memory(device)
        limit = max_memory if max_memory is not None else free
        mode = first_that_fits(needs(skeleton, device, plan or Plan()), limit)
        _log.info("memory: %s, of %s bytes", mode or "all parts stay", limit)
    if mode is None:
        return read(places)
    if device.type != "cpu":
        parts = read("cpu")
    else:
        assert skeleton is not None
        parts = skeleton
        _require_readable(parts)
    offload(parts, mode, device)
    return parts


def needs(parts: "Parts", device: torch.device, plan: Plan | None = None) -> dict[str | None, float]:
    """Return about how many bytes of the device the largest request of a plan takes in each mode; None: no mode."""
    card, dtypes, text, quantized = described(parts)
    plan = plan or Plan()
    own = [network.config for network in parts.controlnets]
    told = [
        estimate.stages(
            card,
            request.resolve(card),
            dtypes,
            text=text,
            quantized=quantized,
            accelerator=device.type != "cpu",
            controlnets=own if plan.controlnet is None else [plan.controlnet],
        )
        for request in plan.of(card)
    ]
    return {mode: max(estimate.memory(stages, mode) for stages in told) for mode in (None, *MODES)}


def described(parts: "Parts") -> tuple[Card, dict[str, str], estimate.TextShape | None, list[str]]:
    """Return what an estimate must know of loaded parts: a card of just this size, dtypes, the text encoder's shape,
    and which parts are quantised.
    """
    card = parts.effective_card
    if parts.card is None:
        count = sum(weight.numel() for weight in parts.transformer.parameters())
        architecture = TransformerConfig.from_dict(parts.transformer.config.to_dict())
        card = dataclasses.replace(card, transformer=architecture, params=count)
        if parts.vae is not None:
            card = dataclasses.replace(card, autoencoder=AutoencoderConfig.from_dict(parts.vae.config.to_dict()))
    config = getattr(parts.text_encoder, "config", None)
    text = None
    if config is not None:
        names = estimate.TextShape.__dataclass_fields__
        text = estimate.TextShape(**{name: getattr(config, name) for name in names if hasattr(config, name)})
    there = [name for name in ("text_encoder", "transformer", "vae") if getattr(parts, name) is not None]
    dtypes = {name: str(getattr(parts, name).dtype).removeprefix("torch.") for name in there}
    dtypes = {**dict.fromkeys(("text_encoder", "transformer", "vae"), "float32"), **dtypes}
    return card, dtypes, text, [name for name in there if noted(getattr(parts, name)) is not None]


def first_that_fits(needed: Mapping[str | None, float], limit: float | None) -> str | None:
    """Return the first mode that fits into `limit` bytes, or the one that needs least."""
    if limit is None:
        return None
    return next((mode for mode, size in needed.items() if size <= limit), MODES[-1])


def _require_readable(parts: "Parts") -> None:
    for name in WEIGHTED:
        for module in modules_of(getattr(parts, name)):
            if origin_of(module) is None and any(weight.is_meta for weight in module.parameters()):
                raise InvalidInput(
                    f"The {name} is not stored as safetensors, so it cannot be read piece by piece. Convert the model"
                    " with `sana convert`, or drop the memory mode."
                )
