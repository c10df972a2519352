"""Small data sets for the tests, made as other programs make them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def picture_bytes(number: int = 0, size: tuple[int, int] = (80, 72), kind: str = "PNG", **options: Any) -> bytes:
    """Return an encoded picture whose pixels depend on the number."""
    out = io.BytesIO()
    small = Image.new("RGB", (4, 3))
    small.putdata([((number * 37 + i * 53) % 256, (number * 91 + i * 17) % 256, i * 20) for i in range(12)])
    small.resize(size, Image.Resampling.NEAREST).save(out, kind, **options)
    return out.getvalue()


def make_folder(folder: Path, count: int = 6, size: tuple[int, int] = (80, 72)) -> Path:
    """Write pictures 000.png ... with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(picture_bytes(number, size))
        (folder / f"{number:03d}.txt").write_text(f"picture number {number}\n")
    return folder


def make_tar(path: Path, members: Mapping[str, bytes], **fields: Any) -> Path:
    """Write a tar with these members as the standard library writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **fields) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard_members(numbers: range, size: tuple[int, int] = (80, 72)) -> dict[str, bytes]:
    """Return the members of samples as the original code wants them."""
    members: dict[str, bytes] = {}
    for number in numbers:
        members[f"{number:06d}.png"] = picture_bytes(number, size)
        record = {"prompt": f"picture number {number}", "width": size[0], "height": size[1]}
        members[f"{number:06d}.json"] = json.dumps(record).encode()
    return members


def make_shards(folder: Path, shards: int = 2, each: int = 3, *, meta: bool = True) -> Path:
    """Write tars of samples and their wids-meta.json."""
    shardlist = []
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        make_tar(folder / f"{shard:05d}.tar", shard_members(numbers))
        shardlist.append({"url": f"{shard:05d}.tar", "nsamples": each})
    if meta:
        content = {"name": "test", "__kind__": "Sana-WebDataset", "wids_version": 1, "shardlist": shardlist}
        (folder / "wids-meta.json").write_text(json.dumps(content))
    return folder
