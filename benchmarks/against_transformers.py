"""Decode and prefill of the default model, compared with transformers on the same file.

    python benchmarks/against_transformers.py [--rounds 3] [--new 48] [--prompt 128]

Each round measures every program once; medians are printed, and one line of JSON. The bound for
decoding is the memory bandwidth, measured in the same run, divided by the bytes read per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from glassllama import hub
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.pack import pack

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from rows import Rows

Timed = tuple[float, float]  # prefill, decode: tokens per second


def theirs(path: Path, dtype: torch.dtype) -> Callable[[list[int], int], Timed]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)

    @torch.inference_mode()
    def run(prompt: list[int], new: int) -> Timed:
        start = time.perf_counter()
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(new):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
        return len(prompt) / (prefilled - start), new / (time.perf_counter() - prefilled)

    return run


def ours(path: Path) -> Callable[[list[int], int], Timed]:
    engine = pack(open_checkpoint(path))

    def run(prompt: list[int], new: int) -> Timed:
        cache = Rows(engine)
        start = time.perf_counter()
        logits = cache.next_logits([prompt])
        prefilled = time.perf_counter()
        for _ in range(new):
            logits = cache.next_logits([[int(logits[0].argmax())]])
        return len(prompt) / (prefilled - start), new / (time.perf_counter() - prefilled)

    return run


def bandwidth() -> float:
    """Bytes per second at which NumPy reads memory on one thread, the best of five."""
    data = np.ones(1 << 27, dtype=np.float32)  # 512 MB: larger than any cache
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.max()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    path = hub.resolve("smollm2-135m")
    runners = {
        "glassllama engine": ours(path),
        "transformers bfloat16": theirs(path, torch.bfloat16),
        "transformers float32": theirs(path, torch.float32),
    }
    prompt = [int(i) for i in np.random.default_rng(0).integers(100, 49_000, options.prompt)]
    times: dict[str, list[Timed]] = {name: [] for name in runners}
    for _ in range(options.rounds):
        for name, run in runners.items():
            times[name].append(run(prompt, options.new))
    rows = {
        name: {
            "prefill_tok_s": round(statistics.median(p for p, _ in runs), 1),
            "decode_tok_s": round(statistics.median(d for _, d in runs), 1),
        }
        for name, runs in times.items()
    }
    for name, row in rows.items():
        print(f"{name:24} prefill {row['prefill_tok_s']:8.1f}   decode {row['decode_tok_s']:7.1f}")
    bound = bandwidth() / path.stat().st_size
    print(f"{'bound (one thread reads)':24} {'':16}   decode {bound:7.1f}")
    print(json.dumps({"rows": rows, "bound_decode_tok_s": round(bound, 1), **vars(options)}))


if __name__ == "__main__":
    main()
