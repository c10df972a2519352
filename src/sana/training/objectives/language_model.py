"""Training the small text encoder: next-token prediction on captions, and questions about what was read.

Shapes: B batch, T text length, E width, V vocabulary, S slots of a scene.

A language model that only predicts the next word of a caption has no reason to keep, at the last token, who was red
and who stood above whom; the image model needs just that. So linear read-outs ask for it: at the end of every noun
phrase its kind, colour, number and size, and at the last token the whole scene, in the order of places (left to
right, top to bottom) when the caption tells them. The read-outs are thrown away. The instruction is encoded once
per step and its keys and values, with their gradients, are shared by all captions; a part of the steps goes without
it, as negative prompts do.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.checkpoints.text_parts import no_progress_bars
from sana.data import cutouts
from sana.data.cutout_captions import Caption, caption
from sana.data.cutout_shapes import KINDS
from sana.data.identity import Content
from sana.errors import InvalidInput
from sana.text.gemma import with_cache
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION, join_instruction
from sana.training.config import RunSettings
from sana.training.objectives.base import MAIN, Check, trainable, unasked
from sana.training.tokenizer import save_tokenizer, train_tokenizer

INSTRUCTION = join_instruction(COMPLEX_HUMAN_INSTRUCTION) or ""
SLOTS = 3
SIZES = ("small", "medium", "large")
IGNORED = -100
# Kind (0: no such group), colour (0: not said), number, size (0: not said) of one group.
GROUP_FIELDS = (1 + len(KINDS), 1 + len(cutouts.COLOURS), 5, 1 + len(SIZES))
AXES = ("unsaid", "across", "upright")
SCENE_FIELDS = (*GROUP_FIELDS * SLOTS, len(AXES), 1 + len(cutouts.BACKGROUNDS))
HELD_OUT_CAPTIONS = 512


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings:
    """The `[language_model]` table of a recipe."""

    vocabulary_size: int = 1024
    tokenizer_captions: int = 20_000
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    question_weight: float = 1.0
    instruction_share: float = 0.7
    """Share of the steps that put the instruction before the captions."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other, and shares that cannot be."""
        for name in ("tokenizer_captions", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"language_model.{name} must be at least 1, but is {getattr(self, name)}.")
        for name, whole in (("num_heads", "hidden_size"), ("num_kv_heads", "num_heads")):
            if getattr(self, whole) % getattr(self, name):
                told = f"language_model.{name} must divide {whole}, {getattr(self, whole)}"
                raise InvalidInput(f"{told}, but is {getattr(self, name)}.")
        if self.question_weight < 0:
            raise InvalidInput(f"language_model.question_weight must not be negative, but is {self.question_weight}.")
        if not 0 <= self.instruction_share <= 1:
            raise InvalidInput(f"language_model.instruction_share must lie in [0, 1], but is {self.instruction_share}.")

    def check(self, run: RunSettings) -> None:
        """Refuse switches of a run that change nothing here.

        Raises:
            InvalidInput: naming the switch.
        """
        for name in ("compile", "checkpointing", "offload"):
            if getattr(run, name):
                raise InvalidInput(f"run.{name} has no effect on 'language_model'. Switch it off.")
        # All processes gather a split block at once, but each draws for itself whether it reads the instruction.
        if run.shard:
            raise InvalidInput("run.shard does not go with 'language_model', which is small. Switch it off.")


def group_labels(scene: cutouts.Scene, index: int, said_colour: str | None, said_size: str | None) -> list[int]:
    """The four answers about a group, as far as they were said."""
    group = scene.groups[index]
    return [
        1 + list(KINDS).index(group.kind),
        0 if said_colour is None else 1 + list(cutouts.COLOURS).index(said_colour),
        group.count,
        0 if said_size is None else 1 + SIZES.index(said_size),
    ]


def scene_labels(scene: cutouts.Scene, text: Caption) -> list[int]:
    """The answers about the whole scene: the groups by place if it was said, else as they were named."""
    order = [mention.group for mention in text.mentions]
    said = {mention.group: mention for mention in text.mentions}
    axis = 0
    if text.relation is not None:
        order = [0, 1] if text.relation in ("left", "above") else [1, 0]
        axis = 1 if text.relation in ("left", "right") else 2
    answers: list[int] = []
    for slot in range(SLOTS):
        if slot < len(order):
            answers += group_labels(scene, order[slot], said[order[slot]].colour, said[order[slot]].size)
        else:
            answers += [0, 0, 0, 0]
    background = 0 if text.background is None else 1 + list(cutouts.BACKGROUNDS).index(text.background)
    return [*answers, axis, background]


class _Trained(nn.Module):
    """The language model and the read-outs that training throws away."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.phrase_head = nn.Linear(width, sum(GROUP_FIELDS))
        self.scene_head = nn.Linear(width, sum(SCENE_FIELDS))


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A batch of captions as tokens: ids and mask [B, T], answers per phrase and per scene."""

    ids: Tensor
    mask: Tensor
    phrase_rows: Tensor
    phrase_positions: Tensor
    phrase_labels: Tensor
    scene_labels: Tensor


def build_model(settings: LanguageModelSettings) -> nn.Module:
    """A Gemma-2 text model of the settings' size, with random weights."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=settings.vocabulary_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        query_pre_attn_scalar=settings.hidden_size // settings.num_heads,
        attn_implementation="eager",
    )
    model: nn.Module = Gemma2Model(config)
    return model


class LanguageModelObjective:
    """Next-token prediction on captions, with questions."""

    name = "language_model"
    turns = MAIN
    better: Literal["lower", "higher"] = "higher"

    def __init__(self, settings: LanguageModelSettings, run: RunSettings, device: torch.device) -> None:
        """Train the tokenizer and build the model. Errors: InvalidInput for settings that contradict each other."""
        settings.check(run)
        torch.manual_seed(run.seed)
        self.settings, self.run, self.device = settings, run, device
        self.tokenizer = train_tokenizer(settings.vocabulary_size, run.seed, settings.tokenizer_captions)
        self.module = _Trained(build_model(settings), settings.hidden_size).to(device)
        instruction = self.tokenizer.encode(INSTRUCTION).ids
        # The instruction's trailing space merges into the first word of the caption, so it is not part of the prefix.
        self._prefix = torch.tensor([instruction[:-1]], device=device)
        rng = random.Random(f"{run.seed}/held-out")
        self._held_out = []
        for i in range(HELD_OUT_CAPTIONS):
            counts = ((1, 1), (1,), (1, 1), (2, 1))[i % 4]
            scene = cutouts.sample_scene(rng, counts=counts, held_out=True)
            self._held_out.append((scene, caption(scene, rng)))

    def _texts(self, pairs: list[tuple[cutouts.Scene, Caption]], with_instruction: bool) -> Texts:
        """Tokenise captions; with the instruction they are read as its continuation, without it they begin with BOS."""
        rows, where = [], []
        skipped = self._prefix.shape[1] if with_instruction else 0
        lead = INSTRUCTION if with_instruction else ""
        phrase_rows, phrase_positions, phrase_labels = [], [], []
        for row, (scene, text) in enumerate(pairs):
            encoded = self.tokenizer.encode(lead + text.text)
            rows.append(encoded.ids[skipped:])
            for mention in text.mentions:
                last = len(lead) + mention.end - 1
                where = [i for i, (start, end) in enumerate(encoded.offsets) if start <= last < end]
                phrase_rows.append(row)
                phrase_positions.append(where[-1] - skipped)
                phrase_labels.append(group_labels(scene, mention.group, mention.colour, mention.size))
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        scenes = torch.tensor([scene_labels(scene, text) for scene, text in pairs], device=self.device)
        return Texts(
            ids=ids,
            mask=mask,
            phrase_rows=torch.tensor(phrase_rows, device=self.device),
            phrase_positions=torch.tensor(phrase_positions, device=self.device),
            phrase_labels=torch.tensor(phrase_labels, device=self.device),
            scene_labels=scenes,
        )

    def _hidden(self, texts: Texts, with_instruction: bool) -> Tensor:
        """Last hidden states [B, T, E] of the captions."""
        if not with_instruction:
            out: Tensor = self.module.model(input_ids=texts.ids, attention_mask=texts.mask, use_cache=False)[0]
            return out
        from transformers import DynamicCache

        batch = texts.ids.shape[0]
        first = DynamicCache(config=self.module.model.config)
        self.module.model(input_ids=self._prefix, use_cache=True, **with_cache(self.module.model, first))
        shared: Any = DynamicCache(
            ddp_cache_data=[
                (layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1)) for layer in first.layers
            ]
        )
        length = self._prefix.shape[1]
        mask = torch.cat([texts.mask.new_ones(batch, length), texts.mask], dim=1)
        positions = torch.arange(length, length + texts.ids.shape[1], device=self.device)[None].expand(batch, -1)
        continued: Tensor = self.module.model(
            input_ids=texts.ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **with_cache(self.module.model, shared),
        )[0]
        return continued

    def _scores(self, texts: Texts, with_instruction: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token logits [B, T, V], phrase answers and scene answers (unsplit)."""
        hidden = self._hidden(texts, with_instruction)
        embedding: Any = self.module.model.embed_tokens
        logits = 30 * torch.tanh(hidden @ embedding.weight.T / 30)
        phrases = self.module.phrase_head(hidden[texts.phrase_rows, texts.phrase_positions])
        last = texts.mask.sum(1) - 1
        return logits, phrases, self.module.scene_head(hidden[torch.arange(len(last), device=last.device), last])

    @property
    def data(self) -> Mapping[str, Content]:
        """None beside the drawn world."""
        return {}

    def parameters_of(self, turn: str) -> Iterable[tuple[str, nn.Parameter]]:
        """All that is not frozen."""
        return trainable(self.module)

    def loss(self, draw: int, turn: str = "main") -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of micro-batch `draw`."""
        rng = random.Random(f"{self.run.seed}/{draw}")
        with_instruction = rng.random() < self.settings.instruction_share
        pairs = []
        for _ in range(self.run.batch_size):
            scene = cutouts.sample_scene(rng)
            pairs.append((scene, caption(scene, rng)))
        texts = self._texts(pairs, with_instruction)
        logits, phrases, scenes = self._scores(texts, with_instruction)
        targets = texts.ids[:, 1:].masked_fill(texts.mask[:, 1:] == 0, IGNORED)
        words = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        asked = _answers_loss(phrases, texts.phrase_labels, GROUP_FIELDS)
        read = _answers_loss(scenes, texts.scene_labels, SCENE_FIELDS)
        total = words + self.settings.question_weight * (asked + read)
        return total, {"words": words.detach(), "phrases": asked.detach(), "scenes": read.detach()}

    def evaluate(self, check: Check = unasked) -> Mapping[str, float]:
        """Share of held-out scenes answered entirely right, with and without the instruction, and the perplexity."""
        figures = {}
        for name, with_instruction in (("scenes_read", True), ("scenes_read_bare", False)):
            check()
            texts = self._texts(self._held_out, with_instruction)
            logits, _, scenes = self._scores(texts, with_instruction)
            right = torch.ones(len(self._held_out), dtype=torch.bool, device=self.device)
            for part, labels in zip(torch.split(scenes, list(SCENE_FIELDS), dim=1), texts.scene_labels.T, strict=True):
                right &= part.argmax(1) == labels
            figures[name] = float(right.float().mean())
        targets = texts.ids[:, 1:].masked_fill(texts.mask[:, 1:] == 0, IGNORED)
        words = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return {**figures, "perplexity": math.exp(float(words))}

    def preview(self, check: Check = unasked) -> None:
        """Nothing to look at."""

    def export(self, folder: Path) -> None:
        """Write `text_encoder` (half precision) and `tokenizer`."""
        model: Any = self.module.model
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with no_progress_bars():
            model.to(torch.float16).save_pretrained(folder / "text_encoder")
        model.to(torch.float32).load_state_dict(kept)
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def _answers_loss(scores: Tensor, labels: Tensor, fields: tuple[int, ...]) -> Tensor:
    """Mean cross-entropy over the questions, whose scores lie side by side."""
    parts = torch.split(scores.float(), list(fields), dim=1)
    return torch.stack([F.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True)]).mean()
