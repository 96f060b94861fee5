"""Float checkpoints of any format, quantized when the engine loads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from glassllama.base.errors import ConfigError, MemoryShortError
from glassllama.base.interfaces import TensorFile, TensorInfo
from glassllama.formats.blocks import dequantize
from glassllama.llm import load
from glassllama.native.engine.executor import Engine
from glassllama.native.engine.layout import Matrix
from glassllama.weights import pack as packing
from glassllama.weights.backend import CHOICES, PACKING_MEMORY, PackingPlan, packing_plan
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.pack import choose_packing, pack
from native.engine.unpacked import read_rows
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf, write_hf, write_meta
from tolerances import eight_bit_tolerance, rms_difference

# A shape that params.json can express, with rows of whole blocks and different sizes.
WIDE = {**META_SHAPE, "hidden_size": 192, "intermediate_size": 544, "vocab_size": 203}
IDS = [5, 99, 3, 7, 120, 11, 64]
LAYERS = META_SHAPE["num_hidden_layers"]
F16, BF16 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in the formats of Meta, Hugging Face and GGUF."""
    base = tmp_path_factory.mktemp("floats")
    model = hf_model(**WIDE)
    return {
        "pth": write_meta(model.bfloat16(), base / "pth", multiple_of=272),
        "hf": write_hf(model.bfloat16(), base / "hf"),
        "bf16": write_gguf(model, base / "bf16.gguf", BF16),
        "f16": write_gguf(model, base / "f16.gguf", F16),
        "f32": write_gguf(model, base / "f32.gguf"),
        "q8_0": write_gguf(model, base / "q8_0.gguf", gguf.GGMLQuantizationType.Q8_0),
        "q4_0": write_gguf(model, base / "q4_0.gguf", gguf.GGMLQuantizationType.Q4_0),
    }


def logits(engine: Engine) -> Any:
    return Rows(engine).all_logits(IDS)


def rows_of(matrix: Matrix) -> Any:
    return read_rows(matrix)


def packed_as(engine: Engine) -> set[str]:
    weights = engine.weights
    return {matrix.weight_type.name for matrix in (*weights.matrices, weights.embeddings)}


@pytest.mark.parametrize("form", ["pth", "bf16", "f16", "f32"])
def test_q8_0_at_load_is_bit_identical_to_a_q8_0_file(form: str, models: dict[str, Path]) -> None:
    """The file was quantized by the gguf package. (bfloat16 numbers are exact in all formats.)"""
    at_load = pack(open_checkpoint(models[form]), quantize="q8_0")
    file = pack(open_checkpoint(models["q8_0"]))
    assert packed_as(at_load) == {"Q8_0"}
    for ours, theirs in zip(at_load.weights.matrices, file.weights.matrices, strict=True):
        assert (rows_of(ours) == rows_of(theirs)).all()
    assert rms_difference(logits(at_load), logits(file)) <= eight_bit_tolerance(LAYERS)
    assert any("as Q8_0" in note for note in at_load.notes)


def test_q8_0_at_load_of_a_hugging_face_folder(models: dict[str, Path]) -> None:
    """Rows of q and k have another order there, so sums round differently."""
    ours = logits(pack(open_checkpoint(models["hf"]), quantize="q8_0"))
    theirs = logits(pack(open_checkpoint(models["pth"]), quantize="q8_0"))
    assert rms_difference(ours, theirs) <= eight_bit_tolerance(LAYERS)


def test_q4_0_quantizes_embeddings_and_output_to_eight_bits(models: dict[str, Path]) -> None:
    engine, file = (
        pack(open_checkpoint(models["f32"]), quantize="q4_0"),
        pack(open_checkpoint(models["q4_0"])),
    )
    assert packed_as(engine) == {"Q4_0", "Q8_0"}
    assert (
        engine.weights.embeddings.weight_type.name
        == engine.weights.matrices[-1].weight_type.name
        == "Q8_0"
    )
    for ours, theirs in zip(engine.weights.matrices[:-1], file.weights.matrices[:-1], strict=True):
        assert (rows_of(ours) == rows_of(theirs)).all()


def test_no_quantization_by_default_if_there_is_enough_memory(models: dict[str, Path]) -> None:
    assert packed_as(pack(open_checkpoint(models["bf16"]))) == {"BF16"}
    assert packed_as(pack(open_checkpoint(models["bf16"]), quantize="none")) == {"BF16"}


def test_rows_that_are_not_whole_blocks_are_not_quantized(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf(hf_model().bfloat16(), tmp_path))  # 48 and 140 columns
    engine = pack(checkpoint, quantize="q8_0")
    assert packed_as(engine) == {"BF16"}


def test_a_quantized_file_is_not_quantized_again_with_a_notice(models: dict[str, Path]) -> None:
    engine = pack(open_checkpoint(models["q4_0"]), quantize="q8_0")
    assert packed_as(engine) == {"Q4_0"}
    assert any("quantized already" in note for note in engine.notes)


def sizes(checkpoint: Checkpoint) -> list[int]:
    return [packing_plan(checkpoint, exact=False, quantize=choice).nbytes for choice in CHOICES]


@pytest.mark.parametrize(("short_by", "kind"), [(0, "none"), (1, "q8_0"), (2, "q4_0")])
def test_weights_are_quantized_if_memory_is_short(
    short_by: int, kind: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(models["bf16"])
    free = sizes(checkpoint)[short_by] + PACKING_MEMORY
    monkeypatch.setattr(packing, "available_memory", lambda: free)
    packed = choose_packing(checkpoint, exact=False, quantize=None)
    assert packed.nbytes == free - PACKING_MEMORY
    if kind == "none":
        assert packed.notes == []
        return
    [note] = packed.notes
    assert note.startswith("BF16 weights need ")
    assert f"GB are free: quantized to {kind} (" in note


@pytest.mark.parametrize("form", ["bf16", "q4_0"])
def test_a_model_that_does_not_fit_in_any_type(
    form: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what would fit, by the estimate of weights/backend.py."""
    checkpoint = open_checkpoint(models[form])
    monkeypatch.setattr(packing, "available_memory", lambda: 10_000_000)
    with pytest.raises(MemoryShortError, match=r"of memory, 10\.0 MB are free; nothing fits"):
        choose_packing(checkpoint, exact=False, quantize=None)
    monkeypatch.setattr(packing, "available_memory", lambda: 500_000_000)
    monkeypatch.setattr(packing, "packing_plan", lambda *_, **__: PackingPlan({}, 10**9, []))
    with pytest.raises(MemoryShortError, match="use backend engine"):
        choose_packing(checkpoint, exact=False, quantize=None)


def test_options_that_contradict_each_other(models: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(models["bf16"])
    with pytest.raises(ConfigError, match="exact arithmetic keeps every weight"):
        pack(checkpoint, exact=True, quantize="q8_0")
    with pytest.raises(ConfigError, match="must be None or none or q8_0 or q4_0, got 'q5_0'"):
        choose_packing(checkpoint, exact=False, quantize="q5_0")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quantize q8_0 is for the engine"):
        load(models["bf16"], backend="torch", quantize="q8_0")


class AsBfloat16:
    """A quantized file as if it had been stored in bfloat16."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def info(self, name: str) -> TensorInfo:
        info = self.file.info(name)
        return info if info.dtype == "F32" else replace(info, dtype="BF16")

    def read(self, name: str, rows: slice | None = None) -> Any:
        info, raw = self.file.info(name), self.file.read(name, rows)
        if info.dtype == "F32":
            return raw
        shape = (len(raw), *info.shape[1:])
        return dequantize(raw, info.dtype, shape).astype(ml_dtypes.bfloat16)


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def in_floats(default_model: Path) -> tuple[Checkpoint, list[int], Any]:
    """The default model in bfloat16, ids of prose, and its unquantized logits."""
    checkpoint = open_checkpoint(default_model)
    floats = replace(checkpoint, file=AsBfloat16(checkpoint.file))
    text = (Path(__file__).parents[2] / "LICENSE").read_text()[:1500]
    ids = checkpoint.tokenizer.encode(text)
    engine = pack(floats, quantize="none")
    return floats, ids, log_softmax(Rows(engine).all_logits(ids))


# Upper bound of the mean divergence in nats, lower bound of how often the most likely token is the
# same. Measured: 0.007 and 0.95, which is what the engine's eight-bit inputs cost; 0.43 and 0.66,
# which is why q4_0 is the last resort for so small a model, and for one rounded to a grid before.
@pytest.mark.parametrize(
    ("quantize", "divergence", "agreement"), [("q8_0", 0.015, 0.92), ("q4_0", 0.6, 0.6)]
)
def test_quality_on_real_text(
    quantize: Any, divergence: float, agreement: float, in_floats: tuple[Checkpoint, list[int], Any]
) -> None:
    """The model quantized again, with the text of the license."""
    floats, ids, p = in_floats
    engine = pack(floats, quantize=quantize)
    q = log_softmax(Rows(engine).all_logits(ids))
    measured = (np.exp(p) * (p - q)).sum(-1).mean()
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    print(f"{quantize}: divergence {measured:.4f}, same likeliest token {same:.3f}")
    assert 0 < measured <= divergence
    assert same >= agreement
