"""How different tools name the tensors of an adapter: names and shapes to layers of ours, and back.

Nothing here reads data before all names and shapes are judged. Dialects: "peft" (this library's own, diffusers and
PEFT), "kohya" (dots written as underscores, an alpha per layer) and "comfyui" (the names of the original SANA code,
with queries, keys and values fused).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sana.checkpoints.bounds import shown
from sana.checkpoints.original.keymap import transformer_keys
from sana.errors import CheckpointError, InvalidInput
from sana.models.lora import LowRank, Target, check_supported

Dialect = Literal["peft", "kohya", "comfyui"]

MAX_RANK = 4096
"""Largest rank that is believed; above it, an adapter would be larger than what it adapts."""
MAX_TENSORS = 1 << 16
MAX_NAME = 512

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "_orig_mod.",
)
_FLAT_PREFIX = re.compile(r"(lora_unet|lora_transformer|lycoris)_")
_INFIX = r"(?:\.[\w-]+)?"
_PARTS = {
    "down": re.compile(rf"(.+?)[._](?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_INFIX}\.weight"),
    "up": re.compile(rf"(.+?)[._](?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_INFIX}\.weight"),
    "bias": re.compile(rf"(.+?)\.lora_B{_INFIX}\.bias"),
    "alpha": re.compile(r"(.+?)\.alpha"),
    "magnitude": re.compile(rf"(.+?)\.(?:dora_scale|lora_magnitude_vector{_INFIX}(?:\.weight)?)"),
}
_OTHER_KINDS = {
    r"\.lokr_": "LoKr (Kronecker products)",
    r"\.hada_": "LoHa (Hadamard products)",
    r"\.b?oft_": "OFT (rotations)",
    r"\.lora_mid\.": "LoCon with a Tucker core",
    r"\.vera_": "VeRA (shared random projections)",
    r"\.diff(_b)?$": "a difference of whole weights",
    r"\.lora_embedding_": "an adapter of embeddings",
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tensors in a file that belong to one layer of theirs, which may be several of ours."""

    theirs: str
    ours: tuple[str, ...]
    keys: Mapping[str, str]
    """Part (down, up, alpha, magnitude, bias) -> name of the tensor in the file."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the names of a file say."""

    dialect: Dialect
    groups: tuple[Group, ...]
    unmatched: tuple[str, ...] = field(default=())
    """Layers of the file that the model does not have."""


def read_names(names: Iterable[str], targets: Mapping[str, Target], where: str) -> Reading:
    """Sort the names of a file's tensors by the layers of a model.

    Errors: CheckpointError when they are of no adapter, of another kind of adapter, or of no layer of this model.
    """
    parts, foreign = _sorted_names(list(names), where)
    table = _Names(targets)
    groups, unmatched, kinds = [], [], []
    for theirs, keys in parts.items():
        ours, dialect = table.resolve(theirs)
        kinds.append(dialect)
        if ours:
            groups.append(Group(theirs=theirs, ours=ours, keys=keys))
        else:
            unmatched.append(theirs)
    if not groups:
        first = ", ".join(map(shown, unmatched[:3])) or "none at all"
        text = f"No layer of the adapter in {where} is one of this model (0 of {len(parts)} matched; it names {first})"
        raise CheckpointError(f"{text}: it was made for another kind of model.")
    named = [kind for kind in kinds if kind is not None]
    return Reading(dialect=max(set(named), key=named.count), groups=tuple(groups), unmatched=(*unmatched, *foreign))


def check_shapes(
    reading: Reading, shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, Target], where: str
) -> None:
    """Compare the shapes of a file with the layers they are for, before any data is read.

    Errors: CheckpointError naming the first fault, and how many there are.
    """
    faults = []
    for group in reading.groups:
        fault = _fault(group, shapes, [targets[name] for name in group.ours])
        if fault:
            faults.append(f"layer {shown(group.theirs)} {fault}")
    if faults:
        more = f" ({len(faults)} of {len(reading.groups)} layers do not fit)" if len(faults) > 1 else ""
        text = f"The adapter in {where} does not fit this model: {faults[0]}{more}"
        raise CheckpointError(f"{text}. Use it with the model that it was trained on.")
    name, count = Counter(name for group in reading.groups for name in group.ours).most_common(1)[0]
    if count > 1:
        raise CheckpointError(f"The adapter in {where} holds layer '{name}' twice, under two names: save it again.")


def _fault(group: Group, shapes: Mapping[str, tuple[int, ...]], layers: Sequence[Target]) -> str | None:
    """Say what is wrong with the shapes of one layer, if anything."""
    lacking = [part for part in ("down", "up") if part not in group.keys]
    if lacking:
        return f"has no {lacking[0]}-projection"
    parts = {part: shapes[key] for part, key in group.keys.items()}
    down, up = parts["down"], parts["up"]
    target, outputs = layers[0], sum(layer.outputs for layer in layers)
    try:
        for name, layer in zip(group.ours, layers, strict=True):
            check_supported(name, layer)
    except InvalidInput as error:
        return f"cannot be adapted: {str(error).rstrip('.')}"
    if len(down) not in (2, 4) or len(up) not in (2, 4) or any(side != 1 for side in up[2:]):
        return f"has projections of shape {list(down)} and {list(up)}"
    if up[1] != down[0]:
        return f"has projections of different rank, {down[0]} and {up[1]}"
    if not 1 <= down[0] <= MAX_RANK:
        return f"has rank {down[0]:,}, which is not between 1 and {MAX_RANK:,}"
    if down[1] != target.inputs:
        return f"reads {down[1]} inputs, the model's has {target.inputs}"
    if (down[2:] or (1, 1)) != (target.kernel or (1, 1)):
        return f"has a kernel of {list(down[2:])}, the model's is a {target.kind}"
    if up[0] != outputs:
        return f"gives {up[0]} outputs, the model's has {outputs}"
    if "alpha" in parts and _count(parts["alpha"]) != 1:
        return f"has an alpha of shape {list(parts['alpha'])}"
    for part in ("magnitude", "bias"):
        if part in parts and parts[part] not in ((outputs,), (outputs, 1), (outputs, 1, 1, 1), (1, outputs, 1, 1)):
            told = "scales inputs instead of outputs" if part == "magnitude" and len(parts[part]) == 2 else "is wrong"
            return f"has a {part} of shape {list(parts[part])}, which {told}"
    return None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def assemble(
    reading: Reading,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    *,
    alphas: Mapping[str, float],
    rank_stabilised: bool = False,
) -> dict[str, LowRank]:
    """Return the updates of our layers; `alphas` are those that metadata name, by our names."""
    updates: dict[str, LowRank | None] = {}
    for group in reading.groups:
        held = {part: tensors[key] for part, key in group.keys.items()}
        rank = len(held["down"])
        told = next((alphas[name] for name in group.ours if name in alphas), float(rank))
        magnitude, bias = held.get("magnitude"), held.get("bias")
        whole = LowRank(
            down=held["down"].reshape(rank, *targets[group.ours[0]].down_shape[1:]),
            up=held["up"].flatten(1),
            alpha=float(held["alpha"]) if "alpha" in held else told,
            rank_stabilised=rank_stabilised,
            magnitude=None if magnitude is None else magnitude.flatten(),
            bias=None if bias is None else bias.flatten(),
        )
        updates.update(zip(group.ours, split(whole, len(group.ours)), strict=True))
    return {name: update for name, update in updates.items() if update is not None}


def split(whole: LowRank, parts: int) -> list[LowRank | None]:
    """Cut the update of a fused layer along its outputs; exact, and without the ranks that give a part nothing.

    A part to which nothing is added is None.
    """
    if parts == 1:
        return [whole]
    vectors = [[None] * parts if v is None else v.chunk(parts) for v in (whole.magnitude, whole.bias)]
    made: list[LowRank | None] = []
    for up, magnitude, bias in zip(whole.up.chunk(parts), *vectors, strict=True):
        used = (up != 0).any(dim=0)
        count = int(used.sum())
        if count == 0 and magnitude is None and bias is None:
            made.append(None)
            continue
        if count in (0, whole.rank):
            made.append(replace(whole, up=up.clone(), magnitude=magnitude, bias=bias))
            continue
        part = replace(whole, down=whole.down[used], up=up[:, used], magnitude=magnitude, bias=bias)
        share = whole.alpha * count / whole.rank
        part.alpha = whole.alpha * (count / whole.rank) ** 0.5 if whole.rank_stabilised else share
        made.append(part)
    return made


def join(parts: Sequence[LowRank | None], theirs: str) -> LowRank:
    """Return one update of the fused layer that does what those of its parts do; `split` the other way.

    Errors: InvalidInput for lengths of rows (DoRA) of some parts only.
    """
    there = [part for part in parts if part is not None]
    if len(parts) == 1:
        return there[0]
    for kind in ("magnitude", "bias"):
        if len({getattr(part, kind, None) is None for part in parts}) > 1:
            text = f"'{theirs}' fuses {len(parts)} layers of which only some have a {kind}"
            raise InvalidInput(f"{text}, so the adapter cannot be written in this dialect: write it as peft.")
    first, equal = there[0], len({(part.scaling, part.rank_stabilised) for part in there}) == 1
    ups = [part.up if equal else part.up * part.scaling for part in there]
    shared = len(there) == len(parts) and all(
        part.down.shape == first.down.shape and torch.equal(part.down, first.down) for part in there
    )
    if shared:
        down, up = first.down, torch.cat(ups)
    else:
        down = torch.cat([part.down for part in there])
        rows, column = len(first.up), 0
        up = first.up.new_zeros(rows * len(parts), len(down), dtype=torch.result_type(ups[0], ups[-1]))
        for index, part in enumerate(parts):
            if part is not None:
                block = ups[there.index(part)]
                up[rows * index : rows * (index + 1), column : column + part.rank] = block
                column += part.rank
    scaling = first.scaling if equal else 1.0
    magnitude, bias = (
        None if getattr(first, kind) is None else torch.cat([getattr(part, kind) for part in there])
        for kind in ("magnitude", "bias")
    )
    return LowRank(down=down, up=up, alpha=scaling * len(down), magnitude=magnitude, bias=bias)


def write_names(updates: Mapping[str, LowRank], dialect: Dialect) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names of a dialect.

    Errors: InvalidInput for what the dialect cannot say.
    """
    if dialect == "peft":
        return {key: tensor for name, update in updates.items() for key, tensor in _peft(name, update).items()}
    written: dict[str, Tensor] = {}
    for theirs, update in _flat(updates) if dialect == "kohya" else _originals(updates):
        if update.bias is not None:
            raise InvalidInput(f"'{theirs}' has a bias, which the dialect {dialect} cannot say: write it as peft.")
        down, up = ("lora_down", "lora_up") if dialect == "kohya" else ("lora_A", "lora_B")
        alpha = torch.tensor(update.scaling * update.rank, dtype=torch.float64)
        written[f"{theirs}.{down}.weight"] = update.down
        written[f"{theirs}.{up}.weight"] = update.up.view(*update.up.shape, *(1,) * (update.down.ndim - 2))
        written[f"{theirs}.alpha"] = alpha.float() if alpha.float() == alpha else alpha
        if update.magnitude is not None:
            written[f"{theirs}.dora_scale"] = update.magnitude.view(-1, *(1,) * (update.down.ndim - 1))
    return written


def _peft(name: str, update: LowRank) -> dict[str, Tensor]:
    conv = update.down.ndim == 4
    named = {
        f"{name}.lora_A.weight": update.down,
        f"{name}.lora_B.weight": update.up[:, :, None, None] if conv else update.up,
    }
    if update.magnitude is not None:
        named[f"{name}.lora_magnitude_vector"] = update.magnitude.view(1, -1, 1, 1) if conv else update.magnitude
    if update.bias is not None:
        named[f"{name}.lora_B.bias"] = update.bias
    return named


def _flat(updates: Mapping[str, LowRank]) -> list[tuple[str, LowRank]]:
    return [(f"lora_unet_{name.replace('.', '_')}", update) for name, update in updates.items()]


def _originals(updates: Mapping[str, LowRank]) -> list[tuple[str, LowRank]]:
    """Return the updates under the names of the original code, fused as there."""
    made, table = [], _original_names(updates, whole=True)
    unnamed = set(updates).difference(*table.values())
    if unnamed:
        raise InvalidInput(f"Layer '{min(unnamed)}' has no name in the original code: write the adapter as peft.")
    for original, ours in table.items():
        if any(name in updates for name in ours):
            theirs = f"diffusion_model.{original}"
            made.append((theirs, join([updates.get(name) for name in ours], theirs)))
    return made


def _original_names(names: Iterable[str], *, whole: bool = False) -> dict[str, tuple[str, ...]]:
    """Return path in the original code -> our paths, in their order; `whole` adds those that are not in `names`."""
    known = list(names)
    keymap = transformer_keys(any("guidance_embedder" in name for name in known))
    if whole:
        pieces, _, _ = keymap.pieces(keymap.originals(f"{name}.weight" for name in known).values())
        known = sorted({name.removesuffix(".weight") for name in pieces} | set(known))
    sources, _ = keymap.sources(f"{name}.weight" for name in known)
    table = {original: tuple(o.removesuffix(".weight") for o in ours) for original, (_, ours) in sources.items()}
    return {original.removesuffix(".weight"): ours for original, ours in table.items()}


class _Names:
    """Looks layers up by any of the names that tools give them."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.ours = dict.fromkeys(targets)
        self.originals = _original_names(targets)
        self.flat: dict[str, tuple[str, ...]] = {name.replace(".", "_"): ours for name, ours in self.originals.items()}
        self.flat.update({name.replace(".", "_"): (name,) for name in targets})

    def resolve(self, theirs: str) -> tuple[tuple[str, ...], Dialect | None]:
        """Return our names of a layer, () if it has none, and the dialect that its name speaks."""
        if flat := _FLAT_PREFIX.match(theirs):
            return self.flat.get(theirs[flat.end() :].replace(".", "_"), ()), "kohya"
        bare = theirs
        while prefix := next((p for p in _PREFIXES if bare.startswith(p)), None):
            bare = bare.removeprefix(prefix)
        if bare in self.ours:
            return (bare,), "comfyui" if "diffusion_model." in theirs else "peft"
        if bare in self.originals:
            return self.originals[bare], "comfyui"
        return (), None


def _sorted_names(names: Sequence[str], where: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return layer -> part -> name of the tensor, and the names of other tensors beside them.

    Errors: CheckpointError when there are too many, when none is of an adapter, or when one is of another kind.
    """
    if len(names) > MAX_TENSORS or any(len(name) > MAX_NAME for name in names):
        text = f"{len(names):,} tensors, names of up to {max(map(len, names)):,} letters"
        raise CheckpointError(f"{where} holds {text}, which no adapter does: do not use it.")
    parts: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        kind = next((told for mark, told in _OTHER_KINDS.items() if re.search(mark, name)), None)
        if kind is not None:
            text = f"The adapter in {where} is {kind}, by its tensor {shown(name)}, which is not supported"
            raise CheckpointError(f"{text}: use LoRA or DoRA.")
        for part, pattern in _PARTS.items():
            if match := pattern.fullmatch(name):
                layer = parts.setdefault(match[1], {})
                if part in layer:
                    raise CheckpointError(f"{where} holds the {part} of {shown(match[1])} twice: save it again.")
                layer[part] = name
                break
        else:
            others.append(name)
    stray = next((name for name in others if "lora" not in name), "no tensor at all" if not parts else None)
    if stray is not None:
        # Callers of comparable libraries look for these words.
        text = "Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring."
        raise CheckpointError(f"{text} ({where} holds {shown(stray)}.)")
    return parts, others
