"""benchmarks/synthetic.py as a module: random models of any shape and type, written in no time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def synthetic_module() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "synthetic.py"
    spec = importlib.util.spec_from_file_location("synthetic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
