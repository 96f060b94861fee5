"""Learning a vocabulary by byte-level BPE, and writing it to files.

    texts → pretokens, counted → the most frequent pair becomes a token → repeated

The merges are learned by a backend: plain Python in backend.py, compiled in native/tokenizers. They
do not depend on the order of texts or pretokens.

The files (tokenizer.json, Meta's tokenizer.model) give every text the same ids, also when read by
tokenizers or tiktoken. For that tokenizer.json lists every way to make a token of two others, as
Llama 3's does, because in Meta's file the rank alone decides.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.interfaces import Progress
from glassllama.tokenizers.backend import MIN_COUNT, PYTHON, BPEBackend, Merge
from glassllama.tokenizers.bpe import BYTE_TO_CHARACTER, BytePairTokenizer, tokenizer_of_ranks
from glassllama.tokenizers.pretokenizer import EACH_DIGIT, GPT2, SPLITS, Split
from glassllama.tokenizers.tiktoken_file import special_token_names
from glassllama.tokenizers.vocabulary import BYTE_TOKENS, split_stage, tokenizer_json

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
Form = Literal["hf", "meta", "both"]

TABLE_HEAD = "id\ttoken\tleft\tright\tcount\texamples\n"


@dataclass(frozen=True)
class TrainedBPE:
    """A learned vocabulary. `tokens`: 256 bytes, then the merged tokens in the order learned."""

    tokens: tuple[bytes, ...]
    merges: tuple[Merge, ...] = field(repr=False)
    specials: tuple[str, ...]
    split: str  # a name in SPLITS
    backend: BPEBackend = field(default=PYTHON, repr=False, compare=False)

    @cached_property
    def tokenizer(self) -> BytePairTokenizer:
        """Merges any two tokens that make a third, the lowest id first, as Llama 3's does.

        Special tokens have the last ids. Texts start with <|begin_of_text|> and answers end with
        <|end_of_text|>, if these are among them.
        """
        return tokenizer_of_ranks(
            self.tokens, self.specials, bos=BEGIN, stops=[END], split=SPLITS[self.split],
            backend=self.backend,
        )  # fmt: skip

    def save(self, folder: Path, form: Form = "hf") -> list[Path]:
        """Write the files of a form into a folder, which is created; returns their paths.

        hf: tokenizer.json and tokenizer_config.json. meta: tokenizer.model. Each with
        vocabulary.tsv. TokenizerError: the vocabulary cannot be written in Meta's form, which has
        its own special tokens and split.
        """
        files: dict[str, bytes] = {}
        if form in ("meta", "both"):
            files["tokenizer.model"] = meta_ranks(self)
        if form in ("hf", "both"):
            files["tokenizer.json"] = as_json(hf_document(self), indent=1)
            files["tokenizer_config.json"] = as_json(hf_config(self), indent=2)
        files["vocabulary.tsv"] = table(self).encode()
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
        return [folder / name for name in files]


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    specials: Sequence[str] = (),
    *,
    split: str = "llama3",
    progress: Progress | None = None,
    backend: BPEBackend = PYTHON,
) -> TrainedBPE:
    """Learn `vocab_size` tokens, including 256 bytes and the special tokens `specials`.

    `progress` is called for every merge. TokenizerError: the size is smaller than that, two special
    tokens are equal, the texts have too few pairs for the size, or contain a lone surrogate.
    """
    num_tokens = check_size(vocab_size, specials, split)
    merges = backend.learn_merges(texts, SPLITS[split], num_tokens, progress)
    tokens = list(BYTE_TOKENS)
    for merge in merges:
        if merge.joined == len(tokens):
            tokens.append(tokens[merge.left] + tokens[merge.right])
    if len(tokens) < num_tokens:
        most = len(tokens) + len(specials)
        raise TokenizerError(
            f"vocab_size {vocab_size}: these texts hold pairs for {most} tokens only (no other "
            f"pair comes {MIN_COUNT} times); ask for at most {most}, or give more text"
        )
    return TrainedBPE(tuple(tokens), tuple(merges), tuple(specials), split, backend)


def check_size(vocab_size: int, specials: Sequence[str], split: str) -> int:
    """The number of tokens besides the special tokens."""
    if split not in SPLITS:
        raise TokenizerError(f"split {quoted(split)} is not known; known are {', '.join(SPLITS)}")
    if "" in specials or len({*specials}) < len(specials):
        raise TokenizerError(f"specials: one is empty or comes twice: {list(specials)}")
    num_tokens = vocab_size - len(specials)
    if num_tokens < len(BYTE_TOKENS):
        raise TokenizerError(
            f"vocab_size {vocab_size}: must be at least {len(BYTE_TOKENS) + len(specials)}, for "
            f"{len(BYTE_TOKENS)} bytes and {len(specials)} special tokens"
        )
    return num_tokens


# Files


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def as_json(document: dict[str, Any], indent: int) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=indent) + "\n").encode()


def meta_ranks(trained: TrainedBPE) -> bytes:
    """`base64 rank` lines. They have no special tokens, whose names are always Meta's."""
    if list(trained.specials) != special_token_names() or trained.split != "llama3":
        raise TokenizerError(
            "tokenizer.model: Meta's form has Llama 3's split and 256 special tokens of its own, "
            f"got split {trained.split!r} and {len(trained.specials)} special tokens; write "
            "tokenizer.json instead"
        )
    lines = [b64encode(token) + b" %d\n" % rank for rank, token in enumerate(trained.tokens)]
    return b"".join(lines)


def hf_document(trained: TrainedBPE) -> dict[str, Any]:
    """The object of tokenizer.json."""
    tokenizer, split = trained.tokenizer, SPLITS[trained.split]
    texts = [characters(token) for token in trained.tokens]
    pairs = sorted((id, left, right) for left, right, _, id in tokenizer.vocabulary.pair_rows())
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {text: id for id, text in enumerate(texts)},
        "merges": [f"{texts[left]} {texts[right]}" for _, left, right in pairs],
    }  # fmt: skip
    return tokenizer_json(
        tokenizer.specials,
        normalizer={"type": "NFC"} if split.normalize_nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": pre_tokenizers(split)},
        post_processor=post_processor(tokenizer),
        decoder=byte_level(use_regex=True),
        model=model,
    )


def characters(token: bytes) -> str:
    """Bytes in GPT-2's characters: b" low" → "Ġlow"."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def pre_tokenizers(split: Split) -> list[dict[str, Any]]:
    """The stages that split: GPT-2's pattern is part of ByteLevel, others are written out."""
    stages: list[dict[str, Any]] = []
    for pattern in split.patterns:
        if pattern == GPT2:
            return [*stages, byte_level(use_regex=True)]
        digits = {"type": "Digits", "individual_digits": True}
        stages.append(digits if pattern == EACH_DIGIT else split_stage(pattern))
    return [*stages, byte_level(use_regex=False)]


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


def post_processor(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """Puts the begin-of-text token before every text, if there is one."""
    if tokenizer.bos is None:
        return byte_level(use_regex=True)
    name = tokenizer.token_bytes(tokenizer.bos).decode()
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": letter, "type_id": at}} for at, letter in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], {"SpecialToken": {"id": name, "type_id": 1}}, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}},
    }


def hf_config(trained: TrainedBPE) -> dict[str, Any]:
    """The object of tokenizer_config.json, which transformers' AutoTokenizer needs."""
    tokenizer = trained.tokenizer
    ends = {"bos_token": tokenizer.bos, "eos_token": min(tokenizer.stop_ids, default=None)}
    named = {n: tokenizer.token_bytes(id).decode() for n, id in ends.items() if id is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
    }


def table(trained: TrainedBPE) -> str:
    """The vocabulary as a readable table: for each token its pair, count and examples.

    Tokens are in quotes; characters that are not printable are \\xNN for every byte.
    """
    lines = [TABLE_HEAD]
    merge_of = {merge.joined: merge for merge in reversed(trained.merges)}  # the first one
    for id, token in enumerate(trained.tokens):
        merge = merge_of.get(id)
        cells = ["", "", "", ""]
        if merge is not None:
            left, right = (visible(trained.tokens[part]) for part in (merge.left, merge.right))
            cells = [left, right, str(merge.count), " ".join(map(visible, merge.examples))]
        lines.append("\t".join([str(id), visible(token), *cells]) + "\n")
    ids = trained.tokenizer.specials.items()
    lines += [f"{id}\t{visible(name.encode())}\t\t\tspecial token\t\n" for name, id in ids]
    return "".join(lines)


def visible(token: bytes) -> str:
    """A token in quotes, without loss: b" low\\n" → '" low\\x0a"'."""
    text = token.decode("utf-8", "surrogateescape")
    return '"' + "".join(map(visible_character, text)) + '"'


def visible_character(character: str) -> str:
    if character.isprintable() and character not in '\\"':
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
