"""Files from the web: they go on where they stopped, and what goes wrong is said in one line."""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.util
import netrc
import ssl
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from glassllama.base.errors import DownloadError, quoted
from glassllama.base.interfaces import Progress
from glassllama.hub.pip_settings import PipSettings

CHUNK = 1 << 16  # bytes
PATIENCE = 30.0  # seconds without a byte
LONG = 120  # characters of an address or a reason in an error; what is longer is cut
PARTIAL, COMPLETE = 206, 416  # HTTP: the rest as asked for; there is no rest
NETWORK = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


class Web:
    """How URLs are opened: with pip's proxy, certificates and credentials, if `settings` are given.

    Credentials are those of the URLs' own (`https://user:password@host`) and of ~/.netrc. They are
    sent to their host alone, wherever a redirection leads.
    """

    def __init__(self, settings: PipSettings | None = None) -> None:
        settings = settings or PipSettings()
        self._credentials = Credentials()
        proxy = settings.proxy
        proxies = None if proxy is None else {"http": proxy, "https": proxy}
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), Certificates(settings), self._credentials
        )
        self._opener.addheaders = [("User-Agent", "glassllama")]

    def open(self, url: str, headers: dict[str, str] | None = None) -> Any:
        """The answer, a binary stream with `headers`, `status` and its final `url`.

        Raises OSError, http.client.HTTPException, ValueError: not a URL, DownloadError:
        certificates that cannot be read.
        """
        request = urllib.request.Request(self._credentials.taken_from(url), headers=headers or {})
        return self._opener.open(request, timeout=PATIENCE)


class Credentials(urllib.request.BaseHandler):
    """Adds name and password to requests of the hosts that they belong to."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}  # (scheme, host) -> name:password

    def taken_from(self, url: str) -> str:
        """The URL without its name and password, which are remembered for its host."""
        parts = urlsplit(url)
        if parts.username is None:
            return url
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        self._known[_host(parts)] = words
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        parts = urlsplit(request.full_url)
        words = self._known.get(_host(parts)) or _from_netrc(parts.hostname or "")
        if words is not None:
            coded = base64.b64encode(words.encode()).decode()
            # A header of this request alone: a redirection may lead to another host.
            request.add_unredirected_header("Authorization", f"Basic {coded}")
        return request

    https_request = http_request


def _host(parts: SplitResult) -> tuple[str, str]:
    return parts.scheme, parts.netloc.rpartition("@")[2].lower()


def _from_netrc(host: str) -> str | None:
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None
    return None if found is None else f"{found[0]}:{found[2]}"


class Certificates(urllib.request.HTTPSHandler):
    """Checks every host's certificate but those of the hosts that pip is told to trust."""

    def __init__(self, settings: PipSettings) -> None:
        super().__init__()
        self._settings = settings

    def https_open(self, request: urllib.request.Request) -> Any:
        """Raises DownloadError: certificates that cannot be read."""
        parts = urlsplit(request.full_url)
        trusted = self._settings.trusted_hosts & {parts.hostname or "", _host(parts)[1]}
        context = _context(self._settings, checking=not trusted)
        return self.do_open(http.client.HTTPSConnection, request, context=context)


@lru_cache(maxsize=4)
def _context(settings: PipSettings, *, checking: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not checking:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif (cert := settings.cert) is not None:
        kind = "capath" if cert.is_dir() else "cafile"
        _read(cert, lambda path: context.load_verify_locations(**{kind: path}))
    elif importlib.util.find_spec("certifi"):  # on some systems Python's OpenSSL has none at all
        import certifi

        context.load_verify_locations(certifi.where())
    if settings.client_cert is not None:
        _read(settings.client_cert, context.load_cert_chain)
    return context


def _read(path: Path, load: Any) -> None:
    try:
        load(str(path))
    except (OSError, ssl.SSLError) as error:
        raise DownloadError(
            f"{path}: certificates that pip is configured for cannot be read "
            f"({error.strerror or error})"
        ) from None


def fetch_url(
    url: str, came: Path, *, bytes: int, sha256: str, web: Web, progress: Progress | None = None
) -> Path:
    """The file behind `url`, which has that size and checksum, into the file `came` -> that.

    What is there already is not asked for again. Raises DownloadError: what has come so far stays,
    unless it is something else; OSError of the disk.
    """
    resumed = came.exists()
    try:
        _append(url, came, bytes, web, progress)
    except (OSError, http.client.HTTPException, ValueError) as error:
        complete = isinstance(error, urllib.error.HTTPError) and error.code == COMPLETE
        if not isinstance(error, (*NETWORK, ValueError)):
            raise  # of the disk: hub.cache.explained
        if not complete:
            raise DownloadError(f"{shown(url)}: could not be fetched ({reason(error)})") from None
    with came.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == sha256:
        return came
    came.unlink()
    if resumed:  # what was here already may have been the wrong half
        return fetch_url(url, came, bytes=bytes, sha256=sha256, web=web, progress=progress)
    raise DownloadError(
        f"{shown(url)}: sha256 is {found}, expected {sha256}: damaged on the way or replaced at "
        "its source; it was not kept"
    )


def _append(url: str, came: Path, total: int, web: Web, progress: Progress | None) -> None:
    """Raises what urllib does, IncompleteRead, and ValueError where more than `total` comes."""
    have = came.stat().st_size if came.exists() else 0
    have = have if have <= total else 0  # else it is something else
    with web.open(url, {"Range": f"bytes={have}-"} if have else None) as answer:
        rest = str(answer.headers.get("Content-Range")).startswith(f"bytes {have}-")
        if answer.status != PARTIAL or not rest:
            have = 0
        with came.open("ab" if have else "wb") as file:
            while have <= total and (chunk := answer.read(min(CHUNK, total + 1 - have))):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(min(have, total), total)
    if have < total:
        raise http.client.IncompleteRead(b"", total - have)
    if have > total:
        came.unlink()
        raise ValueError(f"more than the {total:,} bytes that it has")


def reason(error: Exception) -> str:
    """What went wrong on the network, in a few words; what a server says of it is cut."""
    if isinstance(error, http.client.IncompleteRead):
        missing = f", {error.expected} bytes are missing" if error.expected else ""
        return f"the connection broke{missing}"
    said = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    words = said if len(said) <= LONG and said.isprintable() else quoted(said)
    return f"HTTP {error.code} {words}" if isinstance(error, urllib.error.HTTPError) else words


def shown(url: str) -> str:
    """A URL for a message: without a password, and not too long."""
    parts = urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return plain if len(plain) <= LONG else quoted(plain)
