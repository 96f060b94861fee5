"""Write docs/terminal.svg: a real question, asked and answered in a terminal of 80 columns.

python docs/make_picture.py
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ["chat", "Why is the sky blue? Answer in two sentences.", "--temperature", "0"]
SHOWN = 'glassllama chat "Why is the sky blue? Answer in two sentences." --temperature 0'
WEB_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # the picture must not load anything


def picture() -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "glassllama", *COMMAND], capture_output=True, text=True, check=True
    )
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Text("$ ", style="green") + Text(SHOWN, style="bold"))
    console.print(answer.stdout.strip())
    return WEB_FONT.sub("", console.export_svg(title="glassllama"))


if __name__ == "__main__":
    (Path(__file__).parent / "terminal.svg").write_text(picture())
