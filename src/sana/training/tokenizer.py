"""The built-in model's tokenizer: byte-pair encoding with byte fallback, arranged as Gemma's is.

Spaces become U+2581, nothing else is normalised, `<bos>` is put in front, and what no merge knows falls back to
bytes, so any text in any language has tokens.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sana.data import cutouts
from sana.data.cutout_captions import caption
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
EVERYDAY_WORDS = (
    "the a an of and with in on at to is are small big large little tiny red orange yellow green blue purple pink "
    "brown black white grey cat dog fox bird man woman girl boy car road city street house home river sea sky "
    "night day snow rain sun moon photo painting drawing picture portrait style light dark old new beautiful "
    "colorful sitting standing running flying holding next front behind under over near beside between many some "
    "two three four five"
)


def train_tokenizer(vocabulary_size: int, seed: int, num_captions: int = 20_000) -> Tokenizer:
    """Learn merges from captions, the instruction and some everyday words; the result depends on the arguments only."""
    rng = random.Random(f"{seed}/tokenizer")
    texts = [caption(cutouts.sample_scene(rng), rng).text for _ in range(num_captions)]
    texts += ["\n".join(COMPLEX_HUMAN_INSTRUCTION)] * 200 + [EVERYDAY_WORDS.lower()] * 200
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Merges must not run across words, or whole captions become tokens.
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and its configuration, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<unk>",
        "padding_side": "left",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
