"""CLIP score: how well a text describes a picture, 100 times the cosine of their embeddings (arXiv 2104.08718).

Pictures go through the model's own preprocessing; texts are cut to its length, 77 tokens for the published ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sana.checkpoints.onlookers import find, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "openai/clip-vit-large-patch14"
"""The model whose scores the published thresholds are about."""


class ClipScorer:
    """Scores from 0 to 100."""

    def __init__(
        self,
        model: str = MODEL,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        offline: bool = False,
    ) -> None:
        """Load a CLIP model from a folder or the hub.

        Raises:
            ModelNotFound, CheckpointError: it cannot be had, or is no CLIP.
        """
        self.device = torch.device(device)
        folder = find(model, revision=revision, offline=offline)
        loaded: tuple[Any, Any, Any] = load_clip(folder, self.device)
        self._model, self._tokenizer, self._processor = loaded
        self._length = int(self._model.config.text_config.max_position_embeddings)

    def scores(self, pictures: Sequence["Image"], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the scores of the texts of each picture; a negative cosine is 0."""
        if not pictures:
            return []
        seen, flat = self.pictures(pictures), [text for own in texts for text in own]
        read = self.texts(flat)
        owners = [number for number, own in enumerate(texts) for _ in own]
        cosines = (seen[owners] * read).sum(1).tolist()
        found = iter(100 * max(0.0, cosine) for cosine in cosines)
        return [[next(found) for _ in own] for own in texts]

    @torch.no_grad()
    def pictures(self, pictures: Sequence["Image"]) -> Tensor:
        """Return the embeddings [B, E] of RGB pictures, of length 1."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        seen = self._model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._model.visual_projection(seen).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [B, E] of texts, of length 1."""
        if not texts:
            return torch.zeros(0, self._model.config.projection_dim, device=self.device)
        options: dict[str, Any] = {"truncation": True, "max_length": self._length, "padding": "max_length"}
        words = self._tokenizer(list(texts), return_tensors="pt", **options).to(self.device)
        read = self._model.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        return F.normalize(self._model.text_projection(read.pooler_output).float(), dim=1)
