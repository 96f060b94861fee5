"""The commands and programs of the README, of docs/recipes.md and of docs/api.md work.

Those of the section Install are the ones that the Makefile runs; all others are executed here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hub.stand_in import Repository, StandIn
from synthetic_models import module
from tiny_models import META_SHAPE, hf_model, write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
INSTALL = README.split("## Install\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.strip().splitlines()]


INSTALL_COMMANDS = commands(INSTALL)
PYTHON = blocks(README + RECIPES + API, "python")
COMMANDS = commands(README.replace(INSTALL, "") + RECIPES)
EXTRA = re.compile(r"pip install (?:-q )?-e '\.\[([a-z,]+)\]'")
HUB = [line for line in COMMANDS if "HuggingFaceTB/" in line]


def environment(**more: str) -> dict[str, str]:
    scripts_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{scripts_folder}{os.pathsep}{os.environ['PATH']}", **more}


def test_install_commands_are_those_of_the_makefile() -> None:
    assert INSTALL_COMMANDS[0] == "make run"
    recipes = MAKEFILE.replace("$(BIN)", ".venv/bin").replace("$(PYTHON)", "python3")
    for line in INSTALL_COMMANDS[1:]:
        assert line in recipes or EXTRA.search(line), line


def test_extras_that_the_pages_name_exist() -> None:
    """No page installs the package by name, because it is on no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"pip install [^`\n]*", page.read_text()):
            if "glassllama" in line or "'." in line:
                found = EXTRA.search(line)
                assert found is not None, f"{page.name}: {line}"
                assert set(found[1].split(",")) <= known, f"{page.name}: {line}"


def test_the_speed_table_is_up_to_date() -> None:
    assert module("record_page").readme() == README, "run: python benchmarks/record.py"


def test_the_pages_contain_commands() -> None:
    assert len(PYTHON) == 4
    assert len(COMMANDS) >= 16
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
    """Write a chat model with random weights in the form of the Hub, with transformers."""
    vocabulary = Tokenizer(models.BPE())
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    vocabulary.train_from_iterator([README], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    shape = {**META_SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = hf_model(**shape)
    with torch.no_grad():  # its answers do not end at once: the first channel is always positive
        model.model.embed_tokens.weight[:, 0], model.lm_head.weight[:, 0] = 5, 0
        model.lm_head.weight[[1, 2], 0] = -5
    write_hf(model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.docs
def test_hub_command(tmp_path: Path) -> None:
    """A server on the loopback interface speaks the protocol of the Hub."""
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
@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
