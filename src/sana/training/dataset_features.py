"""Features of pictures with captions: encoded pictures, control pictures and texts, kept in memory or in shards.

A picture is encoded alone and a text too, and never in the mixed precision of a training step, so a feature has the
same bits whether it was computed before or during the training. Shards appear by one rename; a computation that was
stopped goes on at the first shard that is missing, and several processes may share it.

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

from sana.checkpoints.digests import hub_digest, verified
from sana.checkpoints.storage import publish, sweep_shared, write_json
from sana.checkpoints.tensors import DIGEST, digest_of, opened, read_tensors, write_tensors
from sana.data.samples import BadSample
from sana.errors import CheckpointError, NonFinite
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training.autoencoder_pictures import to_tensor
from sana.training.starting import StartModel

SHARD = 128
"""Pictures, or texts, in a file."""
KEPT_BYTES = 1 << 31
"""Of features kept in memory; more are computed again, or read again."""
FACTS = "features.json"
"""File in the folder of a kind that says what it holds; it appears when all the shards are there."""


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

    def rest(self) -> None:
        """Say that nothing is left to encode for now."""
        self.start.rest()

    @torch.no_grad()
    def picture(self, picture: Image.Image) -> Tensor:
        """Encode an RGB picture: [C, h, w] float32, times the scaling factor. Errors: NonFinite."""
        vae = self.start.autoencoder
        tensor = to_tensor(np.array(picture, dtype=np.uint8)[None]).to(self.start.device)
        with torch.autocast(self.start.device.type, enabled=False):
            latents = vae.encode(tensor)[0][0].float() * vae.config.scaling_factor
        return _finite(latents.cpu(), "a picture", "autoencoder")

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """Encode a caption behind the instruction: [T, E]. The empty text is encoded bare: it is the unconditional.

        Errors: NonFinite.
        """
        instruction = COMPLEX_HUMAN_INSTRUCTION if text else None
        with torch.autocast(self.start.device.type, enabled=False):
            rows = self.start.prompts.encode([text], instruction).embeds[0]
        return _finite(rows.cpu(), f"the text {json.dumps(text)[:80]}", "text encoder")


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
        self.keep(key, made)
        return made

    def keep(self, key: str, tensor: Tensor) -> None:
        self._bytes += tensor.nbytes - (self._kept.pop(key).nbytes if key in self._kept else 0)
        self._kept[key] = tensor
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


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
        self._whole: set[Path] = set()

    def identity(self, kind: str) -> str:
        """What decides the features of a kind: the encoder's weights and what is encoded."""
        if kind not in self._identities:
            folder = self.encoders.start.folder
            digest = hashlib.sha256()
            if kind == "texts":
                digest.update(_content(folder / "text_encoder"))
                digest.update(_content(folder / "tokenizer"))
                digest.update(str(self.encoders.start.text_dtype).encode())
                digest.update("\0".join((*COMPLEX_HUMAN_INSTRUCTION, *self.texts)).encode())
            else:
                digest.update(_content(folder / "vae"))
                digest.update(self.pictures[kind].identity.encode())
            self._identities[kind] = digest.hexdigest()[:16]
        return self._identities[kind]

    def place(self, kind: str) -> Path:
        """The folder of a kind, named after what decides its content."""
        assert self.folder is not None
        return self.folder / f"{kind}-{self.identity(kind)}"

    def shards(self, share: tuple[int, int] = (1, 1)) -> list[tuple[str, Path]]:
        """The kind and file of every shard, or of share `share[0]` (from 1) of `share[1]` equal ones."""
        kinds = (*self.pictures, "texts")
        files = [(kind, self._file(kind, number)) for kind in kinds for number in range(self._count(kind))]
        return files[share[0] - 1 :: share[1]]

    def span(self, kind: str, file: Path) -> range:
        """The numbers of the pictures, or texts, in a shard."""
        first = int(file.stem) * SHARD
        return range(first, min(first + SHARD, self.items(kind)))

    def compute(
        self, share: tuple[int, int] = (1, 1), tell: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Path, int, int]]:
        """Compute what is missing of a share, yielding each new shard with how many there are by then, and in all.

        `tell` is called before every picture and text.
        Errors: NonFinite naming the picture; OSError naming the file that could not be written.
        """
        shards = self.shards(share)
        for place in dict.fromkeys(target.parent for _, target in shards):
            sweep_shared(place)
        for done, (kind, target) in enumerate(shards, 1):
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            made = self._shard(kind, self.span(kind, target), tell)
            publish(target, lambda beside, made=made: write_tensors(beside, made))  # type: ignore[misc]
            yield target, done, len(shards)
        for kind in (*self.pictures, "texts"):
            if all(file.exists() for of, file in self.shards() if of == kind):
                told = {"kind": kind, "items": self.items(kind), "shard": SHARD, "identity": self.identity(kind)}
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

    def items(self, kind: str) -> int:
        """The number of pictures of a kind, or of texts."""
        return len(self.texts) if kind == "texts" else self.pictures[kind].count

    def _count(self, kind: str) -> int:
        return -(-self.items(kind) // SHARD)

    def _file(self, kind: str, number: int) -> Path:
        return self.place(kind) / f"{number:05d}.safetensors"

    def _shard(self, kind: str, span: range, tell: Callable[[], object]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for i in span:
            tell()
            if kind == "texts":
                made[_name(self.texts[i])] = self.encoders.text(self.texts[i])
                continue
            try:
                made[str(i)] = self.encoders.picture(self.pictures[kind].read(i))
            except BadSample:
                made[str(i)] = torch.zeros(0)  # asking for it will say again what is wrong
            except KeyError:
                continue  # a sample that is not trained on
            except NonFinite as error:
                raise NonFinite(f"{kind} of picture {i}: {error}") from error
        return made

    def _stored(self, kind: str, number: int, name: str) -> Tensor:
        file = self._file(kind, number)

        def read() -> Tensor:
            wanted: Tensor | None
            if not file.exists():
                raise CheckpointError(f"The feature file '{file}' is missing; compute the features again.")
            if file in self._whole:
                with opened(file) as (stored, _):
                    wanted = stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118, no mapping
            else:
                wanted = self._first_reading(kind, file).get(name)
            if wanted is None:
                raise CheckpointError(f"'{file}' is not whole: it lacks {name}. Remove it and compute it again.")
            return wanted

        return self._memory.get(f"{kind}/{name}", read)

    def _first_reading(self, kind: str, file: Path) -> dict[str, Tensor]:
        """Read a shard whole, hold it to its digest, and keep it: its neighbours are likely to be asked for soon."""
        try:
            with verified([file]):
                found = dict(read_tensors(file))
        except CheckpointError as error:
            told = "Remove it and run `sana dataset features` or the training again, which computes it anew."
            raise CheckpointError(f"The feature file '{file}' is damaged ({str(error)[:200]}) {told}") from error
        for name, tensor in found.items():
            self._memory.keep(f"{kind}/{name}", tensor)
        self._whole.add(file)
        return found


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _finite(tensor: Tensor, what: str, encoder: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NonFinite(f"The {encoder} made NaN or infinity of {what}. Use another model, or leave it out.")
    return tensor


def _content(folder: Path) -> bytes:
    """What tells one part of a model from another: its small files and its weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".model"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            digest.update(f"{file.name}\0{_digest(file)}\0".encode())
    return digest.digest()


def _digest(file: Path) -> str:
    """The digest of the weights that the hub or our own header tells; other files are read."""
    with opened(file) as (stored, data):
        told = (stored.metadata() or {}).get(DIGEST) or hub_digest(file)
        return told or str(digest_of(data))
