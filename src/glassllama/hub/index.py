"""One archive of a package, found on the pages of pip's indexes, fetched, and never run.

`pip download` of a source package builds it: it runs the package's code, and fetches more to do so.
Here an index's page is read for the link of one file, whose name, size and sha256 are known in
advance; what comes is compared with them before anybody opens it.
Sources: PEP 503 (pages in HTML), PEP 691 (in JSON).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

from glassllama.base.errors import DownloadError, quoted
from glassllama.base.interfaces import Progress
from glassllama.hub.names import Archive
from glassllama.hub.pip_settings import PipSettings, pip_settings
from glassllama.hub.web import NETWORK, Web, fetch_url, reason, shown

JSON_PAGE = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON_PAGE}, application/vnd.pypi.simple.v1+html;q=0.1, text/html;q=0.01"
LARGEST_PAGE = 32_000_000  # bytes; PyPI's largest have a few million
NOT_FOUND = 404
MOST_REASONS = 8  # that one message spells out; the rest are counted
Links = list[tuple[str, str | None]]  # and their sha256, where it is given
SHA256 = re.compile(r"\bsha256=([0-9a-fA-F]{64})")


def fetch_archive(archive: Archive, came: Path, *, progress: Progress | None = None) -> Path:
    """The archive as it is known, into the file `came` -> that; a half that is there is completed.

    Raises DownloadError: what every place said that pip is configured for; OSError of the disk.
    """
    settings = pip_settings()
    web = Web(settings)
    size, known = archive.archive_bytes, archive.archive_sha256
    reasons: list[str] = []
    for place in pages(archive, settings):
        try:
            links = [*links_to(archive.archive, place, web)]
        except (*NETWORK, OSError, ValueError, RecursionError) as error:
            if getattr(error, "code", None) != NOT_FOUND:  # an index need not have every package
                reasons.append(f"{shown(place)}: {reason(error)}")
            continue
        for url, sha256 in links:
            if sha256 not in (None, known):
                reasons.append(f"{shown(url)}: sha256 is another one, by its index")
                continue
            try:
                return fetch_url(url, came, bytes=size, sha256=known, web=web, progress=progress)
            except DownloadError as error:
                reasons.append(str(error))
    asked = ", ".join(shown(place) for place in (*settings.indexes, *settings.find_links))
    missing = f"it is not at {asked}" if asked else "no index is configured"
    if len(reasons) > MOST_REASONS:
        reasons[MOST_REASONS:] = [f"and {len(reasons) - MOST_REASONS} more"]
    raise DownloadError(
        f"{archive.archive} could not be had from pip's index ({'; '.join(reasons) or missing}); "
        "check the network and pip's index ('pip config list')"
    )


def pages(archive: Archive, settings: PipSettings) -> Iterator[str]:
    """The URLs that may link to the archive: folders and pages, the package's page of each index.

    A folder that holds it is a page itself: the URL of the file.
    """
    for place in settings.find_links:
        url = as_url(place)
        inside = Path(url2pathname(urlsplit(url).path), archive.archive)
        yield inside.as_uri() if url.startswith("file:") and inside.is_file() else url
    for index in settings.indexes:
        url = f"{as_url(index).rstrip('/')}/{archive.package}/"
        yield url + "index.html" if url.startswith("file:") else url


def as_url(place: str) -> str:
    """A folder or file as a URL; what is a URL already stays."""
    if "://" in place or place.startswith("file:"):
        return place
    return Path(os.path.expanduser(place)).absolute().as_uri()


def links_to(name: str, place: str, web: Web) -> Iterator[tuple[str, str | None]]:
    """The URLs of files of that name on a page, and their sha256 where the page gives it.

    Raises OSError, http.client.HTTPException, ValueError.
    """
    if file_name(place) == name:
        yield place, None
        return
    if place.startswith("file:") and not Path(url2pathname(urlsplit(place).path)).is_file():
        return  # a folder, or an index without this package
    with web.open(place, {"Accept": ACCEPT}) as answer:
        page = answer.read(LARGEST_PAGE + 1)
        if len(page) > LARGEST_PAGE:
            raise ValueError(f"a page of more than {LARGEST_PAGE:,} bytes")
        read = json_links if answer.headers.get_content_type() == JSON_PAGE else html_links
        base, found = read(page)
        for link, sha256 in found:
            if name not in unquote(link):  # whatever the others are
                continue
            try:
                url = urljoin(urljoin(answer.url, base), link)
                local = urlsplit(url).scheme not in ("http", "https")
            except ValueError:  # one bad link of many
                continue
            if file_name(url) == name and not (local and not place.startswith("file:")):
                yield url, sha256


def file_name(url: str) -> str:
    return unquote(urlsplit(url).path).rsplit("/", 1)[-1]


def json_links(page: bytes) -> tuple[str, Links]:
    """Raises ValueError: not a page of PEP 691."""
    try:
        files: list[Any] = json.loads(page)["files"]
        found = [(str(file["url"]), (file.get("hashes") or {}).get("sha256")) for file in files]
        return "", [
            (url, sha256 if sha256 is None else str(sha256).lower()) for url, sha256 in found
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"not a list of files: {quoted(page)}") from None


def html_links(page: bytes) -> tuple[str, Links]:
    """What the page's links are relative to, if it says so, and the links."""
    anchors = Anchors()
    anchors.feed(page.decode("utf-8", errors="replace"))
    found = [(link, SHA256.search(link.partition("#")[2])) for link in anchors.links]
    return anchors.base, [(link, sha256[1].lower() if sha256 else None) for link, sha256 in found]


class Anchors(HTMLParser):
    """The links of a page, and what they are relative to where it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href is not None and tag == "a":
            self.links.append(href.strip())
        elif href is not None and tag == "base" and not self.base:
            self.base = href.strip()
