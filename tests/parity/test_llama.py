"""The reference model against transformers and Meta's own code, in all three formats."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import load_model
from tiny_models import (
    META_SHAPE,
    VARIANTS,
    hf_model,
    meta_params,
    meta_state,
    write_gguf,
    write_hf,
    write_meta,
)
from tolerances import difference, logits_tolerance

WRITERS = {
    "safetensors": lambda model, folder: write_hf(model, folder),
    "pth": lambda model, folder: write_meta(model, folder),
    "gguf": lambda model, folder: write_gguf(model, folder / "tiny.gguf"),
}
NOT_IN_PARAMS_JSON = {"scaled-32", "linear", "wide heads"}  # the format cannot express these
CASES = [
    (form, variant)
    for form in WRITERS
    for variant in VARIANTS
    if form != "pth" or variant not in NOT_IN_PARAMS_JSON
]
IDS = torch.arange(2 * 61).reshape(2, 61) * 37 % 131


@torch.no_grad()
@pytest.mark.parametrize(("form", "variant"), CASES)
def test_logits_equal_transformers(form: str, variant: str, tmp_path: Path, parity: Any) -> None:
    model = hf_model(**VARIANTS[variant])
    ours = load_model(open_checkpoint(WRITERS[form](model, tmp_path / "model")))
    apart, bar = difference(ours(IDS), model(IDS).logits), logits_tolerance(ours.config)
    parity(f"logits, {form}", "transformers LlamaForCausalLM", bar, apart)
    assert apart <= bar


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float16_files_give_their_values(dtype: str, tmp_path: Path, parity: Any) -> None:
    write_hf(hf_model(**META_SHAPE).to(getattr(torch, dtype)), tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(open_checkpoint(tmp_path), dtype=torch.float32)
    apart, bar = difference(ours(IDS), theirs(IDS).logits), logits_tolerance(ours.config)
    parity(f"logits, {dtype} file in float32", "transformers LlamaForCausalLM", bar, apart)
    assert apart <= bar


@torch.no_grad()
def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = hf_model(**META_SHAPE).bfloat16()
    write_hf(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_model(open_checkpoint(tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    exact = load_model(open_checkpoint(tmp_path), dtype=torch.float32)(IDS)
    bar = logits_tolerance(ours.config, torch.bfloat16)
    for each in (
        ours(IDS),
        theirs(IDS).logits,
    ):  # both round at every step, but at different places
        assert difference(each, exact) <= bar


@pytest.fixture(scope="module")
def meta_reference() -> Iterator[type]:
    """Meta's Transformer in one process with gloo, which it requires."""
    fairscale = pytest.importorskip("fairscale.nn.model_parallel.initialize")
    from llama_models.llama3.model import Transformer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    fairscale.initialize_model_parallel(1)
    yield Transformer
    fairscale.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["scaled-8", "plain", "one kv head"])
def test_logits_equal_metas_own_code(
    variant: str, tmp_path: Path, meta_reference: type, parity: Any
) -> None:
    from llama_models.llama3.args import ModelArgs

    model = hf_model(**VARIANTS[variant])
    args = ModelArgs(**meta_params(model), max_batch_size=2, max_seq_len=64)
    theirs = meta_reference(args)
    theirs.load_state_dict(meta_state(model))
    ours = load_model(open_checkpoint(write_meta(model, tmp_path)))
    cache = ours.new_cache(2, 64)
    pieces = [IDS[:, :40], IDS[:, 40:41], IDS[:, 41:]]  # whole, one token, cached prefill
    start, worst, bar = 0, 0.0, logits_tolerance(ours.config)
    for piece in pieces:
        worst = max(worst, difference(ours(piece, cache), theirs(piece, start)))
        start += piece.shape[1]
    parity("logits with cache, pth", "Meta's reference model", bar, worst)
    assert worst <= bar
