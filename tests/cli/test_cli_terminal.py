"""A conversation with the default model on a real terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.programs import Terminal
from glassllama.base.machine import cache_home

PROMPT = "> "
GREEDY = ("-t", "0")


@pytest.fixture
def home(default_model: Path, tmp_path: Path) -> Path:
    """A cache folder with its own history; models and machine code come from the user's cache."""
    home = tmp_path / "home"
    home.mkdir()
    for shared in ("models", "compiled"):
        (cache_home() / shared).mkdir(exist_ok=True)
        (home / shared).symlink_to(cache_home() / shared)
    return home


@pytest.fixture
def terminal(home: Path) -> Iterator[Terminal]:
    """`chat` at its first prompt."""
    terminal = Terminal("chat", *GREEDY, "-n", "24", env={"GLASSLLAMA_HOME": str(home)})
    terminal.wait_for("/help; Ctrl-D leaves")
    terminal.wait_for(PROMPT)
    yield terminal
    terminal.kill()


def say(terminal: Terminal, line: str) -> str:
    """Type a line -> the output up to the next prompt."""
    terminal.send(line + "\n")
    terminal.wait_for("\n")  # the echo
    return terminal.wait_for("\r\n" + PROMPT)


def test_a_conversation_and_every_command(terminal: Terminal, home: Path, tmp_path: Path) -> None:
    answer = say(terminal, "What is the capital of France?")
    assert "decode" in answer
    assert "peak memory" in answer
    assert "/load FILE" in say(terminal, "/help")
    assert "24" in say(terminal, "/set max_tokens")  # shown unchanged
    assert "expected a number" in say(terminal, "/set temperature warm")
    assert "top_p must be" in say(terminal, "/set top_p 3")
    assert "is not an option" in say(terminal, "/set mood good")
    assert "0.5" in say(terminal, "/set temperature 0.5")
    assert "pirate" in say(terminal, "/system You are a pirate.")
    assert "is not a command" in say(terminal, "/dance")
    assert "3" in say(terminal, "/show").split("messages")[1].split("\n")[0]

    kept = tmp_path / "kept.json"
    assert "3 messages" in say(terminal, f"/save {kept}")
    messages = json.loads(kept.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "What is the capital of France?"
    assert "No such file" in say(terminal, f"/save {tmp_path}/no/folder")
    say(terminal, "/clear")
    assert "1" in say(terminal, "/show").split("messages")[1].split("\n")[0]
    assert "3 messages" in say(terminal, f"/load {kept}")
    kept.write_text('{"messages": [{"role": "king", "content": "x"}]}')
    assert "king" in say(terminal, f"/load {kept}")
    assert "3" in say(terminal, "/show").split("messages")[1].split("\n")[0]

    terminal.send('"""one\n')
    terminal.wait_for(". ")
    terminal.send("two\n")
    terminal.wait_for(". ")
    say(terminal, '"""')
    say(terminal, f"/save {kept}")
    assert json.loads(kept.read_text())["messages"][3]["content"] == "one\ntwo"

    say(terminal, "/show")
    assert "messages" in say(terminal, "\x1b[A\x1b[A\x1b[B")  # up, up, down: /show again
    terminal.send("/bye\n")
    assert terminal.end() == 0
    assert (
        "/dance" in (home / "history").read_text().splitlines()
    )  # the arrow keys of the next chat
    assert (home / "history").stat().st_mode & 0o777 == 0o600


def test_one_ctrl_c_stops_the_answer_and_two_end_the_program(terminal: Terminal) -> None:
    say(terminal, "/set max_tokens none")
    say(terminal, "/set ignore_eos on")
    terminal.send("Tell me a long story.\n")
    terminal.wait_for(" the ")
    terminal.ctrl_c()
    terminal.wait_for("(stopped)")
    terminal.wait_for("\r\n" + PROMPT)
    assert (
        "2" in say(terminal, "/show").split("messages")[1].split("\n")[0]
    )  # the text shown so far stays
    terminal.ctrl_c()
    terminal.wait_for("Ctrl-C again leaves")
    terminal.ctrl_c()
    assert terminal.end() == 130


def test_the_tour_continues_as_a_chat_and_wraps_lines_between_words(home: Path) -> None:
    terminal = Terminal("chat", "--tour", env={"GLASSLLAMA_HOME": str(home)})
    terminal.wait_for("What is photosynthesis?\r\n")
    shown = terminal.wait_for("prefill").split("\r\n")
    lines = [line.rsplit("\r", 1)[-1] for line in shown]  # the rest of a progress bar
    assert len(lines) > 2
    assert all(len(line) <= 80 for line in lines)
    words = " ".join(line.strip() for line in lines).split()
    assert "photosynthesis" in [word.strip(".,").lower() for word in words]
    terminal.wait_for("Three things to try next")
    terminal.wait_for(PROMPT)
    terminal.ctrl_d()
    assert terminal.end() == 0


def test_next_prompts_repeatedly(home: Path) -> None:
    terminal = Terminal("next", "--top", "1", env={"GLASSLLAMA_HOME": str(home)})
    terminal.wait_for("text> ")
    terminal.send("The capital of France is\n")
    assert "Paris" in terminal.wait_for("text> ")
    terminal.ctrl_d()
    assert terminal.end() == 0


def test_no_color_turns_colors_off() -> None:
    """Bold type stays, as no-color.org and Rich specify."""
    color = re.compile(r"\x1b\[(\d+;)*[349]\d(;\d+)*m")
    plain = Terminal("--help", env={"NO_COLOR": "1"})
    assert plain.end() == 0
    assert not color.search(plain.raw)
    colored = Terminal("--help")
    assert colored.end() == 0
    assert color.search(colored.raw)
