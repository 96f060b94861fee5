"""Downloads as pip is configured: an archive of a package, found on the pages of pip's indexes.

pip itself is not run: `pip download` of a source package runs the package's code, and this Python
may have no pip. pip's documented files and variables are read, an index's page is searched for the
link of one file, and what comes is compared with a checksum that is known in advance.
Sources: PEP 503, https://pip.pypa.io/en/stable/topics/configuration/
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import http.client
import importlib.util
import netrc
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

from glassllama.base.errors import DownloadError, quoted
from glassllama.base.interfaces import Progress

PYPI = "https://pypi.org/simple"
SECTIONS = ("global", "download")  # of pip's files; the later one wins, variables win over both
CA_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # what pip's HTTP library honors
ACCEPT = "application/vnd.pypi.simple.v1+html, text/html;q=0.1"
SHA256 = re.compile(r"\bsha256=([0-9a-fA-F]{64})")
MAX_PAGE_BYTES = 32_000_000  # PyPI's largest pages have a few million
MAX_REASONS = 8  # that one message spells out; the rest are counted
MAX_SHOWN = 120  # characters of a URL or a reason in an error
CHUNK = 1 << 16  # bytes
TIMEOUT = 30.0  # seconds without a byte
PARTIAL_CONTENT, NOT_FOUND = 206, 404  # HTTP
NETWORK_ERRORS = (
    urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file of a package index, a wheel or a source package."""

    package: str  # the normalized name: small letters, hyphens (PEP 503)
    filename: str
    bytes: int
    sha256: str


# --- pip's configuration --------------------------------------------------------------------


def pip_options() -> dict[str, str]:
    """The options that `pip download` would use now, such as "index-url"; an empty one is none.

    Raises DownloadError: a configuration file that cannot be read.
    """
    parser = configparser.RawConfigParser()
    for path in _config_files():
        try:
            parser.read(path, encoding="utf-8")  # a missing file is no error
        except (configparser.Error, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise DownloadError(f"{path}: not a configuration file of pip ({reason})") from None
    found = [item for name in SECTIONS if parser.has_section(name) for item in parser.items(name)]
    found += [(k.removeprefix("PIP_"), v) for k, v in os.environ.items() if k.startswith("PIP_")]
    return {
        name.lower().replace("_", "-").removeprefix("--"): value
        for name, value in found
        if value.strip()
    }


def _config_files() -> list[str]:
    """pip's configuration files on all systems, the last one wins; most of them do not exist."""
    variable, home = os.environ.get, os.path.expanduser("~")
    chosen = variable("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    macos = "/Library/Application Support/pip/pip.conf"
    folders = (variable("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [f"{variable('PROGRAMDATA', '')}/pip/pip.ini", macos]
    files += [*(f"{folder}/pip/pip.conf" for folder in folders), "/etc/pip.conf"]
    if chosen is None or not os.path.exists(chosen):
        files += [f"{home}/pip/pip.ini", f"{variable('APPDATA', '')}/pip/pip.ini"]
        config = variable("XDG_CONFIG_HOME") or f"{home}/.config"
        files += [f"{home}/.pip/pip.conf", f"{config}/pip/pip.conf", home + macos]
    files += [f"{sys.prefix}/pip.ini", f"{sys.prefix}/pip.conf"]
    return files if chosen is None else [*files, chosen]


# --- HTTP -----------------------------------------------------------------------------------


class PipSession:
    """Opens URLs with pip's proxy, certificates and credentials.

    Credentials are those of the URLs (`https://user:password@host`) and of ~/.netrc. They are sent
    to their own host only, wherever a redirection leads.
    """

    def __init__(self, options: dict[str, str] | None = None) -> None:
        options = pip_options() if options is None else options
        proxy = options.get("proxy")
        proxies = {"http": proxy, "https": proxy} if proxy else None
        self._credentials = Credentials()
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), CertificateCheck(options), self._credentials
        )
        self._opener.addheaders = [("User-Agent", "glassllama")]

    def open(self, url: str, headers: dict[str, str]) -> Any:
        """The response, a binary stream with `headers`, `status` and its final `url`.

        Raises OSError, http.client.HTTPException, ValueError: not a URL, DownloadError:
        certificates that cannot be read.
        """
        request = urllib.request.Request(self._credentials.remove_from(url), headers=headers)
        return self._opener.open(request, timeout=TIMEOUT)


class Credentials(urllib.request.BaseHandler):
    """Adds user and password to requests for the hosts that they belong to."""

    def __init__(self) -> None:
        self._by_host: dict[tuple[str, str], str] = {}  # (scheme, host:port) -> user:password

    def remove_from(self, url: str) -> str:
        """The URL without its user and password, which are remembered for its host."""
        parts = urlsplit(url)
        if parts.username is None:
            return url
        host = parts.netloc.rpartition("@")[2]
        userinfo = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        self._by_host[parts.scheme, host.lower()] = userinfo
        return parts._replace(netloc=host).geturl()

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        parts = urlsplit(request.full_url)
        userinfo = self._by_host.get((parts.scheme, parts.netloc.lower()))
        userinfo = userinfo or _netrc_userinfo(parts.hostname or "")
        if userinfo is not None:
            encoded = base64.b64encode(userinfo.encode()).decode()
            # A header of this request alone: a redirection may lead to another host.
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        return request

    https_request = http_request


def _netrc_userinfo(host: str) -> str | None:
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return None if found is None else f"{found[0]}:{found[2]}"


class CertificateCheck(urllib.request.HTTPSHandler):
    """Checks the certificates of all hosts except pip's trusted hosts."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__()
        self._options = options
        self._trusted_hosts = {*options.get("trusted-host", "").lower().split()}

    def https_open(self, request: urllib.request.Request) -> Any:
        """Raises DownloadError: certificates that cannot be read."""
        parts = urlsplit(request.full_url)
        trusted = self._trusted_hosts & {parts.hostname or "", parts.netloc.lower()}
        context = _ssl_context(self._options, check=not trusted)
        return self.do_open(http.client.HTTPSConnection, request, context=context)


def _ssl_context(options: dict[str, str], *, check: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    path = options.get("cert") or next(filter(None, map(os.environ.get, CA_BUNDLES)), None)
    try:
        if not check:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        elif path is not None:
            path = os.path.expanduser(path)
            context.load_verify_locations(**{"capath" if os.path.isdir(path) else "cafile": path})
        elif importlib.util.find_spec("certifi"):  # on some systems OpenSSL finds no certificates
            import certifi

            context.load_verify_locations(certifi.where())
        if (path := options.get("client-cert")) is not None:
            context.load_cert_chain(os.path.expanduser(path))
    except OSError as error:
        raise DownloadError(
            f"{path}: certificates that pip is configured for cannot be read "
            f"({error.strerror or error})"
        ) from None
    return context


def download(
    url: str, path: Path, *, bytes: int, sha256: str, session: PipSession | None = None,
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """Download a file of known size and checksum to `path`, and return `path`.

    A part that is there already is completed. Raises DownloadError: what has come so far stays,
    unless its checksum is wrong; OSError of the disk.
    """
    have = path.stat().st_size if path.exists() else 0
    have = have if have <= bytes else 0  # else it is another file
    try:
        if have < bytes:
            _append(url, path, have, bytes, session or PipSession(), progress)
    except (*NETWORK_ERRORS, ValueError) as error:
        raise DownloadError(f"{shown(url)}: could not be fetched ({reason(error)})") from None
    if (found := sha256_of(path)) == sha256:
        return path
    path.unlink()
    if have:  # the part that was there may have been the damaged one
        return download(url, path, bytes=bytes, sha256=sha256, session=session, progress=progress)
    raise DownloadError(
        f"{shown(url)}: sha256 is {found}, expected {sha256}: damaged on the way or replaced at "
        "its source; the file was deleted"
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _append(
    url: str, path: Path, have: int, total: int, session: PipSession, progress: Progress | None
) -> None:
    """Raises what urllib does, IncompleteRead, and ValueError if more than `total` bytes come."""
    with session.open(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        resumes = str(response.headers.get("Content-Range")).startswith(f"bytes {have}-")
        if response.status != PARTIAL_CONTENT or not resumes:
            have = 0
        with path.open("ab" if have else "wb") as file:
            while have <= total and (chunk := response.read(min(CHUNK, total + 1 - have))):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(min(have, total), total)
    if have < total:
        raise http.client.IncompleteRead(b"", total - have)
    if have > total:
        path.unlink()
        raise ValueError(f"more than the {total:,} bytes that it has")


def reason(error: Exception) -> str:
    """A network error in a few words; what a server says is cut."""
    if isinstance(error, http.client.IncompleteRead):
        missing = f", {error.expected} bytes are missing" if error.expected else ""
        return f"the connection broke{missing}"
    text = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    text = text if len(text) <= MAX_SHOWN and text.isprintable() else quoted(text)
    return f"HTTP {error.code} {text}" if isinstance(error, urllib.error.HTTPError) else text


def shown(url: str) -> str:
    """A URL for a message: without a password, and not too long."""
    parts = urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return plain if len(plain) <= MAX_SHOWN else quoted(plain)


# --- pages of indexes -----------------------------------------------------------------------


def fetch_archive(archive: Archive, path: Path, *, progress: Progress | None = None) -> Path:
    """Download an archive to `path`, and return `path`; a part that is there is completed.

    Raises DownloadError with the reasons of every place that pip is configured for; OSError of the
    disk.
    """
    options = pip_options()
    session, pages, reasons = PipSession(options), index_pages(archive, options), list[str]()
    for page in pages:
        try:
            links = [*_links_to(archive.filename, page, session)]
        except (*NETWORK_ERRORS, OSError, ValueError) as error:
            if getattr(error, "code", None) != NOT_FOUND:  # an index need not have every package
                reasons.append(f"{shown(page)}: {reason(error)}")
            continue
        for url, sha256 in links:
            if sha256 not in (None, archive.sha256):
                reasons.append(f"{shown(url)}: sha256 is another one, by its index")
                continue
            try:
                return download(
                    url, path, bytes=archive.bytes, sha256=archive.sha256, session=session,
                    progress=progress,
                )  # fmt: skip
            except DownloadError as error:
                reasons.append(str(error))
    if len(reasons) > MAX_REASONS:
        reasons[MAX_REASONS:] = [f"and {len(reasons) - MAX_REASONS} more"]
    missing = f"it is not at {', '.join(map(shown, pages))}" if pages else "no index is configured"
    raise DownloadError(
        f"{archive.filename} could not be fetched from pip's index "
        f"({'; '.join(reasons) or missing}); 'pip config list' shows how pip is configured"
    )


def index_pages(archive: Archive, options: dict[str, str]) -> list[str]:
    """The URLs that may link to the archive: find-links, and the package's page of each index.

    For a folder that contains the archive, the URL of the archive itself.
    """
    pages: list[str] = []
    for place in options.get("find-links", "").split():
        url = _as_url(place)
        file = Path(url2pathname(urlsplit(url).path), archive.filename)
        pages.append(file.as_uri() if url.startswith("file:") and file.is_file() else url)
    if options.get("no-index", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return pages
    for index in (options.get("index-url", PYPI), *options.get("extra-index-url", "").split()):
        url = f"{_as_url(index).rstrip('/')}/{archive.package}/"
        pages.append(url + "index.html" if url.startswith("file:") else url)
    return pages


def _as_url(place: str) -> str:
    """A folder or file as a URL; a URL stays as it is."""
    is_url = "://" in place or place.startswith("file:")
    return place if is_url else Path(os.path.expanduser(place)).absolute().as_uri()


def _links_to(filename: str, page: str, session: PipSession) -> Iterator[tuple[str, str | None]]:
    """The URLs of files of that name on a page, and their sha256 if the page has it.

    Raises OSError, http.client.HTTPException, ValueError.
    """
    if _file_name(page) == filename:
        yield page, None
        return
    if page.startswith("file:") and not Path(url2pathname(urlsplit(page).path)).is_file():
        return  # a folder, or an index without this package
    with session.open(page, {"Accept": ACCEPT}) as response:
        content = response.read(MAX_PAGE_BYTES + 1)
        if len(content) > MAX_PAGE_BYTES:
            raise ValueError(f"a page of more than {MAX_PAGE_BYTES:,} bytes")
        parser = LinkParser(content)
        for link in parser.links:
            if filename not in unquote(link):  # whatever the others are
                continue
            try:
                url = urljoin(urljoin(response.url, parser.base), link)
                is_local = urlsplit(url).scheme not in ("http", "https")
            except ValueError:  # one bad link of many
                continue
            if _file_name(url) == filename and (page.startswith("file:") or not is_local):
                sha256 = SHA256.search(urlsplit(url).fragment)
                yield url, sha256[1].lower() if sha256 else None


def _file_name(url: str) -> str:
    return unquote(urlsplit(url).path).rsplit("/", 1)[-1]


class LinkParser(HTMLParser):
    """The links of a page, and the base URL that they are relative to, if the page has one."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.base = ""
        self.links: list[str] = []
        self.feed(page.decode("utf-8", errors="replace"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = (dict(attrs).get("href") or "").strip()
        if href and tag == "a":
            self.links.append(href)
        elif href and tag == "base" and not self.base:
            self.base = href
