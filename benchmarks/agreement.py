"""Agreement with llama.cpp on a real model: greedy ids, perplexity, ids of texts.

    python benchmarks/agreement.py [MODEL] [--out FILE]     (needs the extras bench and dev)

Compared are exact mode with llama.cpp in float32 (its own conversion of the file, with keys and
values in float32), and default mode with llama.cpp on the file as it is.

1. Exact mode continues twelve prompts greedily. All programs read the same ids, one by one, and the
   most likely id is compared at each. A difference is a near tie if both gaps together, by which
   each program prefers its own id, are at most 4·√2·σ. σ is the standard deviation of the
   difference of a logit in both programs, so √2·σ is that of the sum of both gaps.
2. Perplexity of the beginning of a play, in windows of 512 ids that begin with bos.
3. Ids of the texts that the tests of the tokenizers use, with special tokens parsed and not parsed.

Prints what it finds and one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from glassllama import load
from glassllama.base.interfaces import NewTokens
from glassllama.benchmark import machine_info, versions
from glassllama.generation.perplexity import log_probabilities
from glassllama.llm import LLM

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
from byte_level_families import mixed_text  # noqa: E402
from corpora import in_context, some  # noqa: E402
from llama_cpp_vocabulary import LlamaCppTokenizer  # noqa: E402

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are:\n1.",
    "Question: Why is the sky blue?\nAnswer:",
    "Die Hauptstadt von Deutschland heißt",
    "1, 1, 2, 3, 5, 8, 13,",
    "The recipe for pancakes is simple:",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name FROM users WHERE",
    "In 1969, Neil Armstrong",
    "日本の首都は",
)
NEW = 48  # ids after each prompt
TIE = 4.0 * math.sqrt(2.0)  # standard deviations
TEXT, CHARACTERS = TESTS / "romeo_and_juliet.txt", 20_000
WINDOW = 512
SEEDS = 100
CODE_POINTS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
Floats = NDArray[np.float64]
Decode = Callable[[Sequence[int]], Floats]  # ids -> logits after the last, (V,)


class Peer:
    """llama.cpp: the file as it is, or with weights, keys and values in float32."""

    def __init__(self, path: Path, *, float32: bool) -> None:
        kind = llama_cpp.GGML_TYPE_F32 if float32 else llama_cpp.GGML_TYPE_F16
        self.model = llama_cpp.Llama(
            str(path), n_ctx=WINDOW, verbose=False, logits_all=True, type_k=kind, type_v=kind
        )

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(T,) -> (T, V)"""
        self.model.reset()
        self.model.eval(list(ids))
        return np.asarray(self.model.scores[: len(ids)])

    def decoder(self) -> Decode:
        self.model.reset()

        def decode(ids: Sequence[int]) -> Floats:
            self.model.eval(list(ids))
            return np.array(self.model.scores[self.model.n_tokens - 1], np.float64)

        return decode


def decoder(llm: LLM) -> Decode:
    cache = llm.executor.new_cache()
    sequence = cache.add()
    return lambda ids: llm.executor.forward([NewTokens(sequence, ids)], cache)[0].astype(np.float64)


def widened(source: Path, target: Path) -> Path:
    """The same weights in float32, converted by llama.cpp."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    paths = (str(path).encode() for path in (source, target))
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) != 0:
        raise RuntimeError(f"llama.cpp could not write {target}")
    return target


# --- greedy ids -----------------------------------------------------------------------------------


def greedy(models: dict[str, LLM | Peer], pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """For each pair: how many of the most likely ids are equal, and where they are not."""
    exact: Any = models["exact"]
    found: dict[str, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    squares = dict.fromkeys(pairs, 0.0)
    for prompt in PROMPTS:
        steps = {
            name: model.decoder() if isinstance(model, Peer) else decoder(model)
            for name, model in models.items()
        }
        new = exact.encode(prompt)
        for place in range(NEW):
            rows = {name: step(new) for name, step in steps.items()}
            for pair, (ours, theirs) in pairs.items():
                apart = rows[ours] - rows[theirs]
                squares[pair] += float(apart.var())
                if row := difference(exact, rows[ours], rows[theirs]):
                    found[pair].append({"prompt": prompt, "place": place, **row})
            new = [int(rows["exact"].argmax())]
    total = len(PROMPTS) * NEW
    return {pair: summary(found[pair], math.sqrt(squares[pair] / total), total) for pair in pairs}


def difference(llm: LLM, ours: Floats, theirs: Floats) -> dict[str, Any] | None:
    """Both candidates with their logits of both programs, if the most likely ids differ."""
    a, b = int(ours.argmax()), int(theirs.argmax())
    if a == b:
        return None
    return {
        "texts": [llm.tokenizer.decode([id]) for id in (a, b)],
        "ours": ours[[a, b]].tolist(),
        "llama.cpp": theirs[[a, b]].tolist(),
        "gaps": float(ours[a] - ours[b] + theirs[b] - theirs[a]),
    }


def summary(rows: list[dict[str, Any]], sigma: float, total: int) -> dict[str, Any]:
    bar = TIE * sigma
    return {
        "ids": total, "different": len(rows), "sigma": sigma, "tie": bar,
        "no_ties": sum(row["gaps"] > bar for row in rows), "rows": rows,
    }  # fmt: skip


# --- perplexity -----------------------------------------------------------------------------------


def perplexity(models: dict[str, LLM | Peer], pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Perplexities, and for each pair ours minus theirs in nats, with its standard error."""
    exact: Any = models["exact"]
    ids = exact.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:CHARACTERS])
    nats: dict[str, list[Floats]] = {name: [] for name in models}
    for start in range(0, len(ids), WINDOW - 1):
        window = ids[start : start + WINDOW - 1]
        for name, model in models.items():
            logits = model.logits([exact.tokenizer.bos, *window[:-1]])
            nats[name].append(-log_probabilities(logits, window))
    costs_of = {name: np.concatenate(parts) for name, parts in nats.items()}
    more = {}
    for pair, (ours, theirs) in pairs.items():
        apart = costs_of[ours] - costs_of[theirs]
        more[pair] = [float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))]
    values = {name: math.exp(cost.mean()) for name, cost in costs_of.items()}
    return {
        "text": TEXT.name, "tokens": len(ids), "window": WINDOW, "values": values, "more": more,
    }  # fmt: skip


# --- tokenizer ------------------------------------------------------------------------------------


def corpora(llm: LLM) -> Iterator[tuple[str, list[str]]]:
    vocabulary = range(llm.tokenizer.vocab_size)
    yield "every code point", [*in_context(CODE_POINTS, "a{0} {0}{0}")]
    yield "every token", [llm.tokenizer.decode([id]) for id in vocabulary]
    yield "mixed texts", [mixed_text(seed) for seed in range(SEEDS)]
    yield "code", some("code")
    yield "prose", some("prose")


def tokenizer(llm: LLM) -> list[dict[str, Any]]:
    theirs, rows = LlamaCppTokenizer(llm.path), []
    for name, texts in corpora(llm):
        for specials in (False, True):
            different = [
                text for text in texts
                if llm.tokenizer.encode(text, specials=specials)
                != theirs.encode(text, specials=specials)
            ]  # fmt: skip
            rows.append({
                "corpus": name, "specials": specials, "texts": len(texts),
                "characters": sum(map(len, texts)), "different": len(different),
            })  # fmt: skip
            print(f"{name}, specials {specials}: {len(different)} of {len(texts)} texts differ")
            for text in different[:3]:
                print(f"  {text[:70]!r}")
    return rows


PAIRS = {"float32": ("exact", "llama.cpp float32"), "as stored": ("default", "llama.cpp")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="gemma3-270m")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    machine = machine_info()
    exact, default = load(flags.model, exact=True), load(flags.model)
    with tempfile.TemporaryDirectory() as folder:
        wide = widened(exact.path, Path(folder) / "float32.gguf")
        models = {
            "exact": exact, "default": default,
            "llama.cpp float32": Peer(wide, float32=True),
            "llama.cpp": Peer(exact.path, float32=False),
        }  # fmt: skip
        found = {"greedy": greedy(models, PAIRS), "perplexity": perplexity(models, PAIRS)}
    for pair, row in found["greedy"].items():
        print(f"{pair}: {row['different']} of {row['ids']} ids differ, {row['no_ties']} no ties")
    print(found["perplexity"])
    line = {
        "model": Path(flags.model).name,
        "machine": machine,
        "versions": versions() | {"llama.cpp": llama_cpp.__version__},
        **found,
        "tokenizer": tokenizer(exact),
    }
    text = json.dumps(line, default=float)  # of NumPy's numbers
    print(text)
    if flags.out:
        with flags.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
