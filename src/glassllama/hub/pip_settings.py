"""What pip is configured for: its documented files and variables, read without running pip.

So the user's own index, proxy and certificates are used, also where this Python has no pip, and no
program is started in a folder that may hold modules of a stranger's.
Source: https://pip.pypa.io/en/stable/topics/configuration/
"""

from __future__ import annotations

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from glassllama.base.errors import DownloadError

PYPI = "https://pypi.org/simple"
SECTIONS = ("global", "download")  # the later one wins; variables win over both
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # what pip's HTTP library honours
YES = ("1", "true", "yes", "y", "t", "on")


@dataclass(frozen=True, kw_only=True)
class PipSettings:
    """Where pip looks for packages, and how it gets there."""

    indexes: tuple[str, ...] = (PYPI,)  # URLs or folders, with a folder for each package
    find_links: tuple[str, ...] = ()  # URLs of pages, folders, or files
    trusted_hosts: frozenset[str] = frozenset()  # whose certificates are not checked
    cert: Path | None = None
    client_cert: Path | None = None
    proxy: str | None = None


def pip_settings() -> PipSettings:
    """The settings that `pip download` would use now. Raises DownloadError: unreadable file."""
    options = _options()
    indexes = [options.get("index-url", PYPI), *options.get("extra-index-url", "").split()]
    no_index = options.get("no-index", "").lower() in YES
    bundles = [os.environ[name] for name in BUNDLES if os.environ.get(name)]
    return PipSettings(
        indexes=() if no_index else tuple(indexes),
        find_links=tuple(options.get("find-links", "").split()),
        trusted_hosts=frozenset(options.get("trusted-host", "").lower().split()),
        cert=_path(options.get("cert") or (bundles[0] if bundles else None)),
        client_cert=_path(options.get("client-cert")),
        proxy=options.get("proxy"),
    )


def _options() -> dict[str, str]:
    """Option -> value, of all files and variables; an empty value counts as none."""
    parser = configparser.RawConfigParser()
    for path in config_files():
        try:
            parser.read(path, encoding="utf-8")  # one that is not there is no error
        except (configparser.Error, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise DownloadError(f"{path}: not a configuration of pip's ({reason})") from None
    found = [item for name in SECTIONS if parser.has_section(name) for item in parser.items(name)]
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            found.append((name.removeprefix("PIP_"), value))
    return {_plain(name): value for name, value in found if value.strip()}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("--")


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(os.path.expanduser(name))


def config_files() -> list[Path]:
    """pip's configuration files, those that win last; not all of them exist."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    everyone, users = _places()
    files = [*everyone]
    if chosen is None or not os.path.exists(chosen):
        files += users
    files.append(Path(sys.prefix) / _file_name())
    return files if chosen is None else [*files, Path(chosen)]


def _file_name() -> str:
    return "pip.ini" if sys.platform == "win32" else "pip.conf"


def _places() -> tuple[list[Path], list[Path]]:
    """The files for all users of this machine, and for this one."""
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        data = Path(os.environ.get("APPDATA", home))
        everyone = [Path(os.environ.get("PROGRAMDATA", "C:/ProgramData"), "pip", "pip.ini")]
        return everyone, [home / "pip" / "pip.ini", data / "pip" / "pip.ini"]
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if sys.platform == "darwin":
        everyone = [Path("/Library/Application Support/pip/pip.conf")]
        own = home / "Library" / "Application Support" / "pip"
        config = own.parent if own.is_dir() else home / ".config"
    else:
        folders = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
        everyone = [*(Path(folder, "pip", "pip.conf") for folder in folders), Path("/etc/pip.conf")]
    return everyone, [home / ".pip" / "pip.conf", config / "pip" / "pip.conf"]
