"""Pipelines of tokenizer.json run stage by stage: the ids of the tokenizers library."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from functools import cache
from typing import Any

import pytest

from byte_level_families import mixed_text
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers import patterns
from glassllama.tokenizers.hf_json import pipeline_from_json
from glassllama.tokenizers.pipeline import PipelineTokenizer
from glassllama.tokenizers.pretokenizer import GPT4O, OTHER_SPLITS, TEKKEN
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

ROUNDS = int(os.environ.get("GLASSLLAMA_FUZZ", "60"))
WORDS = ["Hello", " WORLD", "don't", "parseHTTP", "12345", "x²", "\r\n", "  ", "x/y\n", "日本語",
         "…", "café", "e\u0301", " the", "theatre", "_a_", "$1", "\t", "«», ", "ſ", "'LL",
         "½", "<tok>", "🦙"]  # fmt: skip
TEXTS = [mixed_text(seed, pieces=200) for seed in range(8)]


def some_text(chance: random.Random, *more: str) -> str:
    return "".join(chance.choices([*WORDS, " ", *more], k=chance.randrange(12)))


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["".join(WORDS) * 9, "the there " * 200, *TEXTS], trainer)
    return tokenizer


@cache
def of_pieces() -> Tokenizer:
    """As in old conversions of Llama: ▁ for spaces and a space in front, bytes for unknown
    characters."""
    words = ["▁", *"xyabtok<>the12", "▁x", "▁y", "th", "the", "▁t", "▁the", "to", "tok", "▁▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: 259 + n for n, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "x"), ("▁", "y"), ("t", "h"), ("th", "e"), ("▁", "t"), ("▁t", "h"), ("t", "o"),
              ("to", "k"), ("▁", "▁"), ("▁", "the")]  # fmt: skip
    merges = [pair for pair in merges if "".join(pair) in vocab]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer


def copy_of(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def ours(theirs: Tokenizer) -> PipelineTokenizer:
    return pipeline_from_json(json.loads(theirs.to_str()))


def assert_same(theirs: Tokenizer, texts: list[str]) -> int:
    """Returns the number of compared texts: tokenizers fails if two tokens share a space."""
    tokenizer = ours(theirs)
    assert tokenizer.vocab_size == 1 + max(theirs.get_vocab().values())
    compared = 0
    for text in texts:
        try:
            expected = theirs.encode(text, add_special_tokens=False).ids
        except BaseException as fault:
            if type(fault).__name__ != "PanicException":
                raise
            continue
        compared += 1
        assert tokenizer.encode(text, specials=True) == expected, text
        assert not {*tokenizer.encode(text)} & {*tokenizer.specials.values()}
    return compared


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


FAMILIES: dict[str, list[Any]] = {
    "Tekken": [isolated(TEKKEN)],
    "Llama 4": [isolated(GPT4O)],
    "DeepSeek-LLM": [*map(isolated, OTHER_SPLITS["deepseek-llm"].patterns)],
    "DeepSeek-Coder": [*map(isolated, OTHER_SPLITS["deepseek-coder"].patterns)],
    "DeepSeek-V3": [*map(isolated, OTHER_SPLITS["deepseek-v3"].patterns)],
    "Viking": [*map(isolated, OTHER_SPLITS["viking"].patterns)],
    "Falcon": [*map(isolated, OTHER_SPLITS["falcon"].patterns)],
    "llama.cpp's default": [*map(isolated, OTHER_SPLITS["default"].patterns)],
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.identical("ids of other pipelines", "tokenizers")
def test_families_whose_split_is_not_compiled(name: str) -> None:
    theirs = copy_of(byte_level())
    end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*FAMILIES[name], end])  # type: ignore[assignment]
    chance = random.Random(0)
    assert_same(theirs, [*TEXTS, *(some_text(chance) for _ in range(100))])


def test_falcon_3_splits_between_the_bytes_of_a_character() -> None:
    """Digits comes after ByteLevel there: byte 0xB2 is written ², which is a number."""
    theirs = copy_of(byte_level())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Punctuation("contiguous"),
         pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(False),
         isolated("[0-9][0-9][0-9]")]
    )  # fmt: skip
    assert_same(theirs, [*TEXTS, "", "ж²", "1234567"])


def test_byte_level_with_its_default_puts_a_space_before_a_text() -> None:
    theirs = copy_of(byte_level())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
    assert_same(theirs, [*TEXTS, "", "Hello", " Hello", "\nHello"])
    assert ours(theirs).decode(ours(theirs).encode("Hello")) == " Hello"


BEHAVIORS = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
PATTERNS = [
    r"\s?\p{L}+",
    r"\p{N}",
    r"[\r\n]",
    r"\w+|[^\w\s]+",
    r"(?i:'s|'ll)",
    r"\s+(?!\S)",
    "[^a-z]",
]


def some_pre_tokenizer(chance: random.Random, schemes: list[str]) -> Any:
    P = pre_tokenizers
    behavior, pattern = chance.choice(BEHAVIORS), chance.choice(PATTERNS)
    return chance.choice(
        [
            lambda: P.Split(Regex(pattern), behavior, invert=chance.random() < 0.3),
            lambda: P.Split(chance.choice([" ", "th", "1", "'"]), behavior),
            lambda: P.Digits(chance.random() < 0.5),
            lambda: P.Punctuation(behavior),
            P.Whitespace,
            P.WhitespaceSplit,
            lambda: P.CharDelimiterSplit("a"),
            lambda: P.Metaspace(prepend_scheme=chance.choice(schemes), split=chance.random() < 0.5),
        ]
    )()  # fmt: skip


def some_normalizer(chance: random.Random) -> Any:
    N = normalizers
    return chance.choice(
        [
            N.NFC, N.NFD, N.NFKC, N.NFKD, N.Lowercase, N.StripAccents, N.Nmt,
            lambda: N.Prepend(chance.choice(["▁", "ab"])),
            lambda: N.Replace(chance.choice([" ", "th"]), chance.choice(["▁", "", "xyz"])),
            lambda: N.Replace(Regex(chance.choice([r"\s+", r"\d", "[aeiou]+"])), "_"),
            lambda: N.Strip(chance.random() < 0.5, chance.random() < 0.5),
        ]
    )()  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_any_stages_in_any_order(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(ROUNDS):
        is_byte_level = chance.random() < 0.7
        theirs = copy_of(byte_level() if is_byte_level else of_pieces())
        has_normalizers = chance.random() < 0.6
        # "first" asks where a piece was before it was normalized, which only tokenizers keeps.
        schemes = ["always", "never"]
        if is_byte_level and not has_normalizers:
            schemes.append("first")
        splits = [some_pre_tokenizer(chance, schemes) for _ in range(chance.randrange(4))]
        if is_byte_level:
            level = pre_tokenizers.ByteLevel(chance.random() < 0.3, True, chance.random() < 0.5)
            splits.insert(chance.randrange(len(splits) + 1), level)
        if splits:
            theirs.pre_tokenizer = pre_tokenizers.Sequence(splits)  # type: ignore[assignment]
        if has_normalizers:
            steps = [some_normalizer(chance) for _ in range(chance.randrange(1, 4))]
            theirs.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
        assert_same(theirs, [some_text(chance) for _ in range(12)])


@pytest.mark.parametrize("seed", range(3))
def test_added_tokens_with_any_flags(seed: int) -> None:
    """lstrip, rstrip, single_word, normalized, special, overlapping, and tokens that merges
    produce."""
    chance = random.Random(100 + seed)
    texts = ["<tok>", "tok", "xa", "ab", "the", "a b", " x", "<s>", "</s>", "é", "x²", "🦙"]
    compared = 0
    for _ in range(ROUNDS):
        theirs = copy_of(chance.choice([byte_level(), of_pieces()]))
        if chance.random() < 0.5:
            theirs.normalizer = normalizers.Sequence(  # type: ignore[assignment]
                [some_normalizer(chance) for _ in range(chance.randrange(1, 3))]
            )
        # The normalizer Strip removes a token of spaces only.
        blank = ["\n"] if theirs.normalizer is None else []
        for text in chance.sample([*texts, *blank], chance.randrange(1, 6)):
            flags = {f: chance.random() < 0.4 for f in ("lstrip", "rstrip", "single_word")}
            token = AddedToken(text, normalized=chance.random() < 0.5, **flags)
            add = theirs.add_special_tokens if chance.random() < 0.4 else theirs.add_tokens
            add([token])
        compared += assert_same(theirs, [some_text(chance, *texts) for _ in range(12)])
    assert compared > 10 * ROUNDS


def test_text_never_becomes_a_special_token_by_merging() -> None:
    """Merges produce a special token only with `specials`."""
    theirs = copy_of(byte_level())
    document = json.loads(theirs.to_str())
    id = document["model"]["vocab"]["the"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": id, "content": "the", "special": True, **flags})
    tokenizer = pipeline_from_json(document)
    assert tokenizer.encode("the", specials=True) == [id]
    for text in ("the", "other", "theatre the"):
        ids = tokenizer.encode(text)
        assert id not in ids
        assert tokenizer.decode(ids) == text


def test_a_text_may_end_with_a_token_of_the_post_processor() -> None:
    """It is a stop token; a prompt does not end with it."""
    theirs = copy_of(byte_level())
    theirs.add_special_tokens(["<a>", "<z>"])
    first, last = theirs.token_to_id("<a>"), theirs.token_to_id("<z>")
    for template, bos, stop in (("<a> $A <z>", first, {last}), ("$A <z>", None, {last})):
        theirs.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=template, special_tokens=[("<a>", first), ("<z>", last)]
        )
        tokenizer = ours(theirs)
        assert (tokenizer.bos, tokenizer.stop_ids) == (bos, stop)
        assert [*tokenizer.encode("Hello", bos=True), last] == theirs.encode("Hello").ids


def test_ids_with_gaps_and_of_the_vocabulary() -> None:
    """A text of the vocabulary has its id there; ids without a token are gaps."""
    document = json.loads(byte_level().to_str())
    size = len(document["model"]["vocab"])
    document["added_tokens"] = [
        {"id": 5, "content": "the", "special": False},
        {"id": size + 3, "content": "☃", "special": True},
    ]  # fmt: skip
    tokenizer = pipeline_from_json(document)
    assert tokenizer.encode("the") == [document["model"]["vocab"]["the"]]
    assert tokenizer.encode("☃", specials=True) == [size + 3]
    assert tokenizer.vocab_size == size + 4
    with pytest.raises(TokenizerError, match=f"id {size}: not in the vocabulary"):
        tokenizer.decode([size])


def test_a_hostile_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassllama.tokenizers.patterns.MIN_SECONDS", 0.2)
    theirs = copy_of(byte_level())
    end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([isolated("(?:a|aa)+c"), end])  # type: ignore[assignment]
    with pytest.raises(TokenizerError, match="takes too long"):
        ours(theirs).encode("a" * 60)


def test_a_long_text_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretokens are created one at a time; a list would take at least 60 bytes for each."""
    monkeypatch.setattr(patterns, "LONG_TEXT", 2**14)
    theirs = copy_of(byte_level())
    stages = [isolated(TEKKEN), pre_tokenizers.Digits(), pre_tokenizers.Metaspace("▁")]
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*stages, byte_level().pre_tokenizer])  # type: ignore[assignment]
    tokenizer, text = ours(theirs), "to be or not 2 be, " * 10_000
    lists = tokenizer._id_lists(text, specials=False, at_start=True)
    tracemalloc.start()
    try:
        count = sum(map(len, lists))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count > len(text) / 4
    assert peak < 20 * len(text)  # start and end of each word: 16 bytes, and copies


def test_a_lone_surrogate_is_refused() -> None:
    for theirs in (byte_level(), of_pieces()):
        with pytest.raises(TokenizerError, match=r"character 1 is U\+D800"):
            ours(theirs).encode("a\ud800")


def test_a_long_word_has_the_ids_of_its_parts() -> None:
    """Long words are cut where nothing can merge, and merged with a heap; the ids equal those of
    plain loops."""
    theirs = copy_of(of_pieces())
    chance = random.Random(5)
    texts = [
        "".join(chance.choices(["tok", "the ", "x", "  ", "é", "abt"], k=400)) for _ in range(5)
    ]
    assert_same(theirs, [*texts, "x" * 3000, " " * 3000])
