"""Speed of encoding, decoding and training a vocabulary, compared with tiktoken and tokenizers.

    python benchmarks/tokenizing.py TEXT... [--ranks tokenizer.model] [--merges 8192] [--repeats 5]

TEXT are files or folders of plain text. Encoding and decoding use Llama 3's vocabulary on one
thread; `first` uses a new encoder with an empty word cache, `again` one that has encoded the text
before. Prints a table and one line of JSON: medians of the repeats (alternating between programs),
as elapsed time and as CPU time ("core", which does not include waiting for a busy core).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # tokenizers' own threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken

import glassllama
import tokenizers
from glassllama.native.tokenizers import COMPILED
from glassllama.native.tokenizers.corpus_encoder import CorpusEncoder
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.pretokenizer import LLAMA3
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer, text_chunks
from glassllama.tokenizers.train import TrainedBPE, hf_document, train_bpe

Work = dict[str, Callable[[], Any]]


def llama3_ranks() -> Path:
    """The tokenizer.model of the llama-models wheel, found without importing it."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Use --ranks with Meta's tokenizer.model, or pip install llama-models")
    return Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"


def read(paths: list[Path]) -> str:
    files = [
        f for path in paths for f in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])
    ]
    return "".join(file.read_bytes().decode("utf-8", "replace") for file in files)


def medians(work: Work, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each function: elapsed time and CPU time."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            wall, core = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.perf_counter() - wall, time.process_time() - core))
    return {
        name: {kind: statistics.median(t[at] for t in times) for at, kind in enumerate(KINDS)}
        for name, times in taken.items()
    }


KINDS = ("wall", "core")


def hf_of(ours: BytePairTokenizer) -> tokenizers.Tokenizer:
    """Llama 3's vocabulary in Hugging Face's library."""
    tokens = tuple(token for token in ours.vocabulary.tokens if token in ours.vocabulary.ids)
    trained = TrainedBPE(tokens, (), tuple(ours.specials), "llama3")
    return tokenizers.Tokenizer.from_str(json.dumps(hf_document(trained)))


def coding_work(ours: BytePairTokenizer, text: str, repeats: int) -> Work:
    tik = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3, mergeable_ranks=dict(ours.vocabulary.ids), special_tokens={}
    )
    hf = hf_of(ours)
    pieces = list(text_chunks(text))  # in chunks, as Meta's tokenizer does
    ids = ours.encode_array(text)
    numbers = ids.tolist()
    new_encoders = [CorpusEncoder(ours.vocabulary) for _ in range(repeats)]  # with empty caches
    assert [id for piece in pieces for id in tik.encode_ordinary(piece)] == numbers
    assert tik.decode(numbers) == ours.decode(numbers) == text

    def first() -> None:
        encoder = new_encoders.pop()
        for piece in pieces:
            encoder(piece)

    return {
        "encode ours first": first,
        "encode ours again": lambda: ours.encode_array(text),
        "encode tiktoken": lambda: [tik.encode_ordinary(piece) for piece in pieces],
        "encode tokenizers": lambda: hf.encode(text, add_special_tokens=False),
        "decode ours": lambda: ours.decode(numbers),
        "decode ours array": lambda: ours.decode(ids),
        "decode tiktoken": lambda: tik.decode(numbers),
        "decode tokenizers": lambda: hf.decode(numbers, skip_special_tokens=False),
    }


def training_work(text: str, merges: int) -> Work:
    """Train the same merges on the same lines with both packages."""
    lines = text.splitlines(keepends=True)
    size = 256 + merges

    def theirs() -> tokenizers.Tokenizer:
        stages = tokenizers.pre_tokenizers
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = stages.Split(tokenizers.Regex(LLAMA3), "isolated")
        byte_level = stages.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = stages.Sequence([split, byte_level])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=stages.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return tokenizer

    return {
        "train ours": lambda: train_bpe(lines, size, backend=COMPILED),
        "train tokenizers": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--ranks", type=Path, help="Meta's tokenizer.model of Llama 3")
    parser.add_argument("--merges", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    text = read(flags.texts)
    megabytes = len(text.encode()) / 1e6
    ours = read_meta_tokenizer(flags.ranks or llama3_ranks(), COMPILED)
    train_bpe(["compile before measuring"], 256, backend=COMPILED)
    seconds = medians(
        coding_work(ours, text, flags.repeats) | training_work(text, flags.merges), flags.repeats
    )
    print(f"{megabytes:.2f} MB\n{'':20} {'wall s':>8} {'core s':>8} {'MB/s':>8} {'MB/s core':>10}")
    for name, taken in seconds.items():
        rates = [megabytes / taken[kind] for kind in KINDS]
        print(
            f"{name:20} {taken['wall']:8.3f} {taken['core']:8.3f} {rates[0]:8.1f} {rates[1]:10.1f}"
        )
    tiktoken_s = seconds["encode tiktoken"]["core"]
    for name in ("encode ours first", "encode ours again"):
        print(f"{name}: {tiktoken_s / seconds[name]['core']:.2f} times tiktoken (core)")
    versions = {m.__name__: m.__version__ for m in (glassllama, tiktoken, tokenizers)}
    facts = {"megabytes": round(megabytes, 2), "merges": flags.merges, "repeats": flags.repeats}
    rounded = {n: {k: round(s, 4) for k, s in taken.items()} for n, taken in seconds.items()}
    machine = {"machine": platform.machine(), "python": platform.python_version(), **versions}
    print(json.dumps({"benchmark": "tokenizing", **machine, **facts, "seconds": rounded}))


if __name__ == "__main__":
    main()
