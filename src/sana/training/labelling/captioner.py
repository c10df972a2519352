"""A vision-language model that describes pictures (SANA's caption labelling, arXiv 2410.10629, section 3.3)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sana.checkpoints.onlookers import find, load_describer
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "Describe this picture in one paragraph: what is in it, where, in which colours and in which style."


@dataclass(frozen=True, kw_only=True)
class Describing:
    """What a model is asked, and how it answers."""

    prompts: tuple[str, ...] = (PROMPT,)
    """Each is asked of every picture."""
    samples: int = 1
    """Answers to each prompt."""
    temperature: float = 0.0
    """How freely words are drawn; 0 takes the likeliest."""
    max_tokens: int = 160
    """Length of an answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise InvalidInput("A prompt for the captions is empty. Write what the model shall do.")
        if self.samples < 1 or self.max_tokens < 1:
            raise InvalidInput("`samples` and `max_tokens` must be at least 1.")
        if not 0 <= self.temperature <= 10:
            raise InvalidInput(f"`temperature` must lie from 0 to 10 but is {self.temperature:g}.")
        if self.samples > 1 and not self.temperature:
            raise InvalidInput("Several `samples` of a prompt are all the same at `temperature` 0. Raise it.")

    @property
    def count(self) -> int:
        """Captions of a picture."""
        return len(self.prompts) * self.samples


class Captioner:
    """Describes pictures by a model of transformers."""

    def __init__(
        self,
        model: str,
        describing: Describing,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        offline: bool = False,
    ) -> None:
        """Load a model from a folder or the hub.

        Raises:
            ModelNotFound, CheckpointError: it cannot be had, or describes no pictures.
        """
        self.describing, self.device = describing, torch.device(device)
        loaded: tuple[Any, Any] = load_describer(find(model, revision=revision, offline=offline), self.device)
        self._model, self._processor = loaded
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # answers begin where the prompts of a batch end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._has_template = bool(getattr(self._processor, "chat_template", None))

    def describe(self, pictures: Sequence["Image"], salt: str = "") -> list[list[str]]:
        """Return `describing.count` texts for each RGB picture, prompt by prompt; some may be empty.

        Random words depend on the seed and on `salt` alone, and not on what was described before.
        """
        found: list[list[str]] = [[] for _ in pictures]
        for number, prompt in enumerate(self.describing.prompts):
            inputs = self._inputs(pictures, prompt)
            for sample in range(self.describing.samples):
                texts = self._answers(inputs, f"{self.describing.seed}/{salt}/{number}/{sample}")
                for own, text in zip(found, texts, strict=True):
                    own.append(" ".join(text.split()))
        return found

    def _inputs(self, pictures: Sequence["Image"], prompt: str) -> Any:
        if not self._has_template:
            made = self._processor(
                images=list(pictures), text=[prompt] * len(pictures), padding=True, return_tensors="pt"
            )
            return made.to(self.device)
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]}]
            for picture in pictures
        ]
        made = self._processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        return made.to(self.device)

    @torch.no_grad()
    def _answers(self, inputs: Any, salt: str) -> list[str]:
        if self._model.dtype != torch.float32:
            inputs = inputs.to(self._model.dtype)  # casts what is no whole number
        options: dict[str, Any] = {"do_sample": False}
        if self.describing.temperature:
            options = {"do_sample": True, "temperature": self.describing.temperature, "top_k": 0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:7], "little"))
            tokens = self._model.generate(**inputs, max_new_tokens=self.describing.max_tokens, **options)
        if not self._model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts
