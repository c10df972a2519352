"""What a file of weights or a folder of a model is, told from headers and configurations; no weight is read."""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.apps.cli.known import millions
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.errors import CheckpointError, InvalidInput

if TYPE_CHECKING:
    from sana.checkpoints.single import TensorFile
    from sana.checkpoints.weights import Stored

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
Page = tuple[dict[str, Any], dict[str, str]]
"""What the JSON document says, and the rows for people."""
_CONFIGS: dict[str, Any] = {"transformer": TransformerConfig, "controlnet": ControlNetConfig, "vae": AutoencoderConfig}


def is_model(file: str) -> bool:
    """Tell whether a name means a folder, or a file that holds weights by its ending."""
    path = Path(file)
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def page(file: str) -> Page:
    """Return what a file of weights or a folder is.

    Raises:
        InvalidInput: it is a folder without a model.
        CheckpointError: it is damaged, hostile, or holds no model.
    """
    path = Path(file)
    return _folder(file, path) if path.is_dir() else _file(file, path)


def _file(file: str, path: Path) -> Page:
    from sana.checkpoints.original.architecture import kinds_of
    from sana.checkpoints.original.examine import examine
    from sana.checkpoints.single import open_single
    from sana.engine.latents import SUFFIX

    if path.name.endswith(SUFFIX):
        return _made("latents", {"kind": "finished latents", "picture": shlex.join(["sana", "decode", file])})
    found = open_single(path)
    if any(mark in name.lower() for name in found.entries for mark in ("lora", "dora_scale")):
        kind = "an adapter (LoRA), to be used with --lora"
        return _made("adapter", {"kind": kind, "weights": _counted(found.entries), "more": _adapter_info(file)})
    stored = f"{'a pickle' if found.pickled else 'safetensors'}, {path.stat().st_size / 1e6:,.1f} MB"
    if not kinds_of(found.entries):
        return _made("part", {"kind": _part_of_folder(found), "stored": stored, "weights": _counted(found.entries)})
    original = examine(path)
    rows = {"kind": "a model in the layout of the original code", "stored": stored}
    for name, model in original.models.items():
        rows[name] = f"{_shape(model.config)}; {_counted(_own(found.entries, name, original.models))}"
    card = original.card or original.base
    rows["architecture"] = f"that of {card.name}" if card is not None else "that of no published model"
    rows["assumed"] = "\n".join(original.assumed)
    rows["besides"] = "averaged weights, which --ema takes" if found.averaged else ""
    base = [] if card is not None or "transformer" not in original.models else ["--base", "MODEL"]
    rows["as a folder"] = shlex.join(["sana", "convert", file, "OUT", *base])
    configs = {name: model.config.to_dict() for name, model in original.models.items()}
    return _made("original", rows, card=card.name if card is not None else None, configs=configs)


def _part_of_folder(found: "TensorFile") -> str:
    """Say what weights are that are not in the original layout, by names that only one part has."""
    known = {
        "a transformer": "patch_embed.proj.weight",
        "a control network": "controlnet_blocks.0.weight",
        "an autoencoder": "decoder.conv_in.weight",
        "a text encoder": "layers.0.self_attn.q_proj.weight",
    }
    names = {name.removeprefix("model.") for name in found.entries}
    kinds = [kind for kind, sign in known.items() if sign in names]
    if not kinds:
        raise CheckpointError(f"{found.path} holds weights, but of no SANA model: its names are those of no part.")
    return f"{kinds[-1]} in the layout of a model folder, which keeps its config.json beside it"


def _folder(file: str, path: Path) -> Page:
    from sana.checkpoints.built_in import part_folder
    from sana.checkpoints.layout import MODEL_INDEX, index_parts, part_of, read_json, sole_variant

    if (path / MODEL_INDEX).is_file():
        parts = [name for name, entry in index_parts(path).items() if entry is not None and part_of(name).stem]
        variant = sole_variant(path, parts)
        made = {name: _part(part_folder(path, name), name, variant) for name in parts}
        card = read_json(path / MODEL_INDEX).get("_sanakit_card")
        rows = {
            "kind": "the folder of a model",
            "variant": variant or "",
            **{name: one for name, (one, _) in made.items()},
        }
        rows["from the card"] = card if isinstance(card, str) else ""
        rows["draw with it"] = shlex.join(["sana", "PROMPT", "-m", file])
        return _made("folder", rows, configs={name: config for name, (_, config) in made.items()})
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        name = _kind_of(config.get("_class_name"))
        text, config = _part(path, name, None)
        return _made("part", {"kind": "the folder of one part", name.replace("_", " "): text}, configs={name: config})
    adapters = [one.name for one in sorted(path.glob("*.safetensors")) if "lora" in one.name or "adapter" in one.name]
    if adapters:
        return _made("adapter", {"kind": "the folder of an adapter (LoRA)", "more": _adapter_info(file)})
    raise InvalidInput(f"{file} is a folder without a model: it has neither {MODEL_INDEX} nor config.json.")


def _kind_of(class_name: Any) -> str:
    kinds = {"SanaTransformer2DModel": "transformer", "SanaControlNetModel": "controlnet", "AutoencoderDC": "vae"}
    return kinds.get(class_name if isinstance(class_name, str) else "", "text_encoder")


def _part(folder: Path, name: str, variant: str | None) -> tuple[str, dict[str, Any]]:
    """Return what to say of a part, and its configuration."""
    from sana.checkpoints.layout import find_weights, part_of, part_variants, read_json
    from sana.checkpoints.weights import inspect

    chosen = part_variants(folder.parent, [name], variant).get(name) if variant is not None else None
    stored = inspect(find_weights(folder, part_of(name), chosen))
    config = read_json(folder / "config.json")
    kind = _CONFIGS.get(name)
    if kind is not None:
        return f"{_shape(kind.from_dict(config))}; {_counted(stored)}", config
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    shape = f"{layers} layers of width {width}; " if isinstance(layers, int) and isinstance(width, int) else ""
    return shape + _counted(stored), config


def _shape(config: Any) -> str:
    if isinstance(config, AutoencoderConfig):
        return f"{config.spatial_compression_ratio} times smaller, {config.latent_channels} channels"
    guided = ", guidance embedded (Sprint)" if getattr(config, "guidance_embeds", False) else ""
    return f"{config.num_layers} blocks of width {config.inner_dim}, latents of {config.sample_size}{guided}"


def _own(entries: "Mapping[str, Stored]", part: str, parts: Iterable[str]) -> "dict[str, Stored]":
    """Return the tensors of a part of an original file, in which a control network is named so."""
    if "controlnet" not in parts:
        return dict(entries)
    return {name: one for name, one in entries.items() if name.startswith("controlnet.") == (part == "controlnet")}


def _adapter_info(file: str) -> str:
    return shlex.join(["sana", "lora", "info", file])


def _counted(entries: "Mapping[str, Stored]") -> str:
    """Say how many parameters there are, and of which dtypes, the commonest first."""
    kinds: Counter[str] = Counter()
    for one in entries.values():
        kinds[str(one.dtype).removeprefix("torch.")] += math.prod(one.shape)
    return f"{millions(sum(kinds.values()))} parameters, {' and '.join(name for name, _ in kinds.most_common())}"


def _made(kind: str, rows: dict[str, str], **more: Any) -> Page:
    return {"kind": kind, "told": {name: text for name, text in rows.items() if text}, **more}, rows
