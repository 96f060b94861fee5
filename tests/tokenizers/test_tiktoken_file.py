"""Llama 3's tokenizer from Meta's file: known ids, special tokens, damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.tiktoken_file import read_meta_tokenizer

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is "


def test_known_ids_of_a_prompt(llama3_ranks: Path) -> None:
    tokenizer = read_meta_tokenizer(llama3_ranks)
    ids = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395]
    assert tokenizer.encode(ULTIMATE, bos=True) == [*ids, 374, 220]
    assert tokenizer.decode(ids[1:]) + " is " == ULTIMATE


def test_specials(llama3_ranks: Path) -> None:
    tokenizer = read_meta_tokenizer(llama3_ranks)
    assert tokenizer.vocab_size == 128_256
    assert tokenizer.bos == tokenizer.specials["<|begin_of_text|>"] == 128_000
    assert tokenizer.stop_ids == {128_001, 128_008, 128_009}
    names = ("<|finetune_right_pad_id|>", "<|start_header_id|>", "<|python_tag|>")
    assert [tokenizer.specials[name] for name in names] == [128_004, 128_006, 128_010]
    assert tokenizer.encode("<|eot_id|>", specials=True) == [128_009]
    assert not {*tokenizer.encode("<|eot_id|>")} & {*tokenizer.specials.values()}


@pytest.mark.parametrize("line", [b"IQ== 1", b"IQ 0", b"IQ==", b" 0", b"\xff 0", b"IQ== 0x0"])
def test_damaged_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(line + b"\nIg== 1\n")
    with pytest.raises(TokenizerError, match="line 1 must be base64"):
        read_meta_tokenizer(path)
