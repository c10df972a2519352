"""Prompts to embeddings with a Gemma-2 language model.

Shapes: B prompts, T kept tokens of the longest prompt, E width of the language model, S tokens after the shared prefix.
"""

import copy
import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.errors import InvalidInput, NonFinite
from sana.text import clean
from sana.text.few_rows import FewRows
from sana.text.instruction import Tokenizer, Tokens, Window, join_instruction, token_window, tokenize

# Model types whose cache and masks are tested against the plain call; every other encoder gets the plain call.
_PREFIX_MODELS = ("gemma2",)
_KEPT_PREFIXES = 2
_KEPT_RESULTS = 64
_KEPT_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class TextCondition:
    """Embeddings of a batch of prompts, no longer than its longest prompt."""

    embeds: Tensor
    """[B, T, E] in the dtype of the language model; rows without a token are zero."""
    mask: Tensor
    """[B, T] int64, 1 for a token; the ones come first."""
    truncated: tuple[str, ...]
    """Per prompt the end of its text that found no room, or an empty string."""


def pad(condition: TextCondition, length: int) -> TextCondition:
    """Append masked zero rows up to [B, `length`, E], the documented shape of `encode_prompt`."""
    missing = length - condition.mask.shape[1]
    if missing < 0:
        raise InvalidInput(
            f"The prompt has {condition.mask.shape[1]} tokens, more than {length}; encode it with that limit instead."
        )
    return TextCondition(
        embeds=F.pad(condition.embeds, (0, 0, 0, missing)),
        mask=F.pad(condition.mask, (0, missing)),
        truncated=condition.truncated,
    )


def prepare_prompt(prompt: str, clean_caption: bool = False) -> str:
    """Lower-case and strip a prompt, or clean it twice as the published pipelines do with `clean_caption`.

    Raises InvalidInput for text that is not valid Unicode, MissingDependency when the cleaning needs missing packages.
    """
    if not isinstance(prompt, str):
        raise InvalidInput(f"A prompt has to be text, but one is of type {type(prompt).__name__}; pass strings.")
    _require_unicode(prompt)
    if not clean_caption:
        return prompt.lower().strip()
    text = clean.clean_caption(clean.clean_caption(prompt))
    _require_unicode(text)
    return text


def _require_unicode(text: str, what: str = "prompt") -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"The {what} is not valid Unicode: character {error.start + 1} is half of a surrogate pair; remove it."
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Prefix:
    cache: Any
    """transformers' key/value cache of the instruction, batch 1; copied for every use."""
    first: Tensor
    """[1, E], the output at position 0."""


class _Fingerprint:
    """Tells whether a module still holds the very same tensors with untouched content."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = [(weakref.ref(tensor), _storage_facts(tensor)) for tensor in _tensors(module)]

    def matches(self, module: nn.Module) -> bool:
        # Weak references, because a freed tensor's id and address may be given to its successor.
        now = list(_tensors(module))
        return len(now) == len(self._seen) and all(
            reference() is tensor and facts == _storage_facts(tensor)
            for (reference, facts), tensor in zip(self._seen, now, strict=True)
        )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield all parameters and buffers; `parameters()` makes their names too, which takes longer than all the rest."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is not None:
            yield from (held for held in chain(one._parameters.values(), one._buffers.values()) if held is not None)
            waiting.extend(one._modules.values())


def _storage_facts(tensor: Tensor) -> tuple[object, ...]:
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # quantised wrapper tensors own no storage
        address = 0
    version = -1 if tensor.is_inference() else tensor._version
    return address, version, tensor.dtype, tensor.device


class PromptEncoder:
    """Encodes prompts with a fast tokenizer and a language model of transformers, doing no work twice.

    The instruction's keys and values are computed once and kept on the model's device. Whole results are kept too, on
    the CPU and in small number, so the default negative prompt and a repeated prompt cost nothing. Both are dropped as
    soon as the model's weights are moved, cast, replaced or changed in place. A change through `.data`, a hook or an
    adapter that is switched leaves no trace: call `clear` after one. The result of a call depends on its arguments
    only, not on earlier calls. Not meant for several threads at once.

    At most `max_batch` prompts go through the model together. With 1 the embedding of a prompt has the same bits in
    every company; otherwise a different padding may change the last bits.
    """

    def __init__(self, tokenizer: Tokenizer, text_encoder: nn.Module, *, max_batch: int = 16) -> None:
        if max_batch < 1:
            raise InvalidInput(f"`max_batch` must be 1 or more, but is {max_batch}.")
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.max_batch = max_batch
        self.clear()

    padded = staticmethod(pad)

    def clear(self) -> None:
        """Forget all kept prefixes and results."""
        self._fingerprint: _Fingerprint | None = None
        self._prefixes: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()
        self._results: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def encode(
        self,
        prompts: Sequence[str],
        instruction: Sequence[str] | str | None = None,
        max_sequence_length: int = 300,
        clean_caption: bool = False,
    ) -> TextCondition:
        """Encode prompts with `instruction` before each, keeping at most `max_sequence_length` rows.

        Prompts are lower-cased and stripped, as the published models were trained; the instruction is not. The spelling
        of special tokens in them is plain text (see `instruction.tokenize`).
        Returns: embeddings at the tokens kept by `token_window`, padded to the longest prompt of the batch.
        Raises: InvalidInput for bad arguments, NonFinite for NaN or infinity, MissingDependency (see `prepare_prompt`).
        """
        texts = self._checked(prompts, max_sequence_length, clean_caption)
        joined = join_instruction(instruction)
        head = joined or ""
        _require_unicode(head, "instruction")
        head_ids = () if joined is None else tokenize(self.tokenizer, head, sys.maxsize).ids
        window = token_window(len(head_ids), max_sequence_length)
        tokens = [tokenize(self.tokenizer, head + text, window.length, protected=len(head)) for text in texts]
        if self._fingerprint is None or not self._fingerprint.matches(self.text_encoder):
            self.clear()
            self._fingerprint = _Fingerprint(self.text_encoder)
        # Equal prompts are encoded once.
        unique = list(dict.fromkeys(one.ids for one in tokens))
        rows: dict[tuple[int, ...], Tensor] = {}
        for i in range(0, len(unique), self.max_batch):
            batch = unique[i : i + self.max_batch]
            rows.update(zip(batch, self._rows(batch, head_ids, window), strict=True))
        return _collate([rows[one.ids] for one in tokens], tokens)

    @staticmethod
    def _checked(prompts: Sequence[str], max_sequence_length: int, clean_caption: bool) -> list[str]:
        if isinstance(prompts, str) or not prompts:
            raise InvalidInput("`prompts` must be a list with at least one prompt; put a single prompt into a list.")
        if isinstance(max_sequence_length, bool) or not isinstance(max_sequence_length, int) or max_sequence_length < 1:
            raise InvalidInput(f"`max_sequence_length` must be a whole number from 1, but is {max_sequence_length!r}.")
        return [prepare_prompt(prompt, clean_caption) for prompt in prompts]

    def _rows(self, batch: list[tuple[int, ...]], head_ids: tuple[int, ...], window: Window) -> list[Tensor]:
        """Return the kept rows [n, E] of each token sequence, from memory when this very batch is known."""
        key = (head_ids, window.start, *batch)
        sizes = [window.valid_rows(len(ids)) for ids in batch]
        # Where memory is small, only some of the weights are there at a time.
        device = next(weight.device for weight in self.text_encoder.parameters() if not weight.is_meta)
        known = self._results.get(key)
        if known is not None:
            self._results.move_to_end(key)
            return list(torch.split(known.to(device), sizes))
        # The caller's autocast would make equal calls differ.
        with torch.no_grad(), torch.autocast(device.type, enabled=False), FewRows():
            rows = torch.cat(self._run(batch, head_ids, window, device))
        if not torch.isfinite(rows).all():
            raise NonFinite(_overflow_message(rows.dtype))
        self._keep(key, rows)
        return list(torch.split(rows, sizes))

    def _keep(self, key: tuple[object, ...], rows: Tensor) -> None:
        if rows.nbytes > _KEPT_BYTES // 4:
            return
        self._results[key] = rows.to("cpu", copy=True)
        while len(self._results) > _KEPT_RESULTS or sum(kept.nbytes for kept in self._results.values()) > _KEPT_BYTES:
            self._results.popitem(last=False)

    def _run(
        self, batch: list[tuple[int, ...]], head_ids: tuple[int, ...], window: Window, device: torch.device
    ) -> list[Tensor]:
        # A causal model given as the language model with its output layer would return logits.
        model: Any = self.text_encoder
        model = model.base_model if hasattr(model, "lm_head") else model
        cached = getattr(getattr(model, "config", None), "model_type", None) in _PREFIX_MODELS
        shared = _shared_prefix(batch, head_ids, window) if cached else 0
        input_ids, mask = _right_padded([ids[shared:] for ids in batch], device)
        if not shared:
            hidden = model(input_ids, attention_mask=mask, **({"use_cache": False} if cached else {}))[0]
            first = hidden[:, 0]
        else:
            prefix = self._prefix(model, head_ids[:shared], device)
            # The model appends to the cache it is given.
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(batch))
            hidden = model(
                input_ids,
                attention_mask=F.pad(mask, (shared, 0), value=1),
                position_ids=torch.arange(shared, shared + input_ids.shape[1], device=device)[None],
                use_cache=True,
                **with_cache(model, cache),
            )[0]
            first = prefix.first.expand(len(batch), -1)
        if window.start is None:
            return [hidden[i, : len(ids)] for i, ids in enumerate(batch)]
        begin = window.start - shared
        return [
            torch.cat([first[i : i + 1], hidden[i, begin : max(begin, len(ids) - shared)]]) if ids else hidden[i, :0]
            for i, ids in enumerate(batch)
        ]

    def _prefix(self, model: Any, ids: tuple[int, ...], device: torch.device) -> _Prefix:
        known = self._prefixes.get(ids)
        if known is not None:
            self._prefixes.move_to_end(ids)
            return known
        from transformers import DynamicCache

        input_ids, mask = _right_padded([ids], device)
        cache = DynamicCache(config=model.config)
        hidden = model(input_ids, attention_mask=mask, use_cache=True, **with_cache(model, cache))[0]
        prefix = _Prefix(cache=cache, first=hidden[0, :1].clone())
        self._prefixes[ids] = prefix
        while len(self._prefixes) > _KEPT_PREFIXES:
            self._prefixes.popitem(last=False)
        return prefix


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the argument that hands a key/value cache to a language model; transformers 5.24 gave it a new name."""
    named = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if named else "past_key_values": cache}


def _shared_prefix(batch: list[tuple[int, ...]], head_ids: tuple[int, ...], window: Window) -> int:
    """Return how many leading tokens all of `batch` share with the instruction, short of the first kept prompt token.

    The last tokens of the instruction may merge with the prompt, so texts are tokenised whole and compared.
    """
    limit = min(window.start or 0, *(len(ids) - 1 for ids in batch))
    for i in range(limit):
        if any(ids[i] != head_ids[i] for ids in batch):
            return i
    return max(0, limit)


def _right_padded(batch: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask [B, S], both int64; at least one position, whose id does not matter when masked."""
    longest = max(1, *map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    return ids.to(device), mask.to(device)


def _collate(rows: list[Tensor], tokens: list[Tokens]) -> TextCondition:
    longest = max(1, *map(len, rows))
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        embeds[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return TextCondition(embeds=embeds, mask=mask.to(embeds.device), truncated=tuple(one.dropped for one in tokens))


def _overflow_message(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return "The text encoder overflows in float16; load it in bfloat16 or float32."
    return f"The text encoder ({name}) gave NaN or infinity; its weights are damaged, load the model again."
