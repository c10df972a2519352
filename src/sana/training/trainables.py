"""What of a transformer learns: all of it, low-rank adapters beside it, or a control branch in front of it.

A trainable holds in `module` exactly what is optimised, averaged and saved; a frozen transformer stays outside, so
that states are as small as what they are about.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sana.checkpoints.controlnet import SanaControlNetModel
from sana.errors import InvalidInput, did_you_mean
from sana.models.controlnet import WIRINGS
from sana.models.linear_dit import LinearDiT
from sana.models.lora import LowRank, Target, attach, check_supported, row_lengths, targets
from sana.training.batches import Batch
from sana.training.steering import Steering


class Trainable(Protocol):
    """One way to train a transformer."""

    transformer: LinearDiT
    module: nn.Module

    def velocity(self, x: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        """Velocity [B, C, h, w] of noisy latents at `timesteps` [B], as the transformer is told them."""
        ...


def computing(transformer: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Autocast for a transformer that is held in bfloat16, whatever the run computes in: what it reads is float32."""
    weight = next(transformer.parameters())
    if weight.dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)


class FullTrainable:
    """All weights of the transformer."""

    def __init__(self, transformer: LinearDiT, module: nn.Module | None = None) -> None:
        """Train `transformer`; `module` is what holds it beside other things that learn."""
        self.transformer = transformer.requires_grad_(True)
        self.module = module if module is not None else transformer

    def velocity(self, x: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        """See `Trainable`."""
        out: Tensor = self.transformer(x, batch.embeds, timesteps, encoder_attention_mask=batch.mask)[0]
        return out


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The `[flow_matching.lora]` table of a recipe."""

    rank: int = 4
    alpha: float = 0.0
    """Numerator of the factor alpha / rank; 0 is the rank, for a factor of 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v")
    """Last parts of the names of the layers that get an adapter, in self- and cross-attention; also `to_out.0`,
    `conv_inverted`, `conv_point` and whole names."""
    dora: bool = False
    """Learn the length of the rows apart from their direction (DoRA, arXiv 2402.09353)."""
    rank_stabilised: bool = False
    """Divide by the root of the rank (arXiv 2312.03732)."""
    dialects: tuple[str, ...] = ("peft",)
    """Forms of the exported file: peft, kohya, comfyui."""
    trigger: str = ""
    """Word that calls what was learnt, written into the file for other programs to show."""

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt."""
        if not 1 <= self.rank <= 4096:
            raise InvalidInput(f"flow_matching.lora.rank must lie between 1 and 4096, but is {self.rank}.")
        if self.alpha < 0:
            raise InvalidInput(f"flow_matching.lora.alpha must not be negative, but is {self.alpha}.")
        if not self.targets:
            raise InvalidInput("flow_matching.lora.targets is empty, so nothing would learn; name some layers.")
        if not self.dialects or len(set(self.dialects)) < len(self.dialects):
            raise InvalidInput(
                f"flow_matching.lora.dialects must name each form of the exported file once, and at least one, but is"
                f" {list(self.dialects)}."
            )
        for name in self.dialects:
            if name not in ("peft", "kohya", "comfyui"):
                raise InvalidInput(f"flow_matching.lora.dialects knows peft, kohya and comfyui, but not '{name}'.")


class LoraTrainable:
    """Low-rank adapters beside a frozen transformer; at the start they change nothing.

    Source: arXiv 2106.09685; the projection down starts Gaussian with standard deviation 1 / rank, that up at zero.
    """

    def __init__(self, transformer: LinearDiT, settings: LoraSettings, seed: int) -> None:
        """Attach adapters to the named layers of `transformer`, which is frozen.

        Raises:
            InvalidInput: a name fits no layer, or one that adapters make no sense for.
        """
        self.transformer, self.settings = transformer.requires_grad_(False), settings
        generator = torch.Generator().manual_seed(seed)
        device = next(transformer.parameters()).device
        self.module = nn.Module()
        self.updates = {
            name: _HeldLowRank(
                self.module, name, **_fresh(transformer.get_submodule(name), target, settings, generator, device)
            )
            for name, target in chosen_layers(transformer, settings.targets).items()
        }
        attach(transformer, {name: [(update, 1.0)] for name, update in self.updates.items()})

    def velocity(self, x: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        """See `Trainable`."""
        with computing(self.transformer):
            out: Tensor = self.transformer(x, batch.embeds, timesteps, encoder_attention_mask=batch.mask)[0]
        return out

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """The transformer without the adapters, for the length of a `with` block."""
        attach(self.transformer, {})
        try:
            yield
        finally:
            attach(self.transformer, {name: [(update, 1.0)] for name, update in self.updates.items()})


def _held(kind: str) -> Any:
    """Return a field of an update that lies in a module."""

    def read(update: "_HeldLowRank") -> Tensor | None:
        return update.module._parameters.get(f"{update.prefix}/{kind}")

    def write(update: "_HeldLowRank", tensor: nn.Parameter | None) -> None:
        if tensor is not None:
            update.module.register_parameter(f"{update.prefix}/{kind}", tensor)

    return property(read, write)


class _HeldLowRank(LowRank):
    """An update that reads its tensors from a module at every use: split over processes, they are others there."""

    down, up, magnitude = _held("down"), _held("up"), _held("magnitude")

    def __init__(self, module: nn.Module, layer: str, **fields: Any) -> None:
        # The names of parameters must not have dots.
        self.module, self.prefix = module, layer.replace(".", "/")
        super().__init__(**fields)


def chosen_layers(transformer: nn.Module, endings: tuple[str, ...]) -> dict[str, Target]:
    """Return the layers inside the blocks whose names end with one of `endings`, or are one.

    Errors: InvalidInput for an ending that fits no layer, and for a layer that cannot have an adapter.
    """
    known = targets(transformer)
    found: dict[str, Target] = {}
    for ending in endings:
        fitting = {name: one for name, one in known.items() if name == ending or name.endswith(f".{ending}")}
        if not fitting:
            tails = sorted({name.split(".", 2)[-1].split(".", 1)[-1] for name in known if "blocks" in name})
            raise InvalidInput(
                f"No layer is called '{ending}'.{did_you_mean(ending, tails)} There are: {', '.join(tails)}."
            )
        for name, target in fitting.items():
            check_supported(name, target)
        found |= fitting
    return dict(sorted(found.items()))


def _fresh(
    layer: Any, target: Target, settings: LoraSettings, generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    """Return the fields of an update that changes nothing yet."""
    down = torch.randn((settings.rank, *target.down_shape[1:]), generator=generator) / settings.rank
    magnitude = None
    if settings.dora:
        magnitude = nn.Parameter(row_lengths(layer.weight.detach().float()))
    return {
        "down": nn.Parameter(down.to(device)),
        "up": nn.Parameter(torch.zeros(target.outputs, settings.rank, device=device)),
        "alpha": settings.alpha or settings.rank,
        "rank_stabilised": settings.rank_stabilised,
        "magnitude": magnitude,
    }


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """The `[flow_matching.control]` table of a recipe."""

    kind: str = "canny"
    """What control pictures show: canny, scribble, soft-edge, ink, hed or depth; or map, where the data bring them."""
    blocks: int = 7
    """How many of the transformer's first blocks are copied."""
    wiring: str = ""
    """How branch and transformer are joined: as in diffusers, or as in the original code (native); left out, as the
    network of `start` says, and a new one as in diffusers."""
    dropout: float = 0.1
    """Share of the samples whose control picture is empty."""
    start: str = ""
    """Folder of a control network to go on from."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.wiring not in ("", *WIRINGS):
            raise InvalidInput(f"flow_matching.control.wiring is diffusers or native, but not '{self.wiring}'.")
        if self.blocks < 1:
            raise InvalidInput(f"flow_matching.control.blocks must be at least 1, but is {self.blocks}.")
        if self.start and self.blocks != ControlSettings.blocks:
            raise InvalidInput("flow_matching.control.blocks has no effect beside start, which has its own. Drop one.")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"flow_matching.control.dropout must lie in [0, 1), but is {self.dropout}.")


def check_blocks(count: int, transformer: LinearDiT) -> None:
    """Refuse a control branch that is as deep as its transformer, or deeper.

    Raises:
        InvalidInput: naming the setting.
    """
    most = len(transformer.transformer_blocks) - 1
    if count > most:
        raise InvalidInput(
            f"flow_matching.control.blocks is {count}, but the transformer has only {most + 1} blocks; copy fewer than"
            f" that: [flow_matching.control] blocks = {max(1, most // 2)}, for example."
        )


class ControlTrainable:
    """A control branch, a copy of the first blocks, in front of a frozen transformer; at the start it changes nothing.

    Source: ControlNet (Zhang et al. 2023, section 3); the embeddings of time, text and patches are those of the frozen
    transformer, only the blocks and the projections learn.
    """

    def __init__(self, transformer: LinearDiT, network: SanaControlNetModel) -> None:
        """Train the blocks of `network` in front of `transformer`, which is frozen."""
        check_blocks(len(network.transformer_blocks), transformer)
        self.transformer = transformer.requires_grad_(False)
        self.network = network.requires_grad_(False)
        self.module: nn.Module = network
        for part in (network.transformer_blocks, network.input_block, network.controlnet_blocks):
            part.requires_grad_(True)

    def velocity(self, x: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        """See `Trainable`."""
        with computing(self.transformer):
            return self._steered(x, batch, timesteps)

    def _steered(self, x: Tensor, batch: Batch, timesteps: Tensor) -> Tensor:
        assert batch.control is not None
        base = self.transformer
        steering = Steering(self.network, batch.embeds, batch.mask, batch.control)
        # In diffusers' wiring the branch is told the plain time, without the factor of the transformer.
        told = timesteps if self.network.wiring == "native" else timesteps / base.config.timestep_scale
        own = base.cross_attention_kv(base.encode_caption(batch.embeds))
        return base.denoise(x, base.modulation(timesteps), own, batch.mask, **steering(x, told))


TRAINABLES: dict[str, Callable[..., Trainable]] = {
    "full": FullTrainable,
    "lora": LoraTrainable,
    "controlnet": ControlTrainable,
}
