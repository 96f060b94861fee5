"""GGUF files of all families against llama.cpp: a prompt in one pass, then one id at a time.

With keys and values in float32, files in float32 and no flash attention, llama.cpp computes in
float32, too, so the tolerance is that of two such computations (tolerances.py). Two settings are
those of its Python package and not of the file: YaRN's `beta_fast` and `beta_slow`.

Gemma is the exception: llama.cpp takes GELU from a table of half-precision numbers, so the gate of
every feed-forward network is rounded to half precision before and after GELU. The effect E of these
roundings is measured with transformers' model. llama.cpp rounds the same numbers, and a number that
is close to the middle of two half-precision numbers may be rounded to the other one: the difference
from transformers with such a GELU is a part of E, at most E if all are, and that from exact
arithmetic at most 2·E.

Without an oracle: the windows of Mistral 7B and of Qwen 2, and dynamic NTK, for which GGUF files of
these architectures have no key; the windows of Phi-3, which llama.cpp disables; those of EXAONE
4.0, which it has for models of 64 layers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import load_model
from glassllama.weights.pack import pack
from rows import Rows
from tiny_families import FAMILIES, GGUF_NAMES, family_model, write_family_gguf
from tiny_models import VARIANTS, hf_model, write_gguf
from tolerances import difference, logits_tolerance

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: the bench extra"
)
IDS = [n * 37 % 131 for n in range(61)]
PROMPT = 40  # ids of the first pass
CONTEXT = 256  # tokens; the original context of the model with LongRoPE
# In GGUF files the scale of the scores follows from the sizes.
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {"query_pre_attn_scalar": 10},
    "phi3": {"sliding_window": None},
}
NO_ORACLE = ("mistral", "qwen2 windows", "llama dynamic", "exaone4")
NAMES = [name for name in FAMILIES if name not in NO_ORACLE]


def logits_of_llama_cpp(path: Path, context: int) -> np.ndarray:
    """(T, V)"""
    model = llama_cpp.Llama(
        str(path), n_ctx=context, logits_all=True, verbose=False, flash_attn=False, n_threads=1,
        n_threads_batch=1, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        yarn_beta_fast=-1.0, yarn_beta_slow=-1.0, yarn_attn_factor=-1.0,  # those of the file
    )  # fmt: skip
    model.eval(IDS[:PROMPT])
    for id in IDS[PROMPT:]:
        model.eval([id])
    logits = np.array(model.scores[: len(IDS)])
    model.close()
    return logits


def logits_of_engine(checkpoint: Checkpoint) -> np.ndarray:
    """The same of the engine in exact mode."""
    engine = pack(checkpoint, exact=True)
    rows = Rows(engine)
    logits = [rows.all_logits(IDS[:PROMPT])] + [rows.next_logits([[id]]) for id in IDS[PROMPT:]]
    engine.close()
    return np.concatenate(logits)


@contextmanager
def half_precision_gelu(model: Any) -> Iterator[None]:
    """GELU of rounded numbers, rounded, in a Gemma of transformers; exact from 10 on."""

    def gelu(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        (gate,) = inputs
        table = torch.nn.functional.gelu(gate.half().float(), approximate="tanh").half().float()
        return torch.where(gate >= 10, gate, table)

    hooks = [layer.mlp.act_fn.register_forward_hook(gelu) for layer in model.model.layers]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def check(model: Any, path: Path, parity: Any, name: str, context: int = CONTEXT) -> None:
    checkpoint = open_checkpoint(path, context)
    theirs, bar = logits_of_llama_cpp(path, context), logits_tolerance(checkpoint.config)
    ids = torch.tensor([IDS])
    if name.startswith("gemma"):
        exact = model(ids).logits[0]
        with half_precision_gelu(model):
            rounded = model(ids).logits[0]
        effect = difference(rounded, exact)
        assert bar < effect < 1e-3
        assert difference(theirs, rounded) <= bar + effect
        bar += 2 * effect
    reference = load_model(checkpoint, dtype=torch.float32)(ids)[0]
    for what, ours in (("", reference), (" of the engine", logits_of_engine(checkpoint))):
        apart = difference(ours, theirs)
        parity(f"logits{what}, prompt and decode, GGUF", f"llama.cpp, {name}", bar, apart)
        assert apart <= bar


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_family(name: str, tmp_path: Path, parity: Any) -> None:
    model = family_model(name, **CHANGES.get(name, {}))
    architecture = FAMILIES[name]["model_type"]
    architecture = GGUF_NAMES.get(architecture, architecture)
    path = write_family_gguf(model, architecture, tmp_path / "tiny.gguf")
    check(model, path, parity, name)
    if name == "phi3 longrope":
        check(model, path, parity, f"{name} beyond its original context", 2 * CONTEXT)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_a_llama(name: str, tmp_path: Path, parity: Any) -> None:
    model = hf_model(**VARIANTS[name])
    check(model, write_gguf(model, tmp_path / "tiny.gguf"), parity, f"llama, {name}")
