"""The engine with read-only caches, in containers, after Ctrl-C, and with other programs."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest

from glassllama.native.engine.executor import Engine
from glassllama.native.engine.thread_pool import cgroup_quota
from glassllama.native.jit import code_cache, compile
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.pack import pack
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf

SHAPE = {**META_SHAPE, "hidden_size": 96, "head_dim": 32, "intermediate_size": 160}


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    path = write_gguf(hf_model(**SHAPE), tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q8_0)
    return pack(open_checkpoint(path))


def test_without_a_writable_cache_code_is_compiled_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv("GLASSLLAMA_HOME", str(occupied))
    monkeypatch.setattr(code_cache, "notes", [])
    monkeypatch.setattr(compile, "code_folder", compile.code_folder.__wrapped__)
    double = compile.entry(twice)
    assert double(21) == 42
    assert code_cache.notes == [code_cache.READ_ONLY]


def twice(x):  # type: ignore[no-untyped-def]
    return 2 * x


@pytest.mark.parametrize(
    ("file", "text", "processors"),
    [("cpu.max", "150000 100000\n", 1.5), ("cpu.max", "max 100000\n", None), ("nothing", "", None)],
)
def test_container_limits(tmp_path: Path, file: str, text: str, processors: float | None) -> None:
    (tmp_path / file).write_text(text)
    assert cgroup_quota(tmp_path) == processors


def test_old_container_limits(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 3


def test_an_interrupt_between_native_calls_does_not_change_the_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives in the main thread when a native call returns."""
    cache = Rows(engine)
    first = cache.next_logits([[1, 2, 3]])
    run, calls = engine._run, 0

    def interrupted(*orders: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        run(*orders)

    monkeypatch.setattr(engine, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.next_logits([list(range(100)) * 4])
    monkeypatch.undo()
    assert cache.lengths == [3]
    cache.truncate(0, 0)
    assert (cache.next_logits([[1, 2, 3]]) == first).all()


def test_threads_end_when_the_engine_is_deleted(tmp_path: Path) -> None:
    path = write_gguf(hf_model(**SHAPE), tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q8_0)
    engine = pack(open_checkpoint(path))
    Rows(engine).next_logits([[1]])
    workers: list[threading.Thread] = list(engine._pool.workers)
    assert len(workers) == engine.threads - 1
    del engine
    gc.collect()
    for member in workers:
        member.join(10)
        assert not member.is_alive()
