"""How far quantised arithmetic moves the answer: mean KL to exact mode, llama.cpp's beside ours.

    python benchmarks/fidelity.py [MODEL.gguf]          (needs the bench extra)

The exact mode answers three questions greedily; both read the same ids, and at every position the
divergence of their distribution from the exact one is taken. Prints a table and one line of JSON.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from glassllama import load

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a short story about a fox.",
)
NEW = 80  # tokens of each answer


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(T, V) logits -> natural logarithms of probabilities."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    exact, ours = load(model, exact=True), load(model)
    peer = llama_cpp.Llama(str(exact.path), n_ctx=1024, verbose=False, logits_all=True)
    rows = []
    for question in QUESTIONS:
        answer = exact.chat(question, max_tokens=NEW)
        ids = [*answer.prompt_ids, *answer.ids]
        truth = log_probs(exact.logits(ids))
        peer.n_tokens = 0
        peer.eval(ids)
        both = {"ours": ours.logits(ids), "llama.cpp": np.array(peer.scores[: len(ids)])}
        row = {
            name: float((np.exp(truth) * (truth - log_probs(logits))).sum(-1).mean())
            for name, logits in both.items()
        }
        rows.append({"ids": len(ids), **row})
        print(f"{len(ids):4} ids   ours {row['ours']:.4f}   llama.cpp {row['llama.cpp']:.4f}")
    print(json.dumps({"model": model, "mean_kl": rows}))


if __name__ == "__main__":
    main()
