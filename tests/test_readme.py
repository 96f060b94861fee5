"""Every command of the README works: the ones for a fresh machine are make's, the rest are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hub.stand_in import Repository, StandIn
from tiny_models import META_SHAPE, hf_model, write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
MAKEFILE = (ROOT / "Makefile").read_text()
FRESH_MACHINE = [line for kind, text in BLOCKS[:4] for line in text.strip().splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS[4:] if kind == "sh" for line in text.strip().splitlines()]
HUB = [line for line in COMMANDS if "HuggingFaceTB/" in line]


def environment(**more: str) -> dict[str, str]:
    beside = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", **more}


def test_pip_lines_are_what_make_runs() -> None:
    assert FRESH_MACHINE[:2] == ["make run", "make test"]
    recipes = MAKEFILE.replace("$(BIN)", ".venv/bin").replace("$(PYTHON)", "python3")
    for line in FRESH_MACHINE[2:]:
        assert line in recipes, line


def test_there_is_something_to_run() -> None:
    assert len(PYTHON) == 1
    assert len(COMMANDS) >= 6
    assert len(HUB) == 1


@pytest.mark.docs
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in HUB])
def test_command(command: str, default_model: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model").symlink_to(default_model.parent)
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "my-text.txt").write_text("".join(pages))
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(folder: Path) -> dict[str, bytes]:
    """A random Hugging Face chat model, written by transformers, as the Hub would hold it."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator([README], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    shape = {**META_SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    write_hf(hf_model(**shape), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.docs
def test_hub_recipe(tmp_path: Path) -> None:
    """The Hub itself is out of reach of tests: a stand-in on loopback speaks its protocol."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    name = re.findall(r"HuggingFaceTB/\S+", HUB[0])[0]
    server.repositories[name] = Repository(files=write_chat_model(tmp_path / "hub"))
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        shlex.split(HUB[0]), env=environment(**hub), capture_output=True, text=True
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.docs
def test_python_recipe(default_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[0]], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
