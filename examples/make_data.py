"""Makes the example data beside this file: pictures of the drawn world with captions, the same as a tar, and prompts.

python examples/make_data.py [FOLDER]
"""

import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

from sana.apps.cli import main as sana
from sana.data import cutouts
from sana.data.cutout_captions import caption

PICTURES = 24
SEED = 2026


def make(folder: Path) -> None:
    """Write `pictures/`, `shards/` and the prompt files below a folder."""
    pictures = folder / "pictures"
    for old in (pictures, folder / "shards"):
        shutil.rmtree(old, ignore_errors=True)
    pictures.mkdir(parents=True)
    records, prompts = [], []
    for number in range(PICTURES):
        rng = random.Random(f"{SEED}/{number}")
        scene = cutouts.sample_scene(rng)
        said = list(dict.fromkeys(caption(scene, rng).text for _ in range(6)))
        said = sorted(said, key=lambda text: not text.isascii())[:3]  # plain English first, where there is some
        name = f"{number:02d}"
        image = Image.fromarray(cutouts.render(scene)).quantize(64, dither=Image.Dither.NONE)
        image.save(pictures / f"{name}.png", optimize=True)
        (pictures / f"{name}.txt").write_text(said[0] + "\n", encoding="utf-8")
        prompts.append(said[0])
        if len(said) > 1:
            others = [{"text": text, "name": f"other-{place}"} for place, text in enumerate(said[1:], 1)]
            records.append({"file_name": f"{name}.png", "captions": [{"text": said[0]}, *others]})
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (pictures / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(prompts[:8]) + "\n", encoding="utf-8")
    orders = [{"prompt": text, "name": f"scene-{place}", "seed": place} for place, text in enumerate(prompts[8:14])]
    lines = (json.dumps(order, ensure_ascii=False) + "\n" for order in orders)
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    code = sana(["dataset", "pack", str(pictures), str(folder / "shards"), "--quiet"])
    (folder / "shards" / ".pack.json").unlink()
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
