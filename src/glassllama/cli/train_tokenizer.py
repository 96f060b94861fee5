"""`glassllama train-tokenizer`: train a BPE vocabulary on your own texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import naming, note, print_json, print_table, progress_bars
from glassllama.cli.options import JSON

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.tokenizers.train import TrainedBPE

Format = Literal["hf", "meta", "both"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WRITTEN = (*TOKENIZER_FILES, "tokenizer_config.json", "vocabulary.tsv")


def train_tokenizer(
    texts: list[Path] = typer.Argument(
        ..., metavar="TEXT...",
        help="UTF-8 texts, .jsonl files (field 'text'), or folders of them.",
    ),
    vocab_size: int = typer.Option(
        ..., min=1, metavar="N", help="Tokens in all, including 256 bytes and special tokens."
    ),
    out: Path = typer.Option(..., "--out", "-o", metavar="FOLDER", help="Where the files go."),
    format: Format = typer.Option(
        "hf", metavar="NAME",
        help="hf: tokenizer.json. meta: Llama 3's tokenizer.model, with its 256 special tokens. "
        "both.",
    ),
    special: list[str] | None = typer.Option(
        None, metavar="TEXT", show_default="<|begin_of_text|> and <|end_of_text|>",
        help="A special token; may be given several times.",
    ),
    split: Literal["llama3", "gpt2", "smollm", "qwen2"] = typer.Option(
        "llama3", metavar="NAME", help="Pretokenizer: llama3, gpt2, smollm or qwen2."
    ),
    show_merges: int = typer.Option(
        0, min=0, metavar="N", help="Show the first N merges and where they occur."
    ),
    json: bool = JSON,
) -> None:  # fmt: skip
    """Train a vocabulary on texts: byte-pair encoding, as for Llama 3.

    Prints the folder; verbs that need only a tokenizer take it as a model.
    """
    from glassllama.tokenizers.train import train_bpe, visible
    from glassllama.weights.tokenizer import BACKEND

    specials = special_tokens(format, special)
    require_free(out)
    start = time.perf_counter()
    with progress_bars() as bar:
        reading, progress = bar("reading", "bytes"), bar("training", "tokens")
        pieces = read(texts, reading)
        trained = train_bpe(
            pieces, vocab_size, specials, split=split, progress=progress, backend=BACKEND
        )
    files = [path.name for path in save(trained, out, format)]
    seconds = round(time.perf_counter() - start, 2)
    first: list[dict[str, Any]] = []
    for merge in trained.merges[:show_merges]:
        ids = {"left": merge.left, "right": merge.right, "token": merge.joined}
        written = {name: visible(trained.tokens[id]) for name, id in ids.items()}
        examples = [visible(word) for word in merge.examples]
        first.append({"id": merge.joined, **written, "count": merge.count, "examples": examples})
    if json:
        sizes = {"vocab_size": vocab_size, "merges": len(trained.merges), "seconds": seconds}
        print_json({"folder": str(out), "files": files, **sizes, "first_merges": first})
        return
    if first:
        rows = [
            (id, f"{left} + {right}", token, count, " ".join(examples))
            for id, left, right, token, count, examples in map(dict.values, first)
        ]
        print_table(["id>", "pair", "token", "count>", "as in"], rows)
    print(out)
    note(f"{vocab_size:,} tokens trained in {seconds} s: {', '.join(files)}")


def read(paths: Sequence[Path], progress: Progress | None) -> Iterator[str]:
    """The texts of files and folders, in pieces. Raises GlassError if there are none."""
    from glassllama.train.corpus import read_texts, text_files

    files = [file for path in paths for file in text_files(path)]
    total, done = sum(file.stat().st_size for file in files), 0
    for text in read_texts(files):
        yield text.characters
        done += len(text.characters.encode())
        if progress is not None:
            progress(done, total)
    if done == 0:
        raise GlassError(f"{', '.join(map(str, paths))}: no text in it; give files with text")


def special_tokens(format: Format, special: list[str] | None) -> Sequence[str]:
    """The special tokens of a file format; Meta's are fixed."""
    from glassllama.tokenizers.tiktoken_file import special_token_names

    if format == "hf":
        return ("<|begin_of_text|>", "<|end_of_text|>") if special is None else special
    if special:
        hint = f"not with --format {format}: Meta's format has its own special tokens"
        raise typer.BadParameter(hint, param_hint="--special")
    return special_token_names()


def require_free(folder: Path) -> None:
    """Raise GlassError if a tokenizer would be overwritten: a model may depend on it."""
    for path in (folder / name for name in TOKENIZER_FILES):
        if path.exists():
            raise GlassError(f"--out: {path} exists already; name another folder, or delete it")
    if folder.exists() and not folder.is_dir():
        raise GlassError(f"--out: {folder} is a file, expected a folder")


def save(trained: TrainedBPE, folder: Path, format: Format) -> list[Path]:
    """Write the files, all or none. Raises GlassError if they cannot be written."""
    new_folder = not folder.is_dir()
    new_files = [folder / name for name in WRITTEN if not (folder / name).exists()]
    try:
        with naming(folder):
            return trained.save(folder, format)
    except BaseException:
        for path in new_files:
            path.unlink(missing_ok=True)
        if new_folder and folder.is_dir():
            folder.rmdir()
        raise
