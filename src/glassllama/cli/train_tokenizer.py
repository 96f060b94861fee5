"""`glassllama train-tokenizer`: train a BPE vocabulary on your own texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GlassError
from glassllama.cli.console import naming, note, print_json, print_table, progress_bars
from glassllama.cli.options import Json

if TYPE_CHECKING:
    from glassllama.base.interfaces import Progress
    from glassllama.tokenizers.backend import Merge
    from glassllama.tokenizers.train import TrainedBPE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WRITTEN = (*TOKENIZER_FILES, "tokenizer_config.json", "vocabulary.tsv")


class Format(StrEnum):
    hf = "hf"
    meta = "meta"
    both = "both"


class SplitName(StrEnum):
    llama3 = "llama3"
    gpt2 = "gpt2"
    smollm = "smollm"
    qwen2 = "qwen2"


Texts = Annotated[
    list[Path],
    typer.Argument(
        metavar="TEXT...", help="UTF-8 texts, .jsonl files (field 'text'), or folders of them."
    ),
]
VocabSize = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Tokens in all, including 256 bytes and special tokens."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the files go.")]
FormatOption = Annotated[
    Format,
    typer.Option(
        metavar="NAME",
        help="hf: tokenizer.json. meta: Llama 3's tokenizer.model, with its 256 special tokens. "
        "both.",
    ),
]
Special = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A special token; may be given several times.",
        show_default="<|begin_of_text|> and <|end_of_text|>",
    ),
]
SplitOption = Annotated[
    SplitName,
    typer.Option(metavar="NAME", help="Pretokenizer: llama3, gpt2, smollm or qwen2."),
]
ShowMerges = Annotated[
    int, typer.Option(min=0, metavar="N", help="Show the first N merges and where they occur.")
]


def train_tokenizer(
    texts: Texts,
    vocab_size: VocabSize,
    out: Out,
    format: FormatOption = Format.hf,
    special: Special = None,
    split: SplitOption = SplitName.llama3,
    show_merges: ShowMerges = 0,
    json: Json = False,
) -> None:
    """Train a vocabulary on texts: byte-pair encoding, as for Llama 3.

    Prints the folder; verbs that need only a tokenizer take it as a model.
    """
    specials = special_tokens(format, special)
    require_free(out)
    start = time.perf_counter()
    trained = train_with_bars(texts, vocab_size, specials, split.value)
    files = [path.name for path in save(trained, out, format)]
    seconds = round(time.perf_counter() - start, 2)
    shown = [merge_facts(trained, merge) for merge in trained.merges[:show_merges]]
    if json:
        sizes = {"vocab_size": vocab_size, "merges": len(trained.merges), "seconds": seconds}
        print_json({"folder": str(out), "files": files, **sizes, "first_merges": shown})
        return
    if shown:
        print_merges(shown)
    print(out)
    note(f"{vocab_size:,} tokens trained in {seconds} s: {', '.join(files)}")


def print_merges(merges: Sequence[dict[str, Any]]) -> None:
    rows = [
        (m["id"], f"{m['left']} + {m['right']}", m["token"], m["count"], " ".join(m["examples"]))
        for m in merges
    ]
    print_table(["id>", "pair", "token", "count>", "as in"], rows)


def train_with_bars(
    paths: Sequence[Path], vocab_size: int, specials: Sequence[str], split: str
) -> TrainedBPE:
    """Read and train, with progress bars. Raises GlassError if there is nothing to read."""
    from glassllama.tokenizers.train import train_bpe
    from glassllama.weights.tokenizer import BACKEND

    with progress_bars() as bar:
        reading, merging = bar("reading", "bytes"), bar("training", "tokens")
        texts = read(paths, reading)
        return train_bpe(
            texts, vocab_size, specials, split=split, progress=merging, backend=BACKEND
        )


def read(paths: Sequence[Path], progress: Progress | None) -> Iterator[str]:
    """The texts of files and folders, in pieces."""
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

    if format is Format.hf:
        return ("<|begin_of_text|>", "<|end_of_text|>") if special is None else special
    if special:
        hint = f"not with --format {format.value}: Meta's format has its own special tokens"
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
            return trained.save(folder, format.value)
    except BaseException:
        for path in new_files:
            path.unlink(missing_ok=True)
        if new_folder and folder.is_dir():
            folder.rmdir()
        raise


def merge_facts(trained: TrainedBPE, merge: Merge) -> dict[str, Any]:
    from glassllama.tokenizers.train import visible

    parts = {"left": merge.left, "right": merge.right, "token": merge.joined}
    written = {name: visible(trained.tokens[id]) for name, id in parts.items()}
    seen = [visible(word) for word in merge.examples]
    return {"id": merge.joined, **written, "count": merge.count, "examples": seen}
