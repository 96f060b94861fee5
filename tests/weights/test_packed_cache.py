"""Packed weights on disk are used only if they equal the result of packing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from glassllama.native.engine.executor import Engine
from glassllama.weights import pack, packed_cache
from glassllama.weights.checkpoint import open_checkpoint
from rows import Rows
from tiny_models import META_SHAPE, hf_model, write_gguf, write_hf

WIDE = {**META_SHAPE, "hidden_size": 96, "head_dim": 32, "intermediate_size": 160}
IDS = [5, 99, 3, 7]
AN_HOUR = 3600


@pytest.fixture(autouse=True)
def cache_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache models of every size, in a folder for this test."""
    monkeypatch.setattr(packed_cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(packed_cache, "folder", lambda: tmp_path / "packed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "x.gguf", seed=0)


def write(path: Path, seed: int) -> Path:
    write_gguf(hf_model(seed, **WIDE), path, gguf.GGMLQuantizationType.Q4_0)
    return aged(path)


def aged(path: Path) -> Path:
    """Set the modification time to an hour ago. The inode's own time cannot be set: see
    `old_inode`."""
    then = time.time() - AN_HOUR
    os.utime(path, (then, then))
    return path


@pytest.fixture(autouse=True)
def old_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "RECENT", -AN_HOUR * 10**9)


def logits(engine: Engine) -> Any:
    return Rows(engine).all_logits(IDS)


class Counted:
    """Counts how often weights were packed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        really = pack.pack_all

        def counting(*arguments: Any) -> None:
            self.times += 1
            really(*arguments)

        monkeypatch.setattr(pack, "pack_all", counting)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def kept_notes(engine: Engine) -> list[str]:
    return [note for note in engine.notes if "not cached" in note]


def test_the_second_start_maps_what_the_first_packed(model: Path, packings: Counted) -> None:
    first, second = pack.pack(open_checkpoint(model)), pack.pack(open_checkpoint(model))
    assert packings.times == 1
    assert (logits(first) == logits(second)).all()
    assert not kept_notes(first)
    assert not kept_notes(second)
    assert not second.weights.matrices[0].values.flags.writeable
    assert len(packed_cache.entries()) == 1


def test_small_models_are_not_cached(
    model: Path, packings: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "WORTH_KEEPING", 10**9)
    for _ in range(2):
        pack.pack(open_checkpoint(model))
    assert packings.times == 2
    assert packed_cache.entries() == []


def test_a_file_changed_in_place_with_its_time_set_back(model: Path, packings: Counted) -> None:
    """Same size, inode and modification time; the inode's change time differs."""
    before, facts = logits(pack.pack(open_checkpoint(model))), model.stat()
    changed = write(model.parent / "y.gguf", seed=1).read_bytes()
    with model.open("r+b") as file:
        file.write(changed)
    os.utime(model, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    now = model.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (
        facts.st_size, facts.st_ino, facts.st_mtime_ns
    )  # fmt: skip
    engine = pack.pack(open_checkpoint(model))
    assert packings.times == 2
    assert np.abs(logits(engine) - before).max() > 0.1
    assert len(packed_cache.entries()) == 1  # the old entry is useless


def test_without_file_times_the_content_is_compared(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(model)
    packed = pack.choose_packing(checkpoint, exact=False, quantize=None)
    seen = []
    for place in (10, model.stat().st_size // 2, model.stat().st_size - 1):
        facts = model.stat()
        seen.append(packed_cache.digest(checkpoint, packed))
        with model.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        monkeypatch.setattr(Path, "stat", lambda _path, facts=facts, **_: facts)
        seen.append(packed_cache.digest(checkpoint, packed))
        monkeypatch.undo()
        monkeypatch.setattr(packed_cache, "WORTH_KEEPING", 0)
    assert len(set(seen[0:2])) == len(set(seen[2:4])) == len(set(seen[4:6])) == 2


def test_other_weight_types_or_other_code_have_other_entries(
    model: Path, packings: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack.pack(open_checkpoint(model))
    pack.pack(open_checkpoint(model), exact=True)
    assert packings.times == 2
    monkeypatch.setattr(packed_cache, "layout_digest", lambda: b"of another layout")
    pack.pack(open_checkpoint(model))
    assert packings.times == 3
    assert len(packed_cache.entries()) == 2  # the exact one, and the newest of the others


def test_a_recently_changed_file_is_not_cached(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "RECENT", 2 * 10**9)
    os.utime(model)
    assert "changed a moment ago" in kept_notes(pack.pack(open_checkpoint(model)))[0]
    assert packed_cache.entries() == []


def test_a_file_that_changes_while_it_is_packed_is_not_cached(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = pack.pack_all

    def changing(*arguments: Any) -> None:
        really(*arguments)
        os.utime(model)

    monkeypatch.setattr(pack, "pack_all", changing)
    engine = pack.pack(open_checkpoint(model))
    assert "changed while" in kept_notes(engine)[0]
    assert np.isfinite(logits(engine)).all()
    assert list((model.parent / "packed").glob("*.pa*")) == []


@pytest.mark.parametrize("damage", ["shorter", "longer", "empty", "magic", "digest", "length"])
def test_incomplete_entries_are_replaced(damage: str, model: Path, packings: Counted) -> None:
    right = logits(pack.pack(open_checkpoint(model)))
    [entry] = packed_cache.entries()
    data = entry.read_bytes()
    at = {"magic": 0, "digest": 20, "length": len(packed_cache.MAGIC) + 33}
    if damage in at:
        data = data[: at[damage]] + bytes([data[at[damage]] ^ 1]) + data[at[damage] + 1 :]
    entry.write_bytes({"shorter": data[:-1], "longer": data + b"x", "empty": b""}.get(damage, data))
    assert (logits(pack.pack(open_checkpoint(model))) == right).all()
    assert packings.times == 2
    pack.pack(open_checkpoint(model))
    assert packings.times == 2


@pytest.mark.parametrize("opened", ["folder", "its parent", "entry"])
def test_files_that_others_can_write_are_not_mapped(
    opened: str, model: Path, packings: Counted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packed_cache, "folder", lambda: tmp_path / "home" / "packed")
    right = logits(pack.pack(open_checkpoint(model)))
    [entry] = packed_cache.entries()
    place = {"folder": entry.parent, "its parent": entry.parent.parent, "entry": entry}[opened]
    place.chmod(0o777)
    engine = pack.pack(open_checkpoint(model))
    assert packings.times == 2
    assert (logits(engine) == right).all()
    if opened == "entry":  # a new file of this user replaces it
        pack.pack(open_checkpoint(model))
        assert packings.times == 2
        assert kept_notes(engine) == []
    else:
        [note] = kept_notes(engine)
        assert f"others can write to {place}" in note
        assert engine.weights.matrices[0].values.flags.writeable, "private memory"


KILLED = """
import os, sys
from pathlib import Path
from glassllama.weights import pack, packed_cache
from glassllama.weights.checkpoint import open_checkpoint
packed_cache.WORTH_KEEPING, packed_cache.RECENT = 0, -10**15
packed_cache.folder = lambda: Path(sys.argv[2])
packed_cache.CacheEntry.keep = lambda self: os._exit(9)
pack.pack(open_checkpoint(sys.argv[1]))
"""


def test_files_of_a_killed_process_are_not_used(model: Path, packings: Counted) -> None:
    folder = packed_cache.folder()
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(folder)])
    assert done.returncode == 9
    assert len(list(folder.glob("*.part"))) == 1
    engine = pack.pack(open_checkpoint(model))
    assert packings.times == 1
    assert list(folder.glob("*.part")) == []
    assert (logits(engine) == logits(pack.pack(open_checkpoint(model)))).all()


def test_several_processes_at_once_pack_once(model: Path) -> None:
    script = KILLED.replace("packed_cache.CacheEntry.keep = lambda self: os._exit(9)", "").replace(
        "pack.pack(open", "really = pack.pack_all\n"
        "pack.pack_all = lambda *a: (print('packed'), really(*a))\n"
        "engine = pack.pack(open"
    ) + (
        "from glassllama.base.interfaces import logits_of_text\n"
        "print(logits_of_text(engine, [1, 2, 3]).sum())"
    )  # fmt: skip
    arguments = [sys.executable, "-c", script, str(model), str(packed_cache.folder())]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate()[0].split() for process in running]
    assert sum("packed" in words for words in lines) == 1
    assert len({words[-1] for words in lines}) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "x.gguf", seed=0)
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setattr(packed_cache, "folder", lambda: occupied / "packed")
    engine = pack.pack(open_checkpoint(model))
    assert len(kept_notes(engine)) == 1
    assert np.isfinite(logits(engine)).all()


def test_a_full_disk_is_reported_before_or_during_allocation(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "free_on_disk", lambda: 1_000_000_000)
    engine = pack.pack(open_checkpoint(model))
    assert "1.00 GB of the disk" in kept_notes(engine)[0]
    monkeypatch.undo()
    monkeypatch.setattr(packed_cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(packed_cache, "RECENT", -AN_HOUR * 10**9)
    monkeypatch.setattr(packed_cache, "folder", lambda: model.parent / "packed")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    engine = pack.pack(open_checkpoint(model))
    assert "No space left" in kept_notes(engine)[0]
    assert np.isfinite(logits(engine)).all()
    assert list((model.parent / "packed").glob("*.pa*")) == []


def test_the_least_recently_used_entry_is_deleted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write(tmp_path / f"{n}.gguf", seed=n) for n in range(3)]
    for number, path in enumerate(models[:2]):
        pack.pack(open_checkpoint(path))
        newest = max(packed_cache.entries(), key=lambda entry: entry.stat().st_ctime_ns)
        os.utime(newest, (number, number))
    pack.pack(open_checkpoint(models[0]))  # used again, so it is no longer the oldest
    size = packed_cache.entries()[0].stat().st_size
    monkeypatch.setattr(packed_cache, "KEPT_BYTES", 2 * size + 100)
    pack.pack(open_checkpoint(models[2]))
    assert sorted(entry.name[0] for entry in packed_cache.entries()) == ["0", "2"]


def test_a_folder_of_safetensors(tmp_path: Path, packings: Counted) -> None:
    folder = write_hf(hf_model(**WIDE), tmp_path / "hf", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    first = logits(pack.pack(open_checkpoint(folder), quantize="q8_0"))
    second = logits(pack.pack(open_checkpoint(folder), quantize="q8_0"))
    assert packings.times == 1
    assert (first == second).all()
    copy = shutil.copytree(folder, tmp_path / "copy")
    pack.pack(open_checkpoint(copy), quantize="q8_0")
    assert packings.times == 2


def test_waiting_for_another_process_has_a_time_limit(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "LOCK_TIMEOUT", 0.1)
    packed_cache.folder().mkdir()
    with packed_cache.FileLock(packed_cache.folder() / ".lock"):
        engine = pack.pack(open_checkpoint(model))
    assert "another process" in kept_notes(engine)[0]
    assert np.isfinite(logits(engine)).all()
