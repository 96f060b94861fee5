"""KeyboardInterrupt at a chosen moment: at each place where Python checks for signals."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

# After these instructions the interpreter calls the handlers of pending signals.
LOOKS = ("CALL", "PRECALL", "RESUME", "JUMP_BACKWARD")


@cache
def names(code: CodeType) -> dict[int, str]:
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


class Interruption:
    """Raises at the `at`-th moment within functions of the package; `came` is whether it did."""

    def __init__(self, at: int, package: str = "glassllama") -> None:
        self.at, self.package, self.seen, self.came = at, f"/{package}/", 0, False
        self.before: dict[FrameType, str] = {}

    def run(self, function: Callable[[], Any]) -> Any:
        """The result of the function; raises KeyboardInterrupt if it was not caught."""
        sys.settrace(self._enter)
        try:
            return function()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.package not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            if self.before.get(frame, "").startswith(LOOKS):
                self.seen += 1
                if self.seen == self.at:
                    self.came = True
                    self.before.clear()
                    raise KeyboardInterrupt
            self.before[frame] = names(frame.f_code).get(frame.f_lasti, "")
        elif event == "return":
            self.before.pop(frame, None)
        return self._step
