"""If the program is started in an untrusted folder, nothing from that folder is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.programs import PATIENCE

# Imported by Python itself before the module named by -m.
PYTHONS = "import runpy, sys; print(*sys.modules)"
OTHERS = ("pip", "typer", "click", "rich", "numpy", "numba", "regex", "filelock", "yaml", "certifi")


@pytest.mark.parametrize("module", ["glassllama", "glassllama.__main__"])
def test_nothing_of_the_current_folder_is_imported(tmp_path: Path, module: str) -> None:
    asked = subprocess.run([sys.executable, "-c", PYTHONS], capture_output=True, text=True)
    names = {*sys.stdlib_module_names, *OTHERS} - {*asked.stdout.split()}
    assert len(names) > 200
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"import os; os.mkdir('imported-{name}')")
    for words in (["-m", module, "list"], [f"-m{module}", "--version"]):
        ran = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert ran.returncode == 0, ran.stderr
        assert [*tmp_path.glob("imported-*")] == []


def test_other_programs_keep_their_search_path(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import glassllama, sys; print(sys.path[0])")
    (tmp_path / "theirs_too").mkdir()
    (tmp_path / "theirs_too" / "__init__.py").write_text("import glassllama")
    (tmp_path / "theirs_too" / "__main__.py").write_text("import theirs")
    for module in ("theirs", "theirs_too"):
        ran = subprocess.run(
            [sys.executable, "-m", module], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.stdout == f"{tmp_path}\n", ran.stderr
