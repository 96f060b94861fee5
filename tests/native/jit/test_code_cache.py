"""Compiled code on disk: damage is detected before it runs; results are the same on every
processor."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numba
import numpy as np
import pytest

from glassllama.base.machine import cache_home
from glassllama.base.trust import HELP
from glassllama.native.engine.dispatch import TIERS, features
from glassllama.native.jit import code_cache
from glassllama.native.jit.code_cache import NO_SPACE, UNTRUSTED
from glassllama.native.jit.compile import code_folder
from tiny_models import META_SHAPE, hf_model, write_gguf
from tolerances import eight_bit_tolerance, rms_difference

SHAPE = {**META_SHAPE, "hidden_size": 96, "head_dim": 32, "intermediate_size": 160}
ANSWER = """
import sys
from glassllama.base.interfaces import logits_of_text
import numpy as np
from glassllama.native.engine.dispatch import tier
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.pack import pack
engine = pack(open_checkpoint(sys.argv[1]))
np.save(sys.argv[2], logits_of_text(engine, [5, 99, 3, 7, 11]))
print(tier(), *engine.notes, sep="\\n")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiers") / "x.gguf"
    return write_gguf(hf_model(**SHAPE), path, gguf.GGMLQuantizationType.Q4_1)


def answer(model: Path, home: Path, **environment: str) -> tuple[list[str], np.ndarray]:
    """The output of a new process, and its logits."""
    out = home / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(model), str(out)],
        env={**os.environ, "GLASSLLAMA_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1], np.load(out)


def test_damaged_code_is_compiled_again_with_a_notice(model: Path, tmp_path: Path) -> None:
    answer(model, tmp_path, GLASSLLAMA_HOME=str(cache_home()))  # where it may be compiled already
    now = code_folder("engine")
    assert now is not None
    folder = Path(shutil.copytree(now, tmp_path / "compiled" / now.parent.name / now.name))
    first, right = answer(model, tmp_path)
    assert not any("compiled" in line for line in first), first
    files = [path for _, path in code_cache.files(folder)]
    objects = [path for path in files if path.suffix == ".nbc"]
    indexes = [path for path in files if path.suffix == ".nbi"]
    assert len(objects) >= 8
    assert len(indexes) >= 8
    for damaged, data in (
        (objects[0], b""),
        (objects[1], os.urandom(200)),
        (objects[2], flipped(objects[2].read_bytes())),  # machine code that would be run
        (indexes[-1], b""),
        (indexes[-2], b"\x80\x04not a pickle"),
    ):
        damaged.write_bytes(data)
    again, logits = answer(model, tmp_path)
    assert "5 files of compiled code on disk were damaged: compiled again" in again
    assert (logits == right).all()  # bit-identical, newly compiled or from disk
    assert not any("damaged" in line for line in answer(model, tmp_path)[0])


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


FULL = """
import resource
from glassllama.native.jit.code_cache import notes
from glassllama.native.jit.compile import STRICT, callback_address, code_folder, entry, raw_entry
from glassllama.native.jit.intrinsics import types
assert code_folder("engine") is not None
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # like a full disk: no file can grow
one = entry(lambda x: x + 1)(2)
two = raw_entry(lambda x: x + 2)(2)
three = callback_address(types.int64(types.int64), lambda x: x + 3, STRICT) != 0
print(one, two, three, *notes, sep="\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no file size limits")
def test_code_runs_even_if_it_cannot_be_cached(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "GLASSLLAMA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["3", "4", "True", NO_SPACE]


ONE_KERNEL = """
from glassllama.native.engine.dispatch import kernel_address
from glassllama.native.engine.layout import InputFormat, WeightType
from glassllama.native.jit.code_cache import notes, save_checksums
from glassllama.native.jit.deferred_signals import compilations
assert kernel_address(WeightType.F32, "plain", InputFormat.F32) != 0
print(compilations.begun > 0, *notes, sep="\\n")
"""


def test_checksums_of_a_kernel_that_is_compiled_alone(tmp_path: Path) -> None:
    """As for a second model with another weight type: the third process compiles nothing."""

    def compiles() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", ONE_KERNEL],
            env={**os.environ, "GLASSLLAMA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert [compiles() for _ in range(2)] == [["True"], ["False"]]


CACHE_SCRIPT = """
from glassllama.native.jit.code_cache import notes, save_checksums
from glassllama.native.jit.compile import code_folder, entry, raw_entry
one = entry(lambda x: x + 1)(2)
two = raw_entry(lambda x: x + 2)(2)
print(one, two, *notes, sep="\\n")
save_checksums()
"""


class ExecutesCode:
    """An object that executes foreign code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_code_in_a_folder_that_others_can_write_to_is_never_run(tmp_path: Path) -> None:
    script, home, canary = tmp_path / "kept.py", tmp_path / "home", tmp_path / "canary"
    script.write_text(CACHE_SCRIPT)

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "GLASSLLAMA_HOME": str(home)},
            capture_output=True,
            text=True,
        )
        return done.stdout.split("\n")[:-1] if done.returncode == 0 else [done.stderr]

    assert run() == ["3", "4"]
    indexes = [*home.rglob("*.nbi")]
    assert len(indexes) == 2
    for index in indexes:
        index.write_bytes(pickle.dumps(numba.__version__) + pickle.dumps(ExecutesCode(canary)))
        (folder,) = (path for path in index.parents if path.parent.parent.parent == home)
        (folder / code_cache.CHECKSUM_FILE).unlink()
        code_cache.write_checksums(folder)  # like another user
    home.chmod(0o777)
    three, four, *notes = run()
    assert (three, four) == ("3", "4")
    assert notes == [UNTRUSTED.format(f"others can write to {home}: {HELP}")]
    assert not canary.exists()
    home.chmod(0o755)
    run()
    assert canary.exists(), "without the check the code would run"


def test_checksums(tmp_path: Path) -> None:
    """Written files get checksums; changed and unknown files, and all files of an invalid list, are
    deleted."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    code_cache.write_checksums(tmp_path)
    assert code_cache.discard_damaged(tmp_path) == 0
    facts = (tmp_path / "b").stat()
    (tmp_path / "b").write_text("x")
    os.utime(tmp_path / "b", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    code_cache.write_checksums(tmp_path)  # does not accept the damaged file
    (tmp_path / "d").write_text("half writ")
    assert code_cache.discard_damaged(tmp_path) == 1  # d never had a checksum
    assert [name for name, _ in code_cache.files(tmp_path)] == ["a", "c"]
    (tmp_path / code_cache.CHECKSUM_FILE).write_text('{"a": 7')
    assert code_cache.discard_damaged(tmp_path) == 0
    assert list(code_cache.files(tmp_path)) == []


# Numba compiles for a processor that has a tier's features and no others. The tiers of AVX-512 are
# what test_layout_and_kernels.py runs; here everything else is compiled for the processor, too.
LEAST = "+cx16,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx"


@pytest.mark.portable
def test_processors_with_fewer_instructions_give_the_same_answer(
    model: Path, tmp_path: Path
) -> None:
    """Processes that compile everything, at the same time; the first for an unknown processor."""
    processors = {"plain": ("generic", "+sse2,+cx16")}
    for tier in ("avxvnni", "avx2"):
        if TIERS[tier] <= features():
            able = ",".join([LEAST, *(f"+{name}" for name in sorted(TIERS[tier]))])
            processors[tier] = ("x86-64", able)
    if len(processors) == 1:
        pytest.skip("this processor has no other tiers")

    def answer_of(tier: str) -> tuple[str, np.ndarray]:
        home, (name, able) = tmp_path / tier, processors[tier]
        home.mkdir()
        lines, logits = answer(model, home, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=able)
        return lines[0], logits

    with ThreadPoolExecutor() as pool:
        (plain, right), *others = pool.map(answer_of, processors)
    assert [plain, *(tier for tier, _ in others)] == [*processors]
    for tier, logits in others:
        assert rms_difference(logits, right) <= eight_bit_tolerance(SHAPE["num_hidden_layers"]), (
            tier
        )
