"""Speed of speculation by prompt lookup, and a check that it changes no answer.

    python benchmarks/speculation.py [MODEL] [--rounds 5] [--max-tokens 160] [--out FILE.jsonl]

Each prompt is answered with and without speculation, alternately, greedily and at temperature 0.6.
The table has the best tokens per second over the rounds (other programs can only slow a run down),
the share of guessed ids that were accepted, and the ids per step. Prints one line of JSON at the
end and appends it to --out. Exit code 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from glassllama import __version__, load
from glassllama.llm import DEFAULT_MODEL, LLM

STORY = (
    "The lighthouse of Cape Mornay was built in 1867 by Elias Thornbury, a mason from Leeds. Its "
    "lamp burned whale oil until 1891, when Thornbury's daughter Ada brought electricity to the "
    "cape. In the storm of March 1903 the keeper, Jonas Pell, kept the lamp alight for three days "
    "and saved the crew of the steamer Halcyon. Today the tower is a museum, and every March the "
    "people of Mornay light a fire on the cliff in memory of Jonas Pell."
)
CODE = """def total_price(items, tax_rate):
    total = 0
    for item in items:
        if item["quantity"] > 0:
            total += item["price"] * item["quantity"]
    return total * (1 + tax_rate)


def average_price(items):
    if not items:
        return 0
    return sum(item["price"] for item in items) / len(items)
"""
PROMPTS = {
    "free chat": [
        "Why is the sky blue?",
        "Write a short poem about autumn.",
        "What should I cook tonight? Give me three ideas.",
        "Explain what a neural network is to a child.",
    ],
    "quoting": [
        f"Repeat this text word for word:\n\n{STORY}",
        f"Correct the spelling of this text, and change nothing else:\n\n{STORY}",
    ],
    "summarizing": [
        f"Summarize this text in three sentences:\n\n{STORY}",
        f"Who was Jonas Pell? Answer from this text, and quote it:\n\n{STORY}",
    ],
    "code": [
        f"Add a docstring to each function and write out the whole code:\n\n```python\n{CODE}```",
        f"Rename `items` to `goods` everywhere:\n\n```python\n{CODE}```",
    ],
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 0.6": {"temperature": 0.6, "top_p": 0.9, "seed": 7},
}


class DifferentAnswerError(Exception):
    """Speculation has changed an answer."""


def answer(llm: LLM, prompt: str, limit: int, speculation: bool, options: dict[str, Any]) -> Any:
    return llm.chat(prompt, max_tokens=limit, speculation=speculation, **options)


def compare(llm: LLM, prompt: str, limit: int, rounds: int, options: dict[str, Any]) -> Any:
    """Seconds per token without and with speculation, and the counts of the latter."""
    plain, speculative = [], []
    for _ in range(rounds):
        one = answer(llm, prompt, limit, False, options)
        other = answer(llm, prompt, limit, True, options)
        if one.ids != other.ids:
            raise DifferentAnswerError(prompt)
        plain.append(one.timings.decode_s)
        speculative.append(other.timings.decode_s)
    return min(plain), min(speculative), other.timings


def row(llm: LLM, kind: str, sampling: str, limit: int, rounds: int) -> dict[str, Any]:
    results = [compare(llm, p, limit, rounds, SAMPLING[sampling]) for p in PROMPTS[kind]]
    tokens = sum(timings.decode_tokens for *_, timings in results)
    drafted = sum(timings.drafted for *_, timings in results)
    accepted = sum(timings.accepted for *_, timings in results)
    return {
        "prompts": kind,
        "sampling": sampling,
        "tokens": tokens,
        "tok_s": tokens / sum(plain for plain, *_ in results),
        "tok_s_speculation": tokens / sum(speculative for _, speculative, _ in results),
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_step": tokens / (tokens - accepted),
    }


def line(found: dict[str, Any]) -> str:
    gain = found["tok_s_speculation"] / found["tok_s"]
    share = found["accepted"] / found["drafted"] if found["drafted"] else 0
    return (
        f"{found['prompts']:11} {found['sampling']:16} {found['tok_s']:8.0f} "
        f"{found['tok_s_speculation']:8.0f} {gain:6.2f} {found['drafted']:8} {share:7.0%} "
        f"{found['tokens_per_step']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    llm = load(given.model)
    answer(llm, PROMPTS["quoting"][0], 32, True, {})  # compiles and warms up
    print("prompts     sampling            tok/s    specul.  ratio  guessed accepted ids/step")
    rows = []
    for kind in PROMPTS:
        for sampling in SAMPLING:
            rows.append(row(llm, kind, sampling, given.max_tokens, given.rounds))
            print(line(rows[-1]), flush=True)
    result = {
        "benchmark": "speculation", "version": __version__, "model": llm.name,
        "machine": platform.processor() or platform.machine(), "rounds": given.rounds,
        "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))
    if given.out is not None:
        with given.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    try:
        main()
    except DifferentAnswerError as difference:
        sys.exit(f"speculation changed the answer to this prompt: {difference}")
