"""The byte-level pipelines of four model families, in the form of the tokenizers library."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import tiktoken

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# As in the published tokenizer.json files of these models.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_pattern(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "llama3": lambda: by_pattern(LLAMA3),
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen2": lambda: by_pattern(QWEN2),
}
GGUF_NAMES = {"llama3": "llama-bpe", "gpt2": "gpt-2", "smollm": "smollm", "qwen2": "qwen2"}


def with_pipeline(model: Any, family: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = FAMILIES[family]()
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def from_vocabulary(metadata: Mapping[str, Any], family: str) -> Tokenizer:
    """Tokens and merges of a GGUF file in the pipeline of a family."""
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(str(merge).split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = with_pipeline(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=family == "llama3"), family
    )
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return tokenizer


def trained(family: str, text: str, *, size: int, specials: list[str]) -> Tokenizer:
    tokenizer = with_pipeline(models.BPE(ignore_merges=family == "llama3"), family)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


PIECES = (
    " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\u00a0", "\u2003", "\u3000", "\x85", "\x1c",
    "'s", "'S", "'ll", "'LL", "'ſ", "'x", "''", "don't", "I'M", "word", "Word", "WORD", "naïve",
    "straße", "İstanbul", "ﬁ", "e\u0301", "\u0301\u0323", "日本語", "中文。", "한국어", "हिन्दी",
    "ภาษาไทย", "العربية", "עברית", "Ελληνικά", "русский", "0", "12", "1234567", "٣٤٥", "Ⅷ", "½",
    "²", "१२३", "!", "?!", "...", "…", "—", "`", "^^", "$", "€", "<|", "|>", "<|eot_id|>",
    "<|im_end|>", "<|endoftext|>", "{", "}", "();", "->", "::", "#include", "__init__",
    "    return x\n", "http://", "😀", "👩\u200d👩\u200d👧", "🇪🇺", "\ufeff", "\x00",
    "\x07", "\ufffd", "\U0001d54f", "\u200b",
)  # fmt: skip


CODE_POINTS = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]


@cache
def unassigned_in_oracles() -> frozenset[str]:
    """Code points that are not assigned in the oracles' version of Unicode but may be in that of
    Python's `regex`.

    How they split is undefined, so they are left out where ids are compared.
    """
    text = "".join(CODE_POINTS)
    one_by_one = {bytes([value]): value for value in range(256)}
    unassigned = tiktoken.Encoding(
        "unassigned", pat_str=r"\p{Cn}", mergeable_ranks=one_by_one, special_tokens={}
    )
    of_tiktoken = bytes(unassigned.encode_ordinary(text)).decode()
    kept = pre_tokenizers.Split(Regex(r"\p{Cn}"), "removed").pre_tokenize_str(text)
    of_tokenizers = {*CODE_POINTS}.difference(*(word for word, _ in kept))
    assert 0 < len(of_tokenizers) < len(CODE_POINTS) / 4
    return frozenset(of_tokenizers | {*of_tiktoken})


def mixed_text(seed: int, *, pieces: int = 600) -> str:
    """Scripts, digits, spaces, punctuation, code, near-copies of special tokens, any code point."""
    chance = random.Random(seed)
    parts = chance.choices(PIECES, k=pieces)
    for at in chance.sample(range(pieces), k=pieces // 10):
        point = chance.choice(CODE_POINTS)
        parts[at] = point if point not in unassigned_in_oracles() else " "
    return "".join(parts)
