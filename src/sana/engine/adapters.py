"""The adapters of a transformer: loaded under names, chosen with strengths, for good or for one request."""

import contextlib
import hashlib
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana.checkpoints.lora.files import LoraFile, find, read_lora
from sana.checkpoints.lora.writing import save_lora
from sana.engine.adapter_strengths import LoraReport, Strength, check_strength, free_name, strength_of, times
from sana.errors import InvalidInput, did_you_mean
from sana.models.lora import LowRank, attach, merged, targets
from sana.models.lora_start import LoraSettings, new_updates

KEPT = 8
"""Adapters that `ensure` keeps in memory; the one that was used longest ago goes first."""
_STATE = "_sanakit_adapters"
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Adapter:
    """One loaded adapter."""

    updates: dict[str, LowRank]
    report: LoraReport
    strength: Strength = 1.0
    source: tuple[Any, ...] | None = None
    """What `ensure` knows it by: path, size and time of the file."""


@dataclass(kw_only=True)
class _State:
    """What a transformer carries; every `Adapters` of the same transformer shares it."""

    loaded: dict[str, _Adapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    instead: Mapping[str, Strength] | None = None
    """What acts inside a `using` block in place of the active ones."""
    fused: dict[str, Strength] = field(default_factory=dict)
    originals: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)
    """Weights of the layers under merged adapters as they were."""
    common_rank: int = 0


class Adapters:
    """The adapters of one transformer. Its own weights are not touched, unless adapters are fused into them."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self._state: _State = transformer.__dict__.setdefault(_STATE, _State())

    @property
    def names(self) -> tuple[str, ...]:
        """All that are loaded, in the order of loading."""
        return tuple(self._state.loaded)

    @property
    def active(self) -> dict[str, Strength]:
        """Those that act, or would if adapters were not disabled, with their strengths."""
        return {name: self._state.loaded[name].strength for name in self._state.active}

    @property
    def fused(self) -> dict[str, Strength]:
        """Those whose updates are in the weights, with the strengths they had."""
        return dict(self._state.fused)

    @property
    def acting(self) -> dict[str, Strength]:
        """Those that act now, which inside `using` are others than the active ones."""
        if self._state.instead is not None:
            return dict(self._state.instead)
        return self.active if self._state.enabled else {}

    @property
    def enabled(self) -> bool:
        """Whether the active ones act."""
        return self._state.enabled

    def load(
        self,
        source: str | Path | Mapping[str, Tensor],
        name: str | None = None,
        *,
        hotswap: bool = False,
        weight: Strength | None = None,
        activate: bool = True,
        **where: Any,
    ) -> LoraReport:
        """Load an adapter from a file, a folder, the hub or tensors, and let it act, alone unless `activate` is off.

        Args:
            source: path, hub id or a mapping of names to tensors, in any dialect of `sana.checkpoints.lora.dialects`.
            name: what to call it; None takes "default_0", "default_1", ...
            hotswap: put it in the place of the loaded adapter of that name.
            weight: its strength; None is 1, or with `hotswap` that of the one before.
            where: arguments of `sana.checkpoints.lora.files.read_lora`, such as `weight_name` and `revision`.

        Raises:
            ModelNotFound: there is no such file.
            CheckpointError: it is damaged, for another model or matches no layer; nothing has changed then.
            InvalidInput: the name is taken, or with `hotswap` is not.
        """
        name = self._new_name(name, hotswap)
        if weight is None:
            weight = self._state.loaded[name].strength if hotswap else 1.0
        file = read_lora(source, targets(self.transformer), **where)
        report = LoraReport.of(name, file)
        check_strength(name, weight, file.updates)
        self._state.loaded[name] = _Adapter(updates=file.updates, report=report, strength=weight)
        if file.unmatched:
            first = ", ".join(file.unmatched[:5])
            more = f" and {len(file.unmatched) - 5} more" if len(file.unmatched) > 5 else ""
            warnings.warn(f"{report}. This model does not have: {first}{more}.", stacklevel=2)
        if not any(update.changes for update in file.updates.values()):
            warnings.warn(f"The adapter '{name}' changes nothing: up-projections or alphas are all zero.", stacklevel=2)
        _log.info("%s", report)
        if hotswap or not activate:
            self._act(self._state.instead)
        else:
            self.set({name: weight})
        return report

    def add(self, config: Any = None, name: str = "default", generator: torch.Generator | None = None) -> LoraReport:
        """Add a fresh adapter that learns, and let it act alone; it changes nothing until it is trained.

        `config` holds fields of `LoraSettings`: an object such as PEFT's `LoraConfig`, or a mapping.
        Errors: InvalidInput for a taken name or a target that is no layer.
        """
        name = self._new_name(name, hotswap=False)
        updates = new_updates(self.transformer, LoraSettings.read(config or {}), generator)
        report = LoraReport.of(name, LoraFile(updates=updates, dialect="peft", name=name, sha256=""))
        self._state.loaded[name] = _Adapter(updates=updates, report=report)
        self.set({name: 1.0})
        return report

    def ensure(self, source: str | Path, *, keep: Collection[str] = (), **where: Any) -> str:
        """Return the name of the adapter from that file, loading it, inactive, only if it is not loaded as it is now.

        At most `KEPT` adapters that came this way stay loaded, besides those that act and those in `keep`.
        Errors: as `load`.
        """
        path = find(source, **where)
        told = path.stat()
        key = (str(path.resolve()), told.st_size, told.st_mtime_ns)
        known = next((name for name, adapter in self._state.loaded.items() if adapter.source == key), None)
        if known is None:
            known = free_name(path.stem, self._state.loaded)
            self.load(path, known, activate=False)
        adapter = self._state.loaded.pop(known)
        adapter.source = key
        self._state.loaded[known] = adapter  # the newest is the last
        used = {known, *keep, *self.active, *self.acting, *self.fused}
        idle = [name for name, held in self._state.loaded.items() if held.source and name not in used]
        self.remove(*idle[: max(0, len(idle) + 1 - KEPT)])
        return known

    def set(self, weights: Mapping[str, Strength]) -> None:
        """Let exactly these adapters act, in this order.

        Errors: InvalidInput for a name that is not loaded, a strength that is no number and a layer that none has.
        """
        self._check_strengths(weights)
        for name, weight in weights.items():
            self._state.loaded[name].strength = weight
        self._state.active = tuple(weights)
        self._act()

    def enable(self) -> None:
        """Let the active adapters act again."""
        self._state.enabled = True
        self._act()

    def disable(self) -> None:
        """Let no adapter act until `enable`; fused ones stay in the weights."""
        self._state.enabled = False
        self._act()

    def remove(self, *names: str) -> None:
        """Forget adapters. Errors: InvalidInput when one is not loaded, or fused; all stay then."""
        self._check_names(names)
        for name in names:
            if name in self._state.fused:
                raise InvalidInput(f"The adapter '{name}' is fused into the weights. Call unfuse_lora() first.")
        for name in dict.fromkeys(names):
            del self._state.loaded[name]
        self._state.active = tuple(other for other in self._state.active if other not in names)
        instead = self._state.instead
        if instead is not None:
            instead = {name: strength for name, strength in instead.items() if name not in names}
        self._act(instead)

    def clear(self) -> None:
        """Forget all adapters. Weights into which some are fused stay fused, and are the model's own from then on."""
        common_rank = self._state.common_rank
        self.transformer.__dict__[_STATE] = self._state = _State(common_rank=common_rank)
        self._act()

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, Strength] | None = None, scale: float = 1.0) -> Iterator[None]:
        """Let these adapters act inside the `with` block, then those that did before.

        `weights` None are the active ones, {} none. `scale` multiplies all strengths.
        Errors: InvalidInput as `set`.
        """
        _check_scale(scale)
        if weights is None and scale == 1:
            yield
            return
        chosen = self.acting if weights is None else dict(weights)
        self._check_strengths(chosen)
        if scale != 1 and self._state.fused and self._state.fused.keys() >= chosen.keys():
            warnings.warn("The scale is ignored: the adapters are fused into the weights.", stacklevel=3)
        before = self._state.instead
        self._act({name: times(weight, scale) for name, weight in chosen.items()})
        try:
            yield
        finally:
            self._act(before)

    def fuse(self, names: Sequence[str] | None = None, scale: float = 1.0) -> None:
        """Merge adapters, None: the active ones, into the weights; they no longer cost time, nor follow `set`.

        The weights of the layers concerned are kept as they were, on the CPU; `unfuse` brings them back bit by bit.
        Errors: InvalidInput for an unknown name, an adapter that is fused already, a quantised layer and a result that
        is not finite; the weights are untouched then.
        """
        _check_scale(scale)
        state = self._state
        chosen = [names] if isinstance(names, str) else list(state.active if names is None else names)
        self._check_names(chosen)
        if not chosen:
            raise InvalidInput("There is no active adapter to fuse. Load one, or pass `adapter_names`.")
        for name in chosen:
            if name in state.fused:
                raise InvalidInput(f"The adapter '{name}' is fused already. Call unfuse_lora() first.")
        wanted = {**state.fused, **{name: times(state.loaded[name].strength, scale) for name in chosen}}
        self._merge(wanted)
        state.fused = wanted
        self._act()

    def unfuse(self) -> None:
        """Take all fused adapters out of the weights, which are then bit by bit as before; they act unfused again."""
        self._merge({})
        self._state.fused = {}
        self._act()

    def share_compiled(self, rank: int) -> None:
        """Pad all adapters to that rank, so that compiled code need not be made again for one of another rank."""
        if rank < 1:
            raise InvalidInput(f"`target_rank` is {rank}; it must be at least 1.")
        self._state.common_rank = rank
        self._act()

    def move(self, names: Sequence[str], device: torch.device | str | int) -> None:
        """Keep the tensors of adapters on a device; while they act, copies are where their layers are."""
        self._check_names(names)
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        for name in names:
            for update in self._state.loaded[name].updates.values():
                update.to(place)

    def updates(self, name: str) -> dict[str, LowRank]:
        """Return the updates of an adapter by layer."""
        self._check_names([name])
        return dict(self._state.loaded[name].updates)

    def parameters(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter under PEFT's names; those of `add` are parameters that learn."""
        words = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
        return {
            f"{layer}.{words.get(kind, 'lora_B.bias')}": tensor
            for layer, update in self.updates(name).items()
            for kind, tensor in update.tensors.items()
        }

    def save(self, name: str, path: str | Path, **options: Any) -> None:
        """Write an adapter; `options` are those of `sana.checkpoints.lora.writing.save_lora`."""
        save_lora(Path(path), self.updates(name), **options)

    def report(self, name: str) -> LoraReport:
        """Return what came of loading an adapter."""
        self._check_names([name])
        return self._state.loaded[name].report

    def describe(self, weights: Mapping[str, Strength] | None = None) -> list[dict[str, Any]]:
        """Return what records say of the adapters that act, or of these: name, SHA-256 and scale."""
        told = {**self.acting, **self._state.fused} if weights is None else weights
        return [
            {"name": name, "sha256": self._digest(name), "scale": dict(scale) if isinstance(scale, Mapping) else scale}
            for name, scale in told.items()
        ]

    def _digest(self, name: str) -> str:
        known = self._state.loaded[name].report.sha256
        if known:
            return known
        digest = hashlib.sha256()  # trained here: its values are its name
        for key, tensor in sorted(self.parameters(name).items()):
            digest.update(key.encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return digest.hexdigest()

    def _new_name(self, name: str | None, hotswap: bool) -> str:
        loaded = self._state.loaded
        if name is None and not hotswap:
            return free_name("default_0", loaded)
        if name is not None and (not isinstance(name, str) or not name.strip() or len(name) > 200 or "/" in name):
            raise InvalidInput(f"An adapter cannot be called {name!r:.60}. Give it a short word as its name.")
        if hotswap and name not in loaded:
            raise InvalidInput(f"Trying to hotswap LoRA adapter '{name}' but there is no adapter of that name.")
        if hotswap and name in self._state.fused:
            raise InvalidInput(f"The adapter '{name}' is fused into the weights. Call unfuse_lora() before a hotswap.")
        if not hotswap and name in loaded:
            text = f"Adapter name {name} already in use in the model"
            raise InvalidInput(f"{text}. Choose another name, or pass hotswap=True to replace it.")
        assert name is not None
        return name

    def _check_names(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self._state.loaded]
        if missing:
            known = ", ".join(self.names) or "none"
            hint = did_you_mean(missing[0], self.names)
            # Callers of comparable libraries look for the words in the middle.
            text = f"Adapter name(s) {', '.join(missing)} not in the list of present adapters: {known}."
            raise InvalidInput(text + hint)

    def _check_strengths(self, weights: Mapping[str, Strength]) -> None:
        self._check_names(list(weights))
        for name, weight in weights.items():
            check_strength(name, weight, self._state.loaded[name].updates)

    def _act(self, instead: Mapping[str, Strength] | None = None) -> None:
        """Attach the adapters that act: these, or None: the active ones."""
        state = self._state
        state.instead = instead
        acting = {name: weight for name, weight in self.acting.items() if name not in state.fused}
        attach(self.transformer, _by_layer(state.loaded, acting), rank=state.common_rank)

    def _merge(self, wanted: Mapping[str, Strength]) -> None:
        """Make the weights those of the base with these adapters in them."""
        state = self._state
        with _restored(state.originals):
            by_layer = _by_layer(state.loaded, wanted)
            layers = {name: self.transformer.get_submodule(name) for name in by_layer}
            made = {name: merged(layers[name], pairs, name) for name, pairs in by_layer.items()}
        kept = {layers[name]: tensors.keys() for name, tensors in made.items()}
        for layer, held in list(state.originals.items()):
            for kind, tensor in held.items():
                parameter = getattr(layer, kind)
                parameter.data = tensor.to(parameter.device, parameter.dtype)
            if layer not in kept:
                del state.originals[layer]
        for name, tensors in made.items():
            held = state.originals.setdefault(layers[name], {})
            for kind, tensor in tensors.items():
                parameter = getattr(layers[name], kind)
                held.setdefault(kind, parameter.data.cpu())
                parameter.data = tensor


@contextlib.contextmanager
def _restored(originals: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Have the kept weights in their layers inside the block."""
    now = {layer: {kind: getattr(layer, kind).data for kind in held} for layer, held in originals.items()}
    try:
        for layer, held in originals.items():
            for kind, tensor in held.items():
                parameter = getattr(layer, kind)
                parameter.data = tensor.to(parameter.device, parameter.dtype)
        yield
    finally:
        for layer, held in now.items():
            for kind, tensor in held.items():
                getattr(layer, kind).data = tensor


def _check_scale(scale: Any) -> None:
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise InvalidInput(f"The scale of adapters is {scale!r:.60}; it must be a finite number.")


def _by_layer(
    loaded: Mapping[str, _Adapter], weights: Mapping[str, Strength]
) -> dict[str, list[tuple[LowRank, float]]]:
    made: dict[str, list[tuple[LowRank, float]]] = {}
    for name, weight in weights.items():
        for layer, update in loaded[name].updates.items():
            made.setdefault(layer, []).append((update, strength_of(weight, layer)))
    return made
