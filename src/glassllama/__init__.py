"""glassllama: Llama 3 from scratch, in Python you can see through, and fast on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion, load

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The facade, imported when it is first asked for: `glassllama --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'glassllama' has no attribute {name!r}")
    from glassllama import llm

    return getattr(llm, name)
