"""A cache that another user owns or can write to is not used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from glassllama.base import trust
from glassllama.base.errors import UntrustedError
from glassllama.base.trust import is_trusted, make_folder, require_trusted
from glassllama.native.jit import code_cache
from glassllama.native.jit.code_cache import folder_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
OTHER_USER = 4242


def change_owner(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it belong to another user: really if the tests run as root, else by a replaced lstat."""
    if os.geteuid() == 0:
        os.chown(path, OTHER_USER, OTHER_USER, follow_symlinks=False)
        return
    real_lstat = os.lstat

    def lstat(place: str | Path) -> os.stat_result:
        status = real_lstat(place)
        other = Path(place) == path
        return os.stat_result([*status[:4], OTHER_USER, *status[5:]]) if other else status

    monkeypatch.setattr(os, "lstat", lstat)


def refusal(folder: Path) -> str:
    with pytest.raises(UntrustedError) as error:
        require_trusted(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_of_this_user(tmp_path: Path) -> None:
    require_trusted(tmp_path)
    require_trusted(tmp_path / "not" / "there" / "yet")
    (tmp_path / "link").symlink_to(tmp_path)
    require_trusted(tmp_path / "link" / "x")
    require_trusted(Path("/"))
    tmp_path.chmod(0o777)  # this bit decides
    assert "others can write" in refusal(tmp_path / "not" / "there" / "yet")
    assert "others can write" in refusal(tmp_path / "link" / "x")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775, 0o1777])
def test_a_folder_that_others_can_write_to(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "private_group", lambda: None)
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    home.chmod(mode)
    assert refusal(home).startswith(f"others can write to {home}: it is not used; ")
    if mode & stat.S_ISVTX:  # sticky bit, as on /tmp: others cannot replace our files
        require_trusted(home / "inner")
        (tmp_path / "link").symlink_to(home)
        assert "others can write" in refusal(tmp_path / "link")
    else:
        assert f"others can write to {home}" in refusal(home / "inner")
        assert f"others can write to {home}" in refusal(home / "not there")


def test_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "inner").mkdir(parents=True)
    change_owner(theirs, monkeypatch)
    assert refusal(theirs) == f"{theirs} belongs to another user: {trust.NOT_OURS}"
    assert refusal(theirs / "inner").startswith(f"{theirs} belongs to another user")


def test_links_and_their_targets_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = tmp_path / "open"
    (open_to_all / "inner").mkdir(parents=True)
    open_to_all.chmod(0o777)
    (tmp_path / "link").symlink_to("second")
    (tmp_path / "second").symlink_to(open_to_all / "inner")
    assert f"others can write to {open_to_all}" in refusal(tmp_path / "link")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        require_trusted(tmp_path / "round")
    (tmp_path / "theirs").symlink_to(tmp_path)
    change_owner(tmp_path / "theirs", monkeypatch)
    assert "belongs to another user" in refusal(tmp_path / "theirs")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_new_folders_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755 & ~umask
    require_trusted(tmp_path / "a" / "b")
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(UntrustedError):
        make_folder(tmp_path / "a" / "c")
    assert not (tmp_path / "a" / "c").exists()


def test_the_private_group_of_a_user_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o770)
    monkeypatch.setattr(trust, "private_group", lambda: tmp_path.stat().st_gid)
    require_trusted(tmp_path)
    monkeypatch.setattr(trust, "private_group", lambda: None)
    assert "others can write" in refusal(tmp_path)


def test_compiled_code_is_stored_in_trusted_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, notes = tmp_path / "home", list[str]()
    monkeypatch.setattr(code_cache, "notes", notes)
    monkeypatch.setenv("GLASSLLAMA_HOME", str(home))
    folder = folder_for("engine", [Path(__file__)], "1")
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert notes == []
    home.chmod(0o777)
    assert folder_for("engine", [Path(__file__)], "1") is None
    assert folder_for("engine", [Path(__file__)], "2") is None
    assert notes == [
        f"compiling in memory, at every start: others can write to {home}: {trust.HELP}"
    ]
    assert [path.name for path in (home / "compiled").iterdir()] == [folder.parent.name]


def test_files_that_others_can_write_are_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "private_group", lambda: None)
    names = ("ours", "open", "in/ours", "open_folder/ours")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("ours")
    code_cache.write_checksums(tmp_path)
    (tmp_path / "open").chmod(0o666)
    (tmp_path / "open_folder").chmod(0o777)
    assert code_cache.discard_damaged(tmp_path) == 2  # and a folder
    assert [name for name, _ in code_cache.files(tmp_path)] == ["in/ours", "ours"]
    (tmp_path / code_cache.CHECKSUM_FILE).chmod(0o666)
    assert code_cache.read_checksums(tmp_path) == {}, "checksums that others can write are not used"
    assert code_cache.discard_damaged(tmp_path) == 0
    assert list(code_cache.files(tmp_path)) == []


def test_writing_checksums_removes_write_permissions_of_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "file").write_text("x")
        code_cache.write_checksums(tmp_path)
    finally:
        os.umask(before)
    assert code_cache.discard_damaged(tmp_path) == 0
    assert [name for name, _ in code_cache.files(tmp_path)] == ["sub/file"]
    assert is_trusted((tmp_path / code_cache.CHECKSUM_FILE).lstat())
