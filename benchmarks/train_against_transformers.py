"""Speed of training steps of a 30 M Llama at context 256 on a CPU, compared with transformers.

    python benchmarks/train_against_transformers.py [--rounds 5] [--batch 8]

Both use the same sizes, batch and AdamW. transformers runs in float32, and in bfloat16 with
PyTorch's autocast. Steps alternate. Prints medians and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from glassllama.train.api import prepare
from glassllama.train.corpus import open_data
from glassllama.train.loop import train_step
from glassllama.train.model import count_parameters
from glassllama.train.settings import from_tables

CONTEXT, VOCABULARY = 256, 8192
SIZES = {
    "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64, "dim": 512, "ffn_dim": 1408,
    "norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_embeddings": True,
}  # fmt: skip


def ours(batch: int, precision: str, folder: Path) -> tuple[Callable[[], object], int]:
    settings = from_tables(
        "30 M",
        {
            "model": {"kind": "llama", **SIZES},
            "data": {"corpus": "shakespeare", "tokenizer": f"bpe:{VOCABULARY}",
                     "context": CONTEXT, "batch": batch},
            "optimizer": {"lr": 1e-4},
            "schedule": {"steps": 10_000},
            "run": {"precision": precision},
        },
    )  # fmt: skip
    run = prepare(settings, open_data(settings.data, folder), folder)
    return lambda: train_step(run), count_parameters(run.model)


def theirs(batch: int, autocast: bool) -> tuple[Callable[[], object], int]:
    config = transformers.LlamaConfig(
        hidden_size=SIZES["dim"], num_hidden_layers=SIZES["n_layers"],
        num_attention_heads=SIZES["n_heads"], num_key_value_heads=SIZES["n_kv_heads"],
        intermediate_size=SIZES["ffn_dim"], vocab_size=VOCABULARY, tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        ids = torch.randint(VOCABULARY, (batch, CONTEXT))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            "glassllama, bfloat16 products": ours(options.batch, "bfloat16", Path(folder) / "a"),
            "glassllama, float32": ours(options.batch, "float32", Path(folder) / "b"),
            "transformers, float32": theirs(options.batch, autocast=False),
            "transformers, autocast": theirs(options.batch, autocast=True),
        }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(options.rounds + 1):  # the first warms up
        for name, (step, _) in runners.items():
            started = time.perf_counter()
            step()
            if number:
                rates[name].append(options.batch * CONTEXT / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians["transformers, float32"]
    print("| training step | parameters | tok/s | of transformers |\n|---|--:|--:|--:|")
    for name, (_, count) in runners.items():
        print(f"| {name} | {count:,} | {medians[name]:,.0f} | {medians[name] / base:.2f} |")
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    print(json.dumps({"tok_s": medians, "rounds": options.rounds, "batch": options.batch} | about))


if __name__ == "__main__":
    main()
