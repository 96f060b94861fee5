"""glassllama: Llama 3 from scratch, in Python you can see through, and fast on a CPU."""

import sys

# `python -m glassllama` has Python look for every module in the current folder first, and that may
# be a stranger's. So this comes before any import that is not built into Python.
_sought = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else ""
if _sought.removesuffix(".__main__").endswith("glassllama") and not sys.flags.safe_path:
    del sys.path[0]

from typing import TYPE_CHECKING, Any  # noqa: E402

from glassllama.base.errors import GlassError  # noqa: E402

if TYPE_CHECKING:
    from glassllama.llm import LLM, Completion, load

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "GlassError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The facade, imported when it is first asked for: `glassllama --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'glassllama' has no attribute {name!r}")
    from glassllama import llm

    return getattr(llm, name)
