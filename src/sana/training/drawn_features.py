"""Precomputed features of drawn scenes: latents and encoded captions, in shards that appear by one rename.

Scene number i is a function of (seed, i), so a shard holds no pictures and no scenes, and a computation that was
stopped goes on at the first shard that is missing.

Shapes: n scenes in a shard, K captions of each, C latent channels, h w latent size, R text rows of the whole shard,
E text width.
"""

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.layout import read_json
from sana.checkpoints.storage import publish, sweep_shared
from sana.checkpoints.tensors import write_tensors
from sana.checkpoints.text_parts import load_text_encoder, load_tokenizer
from sana.data import cutouts
from sana.data.cutout_captions import caption
from sana.engine.control_maps import control_map
from sana.errors import CheckpointError
from sana.text.gemma import PromptEncoder
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training.autoencoder_pictures import cell_labels, to_tensor

SHARD = 1024
ENCODE_BATCH = 32
_FORMER = "*.partial-*"
"""Names of unfinished shards that were written before `publish` named them."""


def scene_of(seed: int, index: int) -> cutouts.Scene:
    """Training scene number `index`."""
    return cutouts.sample_scene(random.Random(f"{seed}/scene/{index}"))


@dataclass(frozen=True, kw_only=True)
class Features:
    """All shards side by side; text rows of caption k of scene i are `text[starts[i, k] : starts[i, k] + lengths[i,
    k]]`.
    """

    latents: Tensor
    """[n, C, h, w] half precision, already times the scaling factor."""
    labels: Tensor
    """Kind and colour under each latent cell [n, 2, h, w], int8."""
    text: Tensor
    """[R, E] half precision."""
    starts: Tensor
    lengths: Tensor
    control: Tensor | None = None
    """[n, C, h, w] half precision, the encoded control maps of the pictures."""


def load_text(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and text encoder (float32) that lie in `folder`."""
    tokenizer = load_tokenizer(folder / "tokenizer", "GemmaTokenizer")
    return tokenizer, load_text_encoder(folder / "text_encoder", "Gemma2Model", dtype=torch.float32)


def fingerprint(folder: Path, prefix: str = "", *others: str) -> str:
    """Sixteen hex digits over the tensors below `folder` whose names begin with `prefix`, and over `others`."""
    digest = hashlib.sha256("\0".join((str(cutouts.WORLD), *others)).encode())
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(tensors):
            if name.startswith(prefix):
                digest.update(name.encode())
                digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureStore:
    """Computes and reads the features of `scenes` drawn scenes, or as many as fill the last shard, below `folder`."""

    def __init__(
        self,
        folder: Path,
        autoencoder: Path,
        text: Path,
        scenes: int,
        captions: int,
        seed: int,
        control: str = "",
        terse: float = 0.0,
    ) -> None:
        """Name the store after the encoders, so that features of other weights are never read.

        With `control`, the kind of a control map, the encoded maps of the pictures are computed too. A share `terse` of
        the captions says neither colours nor places, besides those that are drawn so.
        """
        for part in (autoencoder / "config.json", text / "text_encoder" / "config.json"):
            if not part.is_file():
                raise CheckpointError(
                    f"'{part}' is missing; train the stage before this one, or name its export in the recipe."
                )
        self.autoencoder, self.text = autoencoder, text
        scale = str(read_json(autoencoder / "config.json").get("scaling_factor"))
        words = (text / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
        self.shards, self.captions, self.seed = -(-scenes // SHARD), captions, seed
        self.scenes = self.shards * SHARD
        self.latents_folder = folder / f"latents-{fingerprint(autoencoder, 'encoder.', scale)}-{seed}"
        self.control, self.control_folder = control, folder / f"{control}-{self.latents_folder.name}"
        self.terse, said = terse, f"-terse-{terse}" if terse else ""
        read = fingerprint(text / "text_encoder", "", words, *COMPLEX_HUMAN_INSTRUCTION)
        self.text_folder = folder / f"text-{read}-{captions}-{seed}{said}"

    def compute(self, kind: str = "both") -> Iterator[str]:
        """Compute what is missing ("latents", "text", "control" or all as "both"), yielding the path of every shard
        made here.
        """
        wanted = {
            "text": (self.text_folder, self._text_shard),
            "latents": (self.latents_folder, self._latent_shard),
            **({"control": (self.control_folder, self._control_shard)} if self.control else {}),
        }
        for name, (folder, make) in wanted.items():
            if kind not in (name, "both"):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            sweep_shared(folder, _FORMER)
            for shard in range(self.shards):
                target = folder / f"{shard:05d}.safetensors"
                if target.exists():
                    continue
                made = make(shard)
                publish(target, lambda beside, made=made: write_tensors(beside, made))  # type: ignore[misc]
                yield str(target)

    @functools.cached_property
    def _autoencoder(self) -> AutoencoderDC:
        return AutoencoderDC.from_pretrained(self.autoencoder, torch_dtype=torch.float32)

    @functools.cached_property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(*load_text(self.text), max_batch=64)

    @torch.no_grad()
    def _latent_shard(self, shard: int) -> dict[str, Tensor]:
        latents, labels = [], []
        for start in range(shard * SHARD, (shard + 1) * SHARD, ENCODE_BATCH):
            scenes = [scene_of(self.seed, index) for index in range(start, start + ENCODE_BATCH)]
            latents.append(self._encoded([cutouts.render(scene) for scene in scenes]))
            labels += [torch.from_numpy(cell_labels(scene)).to(torch.int8) for scene in scenes]
        return {"latents": torch.cat(latents).contiguous(), "labels": torch.stack(labels)}

    @torch.no_grad()
    def _control_shard(self, shard: int) -> dict[str, Tensor]:
        maps = []
        for start in range(shard * SHARD, (shard + 1) * SHARD, ENCODE_BATCH):
            pictures = [cutouts.render(scene_of(self.seed, i)) for i in range(start, start + ENCODE_BATCH)]
            drawn = [np.asarray(control_map(self.control, Image.fromarray(picture))) for picture in pictures]
            maps.append(self._encoded(drawn))
        return {"control": torch.cat(maps).contiguous()}

    def _encoded(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Latents [B, C, h, w] of pictures [H, W, 3] in half precision, times the scaling factor."""
        with torch.autocast("cpu", torch.bfloat16):
            latents = self._autoencoder.encode(to_tensor(np.stack(pictures)))[0]
        return (latents.float() * self._autoencoder.config.scaling_factor).half()

    @torch.no_grad()
    def _text_shard(self, shard: int) -> dict[str, Tensor]:
        rows, lengths = [], []
        texts = [
            self._caption(index, k) for index in range(shard * SHARD, (shard + 1) * SHARD) for k in range(self.captions)
        ]
        for start in range(0, len(texts), 64):
            encoded = self._encoder.encode(texts[start : start + 64], COMPLEX_HUMAN_INSTRUCTION)
            sizes = encoded.mask.sum(1)
            rows += [row[:size].half() for row, size in zip(encoded.embeds, sizes, strict=True)]
            lengths.append(sizes)
        return {"text": torch.cat(rows), "lengths": torch.cat(lengths).view(-1, self.captions)}

    def _caption(self, index: int, number: int) -> str:
        rng = random.Random(f"{self.seed}/caption/{index}/{number}")
        left_out = False if self.terse and rng.random() < self.terse else None
        return caption(scene_of(self.seed, index), rng, colours=left_out, relation=left_out).text

    def null(self) -> Tensor:
        """The unconditional text [1, E]: the empty prompt without the instruction."""
        return self._encoder.encode([""]).embeds[0]

    def read(self) -> Features:
        """Everything in memory; shards that are missing are an error."""
        names = [f"{shard:05d}.safetensors" for shard in range(self.shards)]
        folders = [self.latents_folder, self.text_folder, *([self.control_folder] if self.control else [])]
        absent = [n for f in folders for n in names if not (f / n).exists()]
        if absent:
            raise CheckpointError(
                f"{len(absent)} feature shards are missing, the first is {absent[0]}; compute them first."
            )
        images = [load_file(self.latents_folder / name) for name in names]
        texts = [load_file(self.text_folder / name) for name in names]
        lengths = torch.cat([text["lengths"] for text in texts])
        starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        return Features(
            latents=torch.cat([image["latents"] for image in images]),
            labels=torch.cat([image["labels"] for image in images]),
            text=torch.cat([text["text"] for text in texts]),
            starts=starts,
            lengths=lengths,
            control=torch.cat([load_file(self.control_folder / name)["control"] for name in names])
            if self.control
            else None,
        )
