"""glassllama: Llama 3 from scratch, in Python you can see through, and fast on a CPU."""

from __future__ import annotations

__version__ = "0.1.0"
