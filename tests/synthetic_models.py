"""Scripts of benchmarks/ that write models, as modules: of random weights, of any shape and type,
in no time (synthetic.py); and of another model's with zeros around them (padded.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def synthetic_module() -> ModuleType:
    return module("synthetic")


def padded_module() -> ModuleType:
    synthetic_module()  # which it imports
    return module("padded")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
