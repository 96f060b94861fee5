"""The plain backend: tokenizers and training run without compiled code, with the same results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from byte_level_families import mixed_text
from glassllama.formats.gguf import open_gguf
from glassllama.tokenizers.bpe import MANY_IDS, BytePairTokenizer
from glassllama.weights.tokenizer_gguf import tokenizer_from_gguf

WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None  # importing them is an error
from glassllama.tokenizers.train import train_bpe
learned = train_bpe(["the llama and the alpaca " * 9], 262)
assert learned.tokens[256:] == (b"he", b"the", b" a", b" the", b"ac", b"am"), learned.tokens[256:]
tokenizer = learned.tokenizer
for text in ("the alpaca", "the" * 1000):
    ids = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text
"""


def test_tokenizers_run_without_numba() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plain_and_compiled_give_the_same(default_model: Path) -> None:
    compiled = tokenizer_from_gguf(open_gguf(default_model).metadata)
    assert isinstance(compiled, BytePairTokenizer)
    plain = BytePairTokenizer(compiled.vocabulary, bos=None)
    for seed in range(5):
        text = mixed_text(seed)
        assert plain.encode_array(text).tolist() == compiled.encode_array(text).tolist()
    ids = plain.encode(mixed_text(5)) * 1000
    assert len(ids) > MANY_IDS
    assert plain.decode(ids) == compiled.decode(ids)
