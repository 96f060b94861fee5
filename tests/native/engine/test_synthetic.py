"""Tiny models of benchmarks/synthetic.py: a mix of K types, and models with faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from glassllama.base.config import Llama3Scaling, LlamaConfig
from glassllama.base.errors import FormatError, GenerationError
from glassllama.formats.blocks import BLOCKS
from glassllama.generation import GenerationSettings, generate, make_sampler
from glassllama.native.engine.layout import WeightType
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from rows import Rows
from synthetic_models import padded_module, synthetic_module
from tolerances import assert_logits, eight_bit_error, rms_difference

CONFIG = LlamaConfig(
    dim=256, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=32, ffn_dim=768, vocab_size=303,
    max_seq_len=512, norm_eps=1e-5, rope_theta=500_000.0, rope_layout="interleaved",
    tie_embeddings=True, rope_scaling=Llama3Scaling(factor=32.0),
)  # fmt: skip
POOL = 1 << 17
IDS = [int(i) for i in np.random.default_rng(5).integers(0, 303, 40)]


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    return synthetic_module()


def logits(executor: Any) -> Any:
    return Rows(executor).all_logits(IDS)


BLOCK_TYPES = [kind.name for kind in WeightType if not kind.is_float]


@pytest.mark.parametrize("kind", ["Q4_K_M", *BLOCK_TYPES])
def test_a_whole_model_from_file_to_logits(
    kind: str, synthetic: ModuleType, tmp_path: Path
) -> None:
    """Engine against reference. Exact mode: float32 rounding. Default: rounding of int8 inputs and
    int16 keys."""
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "x.gguf", CONFIG, kind, pool=POOL))
    model = load_model(checkpoint, dtype=torch.float32)
    reference = logits(TorchExecutor(model))
    assert 1 < reference.std() < 4  # of normal size: see `LOGIT_WIDTH`
    assert_logits(logits(pack(checkpoint, exact=True)), reference, CONFIG)
    engine = pack(checkpoint)
    packed = {matrix.weight_type.name for matrix in engine.weights.matrices}
    assert packed == {"Q4_K_M": {"Q4_K", "Q6_K"}}.get(kind, {kind})
    assert not any("another format" in line for line in engine.describe())
    eight_bit = eight_bit_error(model, torch.tensor([IDS]))
    assert rms_difference(logits(engine), reference) <= 1.5 * eight_bit


@pytest.mark.parametrize("values", ["Q6_K", "Q8_0", "Q5_K", "Q2_K", "IQ4_XS"])
def test_k_quants_are_bit_identical_in_any_chunks(
    values: str, synthetic: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in chunks, in a batch, on one thread; one matrix of a layer has another format, so
    that its inputs are needed in two formats."""

    def mixed(name: str, wanted: str, config: LlamaConfig) -> str:
        return (
            values if name.endswith(("attention.wv.weight", "feed_forward.up.weight")) else "Q4_K"
        )

    monkeypatch.setattr(synthetic, "type_of", mixed)
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "x.gguf", CONFIG, "Q4_K", pool=POOL))
    engine = pack(checkpoint)
    whole = logits(engine)
    assert (logits(pack(checkpoint, threads=1)) == whole).all()
    for pieces in ([1] * 40, [3, 5, 2, 4, 9, 17], [33, 7]):
        cache, parts, past = Rows(engine), [], 0
        for count in pieces:
            parts.append(cache.all_logits(IDS[past : past + count]))
            past += count
        assert (np.concatenate(parts) == whole).all()
    rows = [IDS, IDS[:1], IDS[:18], IDS[:6]]
    together = Rows(engine, len(rows)).next_logits(rows)
    assert (together == whole[[len(ids) - 1 for ids in rows]]).all()


def test_q4_k_m_mixes_as_llama_cpp_does(synthetic: ModuleType, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "x.gguf", CONFIG, "Q4_K_M", pool=POOL)
    tensors = gguf.GGUFReader(str(tmp_path / "x.gguf")).tensors
    six = {t.name for t in tensors if t.tensor_type == gguf.GGMLQuantizationType.Q6_K}
    assert "token_embd.weight" in six
    layers = {int(name.split(".")[1]) for name in six if "ffn_down" in name}
    assert layers == {0, 3, 6, 7}  # of eight: the first and last eighth, and every third between
    assert {int(name.split(".")[1]) for name in six if "attn_v" in name} == layers


def test_blocks_are_dequantized_as_by_the_gguf_package(synthetic: ModuleType) -> None:
    for kind in ("BF16", *BLOCK_TYPES):
        pool = synthetic.Pool(kind, numbers=1 << 16)
        raw = pool.cut(3, (64, 512), 0.05)
        numbers = gguf.quants.dequantize(raw.reshape(64, -1), pool.kind)
        assert numbers.shape == (64, 512)
        width = 2**-4 if kind == "MXFP4" else 0.05  # a power of two
        groups = 64 * 512 / (32 if kind in synthetic.RANDOM else 1)  # of random scale and minimum
        assert abs(numbers.mean()) < 5 * width / groups**0.5  # five standard deviations
        assert 0.9 * width < numbers.std() < 1.1 * width


@pytest.mark.parametrize("kind", ["F16", "BF16", *BLOCK_TYPES])
@pytest.mark.parametrize("tier", ["best", "plain"])
def test_nan_weights_end_generation_with_an_error(
    kind: str, tier: str, tmp_path: Path, synthetic: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every format, a block whose scale is NaN is detected."""
    if tier == "plain":
        monkeypatch.setenv("GLASSLLAMA_TIER", "plain")
    path = synthetic.write(tmp_path / "x.gguf", CONFIG, kind, pool=POOL)
    set_nan(path, "blk.3.ffn_up.weight")
    engine = pack(open_checkpoint(path))
    settings = GenerationSettings(sampler=make_sampler(), max_tokens=4)
    with pytest.raises(GenerationError, match=r"(?i)nan"):
        list(generate(engine, [IDS], settings))


def set_nan(path: Path, name: str) -> None:
    """Set the first scale, or number, of a tensor to NaN."""
    reader = gguf.GGUFReader(str(path), "r+")
    [tensor] = [tensor for tensor in reader.tensors if tensor.name == name]
    data = tensor.data.reshape(-1).view(np.uint8)
    kind = tensor.tensor_type.name
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    bits = {"BF16": 0x7FC0, "MXFP4": 0xFF}.get(kind, 0x7E00)  # MXFP4: an exponent of 255
    data[at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
    reader.data.flush()


def change_type(path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Change the type of one tensor in the header."""
    data, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # dimensions, sizes
    path.write_bytes(data[:at] + int(kind).to_bytes(4, "little") + data[at + 4 :])


def test_padding_a_model_with_zeros_changes_no_logits(
    tmp_path: Path, synthetic: ModuleType
) -> None:
    """benchmarks/padded.py, which is used to measure the accuracy of K-quants."""
    padded = padded_module()
    narrow = replace(CONFIG, dim=160, n_heads=5, n_kv_heads=5, ffn_dim=288)
    source = open_checkpoint(synthetic.write(tmp_path / "narrow.gguf", narrow, "F32", pool=POOL))
    wide = open_checkpoint(padded.write(tmp_path / "wide.gguf", source, words=False))
    sizes = wide.config.dim, wide.config.n_heads * wide.config.head_dim, wide.config.ffn_dim
    assert sizes == (256, 256, 512)
    before, after = (logits(pack(checkpoint, exact=True)) for checkpoint in (source, wide))
    assert_logits(after, before, narrow)


def test_every_block_type_of_files_is_computed_as_stored() -> None:
    assert set(BLOCKS) == set(BLOCK_TYPES)


def test_an_unknown_type_is_a_clean_error(tmp_path: Path, synthetic: ModuleType) -> None:
    path = synthetic.write(tmp_path / "x.gguf", CONFIG, "Q8_0", pool=POOL)
    change_type(path, gguf.GGMLQuantizationType.IQ3_S)
    with pytest.raises(FormatError, match=r"IQ3_S.*cannot be read.*such as Q8_0"):
        open_checkpoint(path)
