"""The default model, padded with zeros so that it can be quantized to K-quants.

    python benchmarks/padded.py FOLDER [--type Q4_K_M]      (needs the bench extra)

K-quants need a row length that is a multiple of 256. SmolLM2 135M has a width of 576, and there is
no package that contains a small model with such rows and a free license. So rows and columns of
zeros are added (width 768, 12 heads), and the weights of the norms are scaled so that the logits
stay the same. llama.cpp quantizes the file. Writes FOLDER/padded-TYPE.gguf and prints its path.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from synthetic import SUPERBLOCK, add_words, describe, rope_divisors, smollm_words

from glassllama import hub
from glassllama.base.config import LlamaConfig
from glassllama.weights.architectures.llama import LLAMA
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint

TYPES = ("Q4_K_M", "Q6_K")


def wider(config: LlamaConfig) -> LlamaConfig:
    """The smallest larger shape whose row lengths are all multiples of 256."""
    group = config.group_size * config.head_dim
    step = SUPERBLOCK // math.gcd(SUPERBLOCK, group)  # kv heads whose queries fill superblocks
    kv_heads = -(-config.n_kv_heads // step) * step
    dim, ffn_dim = (-(-size // SUPERBLOCK) * SUPERBLOCK for size in (config.dim, config.ffn_dim))
    return replace(
        config, dim=dim, ffn_dim=ffn_dim, n_kv_heads=kv_heads,
        n_heads=kv_heads * config.group_size, norm_eps=config.norm_eps * config.dim / dim,
    )  # fmt: skip


def write(path: Path, checkpoint: Checkpoint, *, words: bool = True) -> Path:
    """Write the checkpoint in float32, padded with zeros; the logits stay the same.

    The zeros make the mean square of a vector smaller by the ratio of the widths. So eps is scaled
    by that ratio, and the weights of the norms by its square root.
    """
    config = wider(checkpoint.config)
    shrunk = np.float32(math.sqrt(checkpoint.config.dim / config.dim))
    writer = gguf.GGUFWriter(str(path), "llama")
    describe(writer, config)
    if words:
        add_words(writer, smollm_words())
        writer.add_chat_template(str(checkpoint.chat_template))
    divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for tensor in LLAMA.tensors(config, "gguf"):
        numbers, shape = checkpoint.float32(tensor.ours), tensor.shape
        wide = np.zeros(shape, np.float32)
        wide[tuple(slice(size) for size in numbers.shape)] = numbers
        writer.add_tensor(tensor.theirs, wide * shrunk if wide.ndim == 1 else wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(source: Path, target: Path, kind: str) -> Path:
    """Quantize a file by llama.cpp."""
    import llama_cpp  # imported here because the rest runs, and is tested, without it

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    paths = (str(path).encode() for path in (source, target))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp could not write {target}")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q4_K_M")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    whole = flags.folder / "padded-F32.gguf"
    try:
        write(whole, open_checkpoint(hub.resolve("smollm2-135m")))
        print(quantize(whole, flags.folder / f"padded-{flags.type}.gguf", flags.type))
    finally:
        whole.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
