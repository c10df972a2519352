"""New low-rank adapters: which layers they are for, and the weights that they start with.

Shapes: I inputs, O outputs, r rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from sana.errors import InvalidInput
from sana.models.lora import LowRank, Target, check_supported, dense_weight, held_tensors, row_lengths, targets


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What a new adapter looks like; the fields are named as in PEFT's `LoraConfig`."""

    r: int = 4
    lora_alpha: float | None = None
    """None: the same as `r`."""
    target_modules: str | Sequence[str] = ("to_q", "to_k", "to_v")
    """Ends of the names of layers, or "all-linear"."""
    init_lora_weights: bool | str = True
    """True: uniform as a linear layer starts; "gaussian": normal with deviation 1 / r. The update starts at 0."""
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def read(cls, config: Any) -> "LoraSettings":
        """Return the settings that an object or a mapping with these fields holds; a `LoraConfig` for example."""
        if isinstance(config, LoraSettings):
            return config
        taken: dict[str, Any] = {}
        for name in (entry.name for entry in fields(cls)):
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if value is not None:
                taken[name] = sorted(value) if isinstance(value, set) else value
        return cls(**taken)

    def chosen(self, found: Mapping[str, Target]) -> list[str]:
        """Return which of a model's layers are meant.

        Errors: InvalidInput for a rank below 1, and for a target that is no layer.
        """
        if self.r < 1:
            raise InvalidInput(f"`r` is {self.r}; the rank of an adapter must be at least 1.")
        if self.target_modules == "all-linear":
            return [name for name, target in found.items() if not target.kernel]
        ends = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        for end in ends:
            if not any(_ends(name, end) for name in found):
                raise InvalidInput(f"`target_modules` names '{end}', which is no layer of this model.")
        names = [name for name in found if any(_ends(name, end) for end in ends)]
        for name in names:
            check_supported(name, found[name])
        return names


def new_updates(
    model: nn.Module, settings: LoraSettings, generator: torch.Generator | None = None
) -> dict[str, LowRank]:
    """Return fresh updates that learn and change nothing yet, float32, on the devices of their layers.

    Errors: InvalidInput as `LoraSettings.chosen`.
    """
    found, made = targets(model), {}
    for name in settings.chosen(found):
        layer, target = model.get_submodule(name), found[name]
        device = next(held_tensors(layer)).device
        down = torch.empty(settings.r, *target.down_shape[1:])
        if settings.init_lora_weights == "gaussian":
            nn.init.normal_(down, std=1 / settings.r, generator=generator)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        magnitude = row_lengths(dense_weight(layer)) if settings.use_dora else None
        made[name] = LowRank(
            down=nn.Parameter(down.to(device)),
            up=nn.Parameter(torch.zeros(target.outputs, settings.r, device=device)),
            alpha=float(settings.r if settings.lora_alpha is None else settings.lora_alpha),
            rank_stabilised=settings.use_rslora,
            magnitude=None if magnitude is None else nn.Parameter(magnitude),
        )
    return made


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
