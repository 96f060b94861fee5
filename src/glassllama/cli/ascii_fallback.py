"""What stands for the characters of drawings where an output's encoding lacks them."""

from __future__ import annotations

import codecs

NAME = "drawn plainly"
PLAIN = str.maketrans(
    # bars, curves and shades; frames; marks and arrows; the rest: one for one, so that columns hold
    "█▉▊▋▌▍▎▏" "▁▂▃▄▅▆▇" "░▒▓" "─━│┃└┘┌┐├┤┬┴┼" "✓✗" "→←↑↓↗↙↖↘↵⇥" "␣⟨⟩·…×÷√",
    "#######|" "_.-=+*%" ".+#" "--||+++++++++" "+x" "><^v//\\\\/>" "_<>..x/V",
)  # fmt: skip


def drawn_plainly(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: what has no plain form becomes a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else "?" for c in text), error.end


codecs.register_error(NAME, drawn_plainly)
