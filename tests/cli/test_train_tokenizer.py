"""`glassllama train-tokenizer`: its output, its files, and errors for texts that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli.conftest import Verb
from cli.programs import Terminal, is_clean_error, run_many
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
FILES = ["tokenizer.json", "tokenizer_config.json", "vocabulary.tsv"]


def test_tokenize_reads_the_folder(verb: Verb, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    ran = verb("train-tokenizer", PAGE, "--vocab-size", 600, "--out", out)
    assert (ran.code, ran.out) == (0, f"{out}\n")
    assert "600 tokens trained in" in ran.err
    assert sorted(path.name for path in out.iterdir()) == FILES
    asked = verb("tokenize", "-m", out, "the model and <|end_of_text|>", "--json", "--bos")
    ids = json.loads(asked.out)["ids"]
    theirs = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert ids == theirs.encode("the model and <|end_of_text|>").ids
    assert ids[0] == 598
    assert 599 not in ids
    back = verb("tokenize", "-m", out, "--decode", " ".join(map(str, ids[1:])))
    assert back.out == "the model and <|end_of_text|>\n"


def test_json_output_and_the_first_merges(verb: Verb, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab ab ab ab ab")
    options = ("--vocab-size", 258, "--special", "<|pad|>", "--show-merges", 5)
    ran = verb("train-tokenizer", text, *options, "-o", tmp_path / "a", "--json")
    answer = json.loads(ran.out)
    assert answer.pop("seconds") >= 0
    assert answer == {
        "folder": str(tmp_path / "a"),
        "files": FILES,
        "vocab_size": 258,
        "merges": 1,
        "first_merges": [
            {"id": 256, "left": '"a"', "right": '"b"', "token": '"ab"', "count": 5,
             "examples": ['" ab"', '"ab"']}
        ],
    }  # fmt: skip
    shown = verb("train-tokenizer", text, *options, "-o", tmp_path / "b")
    assert '"a" + "b"' in shown.out
    assert shown.out.splitlines()[-1] == str(tmp_path / "b")


def test_metas_file_format(verb: Verb, tmp_path: Path) -> None:
    ran = verb(
        "train-tokenizer", PAGE, "--vocab-size", 800, "-o", tmp_path / "m", "--format", "meta"
    )
    assert ran.code == 0
    assert (tmp_path / "m" / "tokenizer.model").read_bytes().count(b"\n") == 800 - 256
    asked = verb("tokenize", "-m", tmp_path / "m", "<|eot_id|>", "--specials", "--json")
    assert json.loads(asked.out)["ids"] == [800 - 256 + 9]


def test_folders_and_json_lines(verb: Verb, tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("low low low low")
    (tmp_path / "in" / "deeper" / "b.jsonl").write_text('{"text": "low low"}\n{"text": "low"}\n')
    options = ("--vocab-size", 260, "--show-merges", 9, "--json", "-o", tmp_path / "o")
    ran = verb("train-tokenizer", tmp_path / "in", *options)
    assert [m["count"] for m in json.loads(ran.out)["first_merges"]] == [7, 7]


def test_invalid_texts_and_options(tmp_path: Path) -> None:
    """One line, exit code 1, and no file is written."""
    empty, latin, lines, few = (tmp_path / n for n in ("e.txt", "l.txt", "j.jsonl", "few.txt"))
    empty.write_bytes(b"")
    latin.write_bytes(b"gr\xfc\xdfe")
    lines.write_text('{"text": "fine"}\n{"text": 5}\n')
    few.write_text("aa aa")
    (tmp_path / "folder").mkdir()
    there = tmp_path / "there"
    there.mkdir()
    (there / "tokenizer.json").write_text("{}")
    out = str(tmp_path / "out")
    faults: list[tuple[list[str], tuple[str, ...]]] = [
        ([str(tmp_path / "none.txt"), "--out", out], ("none.txt", "no such file")),
        ([str(empty), "--out", out], ("e.txt", "no text in it")),
        ([str(latin), "--out", out], ("l.txt", "byte 2")),
        ([str(lines), "--out", out], ("j.jsonl, line 2",)),
        ([str(tmp_path / "folder"), "--out", out], ("no texts in this folder",)),
        ([str(few), "--out", out], ("pairs for", "ask for at most 259")),
        ([str(few), "--out", str(there)], ("tokenizer.json exists already",)),
        ([str(few), "--out", str(latin)], ("l.txt is a file",)),
        ([str(PAGE), "--out", "/proc/nowhere"], ("/proc/nowhere",)),
    ]
    runs = run_many([["train-tokenizer", *line, "--vocab-size", "400"] for line, _ in faults])
    for (_, words), process in zip(faults, runs, strict=True):
        assert is_clean_error(process, *words)
    small = run_many([["train-tokenizer", str(few), "--out", out, "--vocab-size", "100"]])
    assert is_clean_error(small[0], "vocab_size 100: must be at least 258")
    assert not Path(out).exists()
    assert (there / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--vocab-size", "x", "-o", "o"],
        ["-o", "o"],
        ["--vocab-size", "300"],
        ["--vocab-size", "300", "-o", "o", "--format", "gguf"],
        ["--vocab-size", "600", "-o", "o", "--format", "meta", "--special", "<x>"],
    ],
)
def test_wrong_usage(verb: Verb, wrong: list[str]) -> None:
    ran = verb("train-tokenizer", PAGE, *wrong)
    assert ran.code == 2
    assert ran.out == ""


def test_a_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root can write to read-only folders")
    tmp_path.chmod(0o500)
    [process] = run_many(
        [["train-tokenizer", str(PAGE), "--vocab-size", "300", "-o", str(tmp_path / "x")]]
    )
    assert is_clean_error(process, "Permission denied")


def test_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(
        "train-tokenizer", str(PAGE), "--vocab-size", "500", "-o", str(tmp_path / "t")
    )
    terminal.wait_for("500 tokens trained")
    assert terminal.end() == 0
