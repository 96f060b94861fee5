"""Weights are loaded tensor by tensor, and mapped pages of the file are released."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forks import run_script
from synthetic_models import synthetic_module
from tiny_models import hf_model, write_gguf, write_hf, write_meta

SHAPE = {
    "hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 2736, "vocab_size": 16_000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
# Bytes allowed in addition to imports, the loaded model and its largest tensor in float32. The file
# has 253 MB, so mapped pages that are not released exceed this. The first run compiles the engine.
ALLOWED, ALLOWED_COMPILING = 100e6, 200e6

MEASURE = """
import sys
{imports}
def high_water():  # of this process only: getrusage includes the parent's peak
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = high_water()
{load}
print(high_water() - before)
"""
TORCH = (
    "import torch; from glassllama.weights.load import *\n"
    "from glassllama.weights.checkpoint import *",
    "model = load_model(open_checkpoint(sys.argv[1]))",
)
ENGINE = (
    "import numba; from glassllama.weights.pack import *\n"
    "from glassllama.weights.checkpoint import *",
    "model = pack(open_checkpoint(sys.argv[1]))",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model of about 120 M parameters, bfloat16, in three formats."""
    base = tmp_path_factory.mktemp("memory")
    model = hf_model(**SHAPE).bfloat16()
    return {
        "safetensors": write_hf(model, base / "hf"),
        "pth": write_meta(model, base / "meta", multiple_of=16),  # 2736: 2/3 of 4·1024, rounded
        "gguf": write_gguf(model, base / "x.gguf", gguf.GGMLQuantizationType.BF16),
    }


def peak(script: tuple[str, str], path: Path) -> int:
    """The increase of the peak of a new process by loading, in bytes."""
    return int(run_script(MEASURE.format(imports=script[0], load=script[1]), path))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "pth", "gguf"])
def test_peak_is_the_model_and_one_tensor(form: str, folders: dict[str, Path]) -> None:
    with torch.device("meta"):
        sizes = [p.numel() for p in LlamaForCausalLM(LlamaConfig(**SHAPE)).parameters()]
    in_bfloat16, in_float32 = 2 * sum(sizes), 4 * sum(sizes)
    assert peak(TORCH, folders[form]) <= in_bfloat16 + 4 * max(sizes) + ALLOWED
    assert peak(ENGINE, folders[form]) <= in_float32 + 4 * max(sizes) + ALLOWED_COMPILING


PACKED = """
import sys
from glassllama.base.interfaces import logits_of_text
import numba
from pathlib import Path
from glassllama.weights import pack, packed_cache
from glassllama.weights.checkpoint import open_checkpoint
packed_cache.WORTH_KEEPING, packed_cache.RECENT = int(sys.argv[2]), -1e18
packed_cache.folder = lambda: Path(sys.argv[1]).parent / "packed"
engine = pack.pack(open_checkpoint(sys.argv[1]))
logits_of_text(engine, [1, 2, 3])
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(peak, engine.weights.nbytes, *engine.notes)
"""
MOST_BESIDE = 450e6  # a large model may take 600 MB in addition to its file, including compilation


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("worth_keeping", [0, 10**12], ids=["on disk", "in memory"])
def test_a_large_quantized_model_takes_little_more_than_its_file(
    worth_keeping: int, tmp_path: Path
) -> None:
    """Half a gigabyte: with source pages or a copy kept, the peak would be twice that."""
    synthetic = synthetic_module()
    config = synthetic.shape("1b", vocab_size=32_000, layers=7)
    path = synthetic.write(tmp_path / "x.gguf", config, "Q8_0")
    size = path.stat().st_size
    assert size > MOST_BESIDE
    for _ in range(2):  # packed, then mapped
        peak, nbytes, *notes = run_script(PACKED, path, worth_keeping).split()
        assert not notes
        assert int(nbytes) <= 1.01 * size
        assert int(peak) <= size + MOST_BESIDE
