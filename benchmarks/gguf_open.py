"""Time to open a GGUF file with a vocabulary as large as Llama 3's.

    python benchmarks/gguf_open.py [--repeats 7]

The file (128,256 words with scores and types, 280,147 merges) is written by the `gguf` package and
opened by both packages. Prints a table, then one line of JSON: median seconds, with the file in the
page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from glassllama.formats.gguf import open_gguf

WORDS, MERGES = 128_256, 280_147


def write_vocabulary(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"Ġwörd{i}" for i in range(WORDS)])
    writer.add_token_scores([-float(i) for i in range(WORDS)])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges([f"Ġa{i} b{i}" for i in range(MERGES)])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_and_decode(path: Path) -> None:
    metadata = open_gguf(path).metadata
    words, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert (len(list(words)), len(list(merges))) == (WORDS, MERGES)


def median_seconds(work: Callable[[Path], object], path: Path, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work(path)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path)
        got = {
            "open": median_seconds(open_gguf, path, flags.repeats),
            "open, every string decoded": median_seconds(open_and_decode, path, flags.repeats),
            "gguf.GGUFReader": median_seconds(gguf.GGUFReader, path, 1),
        }
    for name, taken in got.items():
        print(f"{name:28} {taken:8.4f} s")
    print(json.dumps({"benchmark": "gguf_open", "words": WORDS, "merges": MERGES, "seconds": got}))


if __name__ == "__main__":
    main()
