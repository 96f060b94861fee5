"""`validate` finds all faults of a model; `show` handles unusual models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.conftest import Verb
from tiny_models import VARIANTS, hf_model, write_hf, write_meta


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(hf_model(**VARIANTS["scaled-8"]), tmp_path_factory.mktemp("tiny"))


def problems(verb: Verb, path: Path) -> list[str]:
    ran = verb("validate", path, "--json")
    result = json.loads(ran.out)
    assert ran.code == (1 if result["problems"] else 0)
    assert result["ok"] == (not result["problems"])
    found: list[str] = result["problems"]
    return found


def test_the_default_model_is_valid(verb: Verb, default_model: Path) -> None:
    ran = verb("validate", "smollm2-135m")
    assert ran.code == 0, ran.out
    assert "sha256: b179c9523d0e" in ran.out
    assert "problem" not in ran.out


def test_nan_infinite_and_zero_weights_are_listed(verb: Verb, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = torch.inf
    tensors["model.layers.2.self_attn.q_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    assert problems(verb, folder)[:2] == [
        "model.layers.1.mlp.up_proj.weight: 1 NaN and 2 infinite numbers",
        "model.layers.2.self_attn.q_proj.weight: all zeros",
    ]


def test_a_missing_tokenizer_and_a_missing_tensor(verb: Verb, tiny: Path, tmp_path: Path) -> None:
    [problem] = problems(verb, tiny)
    assert "tokenizer" in problem
    folder = shutil.copytree(tiny, tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    [problem] = problems(verb, folder)  # a file that cannot be opened is not examined further
    assert "model.norm.weight" in problem
    assert "lm_head.weight" in problem


def test_a_flipped_bit_in_a_pth_is_found(verb: Verb, tmp_path: Path) -> None:
    folder = write_meta(hf_model(**VARIANTS["scaled-8"]), tmp_path / "meta", shards=2)
    assert not [p for p in problems(verb, folder) if "checksum" in p]
    shard = folder / "consolidated.01.pth"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert any("CRC-32" in problem for problem in problems(verb, folder))


def test_show_prints_notes_about_unusual_models(verb: Verb, tiny: Path) -> None:
    ran = verb("show", tiny)
    assert ran.code == 0
    assert "scaled (Llama3Scaling)" in ran.out
    assert "none: " in ran.out  # no tokenizer
    facts = json.loads(verb("show", tiny, "--json").out)
    assert facts["config"]["rope_scaling"]["factor"] == 8.0
    assert facts["memory"][-1]["context"] == 131_072
