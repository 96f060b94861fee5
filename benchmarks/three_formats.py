"""The same random 1B Llama in three formats: the greedy ids must be equal; time and memory to load.

    python benchmarks/three_formats.py [--layers 16] [--backend engine|torch]

transformers, torch.save and gguf write the same bfloat16 weights in three formats. Each is loaded
in a new process in float32 and continues a prompt greedily. Prints a table and one line of JSON;
exit code 1 if the ids differ. Needs 8 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LLAMA_32_1B = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128_256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
    },
}  # fmt: skip
PROMPT = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323]
NEW = 16


def write_all(folder: Path, layers: int) -> dict[str, Path]:
    import gguf

    import tiny_models

    model = tiny_models.hf_model(**{**LLAMA_32_1B, "num_hidden_layers": layers}).bfloat16()
    meta = tiny_models.write_meta(model, folder / "meta", multiple_of=8192)
    bfloat16 = gguf.GGMLQuantizationType.BF16
    return {
        "safetensors": tiny_models.write_hf(model, folder / "hf"),
        "pth": meta,
        "gguf": tiny_models.write_gguf(model, folder / "model.gguf", bfloat16),
    }


def peak_memory() -> int:
    """Peak resident bytes of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM"))


def continue_one(path: Path, backend: str) -> dict[str, Any]:
    """Load one checkpoint in float32 and continue PROMPT greedily."""
    from glassllama.generation import GenerationSettings, generate
    from glassllama.weights.checkpoint import open_checkpoint

    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    if backend == "engine":
        from glassllama.weights.pack import pack

        executor: Any = pack(checkpoint, exact=True)
    else:
        import torch

        from glassllama.weights.load import TorchExecutor, load_model

        executor = TorchExecutor(load_model(checkpoint, dtype=torch.float32))
    load_s = time.perf_counter() - start
    ids = [s.id for s in generate(executor, [PROMPT], GenerationSettings(max_tokens=NEW))]
    return {"ids": ids, "load_s": round(load_s, 2), "peak_gb": round(peak_memory() / 1e9, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--backend", choices=("engine", "torch"), default="engine")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(continue_one(arguments.one, arguments.backend)))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--backend", arguments.backend, "--one"]
        for name, path in write_all(Path(folder), arguments.layers).items():
            done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
            results[name] = json.loads(done.stdout)
            print(f"{name:12} load {results[name]['load_s']:6.2f} s   "
                  f"peak {results[name]['peak_gb']:5.2f} GB   {results[name]['ids']}")  # fmt: skip
    same = len({tuple(result["ids"]) for result in results.values()}) == 1
    print(json.dumps({"layers": arguments.layers, "backend": arguments.backend,
                      "identical": same, "results": results}))  # fmt: skip
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
