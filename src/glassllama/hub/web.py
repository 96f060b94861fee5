"""One file from the web: it goes on where it stopped, and says what went wrong in one line."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress

CHUNK = 1 << 16  # bytes
PATIENCE = 30.0  # seconds without a byte
PARTIAL, COMPLETE = 206, 416  # HTTP: the rest as asked for; there is no rest


def fetch_url(url: str, came: Path, *, place: Path, progress: Progress | None = None) -> Path:
    """Everything behind `url` into the file `came` -> that; what is there already is not asked for.

    `place` is only named in errors: where the file can be put by hand. Raises DownloadError; what
    has come so far stays.
    """
    try:
        _append(url, came, progress)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == COMPLETE:
            return came
        if not isinstance(error, urllib.error.URLError | TimeoutError | ConnectionError) and (
            isinstance(error, OSError)
        ):
            raise  # of the disk: hub.cache.explained
        raise DownloadError(
            f"{url}: could not be fetched ({_reason(error)}); check the network and try again: "
            f"what has come is kept; or put the file at {place}"
        ) from None
    return came


def _append(url: str, came: Path, progress: Progress | None) -> None:
    have = came.stat().st_size if came.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "glassllama"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        if answer.status != PARTIAL:
            have = 0
        total = have + int(answer.headers.get("Content-Length") or 0)
        with came.open("ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, max(total, have))
        if have < total:
            raise http.client.IncompleteRead(b"", total - have)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection broke, {error.expected} bytes are missing"
    return str(error) or type(error).__name__
