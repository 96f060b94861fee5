"""PaliGemma 1 and 2: patches of SigLIP, projected to the width of a Gemma, before the prompt.

Pictures and prompt see each other in both directions; the answer is causal. Source: PaliGemma
(Beyer et al., 2024), section 3; PaliGemma 2 (Steiner et al., 2024) has Gemma 2 as the decoder.

Shapes: N pictures, P patches, T tokens, C width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from glassllama.models.language_model import LanguageModel
from glassllama.models.siglip import VisionConfig, VisionTower
from glassllama.nn.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """`text`: the configuration of the decoder; `image_token`: the id that stands for a patch."""

    vision: VisionConfig
    text: Any
    image_token: int
    prefix: bool = True  # whether pictures and prompt see each other


class PaliGemmaImages(nn.Module):
    """The vision tower and the projection of its patches."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.dim, config.text.dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, P, C), one row of the decoder for each patch."""
        rows: Tensor = self.projector(self.tower(pixels))
        return rows  # (N, P, C)


class PaliGemma(nn.Module):
    """Pictures and a decoder, in five steps: embed images, embed text, merge, prefill, decode."""

    config: PaliGemmaConfig

    def __init__(self, images: nn.Module, decoder: LanguageModel) -> None:
        super().__init__()
        self.config = cast(PaliGemmaConfig, images.config)
        self.images, self.decoder = images, decoder

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, P, C)."""
        rows: Tensor = self.images(pixels)
        return rows  # (N, P, C)

    def embed_text(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C); a placeholder of a picture gets any embedding."""
        is_image = ids == self.config.image_token  # may be outside the vocabulary
        return self.decoder.embed(ids.masked_fill(is_image, 0))  # (B, T, C)

    def merge(self, ids: Tensor, text: Tensor, rows: Tensor) -> Tensor:
        """(B, T) ids, (B, T, C), (N, P, C) -> (B, T, C): rows at the places of placeholders."""
        is_image = (ids == self.config.image_token).unsqueeze(-1)  # (B, T, 1)
        return text.masked_scatter(is_image, rows.to(text.dtype))  # (B, T, C)

    def prefill(
        self, ids: Tensor, pixels: Tensor, cache: KVCache | None, lengths: list[int] | None = None
    ) -> Tensor:
        """(B, T) ids with placeholders, (N, 3, H, W) -> (B, T, V) logits; `lengths` if padded."""
        x = self.merge(ids, self.embed_text(ids), self.embed_images(pixels))  # (B, T, C)
        decoder: Any = self.decoder
        h = decoder.hidden(ids, cache, lengths=lengths, embeddings=x, prefix=self.config.prefix)
        return self.decoder.logits(h)  # (B, T, V)

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """(B, T) ids after the prompt -> (B, T, V) logits."""
        logits: Tensor = self.decoder(ids, cache)
        return logits  # (B, T, V)
