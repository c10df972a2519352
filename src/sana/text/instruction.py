"""The complex human instruction and the token window that cuts it off again.

The instruction is put before every prompt so that the language model reads it as a request to imagine details; of the
encoded tokens only position 0 and those of the prompt reach the image model (arXiv 2410.10629, section 2.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sana.errors import InvalidInput

COMPLEX_HUMAN_INSTRUCTION: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
)

MAX_INSTRUCTION = 20_000
"""Longest instruction in characters, twenty times the published one; all of it goes through the language model."""

# A long text is tokenised from its start only. The cut can change the last tokens before it, never ones this far away.
_MARGIN_TOKENS = 64
_CHARACTERS_PER_TOKEN = 16


class Tokenizer(Protocol):
    """What is asked of a tokenizer: the call of transformers' tokenizers."""

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which token positions are read and kept."""

    length: int
    """Positions read: a longer token sequence is cut, a shorter one counts as padded."""
    start: int | None
    """Kept are position 0 and `start` .. `length` - 1; None keeps all."""

    @property
    def rows(self) -> int:
        """Number of kept positions, padding included."""
        return self.length if self.start is None else 1 + max(0, self.length - self.start)

    def valid_rows(self, num_tokens: int) -> int:
        """Return how many of the kept positions hold one of `num_tokens` tokens; they come first."""
        if self.start is None or num_tokens == 0:
            return num_tokens
        return 1 + max(0, num_tokens - self.start)


def token_window(num_instruction_tokens: int, max_sequence_length: int) -> Window:
    """Return the window of the published pipelines for an instruction of that many tokens, BOS included (0: none).

    With n instruction tokens and a limit of L, n + L - 2 positions are read and L kept: the first and the last L - 1.
    The 2 stand for BOS and for the instruction's trailing space, which merges into the first word of the prompt; so the
    window starts at n - 1 whatever L is.
    """
    if num_instruction_tokens == 0:
        return Window(length=max_sequence_length, start=None)
    # An instruction of one token and a limit of 1 would leave no position at all.
    length = max(1, num_instruction_tokens + max_sequence_length - 2)
    return Window(length=length, start=num_instruction_tokens - 1 if max_sequence_length > 1 else length)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One text as the encoder reads it."""

    ids: tuple[int, ...]
    """At most `Window.length` token ids, instruction first."""
    dropped: str
    """The end of the text that found no room; empty when all of it was read."""


def join_instruction(instruction: Sequence[str] | str | None) -> str | None:
    """Join the lines of an instruction by newlines; None or an empty list means that there is none."""
    lines = [instruction] if isinstance(instruction, str) else [] if instruction is None else instruction
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        raise InvalidInput("The instruction holds something else than text; give a list of strings, or None.")
    if sum(map(len, lines)) > MAX_INSTRUCTION:
        raise InvalidInput(f"The instruction has more than {MAX_INSTRUCTION} characters; shorten it.")
    if not instruction:
        return None
    return "\n".join(lines)


def tokenize(tokenizer: Tokenizer, text: str, max_tokens: int, protected: int = 0) -> Tokens:
    """Tokenise `text` as plain text, with the tokenizer's own BOS, cut on the right to `max_tokens`.

    A deliberate deviation from the published pipelines: the spelling of a special token inside the text (`<bos>`,
    `<start_of_turn>`) stays text, so a prompt cannot end or fake a turn. `protected` is the number of leading
    characters (the instruction) never reported in `Tokens.dropped`. Time does not grow with what finds no room.
    """
    characters = _CHARACTERS_PER_TOKEN * (max_tokens + _MARGIN_TOKENS)
    encoded = _plain(tokenizer, text[:characters])
    while characters < len(text) and len(encoded["input_ids"]) < max_tokens + _MARGIN_TOKENS:
        characters *= 4
        encoded = _plain(tokenizer, text[:characters])
    ids = list(encoded["input_ids"])
    excess = len(ids) - max_tokens
    if excess <= 0:
        return Tokens(ids=tuple(ids), dropped="")
    # Only what the text itself gave is dropped: a tokenizer that closes with EOS keeps its EOS.
    content = [i for i, added in enumerate(encoded["special_tokens_mask"]) if not added]
    drop = content[-excess:]
    first = max(protected, encoded["offset_mapping"][drop[0]][0]) if drop else len(text)
    unwanted = set(drop)
    kept = [token for i, token in enumerate(ids) if i not in unwanted]
    return Tokens(ids=tuple(kept[:max_tokens]), dropped=text[first:])


def _plain(tokenizer: Tokenizer, text: str) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "encode_special_tokens", None)
    try:
        return tokenizer(
            text,
            add_special_tokens=True,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            verbose=False,
        )
    finally:
        # The call leaves this switch on in the caller's tokenizer, where direct users of the backend would meet it.
        if backend is not None and before is not None:
            backend.encode_special_tokens = before
