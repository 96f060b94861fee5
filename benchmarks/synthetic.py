"""GGUF models with random weights in the shapes of models whose license forbids redistribution.

    python benchmarks/synthetic.py FOLDER [--shape 1b|qwen3_0.6b|…] [--type Q4_K_M] [--layers N]

Writes FOLDER/SHAPE-TYPE.gguf tensor by tensor with the `gguf` package and prints its path. The
vocabulary is Llama 3's if the `llama-models` wheel is installed, otherwise that of SmolLM2 (the
default model), with fewer rows of embeddings. Qwen's has unused tokens up to its number of rows.

Numbers are normally distributed with the standard deviation of a trained model: outputs of a matrix
are about as large as its inputs, and the sum of what the layers add to the residual stream does not
depend on the number of layers. So logits are finite and of normal size, but have no meaning. The
`gguf` package quantizes one pool of normal numbers to the types that it can write. It cannot write
K types and IQ4 types, so their blocks are made here: random codes, scales and minima that give the
same standard deviation and a mean of zero. Every tensor is cut from a pool at its own offset, and
its scales are multiplied by its standard deviation.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from glassllama.base.config import DecoderConfig, Llama3Scaling, LlamaConfig
from glassllama.tokenizers.bpe import CHARACTER_TO_BYTE
from glassllama.tokenizers.tiktoken_file import read_ranks, special_token_names
from glassllama.weights.architectures import architecture_of
from glassllama.weights.architectures.qwen import Qwen3Config

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_K",
         "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_K_M")  # fmt: skip
POOL = (1 << 24) + (1 << 12) * 37  # numbers in the pool; not a multiple of a tensor's size
LOGIT_WIDTH = 2.0  # standard deviation of the logits, set by the last norm
SUPERBLOCK = 256
QWEN_TOKENS = 151_936
Raw = NDArray[Any]


SHAPES = ("135m", "1b", "8b", "qwen3_0.6b", "qwen3_1.7b")


def shape(name: str, vocab_size: int, layers: int | None = None) -> DecoderConfig:
    """The shape of SmolLM2 135M, Llama 3.2 1B, Llama 3.1 8B, Qwen3 0.6B or 1.7B, with this
    vocabulary size and optionally another number of layers."""
    sizes: dict[str, dict[str, Any]] = {
        "135m": {"dim": 576, "n_layers": 30, "head_dim": 64, "ffn_dim": 1536, "n_heads": 9,
                 "n_kv_heads": 3, "tie_embeddings": True, "rope_theta": 100_000.0,
                 "max_seq_len": 8192},
        "1b": {"dim": 2048, "n_layers": 16, "head_dim": 64, "ffn_dim": 8192,
               "tie_embeddings": True, "rope_scaling": Llama3Scaling(factor=32.0)},
        "8b": {"dim": 4096, "n_layers": 32, "head_dim": 128, "ffn_dim": 14336,
               "rope_scaling": Llama3Scaling(factor=8.0)},
        "qwen3_0.6b": {"dim": 1024, "ffn_dim": 3072},
        "qwen3_1.7b": {"dim": 2048, "ffn_dim": 6144},
    }  # fmt: skip
    if name.startswith("qwen3"):
        return Qwen3Config(
            vocab_size=vocab_size, n_layers=28 if layers is None else layers, n_heads=16,
            n_kv_heads=8, head_dim=128, norm_eps=1e-6, rope_theta=1e6, rope_layout="half",
            max_seq_len=40_960, tie_embeddings=True, **sizes[name],
        )  # fmt: skip
    llama3 = {"n_heads": 32, "n_kv_heads": 8, "rope_theta": 500_000.0, "max_seq_len": 131_072}
    values = llama3 | sizes[name] | ({} if layers is None else {"n_layers": layers})
    return LlamaConfig(vocab_size=vocab_size, norm_eps=1e-5, rope_layout="interleaved", **values)


# --- vocabularies ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The vocabulary in the metadata of a GGUF file."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    bos: int
    eos: int


def llama3_words(ranks: Path) -> Words:
    """Meta's vocabulary as stored in GGUF: tokens in GPT-2's byte characters, and the merges."""
    tokens = read_ranks(ranks)
    controls = special_token_names()
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(controls)
    return Words(
        pre="llama-bpe",
        tokens=[*map(written, tokens), *controls],
        kinds=[int(kind) for kind in kinds],
        merges=list(merges_of(tokens)),
        bos=len(tokens),
        eos=len(tokens) + controls.index("<|eot_id|>"),
    )


def written(token: bytes) -> str:
    characters = {byte: chr(code) for code, byte in CHARACTER_TO_BYTE.items()}
    return "".join(characters[byte] for byte in token)


def merges_of(tokens: list[bytes]) -> Iterator[str]:
    """The pair that each token is merged from: its bytes after all merges of a lower rank.
    A token that no merge produces has none."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield f"{written(parts[0])} {written(parts[1])}"


def smollm_words() -> Words:
    """The vocabulary of the default model."""
    from glassllama import hub
    from glassllama.formats.gguf import open_gguf

    metadata = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in open_gguf(hub.resolve("smollm2-135m")).metadata.items()
    }
    return Words(
        pre=metadata["pre"],
        tokens=[*map(str, metadata["tokens"])],
        kinds=[*map(int, metadata["token_type"])],
        merges=[*map(str, metadata["merges"])],
        bos=int(metadata["bos_token_id"]),
        eos=int(metadata["eos_token_id"]),
    )


def best_words() -> Words:
    """Llama 3's vocabulary if it is installed, else SmolLM2's."""
    spec = find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        return smollm_words()
    return llama3_words(Path(spec.submodule_search_locations[0]) / "llama3/tokenizer.model")


def enlarged(words: Words, count: int) -> Words:
    """The vocabulary with unused tokens at its end, `count` in all."""
    unused = [f"[PAD{n}]" for n in range(len(words.tokens), count)]
    kinds = [int(gguf.TokenType.UNUSED)] * len(unused)
    return replace(words, tokens=words.tokens + unused, kinds=words.kinds + kinds)


# --- numbers --------------------------------------------------------------------------------------


class Pool:
    """Normal numbers of standard deviation 1 in one type, from which tensors are cut."""

    def __init__(self, kind: str, seed: int = 0, numbers: int = POOL) -> None:
        rng = np.random.default_rng(seed)
        self.kind = getattr(gguf.GGMLQuantizationType, kind)
        self.block, self.size = gguf.GGML_QUANT_SIZES[self.kind]
        count = numbers // SUPERBLOCK * SUPERBLOCK
        if kind in K_BLOCKS:
            self.scales, blocks = K_BLOCKS[kind](rng, count // SUPERBLOCK)
        elif kind in RANDOM:
            self.scales, blocks = random_blocks(rng, self.kind, count // self.block)
        else:
            normal = rng.standard_normal(count, np.float32)
            self.scales, blocks = SCALES.get(kind, slice(0)), plain_blocks(normal, kind, self.kind)
        self.blocks = blocks.reshape(-1, self.size)

    def cut(self, number: int, shape: tuple[int, ...], width: float) -> Raw:
        """The bytes of tensor `number`: part of the pool, scaled to standard deviation `width`."""
        count = math.prod(shape) // self.block
        start = number * 1_000_003 % len(self.blocks)
        rolled = np.roll(self.blocks, -start, axis=0)
        blocks = np.resize(rolled, (count, self.size))
        if self.scales == slice(0):
            stored = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
            numbers = blocks.view(stored[self.kind.name])
            return (numbers.astype(np.float32) * width).astype(numbers.dtype).view(np.uint8)
        if self.kind.name == "MXFP4":
            blocks[:, 0] += np.uint8(round(math.log2(width)) & 255)
            return blocks
        halves = np.ascontiguousarray(blocks[:, self.scales]).view(np.float16)
        blocks[:, self.scales] = (halves * width).astype(np.float16).view(np.uint8)
        return blocks


# The bytes of a block that contain its float16 scales.
SCALES = {
    "Q4_0": slice(0, 2), "Q4_1": slice(0, 4), "Q5_0": slice(0, 2), "Q5_1": slice(0, 4),
    "Q8_0": slice(0, 2), "MXFP4": slice(0, 1),
}  # fmt: skip
# Of blocks of random bytes: where d is, and dmin after it; dmin / d that gives a mean of zero.
RANDOM = {"Q2_K": (80, 1.5), "Q3_K": (108, 0), "Q5_K": (0, 15.5), "IQ4_NL": (0, 0),
          "IQ4_XS": (0, 0)}  # fmt: skip


def plain_blocks(normal: NDArray[np.float32], kind: str, theirs: Any) -> Raw:
    if kind == "BF16":
        return normal.astype(ml_dtypes.bfloat16).view(np.uint8)
    return gguf.quants.quantize(normal.reshape(-1, SUPERBLOCK), theirs).view(np.uint8)


def random_blocks(rng: np.random.Generator, theirs: Any, blocks: int) -> tuple[slice, Raw]:
    """Random codes, scales and minima; half of the blocks are negative."""
    raw = rng.integers(0, 256, (blocks, gguf.GGML_QUANT_SIZES[theirs][1]), np.uint8)
    at, minimum = RANDOM[theirs.name]
    d = rng.choice([-1.0, 1.0], (blocks, 1)) * ([1, minimum] if minimum else [1])
    scales = slice(at, at + 2 * d.shape[1])
    raw[:, scales] = d.astype(np.float16).view(np.uint8)
    width = gguf.quants.dequantize(raw[:1024], theirs).std()
    raw[:, scales] = (d / width).astype(np.float16).view(np.uint8)
    return scales, raw


def codes(rng: np.random.Generator, blocks: int, bits: int) -> tuple[Raw, float]:
    """Normally distributed codes, (blocks, 256) uint8, and their standard deviation."""
    width = 2**bits / 5  # so that about one in eighty is clipped
    middle = (2**bits - 1) / 2
    normal = middle + width * rng.standard_normal((blocks, SUPERBLOCK), np.float32)
    return np.clip(np.rint(normal), 0, 2**bits - 1).astype(np.uint8), width


def q4_k(rng: np.random.Generator, blocks: int) -> tuple[slice, Raw]:
    """d·scale·q − dmin·minimum with minimum = scale and dmin = 7.5 d: mean 0. Source: ggml."""
    q, width = codes(rng, blocks, 4)
    scales = rng.integers(32, 64, (blocks, 8), np.uint8)
    d = np.float32(1 / (47.5 * width))  # 47.5: the mean of the scales
    halves = np.tile(np.array([d, 7.5 * d], np.float16).view(np.uint8), (blocks, 1))
    first, last = scales[:, :4], scales[:, 4:]
    tops = last >> 4 << 6
    six_bits = np.concatenate([first | tops, first | tops, last & 15 | (last & 15) << 4], 1)
    runs = q.reshape(blocks, 4, 2, 32)
    nibbles = (runs[:, :, 0] | runs[:, :, 1] << 4).reshape(blocks, 128)
    return slice(0, 4), np.concatenate([halves, six_bits, nibbles], 1)


def q6_k(rng: np.random.Generator, blocks: int) -> tuple[slice, Raw]:
    """d·scale·(q − 32), sixteen signed scales. Source: ggml."""
    q, width = codes(rng, blocks, 6)
    scales = rng.integers(64, 128, (blocks, 16), np.uint8)
    scales[:, ::2] = -scales[:, ::2].view(np.int8).view(np.uint8)  # some are negative in real files
    halves = np.tile(np.array([1 / (95.5 * width)], np.float16).view(np.uint8), (blocks, 1))
    lanes = q.reshape(blocks, 2, 4, 32)
    low = lanes[:, :, :2] & 15 | (lanes[:, :, 2:] & 15) << 4
    high = sum(lanes[:, :, lane] >> 4 << 2 * lane for lane in range(4))
    parts = (low.reshape(blocks, 128), high.reshape(blocks, 64), scales, halves)
    return slice(208, 210), np.concatenate(parts, 1)


K_BLOCKS = {"Q4_K": q4_k, "Q6_K": q6_k}


# --- the file -------------------------------------------------------------------------------------


def type_of(name: str, kind: str, config: DecoderConfig) -> str:
    """The type of a tensor in llama.cpp's Q4_K_M: Q6_K for the output and half of some others."""
    if kind != "Q4_K_M":
        return kind
    if name == ("tok_embeddings.weight" if config.tie_embeddings else "output.weight"):
        return "Q6_K"
    if name.endswith(("attention.wv.weight", "feed_forward.down.weight")):
        layer, eighth = int(name.split(".")[1]), config.n_layers // 8
        middle = (layer - eighth) % 3 == 2
        if layer < eighth or layer >= 7 * config.n_layers // 8 or middle:
            return "Q6_K"
    return "Q4_K"


def width_of(name: str, shape: tuple[int, ...], config: DecoderConfig) -> float:
    """Standard deviation: outputs as large as inputs; each addition to the residual stream is
    scaled by 1/√(2·layers)."""
    adds = name.endswith(("attention.wo.weight", "feed_forward.down.weight"))
    return 1 / math.sqrt(shape[1] * (2 * config.n_layers if adds else 1))


def write(
    path: Path, config: DecoderConfig, kind: str, words: Words | None = None, pool: int = POOL
) -> Path:
    """Write a model of that shape and type; without `words` the file has no vocabulary."""
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(str(path), architecture.gguf_names[0])
    describe(writer, config)
    if words is not None:
        add_words(writer, words)
    shapes = architecture.shapes(config)
    theirs = {tensor.ours: tensor.theirs for tensor in architecture.tensors(config, "gguf")}
    kinds = {name: type_of(name, kind, config) for name, size in shapes.items() if len(size) > 1}
    pools = {name: Pool(name, numbers=pool) for name in sorted(set(kinds.values()))}
    divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for name, size in shapes.items():
        if name not in kinds:
            writer.add_tensor_info(theirs[name], size, np.dtype(np.float32), 4 * size[0])
            continue
        pool = pools[kinds[name]]
        nbytes = math.prod(size) // pool.block * pool.size
        half = np.dtype(np.float16)  # gguf would take the shape of a uint8 tensor as bytes
        writer.add_tensor_info(theirs[name], size, half, nbytes, raw_dtype=pool.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    for number, (name, size) in enumerate(shapes.items()):
        if name in kinds:
            writer.write_tensor_data(
                pools[kinds[name]].cut(number, size, width_of(name, size, config))
            )
        else:
            last = name == "norm.weight"
            writer.write_tensor_data(np.full(size, LOGIT_WIDTH if last else 1.0, np.float32))
    writer.close()
    return path


def describe(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def add_words(writer: gguf.GGUFWriter, words: Words) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.bos)
    writer.add_eos_token_id(words.eos)


def rope_divisors(config: DecoderConfig) -> NDArray[np.float32] | None:
    """`rope_freqs.weight`: the divisor of each frequency."""
    if config.rope_scaling is None:
        return None
    np.arange(0, config.head_dim, 2) / config.head_dim
    pairs = np.arange(config.head_dim // 2)
    plain = config.rope_theta ** -(2 * pairs / config.head_dim)
    return config.rope_scaling.divisors(plain, pairs, config).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    parser.add_argument("--layers", type=int, help="fewer, for a smaller file")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    words = smollm_words() if flags.shape == "135m" else best_words()
    if flags.shape.startswith("qwen3"):
        words = enlarged(words, QWEN_TOKENS)
    config = shape(flags.shape, len(words.tokens), flags.layers)
    print(write(flags.folder / f"{flags.shape}-{flags.type}.gguf", config, flags.type, words))


if __name__ == "__main__":
    main()
