"""SigLIP: a vision transformer and a text encoder, trained so that matching pairs agree.

Sources: Sigmoid Loss for Language Image Pre-Training (Zhai et al., 2023); the transformer is that
of An Image is Worth 16x16 Words (Dosovitskiy et al., 2021). SigLIP 2 (Tschannen et al., 2025) with
a fixed resolution has the same arithmetic and another vocabulary.

Read it from the bottom up: `Siglip` has two towers, each an encoder of blocks like those of a
Llama, but with LayerNorm, without RoPE, and without a mask: every patch or token sees all others.

Shapes: B pictures or texts, P patches, T tokens, C width, H heads, D head width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassllama.base.config import require_positive, require_sizes
from glassllama.base.errors import ConfigError
from glassllama.nn.attention import join_heads, split_heads

CHANNELS = 3  # red, green, blue


# --- configurations ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes of an encoder."""

    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    ffn_dim: int = 3072
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_sizes(self, "dim", "n_layers", "n_heads", "ffn_dim")
        require_positive(self, "norm_eps")
        if self.dim % self.n_heads:
            raise ConfigError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """Pictures of `image_size` × `image_size` pixels, in squares of `patch_size`.

    Without `head` there is no embedding of the whole picture, only one of each patch.
    """

    image_size: int = 224
    patch_size: int = 16
    head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "image_size", "patch_size")
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"patch_size {self.patch_size} is more than image_size {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches in a row of a picture; pixels that fill no patch are left out."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextConfig(EncoderConfig):
    """`embedding_dim`: E, the width of the picture's tower."""

    vocab_size: int = 32_000
    max_seq_len: int = 64
    embedding_dim: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "vocab_size", "max_seq_len", "embedding_dim")


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    vision: VisionConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if not self.vision.head:
            raise ConfigError("vision: SigLIP needs the head that embeds a whole picture")
        if self.text.embedding_dim != self.vision.dim:
            raise ConfigError(
                f"embeddings of pictures have {self.vision.dim} numbers and those of texts "
                f"{self.text.embedding_dim}: both must be equal"
            )


def preset(dim: int, layers: int, heads: int, ffn: int, patch: int, image: int) -> SiglipConfig:
    sizes: dict[str, Any] = {"dim": dim, "n_layers": layers, "n_heads": heads, "ffn_dim": ffn}
    return SiglipConfig(
        vision=VisionConfig(**sizes, patch_size=patch, image_size=image),
        text=TextConfig(**sizes, embedding_dim=dim),
    )


PRESETS = {
    "base/16-224": preset(768, 12, 12, 3072, 16, 224),
    "base/16-512": preset(768, 12, 12, 3072, 16, 512),
    "large/16-384": preset(1024, 24, 16, 4096, 16, 384),
    "so400m/14-224": preset(1152, 27, 16, 4304, 14, 224),
    "so400m/14-384": preset(1152, 27, 16, 4304, 14, 384),
    "so400m/14-448": preset(1152, 27, 16, 4304, 14, 448),
}


# --- the encoder ------------------------------------------------------------------------------


class EncoderAttention(nn.Module):
    """Attention without a mask; all projections have biases."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.wq = nn.Linear(config.dim, config.dim)
        self.wk = nn.Linear(config.dim, config.dim)
        self.wv = nn.Linear(config.dim, config.dim)
        self.wo = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(w(x), self.n_heads) for w in (self.wq, self.wk, self.wv))
        weighted = F.scaled_dot_product_attention(q, k, v)  # (B, H, P, D)
        out: Tensor = self.wo(join_heads(weighted))
        return out  # (B, P, C)


class EncoderMLP(nn.Module):
    """down(gelu(up(x))), with the approximation of GELU by tanh."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))  # (B, P, F) inside
        return out  # (B, P, C)


class EncoderBlock(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = EncoderAttention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))  # (B, P, C)
        return x + self.mlp(self.mlp_norm(x))  # (B, P, C)


class Encoder(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)  # (B, P, C)
        out: Tensor = self.norm(x)
        return out  # (B, P, C)


# --- pictures ---------------------------------------------------------------------------------


class PoolingHead(nn.Module):
    """A learned query, the probe, attends to all patches: one vector for the whole picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.wqkv = nn.Linear(config.dim, 3 * config.dim)  # three matrices, as files store them
        self.wo = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        wq, wk, wv = self.wqkv.weight.chunk(3)  # (C, C) each
        bq, bk, bv = self.wqkv.bias.chunk(3)  # (C,) each
        q = split_heads(F.linear(self.probe, wq, bq), self.n_heads)  # (1, H, 1, D)
        k = split_heads(F.linear(x, wk, bk), self.n_heads)  # (B, H, P, D)
        v = split_heads(F.linear(x, wv, bv), self.n_heads)  # (B, H, P, D)
        q = q.expand(len(x), -1, -1, -1)  # (B, H, 1, D)
        pooled = self.wo(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (B, 1, C)
        pooled = pooled + self.mlp(self.norm(pooled))  # (B, 1, C)
        out: Tensor = pooled[:, 0]
        return out  # (B, C)


class VisionTower(nn.Module):
    """Pixels to a vector for each patch, and one for the whole picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patches = nn.Conv2d(CHANNELS, config.dim, kernel_size=size, stride=size)
        self.positions = nn.Embedding(config.side**2, config.dim)  # row by row
        self.encoder = Encoder(config)
        self.head = PoolingHead(config) if config.head else None

    def forward(self, pixels: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) pixels -> (B, P, C), patches row by row, after the last norm.

        `positions` (P,) are rows of the table of positions; None: those of the picture, and for
        another size than the configuration's, the table is interpolated. Raises ConfigError if the
        pictures are smaller than a patch.
        """
        height, width = (size // self.config.patch_size for size in pixels.shape[2:])
        if not height or not width:
            raise ConfigError(
                f"pixels: expected at least {self.config.patch_size} pixels on each side, got "
                f"{tuple(pixels.shape[2:])}"
            )
        x = self.patches(pixels.to(self.patches.weight.dtype))  # (B, C, P rows, P columns)
        x = x.flatten(2).transpose(1, 2)  # (B, P, C)
        if positions is not None:
            x = x + self.positions(positions)  # (B, P, C)
        else:
            x = x + self.position_table(height, width)  # (B, P, C)
        out: Tensor = self.encoder(x)
        return out  # (B, P, C)

    def position_table(self, height: int, width: int) -> Tensor:
        """(height · width, C), interpolated bicubically where the size is another one."""
        table, side = self.positions.weight, self.config.side
        if (height, width) == (side, side):
            return table
        square = table.view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, side, side)
        resized = F.interpolate(square, (height, width), mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T  # (height · width, C)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, C), an embedding of each picture. Raises ConfigError: this
        tower has no head."""
        if self.head is None:
            raise ConfigError("this vision tower has no head: it embeds patches only")
        out: Tensor = self.head(self(pixels))
        return out  # (B, C)


# --- texts ------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """Ids to one vector for the text, which is that of the last token.

    Texts are padded to the full length, and padding is seen like all else.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_seq_len, config.dim)
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.dim, config.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, E). Raises ConfigError if T is more than the learned positions."""
        if ids.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"{ids.shape[1]} tokens, but only {self.config.max_seq_len} positions were learned"
            )
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]  # (B, T, C)
        out: Tensor = self.head(self.encoder(x)[:, -1])
        return out  # (B, E)


# --- both -------------------------------------------------------------------------------------


class Siglip(nn.Module):
    """Two towers, and how their similarity becomes a logit: scale · cosine + bias."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.text = TextTower(config.text)
        self.logit_scale = nn.Parameter(torch.zeros(1))  # its logarithm
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def initialize(self, generator: torch.Generator) -> None:
        """Random weights for training: section 3.2 of the paper has the scale 10 and the bias -10,
        with which nearly all of the many wrong pairs begin with a small loss."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                nn.init.trunc_normal_(parameter, std=fan_in**-0.5, generator=generator)
        nn.init.constant_(self.logit_scale, log(10.0))
        nn.init.constant_(self.logit_bias, -10.0)

    def embed_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, E), of length 1."""
        return F.normalize(self.vision.embed(pixels).float(), dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, E), of length 1."""
        return F.normalize(self.text(ids).float(), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, E) and (N, E) embeddings -> (B, N) logits that a text describes a picture."""
        return images @ texts.T * self.logit_scale.exp() + self.logit_bias


def sigmoid_loss(logits: Tensor) -> Tensor:
    """(B, B) logits of pictures and texts -> the loss: pair i, i belongs together, no other does.

    Every pair is a question of its own, yes or no; the paper's equation (1).
    """
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1  # (B, B), 1 or -1
    return -F.logsigmoid(signs * logits).sum() / len(logits)
