"""Compiled code of the tokenizers on disk: damage is detected before it runs; ids stay right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import _CacheLocator

from glassllama.native.jit import code_cache, compile
from glassllama.native.tokenizers import corpus_encoder

IDS = """
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers.bpe import BytePairTokenizer
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.vocabulary import BYTES, Vocabulary
tokens = (*BYTES, b"th", b"the", b" the", b"in", b"an")
tokenizer = BytePairTokenizer(
    Vocabulary(
        tokens=tokens,
        ids={token: id for id, token in enumerate(tokens)},
        merges=None,
        split=SPLITS["llama3"],
        ignore_merges=False,
        added_tokens=(),
    ),
    bos=None,
    backend=COMPILED,
)
text = "In the beginning, the llama; and then another: " * 20 + "an" * 200
ids = tokenizer.encode_array(text).tolist()
assert ids == tokenizer.encode(text)
print(sum(ids), len(ids))
"""


def ids(home: Path) -> str:
    """The output of IDS in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", IDS],
        env={**os.environ, "GLASSLLAMA_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def facts(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_mtime_ns for name, path in code_cache.files(folder)}


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with all compiled code; code that this process has compiled is copied."""
    home, ours = tmp_path_factory.mktemp("home"), compile.code_folder("tokenizers")
    if ours is not None and ours.is_dir():
        copy = shutil.copytree(ours, home / "compiled" / ours.parent.name / ours.name)
        of_these_sources = _CacheLocator.get_suitable_cache_subpath(corpus_encoder.__file__)
        for folder in copy.iterdir():
            if folder.is_dir() and folder.name != of_these_sources:  # of another checkout
                shutil.rmtree(folder)
    ids(home)
    return home


def test_damaged_code_is_compiled_again(home: Path) -> None:
    (folder,) = (home / "compiled").glob("*/tokenizers")
    before = facts(folder)
    right = ids(home)
    assert facts(folder) == before  # undamaged code is loaded, not compiled
    objects = [folder / name for name in before if name.endswith(".nbc")]
    indexes = [folder / name for name in before if name.endswith(".nbi")]
    assert len(objects) >= 5
    largest = max(objects, key=lambda path: path.stat().st_size)
    others = [path for path in objects if path != largest]
    damaged = flipped(largest.read_bytes())
    for path, data in (
        (largest, damaged),  # machine code that would be run
        (others[0], others[0].read_bytes()[:1000]),
        (others[1], b""),
        (indexes[0], b""),
        (indexes[-1], b"\x80\x04not a pickle"),
    ):
        path.write_bytes(data)
    assert ids(home) == right
    entry = largest.relative_to(
        folder
    ).as_posix()  # other functions are compiled only with a caller
    assert facts(folder)[entry] != before[entry]
    assert largest.read_bytes() != damaged
    assert code_cache.discard_damaged(folder) == 0
    assert ids(home) == right
