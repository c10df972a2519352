"""An original file looked at before anything of it is built: what it holds, which model that is, and how it is loaded.

The way back, from our modules to the tensors of an original file, is `original_tensors`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sana.cards import CARDS, Card
from sana.checkpoints.bounds import shown
from sana.checkpoints.digests import has_digest
from sana.checkpoints.original.architecture import (
    KNOWN_BY_CARD,
    Inferred,
    infer_autoencoder,
    infer_controlnet,
    infer_transformer,
    kinds_of,
)
from sana.checkpoints.original.keymap import NULL_CAPTION, POSITIONS, Keymap, Piece, join
from sana.checkpoints.references import card_of_file
from sana.checkpoints.single import TensorFile, in_memory, open_single
from sana.checkpoints.weights import on_meta, placed
from sana.config import TransformerConfig
from sana.errors import CheckpointError, InvalidInput, did_you_mean
from sana.models.controlnet import LinearControlNet
from sana.nn.embeddings import position_table

NULL_CAPTION_LENGTH = 300
"""Tokens of the empty caption that an original file holds."""
MAX_SIDE = 512
"""Greatest `sample_size` whose table of positions is made: four times that of the largest published model."""

_Module = TypeVar("_Module", bound=nn.Module)
_OURS = ("patch_embed.proj.weight", "decoder.conv_in.weight", "decoder.up_blocks.0.0.conv1.weight")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Original:
    """An original file and the models that its tensors describe."""

    file: TensorFile
    models: Mapping[str, Inferred]
    """Part name -> model: "transformer", with or without "controlnet", or "vae"."""
    card: Card | None
    """The card that the file's name or the caller says it belongs to."""

    @property
    def assumed(self) -> tuple[str, ...]:
        """What neither the file nor the caller told, as short sentences."""
        return tuple(dict.fromkeys(text for model in self.models.values() for text in model.assumed))

    @property
    def base(self) -> Card | None:
        """The card whose folder supplies what the file lacks: its own, or the nearest of that architecture."""
        if "transformer" not in self.models:
            return None
        found = self.card or _nearest(self.models["transformer"].config)
        return CARDS.get(found.home, found) if found else None

    def build(
        self, part: str, module_type: type[_Module], *, dtype: torch.dtype | None, device: torch.device | str = "cpu"
    ) -> _Module:
        """Build a part with its weights, strictly, in evaluation mode; memory peaks at the module and one tensor.

        `dtype` None leaves every tensor as it is stored.

        Errors: CheckpointError naming the tensors that are missing, left over, of a wrong shape or not finite.
        """
        if part not in self.models:
            raise InvalidInput(f"{self.file.path} holds no {part}, only {' and '.join(self.models)}.")
        model = self.models[part]
        with on_meta():
            module = module_type(**model.config.to_dict())
        pieces = self._pieces(part, module)
        by_original: dict[str, list[tuple[str, Piece]]] = {}
        for name, piece in pieces.items():
            by_original.setdefault(piece.original, []).append((name, piece))
        ours = not self.file.pickled and has_digest(self.file.path)
        state: dict[str, Tensor] = {}
        for original, tensor in self.file.read(by_original):
            whole = placed(original, tensor, self.file.path, dtype=dtype, device=device, ours=ours)
            for name, piece in by_original[original]:
                # Each is given memory of its own, else one part would keep all the others.
                state[name] = piece.take(whole).clone() if piece.parts > 1 else piece.take(whole)
        module.load_state_dict(state, assign=True)
        if isinstance(module, LinearControlNet):
            module.wiring = "native"  # as the authors of these files join it
        _log.info("loaded %s from %s in %s", module_type.__name__, self.file.path, dtype)
        return module.eval()

    def _pieces(self, part: str, module: nn.Module) -> dict[str, Piece]:
        """Return where each tensor of a module comes from, held against names and shapes of the file."""
        keys, entries = self.models[part].keys, self.file.entries
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        pieces, _, unknown = keys.pieces(entries)
        mine = "controlnet." if part == "controlnet" else ""
        unknown = [name for name in unknown if name.startswith(mine) and (mine or not self._is_control(name))]
        unknown += [piece.original for name, piece in pieces.items() if name not in expected]
        missing = keys.originals(name for name in expected if name not in pieces)
        wrong = [name for name in expected if name in pieces and not _fits(pieces[name], expected[name], entries)]
        faults = []
        if missing:
            lost = list(dict.fromkeys(missing.values()))
            faults.append(f"{len(lost)} missing, first '{lost[0]}'")
        if unknown:
            faults.append(f"{len(unknown)} unexpected, first '{shown(unknown[0])}'")
        if wrong:
            first = pieces[wrong[0]].original
            shape = shown(str(list(entries[first].shape)))
            faults.append(
                f"{len(wrong)} of a wrong shape, first '{first}': {shape} does not become {expected[wrong[0]]}"
            )
        if faults:
            text = f"The tensors of {self.file.path} are not those of one {part}: {'; '.join(faults)}"
            raise CheckpointError(f"{text}. Download or copy the file again.")
        return {name: pieces[name] for name in expected}

    def _is_control(self, name: str) -> bool:
        return "controlnet" in self.models and name.startswith("controlnet.")


def examine(
    path: Path,
    *,
    name: str | None = None,
    card: Card | None = None,
    averaged: bool = False,
    told: Mapping[str, Any] | None = None,
) -> Original:
    """Look at an original file: which models it holds, and what their configurations are.

    `name` is what the file is called where it comes from (default: as here), `card` the model it is known to be,
    `told` fields of the configuration that are known. What stays open is assumed, with one warning in the log.
    Errors: as `open_single`; CheckpointError when it holds no SANA model; InvalidInput for unknown fields.
    """
    called = (name or path.name).replace("\\", "/")
    return _examined(open_single(path, averaged=averaged), called, card, dict(told or {}))


def examine_tensors(tensors: Mapping[str, Tensor], *, told: Mapping[str, Any] | None = None) -> Original:
    """Look at the tensors of an original file that somebody has read already; `told` and errors as `examine`."""
    return _examined(in_memory(tensors), "", None, dict(told or {}))


def _examined(file: TensorFile, called: str, card: Card | None, told: dict[str, Any]) -> Original:
    kinds, entries, where = kinds_of(file.entries), file.entries, str(file.path)
    if not kinds:
        raise _no_original(file)
    found: Card | None = None
    models: dict[str, Inferred]
    if kinds == ("vae",):
        models = {"vae": infer_autoencoder(entries, called, told, where)}
        _refuse_unknown(told, models["vae"].config)
    else:
        models, found = _backbones(file, kinds, called, card or card_of_file(called), told)
    original = Original(file=file, models=models, card=found)
    if original.assumed:
        _log.warning("%s does not say all about its model; assumed: %s", file.path.name, "; ".join(original.assumed))
    if file.averaged:
        _log.info("%s holds averaged weights too; ema=True takes these", file.path)
    return original


def _backbones(
    file: TensorFile, kinds: Sequence[str], called: str, card: Card | None, told: dict[str, Any]
) -> tuple[dict[str, Inferred], Card | None]:
    """Return the transformer, with what only its card knows, the control branch, and the card if it is the one."""
    where = str(file.path)
    facts = {field: getattr(card.transformer, field) for field in KNOWN_BY_CARD} if card is not None else {}
    width = file.entries["x_embedder.proj.weight"].shape[:1]
    fits = card is not None and width == (card.transformer.inner_dim,)
    plain = infer_transformer(file.entries, called, {**(facts if fits else {}), **told}, where)
    _refuse_unknown(told, plain.config)
    if card is not None and not (fits and _same_architecture(card.transformer, plain.config)):
        _log.warning("%s is not the model of the card %s; the card is not used", file.path, card.name)
        card, plain = None, infer_transformer(file.entries, called, told, where)
    models = {"transformer": plain}
    if "controlnet" in kinds:
        models["controlnet"] = infer_controlnet(file.entries, plain.config, where)
    return models, card


def original_tensors(
    state: Mapping[str, Tensor], keys: Keymap, config: Any, taken: Sequence[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an original file for a module's, `Original.build` the other way.

    What an original transformer holds besides is put back: the table of positions (zero where the model adds none, as
    in the originals), and an empty caption of zeros, which the original code fills in itself when it loads the file.
    `taken` are original names to leave out.
    Errors: InvalidInput for a tensor that has no place in an original file.
    """
    sources, unknown = keys.sources(state)
    if unknown:
        raise InvalidInput(f"'{unknown[0]}' has no place in an original file; save the model as a folder instead.")
    for original, (piece, names) in sources.items():
        if len(names) != piece.parts:
            raise InvalidInput(
                f"'{original}' needs {piece.parts} tensors and there are {len(names)}: {', '.join(names)}."
            )
        if original not in taken:
            yield original, join(piece, [state[name] for name in names])
    if isinstance(config, TransformerConfig):
        kind = next(iter(state.values())).dtype
        yield NULL_CAPTION, torch.zeros(NULL_CAPTION_LENGTH, config.caption_channels, dtype=kind)
        if config.sample_size > MAX_SIDE:
            text = f"sample_size is {config.sample_size}, whose table of positions would fill the memory"
            raise InvalidInput(f"{text}; an original file is written up to {MAX_SIDE}.")
        side, width, scale = config.sample_size // config.patch_size, config.inner_dim, config.interpolation_scale
        table = torch.zeros(side * side, width) if scale is None else position_table(side, side, width, side, scale)
        yield POSITIONS, table[None].to(kind)


def _fits(piece: Piece, expected: tuple[int, ...], entries: Mapping[str, Any]) -> bool:
    shape = entries[piece.original].shape
    return piece.fits(shape) and piece.shape_of(shape) == expected


def _same_architecture(one: TransformerConfig, other: TransformerConfig) -> bool:
    names = [field.name for field in fields(TransformerConfig) if field.name not in KNOWN_BY_CARD]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _nearest(config: TransformerConfig) -> Card | None:
    """Return the card of the same configuration that is best to take the other parts from."""
    alike = [card for card in CARDS.values() if card.hub_id and _same_architecture(card.transformer, config)]
    exact = [card for card in alike if card.transformer == config]
    return next(iter([*exact, *alike]), None)


def _refuse_unknown(told: Mapping[str, Any], config: Any) -> None:
    names = [field.name for field in fields(config)]
    for name in told:
        if name not in names:
            raise InvalidInput(f"'{name}' is no setting of this model.{did_you_mean(name, names)}")


def _no_original(file: TensorFile) -> CheckpointError:
    path = file.path
    if any(name in file.entries for name in _OURS):
        advice = "put it into a folder with its config.json and load that with from_pretrained"
        return CheckpointError(f"{path} holds a model in the folder layout, not an original one: {advice}.")
    lora = any("lora" in name.lower() for name in file.entries)
    if lora:
        return CheckpointError(f"{path} holds adapters (LoRA), no model: load them onto one with load_lora_weights.")
    first = shown(next(iter(file.entries)))
    return CheckpointError(f"{path} holds no SANA model: it has no original names (its first tensor is '{first}').")
