"""Accuracy of quantized arithmetic: glassllama and llama.cpp compared with exact mode.

    python benchmarks/fidelity.py [MODEL.gguf] [--new 80] [--out FILE]      (needs the bench extra)

Exact mode answers eight questions greedily. glassllama and llama.cpp then process the same ids, and
the KL divergence of their distribution from the exact one is computed at every id of the answer
(not of the prompt: most of a prompt is the same chat template in all eight). Then all three process
the LICENSE file in windows of 512 ids, the first of which is not scored: KL divergence and
perplexity. Differences between glassllama and llama.cpp are printed with their standard error, over
questions or tokens; differences of about one standard error are not significant. Prints a table and
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from glassllama import load
from glassllama.benchmark import machine_info, versions
from glassllama.llm import LLM

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short story about a fox.",
    "How do I reverse a list in Python? Give an example.",
    "Explain photosynthesis to a child.",
    "List five animals that live in the sea.",
    "What is 17 times 23? Think step by step.",
    "Translate into French: The weather is nice today.",
)
TEXT = Path(__file__).parent.parent / "LICENSE"
BOTH = ("ours", "llama.cpp")
WINDOW = 512  # ids in one forward pass
Floats = NDArray[np.float64]


class Models:
    """Exact mode, default mode and llama.cpp: each maps ids -> (T, V) logits."""

    def __init__(self, model: str) -> None:
        self.exact, self.ours = load(model, exact=True), load(model)
        self.peer = llama_cpp.Llama(
            str(self.exact.path), n_ctx=2 * WINDOW, verbose=False, logits_all=True
        )

    def log_probs(self, ids: list[int]) -> dict[str, Floats]:
        """Natural logarithms of probabilities, (T, V), of each model."""
        self.peer.n_tokens = 0
        self.peer.eval(ids)
        return {
            "exact": log_probs(self.exact.logits(ids)),
            "ours": log_probs(self.ours.logits(ids)),
            "llama.cpp": log_probs(np.array(self.peer.scores[: len(ids)])),
        }


def log_probs(logits: NDArray[np.float32]) -> Floats:
    """(T, V) logits -> natural logarithms of probabilities."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    probs: Floats = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return probs


def divergence(truth: Floats, other: Floats) -> Floats:
    """KL at every position, in nats: (T, V) twice -> (T,)."""
    each: Floats = (np.exp(truth) * (truth - other)).sum(-1)
    return each


def with_error(differences: Sequence[float] | Floats) -> tuple[float, float]:
    """Mean, and its standard error."""
    return float(np.mean(differences)), float(np.std(differences, ddof=1) / len(differences) ** 0.5)


def answers(models: Models, new: int) -> Iterator[dict[str, Any]]:
    """For every question: the number of ids in the answer, and both mean divergences."""
    for question in QUESTIONS:
        answer = models.exact.chat(question, max_tokens=new)
        ids = [*answer.prompt_ids, *answer.ids]
        # positions whose logits predict the ids of the answer
        chosen = slice(len(answer.prompt_ids) - 1, len(ids) - 1)
        found = {name: probs[chosen] for name, probs in models.log_probs(ids).items()}
        row = {name: float(divergence(found["exact"], found[name]).mean()) for name in BOTH}
        count = len(answer.ids)
        print(f"{count:4} ids   ours {row['ours']:.5f}   llama.cpp {row['llama.cpp']:.5f}")
        yield {"ids": count, **row}


def costs(models: Models, ids: list[int]) -> dict[str, Floats]:
    """Negative log-likelihood of every scored id by model; `KL NAME` are the divergences there."""
    found: dict[str, list[Floats]] = {}
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW]
        following, at = window[1:], np.arange(len(window) - 1)
        read = models.log_probs(window)
        for name, probs in read.items():
            found.setdefault(name, []).append(-probs[at, following])
            found.setdefault(f"KL {name}", []).append(divergence(read["exact"], probs)[at])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def text_ids(llm: LLM) -> list[int]:
    return llm.tokenizer.encode(TEXT.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--new", type=int, default=80, help="tokens of each answer")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    machine, models = machine_info(), Models(flags.model)
    found = compare(models, flags.new)
    line = {
        "model": Path(flags.model).name,
        "machine": machine,
        "versions": versions() | {"llama.cpp": llama_cpp.__version__},
        **found,
    }
    print(json.dumps(line))
    if flags.out:
        with flags.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def compare(models: Models, new: int) -> dict[str, Any]:
    """All measurements, also printed. `more`: ours minus llama.cpp's; `error`: standard error."""
    rows = list(answers(models, new))
    means = {name: float(np.mean([row[name] for row in rows])) for name in BOTH}
    answered = {**means, **differing([row["ours"] - row["llama.cpp"] for row in rows])}
    print(summary("answers, mean KL", answered))
    nats = costs(models, text_ids(models.exact))
    divergences = {name: float(nats[f"KL {name}"].mean()) for name in BOTH}
    read = {**divergences, **differing(nats["KL ours"] - nats["KL llama.cpp"])}
    print(summary(f"{TEXT.name}, mean KL", read))
    perplexity = {name: math.exp(nats[name].mean()) for name in ("exact", *BOTH)}
    print(f"{TEXT.name}, perplexity: " + ", ".join(f"{n} {p:.4f}" for n, p in perplexity.items()))
    cost = differing(nats["ours"] - nats["llama.cpp"])
    print(f"ours minus llama.cpp's {cost['more']:+.2%} ± {cost['error']:.2%}")
    return {
        "answers": rows,
        "answers_kl": answered,
        "text_kl": read,
        "tokens": len(nats["ours"]),
        "perplexity": {**perplexity, **cost},
    }


def differing(differences: Sequence[float] | Floats) -> dict[str, float]:
    more, error = with_error(differences)
    return {"more": more, "error": error}


def summary(what: str, kl: dict[str, float]) -> str:
    return (
        f"{what}: ours {kl['ours']:.5f}, llama.cpp {kl['llama.cpp']:.5f}, "
        f"difference {kl['more']:+.5f} ± {kl['error']:.5f}"
    )


if __name__ == "__main__":
    main()
