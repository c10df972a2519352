"""`sana convert`: original files into folders and back, pickles into safetensors, another precision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.output import Terminal, listed
from sana.cards import CARDS
from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from sana.checkpoints.convert import Converted

USAGE = "sana convert IN OUT [options]"
DESCRIPTION = """\
Turn a model into another form. IN is a folder, a hub id, or a file: the original .pth or .safetensors, on this
computer or as hf://organisation/repository/path. OUT is a folder, or an original file where it ends in .safetensors.

  sana convert my.pth my-model --base sana-1.6b-1024   a whole model for sana -m
  sana convert my-model my.safetensors                 and back, bit by bit
  sana convert old-folder new-folder                   .bin becomes .safetensors

A file is held in memory as a whole while it is converted: have as much free as it is large."""


@dataclass(frozen=True, kw_only=True)
class Converting:
    """What is read, and what is written."""

    part: Literal["transformer", "controlnet", "vae"] | None = None
    """Part of a whole model to write alone. Left out, a file gets the transformer with its control branch."""
    controlnet: Annotated[str | None, Spelling(value="FOLDER")] = None
    """Control branch that goes into the same original file as its transformer."""
    base: Annotated[str | None, Spelling(value="MODEL")] = None
    """Model whose text encoder and autoencoder make a whole model of an original file."""
    card: Annotated[str | None, Spelling(value="NAME")] = None
    """Known model that an original file is; left out, told by the file's name."""
    scheduler: Literal["flow-dpm", "flow-euler", "scm"] | None = None
    """Sampler whose settings are written beside the model."""
    config: Annotated[str | None, Spelling(value="FILE")] = None
    """A config.json that says what the tensors of an original file leave open."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of what is written; left out, as it is."""
    variant: Annotated[str | None, Spelling(value="NAME")] = None
    """Name of the precision in the files of a folder, for example bf16."""
    from_variant: Annotated[str | None, Spelling(value="NAME")] = None
    """Which variant of a folder to read."""
    shard: Annotated[str | None, Spelling(value="SIZE")] = None
    """Largest file of a folder, for example 5GB."""
    ema: bool = False
    """Take the averaged weights of a training file."""
    revision: Annotated[str | None, Spelling(value="NAME")] = None
    """Branch, tag or commit of a repository."""
    offline: bool = False
    """Download nothing."""
    force: bool = False
    """Write over what is there."""


GROUPS = (Group(title="the conversion", options=Converting),)
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def run(words: Sequence[str], terminal: Terminal) -> int:
    """Carry out the verb."""
    names, given = arguments.read(words, GROUPS, usage=USAGE, description=DESCRIPTION)
    if len(names) != 2:
        raise InvalidInput("Give what to convert and where to. For example: sana convert model.pth my-model")
    options = Converting(**arguments.take(Converting, given))
    if options.card is not None and options.card not in CARDS:
        hint = did_you_mean(options.card, CARDS)
        raise InvalidInput(f"There is no card '{options.card[:80]}'.{hint} All of them: sana models")

    from sana.checkpoints.convert import Conversion, convert

    task = Conversion(
        source=names[0],
        target=Path(names[1]).expanduser(),
        dtype=_DTYPES[options.dtype] if options.dtype else None,
        variant=options.variant,
        from_variant=options.from_variant,
        part=options.part,
        controlnet=Path(options.controlnet).expanduser() if options.controlnet else None,
        base=options.base,
        scheduler=options.scheduler,
        card=CARDS[options.card] if options.card else None,
        ema=options.ema,
        told=_told(options.config) if options.config else {},
        force=options.force,
        where={"revision": options.revision, "local_files_only": options.offline},
        **({"max_shard_size": options.shard} if options.shard else {}),
    )
    done = convert(task)
    terminal.result("\n".join([f"✓ {done.target}", *listed(_rows(done))]), colour="green")
    terminal.document(_document(done))
    return 0


def _told(file: str) -> dict[str, Any]:
    from sana.checkpoints.layout import read_json

    path = Path(file).expanduser()
    values = read_json(path / "config.json" if path.is_dir() else path)
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name[0] != "_"
    }


def _rows(done: "Converted") -> Mapping[str, str | Sequence[str]]:
    """Return the lines that say what was found and written."""
    return {
        "written": f"{done.form}, {done.tensors} tensors",
        **{part: _shape(config) for part, config in done.configs.items()},
        "card": done.card or "",
        "assumed": done.assumed,
        "left out": done.left_out,
    }


def _shape(config: Mapping[str, Any]) -> str:
    if "encoder_block_out_channels" in config:
        stages = len(config["encoder_block_out_channels"])
        return f"autoencoder f{1 << (stages - 1)}c{config['latent_channels']}, scaling {config['scaling_factor']:g}"
    words = [f"{config['num_layers']} blocks of width {config['cross_attention_dim']}"]
    words += [f"{32 * config['sample_size']} px"]
    words += ["normed queries and keys"] if config.get("qk_norm") else []
    words += ["embedded guidance"] if config.get("guidance_embeds") else []
    return ", ".join(words)


def _document(done: "Converted") -> dict[str, Any]:
    return {
        "target": str(done.target),
        "form": done.form,
        "tensors": done.tensors,
        "configs": dict(done.configs),
        "card": done.card,
        "assumed": list(done.assumed),
        "left_out": list(done.left_out),
    }
