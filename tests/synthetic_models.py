"""Scripts of benchmarks/ that write models, as modules: random weights of any shape and type
(synthetic.py), and models padded with zeros (padded.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def synthetic_module() -> ModuleType:
    return module("synthetic")


def padded_module() -> ModuleType:
    synthetic_module()  # imported by padded.py
    return module("padded")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    return module
