"""Write docs/terminal.svg: two commands and their output in a terminal of 84 columns.

python docs/make_picture.py
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    'chat "What is the capital of France, and what is it known for?" -t 0',
    'next "The capital of France is" -k 4',
)
WEB_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # pictures load nothing from the network


def picture() -> str:
    console = Console(record=True, width=84, file=io.StringIO(), highlight=False)
    for command in COMMANDS:
        console.print(Text("$ ", style="green") + Text(f"glassllama {command}", style="bold white"))
        arguments = [sys.executable, "-m", "glassllama", *shlex.split(command)]
        ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
        console.print(Text(ran.stdout.strip("\n") + "\n"))
    return WEB_FONT.sub("", console.export_svg(title="glassllama"))


if __name__ == "__main__":
    (Path(__file__).parent / "terminal.svg").write_text(picture())
