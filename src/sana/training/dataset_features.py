"""Features of pictures with captions: encoded pictures, control pictures and texts, kept in memory or in shards.

A picture is encoded alone and a text too, so a feature has the same bits whether it was computed before or during the
training. Shards appear by one rename; a computation that was stopped goes on at the first shard that is missing.

Shapes: C latent channels, h w latent size, T text length, E text width.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.checkpoints.digests import verified
from sana.checkpoints.layout import read_json
from sana.checkpoints.storage import publish, write_json
from sana.checkpoints.tensors import read_tensors, write_tensors
from sana.data.samples import BadSample
from sana.errors import CheckpointError
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training.objectives.autoencoder import to_tensor
from sana.training.starting import StartModel

SHARD = 128
"""Pictures, or texts, in a file."""
KEPT_BYTES = 1 << 31
"""Of features kept in memory; more are computed again, or read again."""
FACTS = "features.json"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What is encoded: `read(i)` gives picture i as the trainer cuts it, RGB."""

    count: int
    read: Callable[[int], Image.Image]
    identity: str
    """Hex digits over everything that decides what `read` gives."""


class Encoders:
    """Pictures and texts to features, with the encoders of a model, which are loaded when they are first needed."""

    def __init__(self, start: StartModel) -> None:
        self.start = start

    @torch.no_grad()
    def picture(self, picture: Image.Image) -> Tensor:
        """Encode an RGB picture: [C, h, w] float32, times the scaling factor."""
        vae = self.start.autoencoder
        tensor = to_tensor(np.asarray(picture, dtype=np.uint8)[None]).to(self.start.device)
        return (vae.encode(tensor)[0][0].float() * vae.config.scaling_factor).cpu()

    def text(self, text: str) -> Tensor:
        """Encode a caption behind the instruction: [T, E]. The empty text is encoded bare: it is the unconditional."""
        instruction = COMPLEX_HUMAN_INSTRUCTION if text else None
        return self.start.prompts.encode([text], instruction).embeds[0].cpu()


class _Memory:
    """The features used last, up to a number of bytes."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._limit, self._bytes = limit, 0

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        self._kept[key] = made
        self._bytes += made.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made


class DatasetFeatures:
    """Features by picture number and by text.

    With a folder they are read from there, after `compute` has put there what is missing; without, they are computed
    when they are asked for.
    """

    def __init__(
        self,
        encoders: Encoders,
        pictures: Mapping[str, Pictures],
        texts: Sequence[str],
        folder: Path | None,
    ) -> None:
        """`pictures` by kind, such as "latents"; `texts` are all that will be asked for."""
        self.encoders, self.pictures = encoders, dict(pictures)
        self.texts = sorted(set(texts))
        self.folder = folder
        self._memory = _Memory()
        self._shards = {text: number // SHARD for number, text in enumerate(self.texts)}
        self._identities: dict[str, str] = {}

    def identity(self, kind: str) -> str:
        """What decides the features of a kind: the encoder's weights and what is encoded."""
        if kind not in self._identities:
            folder = self.encoders.start.folder
            digest = hashlib.sha256()
            if kind == "texts":
                digest.update(_weights(folder / "text_encoder"))
                digest.update((folder / "tokenizer" / "tokenizer.json").read_bytes())
                digest.update("\0".join((*COMPLEX_HUMAN_INSTRUCTION, *self.texts)).encode())
            else:
                digest.update(_weights(folder / "vae"))
                digest.update(str(read_json(folder / "vae" / "config.json").get("scaling_factor")).encode())
                digest.update(self.pictures[kind].identity.encode())
            self._identities[kind] = digest.hexdigest()[:16]
        return self._identities[kind]

    def place(self, kind: str) -> Path:
        """The folder of a kind, named after what decides its content."""
        assert self.folder is not None
        return self.folder / f"{kind}-{self.identity(kind)}"

    def compute(self) -> Iterator[tuple[Path, int, int]]:
        """Compute what is missing, yielding each new shard with how many there are by then, and in all.

        Errors: those of the pictures; OSError naming the file that could not be written.
        """
        jobs = [(kind, number) for kind in (*self.pictures, "texts") for number in range(self._count(kind))]
        for done, (kind, number) in enumerate(jobs, 1):
            target = self.place(kind) / f"{number:05d}.safetensors"
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            made = self._shard(kind, number)
            publish(target, lambda beside, made=made: write_tensors(beside, made))  # type: ignore[misc]
            yield target, done, len(jobs)
        for kind in (*self.pictures, "texts"):
            told = {"kind": kind, "items": self._items(kind), "shard": SHARD, "identity": self.identity(kind)}
            self.place(kind).mkdir(parents=True, exist_ok=True)
            write_json(self.place(kind) / FACTS, told)
        self.encoders.start.release()

    def picture(self, kind: str, index: int) -> Tensor:
        """Features [C, h, w] of picture `index`."""
        read = self.pictures[kind].read
        if self.folder is None:
            return self._memory.get(f"{kind}/{index}", lambda: self.encoders.picture(read(index)))
        found = self._stored(kind, index // SHARD, str(index))
        return found if found.numel() else self.encoders.picture(read(index))

    def text(self, text: str) -> Tensor:
        """Features [T, E] of a text."""
        if self.folder is None:
            return self._memory.get(f"texts/{text}", lambda: self.encoders.text(text))
        if text not in self._shards:
            raise CheckpointError(f"The features in '{self.folder}' lack the text {json.dumps(text)[:80]}.")
        return self._stored("texts", self._shards[text], _name(text))

    def _items(self, kind: str) -> int:
        return len(self.texts) if kind == "texts" else self.pictures[kind].count

    def _count(self, kind: str) -> int:
        return -(-self._items(kind) // SHARD)

    def _shard(self, kind: str, number: int) -> dict[str, Tensor]:
        span = range(number * SHARD, min((number + 1) * SHARD, self._items(kind)))
        if kind == "texts":
            return {_name(self.texts[i]): self.encoders.text(self.texts[i]) for i in span}
        made = {}
        for i in span:
            try:
                made[str(i)] = self.encoders.picture(self.pictures[kind].read(i))
            except BadSample:
                made[str(i)] = torch.zeros(0)  # asking for it will say again what is wrong
            except KeyError:
                continue  # a sample that is not trained on
        return made

    def _stored(self, kind: str, number: int, name: str) -> Tensor:
        key = f"{kind}/{name}"

        def read() -> Tensor:
            file = self.place(kind) / f"{number:05d}.safetensors"
            if not file.exists():
                raise CheckpointError(f"The feature file '{file}' is missing; compute the features again.")
            wanted: Tensor | None = None
            with verified([file]):
                for found, tensor in read_tensors(file):
                    if found == name:
                        wanted = tensor
                    else:  # its neighbours will be asked for soon
                        self._memory.get(f"{kind}/{found}", lambda tensor=tensor: tensor)  # type: ignore[misc]
            if wanted is None:
                raise CheckpointError(f"'{file}' is not whole: it lacks {name}. Remove it and compute it again.")
            return wanted

        return self._memory.get(key, read)


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _weights(folder: Path) -> bytes:
    """What tells weights apart: names and sizes of their files, and the digests that are in them."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            head = content.read(8)
            digest.update(file.name.encode() + head + content.read(min(int.from_bytes(head, "little"), 1 << 24)))
            content.seek(-min(file.stat().st_size, 1 << 16), 2)
            digest.update(content.read())
    return digest.digest()
