"""Run an 8B model with 16 GB of weights and one layer in memory at a time.

    python benchmarks/stream_8b.py [--format safetensors|pth|gguf] [--layers 32] [--folder /tmp]

Writes a checkpoint of Llama 3 8B's shape in bfloat16 to a temporary folder, runs a prompt of 17
tokens through it in a new process, and prints the peak memory (including mapped pages), the
seconds, and their bound: bytes read / speed at which this file can be read. "cold": the system was
asked to drop the file from its page cache; "warm": the next run. Without --format all three formats
run, one after the other. Needs 16.1 GB of disk. Prints one line of JSON per format; exit code 1 if
the peak is over 1.5 GB.

The file contains real data, no holes. torch.save, the gguf package, or code that follows the
specification of safetensors writes the header with the offset of each tensor. Every tensor is then
filled from one block of normal numbers, from a different position, so that no two layers are equal.
Norm weights are ones, so the activations are of normal size. The predicted token has no meaning. It
differs between formats: the stored rows of q and k are the same, but safetensors uses the RoPE
layout "half" and the others "interleaved".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128_256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
PROMPT = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374,
          220]  # fmt: skip
TEXT = "the answer to the ultimate question of life, the universe, and everything is "
NUMBERS = (1 << 24) + 4099  # not a multiple of any row length, so that rows differ
SPREAD = 0.02  # standard deviation, usual for the initialization of such models
MAX_PEAK = 1.5e9  # bytes of memory
ONE = b"\x80\x3f"  # 1.0 as bfloat16
STRIDE = 2 * 1_000_003  # bytes between the positions in the block of two tensors

Shapes = dict[str, tuple[int, ...]]


def shapes_of(layers: int) -> Shapes:
    """glassllama's tensor names and shapes; the writers below translate the names."""
    from glassllama.weights.architectures.llama import LLAMA

    values = {**LLAMA_3_8B, "num_hidden_layers": layers}
    return LLAMA.shapes(LLAMA.config_from_hf(values).config)


def rename(shapes: Shapes, names: Any, layers: int) -> Shapes:
    from glassllama.weights.architectures.llama import LLAMA

    config = LLAMA.config_from_hf({**LLAMA_3_8B, "num_hidden_layers": layers}).config
    table = {tensor.ours: tensor.theirs for tensor in LLAMA.tensors(config, names)}
    return {table[ours]: shape for ours, shape in shapes.items()}


def empty_safetensors(folder: Path, layers: int) -> Path:
    """config.json, and a file with a header and no data yet: 8 bytes of length, JSON, the data."""
    config = {**LLAMA_3_8B, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in rename(shapes_of(layers), "hf", layers).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return folder


def empty_pth(folder: Path, layers: int) -> Path:
    """params.json, and a file written by torch.save without the data."""
    import torch

    params = {"dim": 4096, "n_layers": layers, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5,
              "vocab_size": 128_256, "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
              "rope_theta": 500_000.0}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    shapes = rename(shapes_of(layers), "meta", layers)
    # These 16 GB are never written to, so the system allocates no physical memory for them.
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save(state, folder / "consolidated.00.pth")
    return folder


def empty_gguf(folder: Path, layers: int) -> Path:
    import gguf

    bfloat16 = gguf.GGMLQuantizationType.BF16
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(14336)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(128_256)
    end = 0
    for name, shape in rename(shapes_of(layers), "gguf", layers).items():
        nbytes = 2 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes, raw_dtype=bfloat16)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + end)
    return path


EMPTY: dict[str, Callable[[Path, int], Path]] = {
    "safetensors": empty_safetensors,
    "pth": empty_pth,
    "gguf": empty_gguf,
}


def fill(path: Path) -> tuple[int, int]:
    """Write the numbers of every tensor -> bytes of all tensors, and bytes that a pass reads."""
    import ml_dtypes

    from glassllama.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    checkpoint.close()
    values = np.random.default_rng(0).normal(0, SPREAD, NUMBERS).astype(ml_dtypes.bfloat16)
    block = memoryview(values.tobytes())
    for number, info in enumerate(infos.values()):
        with open(info.path, "r+b") as file:
            file.seek(info.offset)
            if len(info.shape) == 1:
                file.write(ONE * info.shape[0])
                continue
            start, left = number * STRIDE % len(block), info.nbytes
            while left:
                wrote = file.write(block[start : start + left])
                start, left = 0, left - wrote
            os.fsync(file.fileno())
    total = sum(info.nbytes for info in infos.values())
    # A pass reads only one row per token of the embeddings.
    return total, total - infos["tok_embeddings.weight"].nbytes


def drop_page_cache(path: Path) -> None:
    """Ask the system to drop the file from its page cache, so that the disk is measured."""
    for file in [path] if path.is_file() else path.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bandwidth(path: Path) -> float:
    """Bytes per second of reading the largest file once, without the page cache."""
    largest = max([path] if path.is_file() else path.iterdir(), key=lambda p: p.stat().st_size)
    buffer = bytearray(1 << 23)
    drop_page_cache(path)
    with largest.open("rb", buffering=0) as file:
        started, total = time.perf_counter(), 0
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - started)


def peak_memory() -> int:
    """Peak resident bytes of this process, including mapped pages (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM"))


def forward(path: Path) -> dict[str, Any]:
    """One forward pass of the prompt through a checkpoint, in this process."""
    import torch

    from glassllama.weights.checkpoint import open_checkpoint
    from glassllama.weights.load import streamed_model

    imported = peak_memory()
    model = streamed_model(open_checkpoint(path))
    started = time.perf_counter()
    with torch.inference_mode():
        h = model.hidden(torch.tensor([PROMPT]))  # (1, T, C)
        logits = model.logits(h)  # (1, T, V)
    seconds = time.perf_counter() - started
    assert logits.isfinite().all()
    return {
        "seconds": round(seconds, 2),
        "peak_gb": round(peak_memory() / 1e9, 3),
        "imports_gb": round(imported / 1e9, 3),
        "hidden_rms": round(h.float().square().mean().sqrt().item(), 4),
        "next": logits[0, -1].argmax().item(),
    }


def walkthrough(path: Path) -> dict[str, Any]:
    """Run the `walkthrough` command, 18 steps: the same prompt as text, with Meta's vocabulary."""
    from importlib.util import find_spec

    wheel = find_spec("llama_models")
    if wheel is None or wheel.submodule_search_locations is None:
        sys.exit("--walkthrough needs the vocabulary in llama-models: pip install llama-models")
    shutil.copy(Path(wheel.submodule_search_locations[0]) / "llama3" / "tokenizer.model", path)
    command = [sys.executable, "-m", "glassllama", "walkthrough", TEXT, "-m", str(path),
               "--stream-layers", "--layer", "2", "--head", "5"]  # fmt: skip
    drop_page_cache(path)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as shown:
        running = subprocess.Popen(command, stdout=shown)
        _, status, used = os.wait4(running.pid, 0)
        shown.seek(0)
        text = shown.read()
    checks = sum(line.startswith("  ✓ ") for line in text.splitlines())
    steps = sum(line.startswith("━━ ") for line in text.splitlines())
    assert (status, steps) == (0, 18), f"status {status} after {steps} steps"
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 3),  # resident, including mapped pages
        "checks": checks,
    }


def estimate(path: Path, speed: float) -> dict[str, float]:
    """The memory estimated by weights/backend.py, and the time to read the file once."""
    from glassllama.weights.backend import estimate_memory
    from glassllama.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    peak = estimate_memory(checkpoint, tokens=len(PROMPT)).peaks["streamed"]
    nbytes = sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    return {"peak_gb": round(peak / 1e9, 3), "seconds": round(nbytes / speed, 2)}


def measure(form: str, layers: int, folder: Path, with_walkthrough: bool) -> dict[str, Any]:
    path = EMPTY[form](folder, layers)
    started = time.perf_counter()
    total, nbytes = fill(path)
    written = time.perf_counter() - started
    speed = bandwidth(path)
    drop_page_cache(path)
    planned = estimate(path, speed)
    results = {}
    for state in ("cold", "warm"):
        if state == "cold":
            drop_page_cache(path)
        done = subprocess.run(
            [sys.executable, __file__, "--forward", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        results[state] = json.loads(done.stdout)
    if with_walkthrough:
        results["walkthrough"] = walkthrough(path)
    return {
        "format": form,
        "layers": layers,
        "gb_file": round(total / 1e9, 2),
        "gb_read": round(nbytes / 1e9, 2),
        "disk_gb_s": round(speed / 1e9, 2),
        "bound_s": round(nbytes / speed, 2),
        "write_s": round(written, 1),
        "planned": planned,
        **results,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=tuple(EMPTY))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="folder for the temporary files of 16 GB")
    parser.add_argument(
        "--walkthrough", action="store_true", help="also run the walkthrough (with --format pth)"
    )
    parser.add_argument("--forward", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.forward:
        print(json.dumps(forward(arguments.forward)))
        return 0
    if arguments.walkthrough and arguments.format != "pth":
        parser.error("--walkthrough needs --format pth, the only format with a vocabulary")
    peaks = []
    for form in [arguments.format] if arguments.format else EMPTY:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            result = measure(form, arguments.layers, Path(folder), arguments.walkthrough)
        for state in ("cold", "warm"):
            run = result[state]
            peaks.append(run["peak_gb"] * 1e9)
            print(f"{form:12} {state}  peak {run['peak_gb']:.2f} GB   {run['seconds']:6.1f} s   "
                  f"bound {result['bound_s']:6.1f} s ({result['gb_read']} GB at "
                  f"{result['disk_gb_s']} GB/s)")  # fmt: skip
        if steps := result.get("walkthrough"):
            peaks.append(steps["peak_gb"] * 1e9)
            print(f"{form:12} steps peak {steps['peak_gb']:.2f} GB   {steps['seconds']:6.1f} s   "
                  f"{steps['checks']} checks passed")  # fmt: skip
        print(json.dumps(result))
    return 0 if max(peaks) <= MAX_PEAK else 1


if __name__ == "__main__":
    sys.exit(main())
