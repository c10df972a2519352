"""Finished latents as a file: what the loop ended with, kept so that another run can decode it.

Shapes: B pictures, C latent channels, h w latent size (pixels / 32).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sana.checkpoints.weights import is_finite
from sana.engine.canvas import Canvas, Kept
from sana.engine.images import resize_and_crop, to_pictures, write_atomically
from sana.engine.request import MAX_SEED, MAX_SIDE, ResolvedRequest
from sana.errors import CheckpointError, InvalidInput, ModelNotFound

SUFFIX = ".latents.safetensors"
RECORD_KEY = "sanakit"
RECORD_VERSION = 1
TENSOR = "latents"
MAX_BYTES = 2**31
MAX_RECORD = 2**21
"""Longest record in characters; prompt and negative prompt fill half of it at most."""
MAX_FACTS, MAX_FACT = 64, 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """The finished latents of a batch and all that is needed to make its pictures."""

    latents: Tensor
    """[B, C, h, w] float32 on the CPU, as the loop ends: not yet divided by the autoencoder's scaling factor."""
    settings: ResolvedRequest
    """The request that they belong to."""
    seeds: Sequence[int]
    """Seed of each of the B pictures."""
    model: Mapping[str, Any]
    """What made them, as in `Result`."""
    canvas: Canvas | None = None
    """How the result lies on what was drawn, where it is no whole picture that was resized."""
    kept: Kept | None = None
    """What of a user's picture is laid over the result."""

    def pictures(self, images_BCHW: Tensor) -> list[Image.Image]:
        """Return the finished pictures of decoded images. Raises CheckpointError if their size is another one."""
        if self.canvas is not None:
            if tuple(images_BCHW.shape[-2:]) != self.canvas.drawn:
                raise CheckpointError("The latents are not of the size that their record names. Draw the picture anew.")
            images_BCHW = self.canvas.cut(images_BCHW)
        else:
            images_BCHW = resize_and_crop(images_BCHW, self.settings.height, self.settings.width)
        made: list[Image.Image] = to_pictures(images_BCHW)
        return made if self.kept is None else [self.kept.paste(picture) for picture in made]


def save_latents(path: str | Path, finished: Finished, *, force: bool = False) -> Path:
    """Write finished latents as safetensors with a JSON record, complete or not at all, and return the path.

    Raises:
        InvalidInput: the name does not end in .safetensors, the folder is missing, or the file exists without `force`.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InvalidInput(f"{target} does not end in .safetensors; latents are written as such. Change the name.")
    record = {
        "version": RECORD_VERSION,
        "request": finished.settings.to_dict(),
        "seeds": list(finished.seeds),
        "model": dict(finished.model),
    }
    tensors = {TENSOR: finished.latents.detach().to("cpu", torch.float32).contiguous()}
    if finished.canvas is not None:
        record["canvas"] = {"drawn": list(finished.canvas.drawn), "resized": finished.canvas.resized}
    if finished.kept is not None:
        tensors |= {"picture": torch.from_numpy(np.array(finished.kept.picture))}
        tensors |= {"share": torch.from_numpy(finished.kept.share)}
    data = save(tensors, metadata={RECORD_KEY: json.dumps(record, ensure_ascii=False)})

    def write(file: BinaryIO) -> None:
        file.write(data)

    write_atomically(target, write, force=force)
    return target


def load_latents(path: str | Path) -> Finished:
    """Read what `save_latents` wrote. Whatever else the file holds, nothing of it runs and memory stays bounded.

    Raises:
        ModelNotFound: there is no such file.
        CheckpointError: the file is damaged or says something impossible.
    """
    source = Path(path)
    try:
        size = source.stat().st_size
        if not source.is_file() or size > MAX_BYTES:
            raise _damaged(source, "it is no file of latents" if size <= MAX_BYTES else "it is far too large")
        with safe_open(source, framework="pt", backend="pread") as file:
            text = (file.metadata() or {}).get(RECORD_KEY)
            names = list(file.keys())
            if text is None or sorted(names) not in ([TENSOR], [TENSOR, "picture", "share"]):
                raise _damaged(source, "it holds something else than finished latents")
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ModelNotFound(f"There is no file {str(source)[-200:]}. Check the name.") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(source, (str(error).splitlines() or ["no reason given"])[0][:100]) from None
    finished = _read_record(source, text, tensors)
    _check(source, finished)
    return finished


def _read_record(source: Path, text: str, tensors: Mapping[str, Tensor]) -> Finished:
    try:
        record = json.loads(text) if len(text) <= MAX_RECORD else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or set(record) - {"canvas"} != {"version", "request", "seeds", "model"}:
        raise _damaged(source, "its record cannot be read")
    if record["version"] != RECORD_VERSION or isinstance(record["version"], bool):
        raise CheckpointError(f"{source} was written by another version of sanakit. Update sanakit.")
    request, seeds, model = record["request"], record["seeds"], record["model"]
    if not isinstance(request, dict) or not isinstance(seeds, list) or not isinstance(model, dict):
        raise _damaged(source, "its record cannot be read")
    if len(model) > MAX_FACTS or not all(len(repr(fact)) <= MAX_FACT for item in model.items() for fact in item):
        raise _damaged(source, "its record of the model is too long")
    try:
        settings = ResolvedRequest.from_dict(request)
    except InvalidInput as error:
        raise _damaged(source, str(error).rstrip(".")) from None
    canvas = _canvas(source, record["canvas"], settings) if "canvas" in record else None
    kept = _kept(source, tensors, settings) if "share" in tensors else None
    return Finished(latents=tensors[TENSOR], settings=settings, seeds=seeds, model=model, canvas=canvas, kept=kept)


def _canvas(source: Path, told: Any, settings: ResolvedRequest) -> Canvas:
    drawn: Any = told.get("drawn") if isinstance(told, dict) else None
    fits = isinstance(drawn, list) and len(drawn) == 2 and all(type(side) is int for side in drawn)
    if not fits or not isinstance(told.get("resized"), bool) or not all(0 < side <= 2 * MAX_SIDE for side in drawn):
        raise _damaged(source, "its canvas cannot be read")
    if not told["resized"] and (drawn[0] < settings.height or drawn[1] < settings.width):
        raise _damaged(source, "its canvas is smaller than its picture")
    return Canvas(height=settings.height, width=settings.width, drawn=(drawn[0], drawn[1]), resized=told["resized"])


def _kept(source: Path, tensors: Mapping[str, Tensor], settings: ResolvedRequest) -> Kept:
    picture, share = tensors["picture"], tensors["share"]
    size = (settings.height, settings.width)
    if picture.dtype != torch.uint8 or tuple(picture.shape) != (*size, 3):
        raise _damaged(source, "its picture does not fit its request")
    if share.dtype != torch.float32 or tuple(share.shape) != size or not bool(((share >= 0) & (share <= 1)).all()):
        raise _damaged(source, "its mask does not fit its request")
    return Kept(picture=Image.fromarray(picture.numpy()), share=share.numpy())


def _check(source: Path, finished: Finished) -> None:
    """Raise CheckpointError unless latents, seeds and request fit each other."""
    latents, settings = finished.latents, finished.settings
    if latents.dtype != torch.float32 or latents.ndim != 4 or not latents.numel():
        raise _damaged(source, f"its tensor is {latents.dtype} of shape {tuple(latents.shape)[:8]}")
    if max(latents.shape[2:]) > MAX_SIDE // 32 or latents.shape[1] > 1024:
        raise _damaged(source, f"its latents are too large, {tuple(latents.shape)}")
    if len(finished.seeds) != len(latents) or len(set(map(repr, finished.seeds))) < len(latents):
        raise _damaged(source, f"it has {len(finished.seeds)} seeds for {len(latents)} pictures")
    last = min(settings.seed + settings.count - 1, MAX_SEED)
    if not all(type(seed) is int and settings.seed <= seed <= last for seed in finished.seeds):
        raise _damaged(source, "its seeds are not those of its request")
    if not is_finite(latents):
        raise _damaged(source, "its latents contain NaN or infinity")


def _damaged(source: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{str(source)[-200:]} cannot be decoded ({why}). Give a {SUFFIX} file that sanakit saved.")
