"""What this machine is, as a line of results says it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from glassllama.base.machine import usable_cores

CPU_INFO = Path("/proc/cpuinfo")
TELLING = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, the flags that kernels ask for, and how busy it is."""
    said = cpu_info()
    flags = (said.get("flags") or said.get("Features") or "").split()
    return {
        "cpu": said.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in TELLING if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cpu_info() -> dict[str, str]:
    """Linux's words about the first processor; nothing elsewhere."""
    try:
        first = CPU_INFO.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    from importlib.metadata import version

    from glassllama import __version__

    packages = {name: version(name) for name in ("numba", "numpy")}
    return {"glassllama": __version__, "python": platform.python_version(), **packages}
