"""Training a vocabulary: manually, plain, compiled, as in the lessons and by Hugging Face's
trainer."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import bpe_bytes
import bpe_characters
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_level_families import FAMILIES, mixed_text, with_pipeline
from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers import COMPILED, pair_counts, word_table
from glassllama.native.tokenizers.word_table import WordCounts
from glassllama.tokenizers import train
from glassllama.tokenizers.backend import PYTHON, BPEBackend
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.train import TrainedBPE, characters, train_bpe
from glassllama.tokenizers.vocabulary import BYTE_TOKENS
from tokenizers import models, pre_tokenizers, trainers

SOURCES = Path(train.__file__).parent
SENNRICH = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3

CORPORA = {
    "prose": (SOURCES.parents[2] / "docs" / "walkthrough.md").read_text("utf-8"),
    "code": "".join(path.read_text("utf-8") for path in sorted(SOURCES.glob("*.py"))[:6]),
    "mixed": "".join(map(mixed_text, range(12))),
    "runs": "aaaaaaaa aaaa aaa aabaab abab ababab bbbb\n" * 3 + "\n\n\n" * 20 + " " * 99,
    "merged twice": "abc abc abc xabc ab ab bc bc bc zbc zbc abcd " * 9,
}


def merges_of(result: TrainedBPE) -> list[tuple[bytes, bytes, int]]:
    return [(result.tokens[m.left], result.tokens[m.right], m.count) for m in result.merges]


def most(
    text: str, num_merges: int, split: str = "llama3", backend: BPEBackend = COMPILED
) -> TrainedBPE:
    """At most so many merges, or as many as the text has pairs."""
    try:
        return train_bpe([text], 256 + num_merges, split=split, backend=backend)
    except TokenizerError as fault:
        size = int(str(fault).partition("ask for at most ")[2].partition(",")[0])
        return train_bpe([text], size, split=split, backend=backend)


def test_the_lesson_on_characters_is_the_example_of_the_paper() -> None:
    """Sennrich et al. (2016), figure 1: e·s, es·t, est·</w>, l·o, lo·w … with ties by alphabet."""
    merges = bpe_characters.learn_merges([SENNRICH], 5)
    assert merges[:3] == [("e", "s"), ("es", "t"), ("est", "</w>")]
    assert {("l", "o"), ("lo", "w")} & {*merges}
    assert bpe_characters.encode("lowest", merges)[-1] == "est</w>"
    text = "low newest widest"
    assert bpe_characters.decode(bpe_characters.encode(text, merges)) == text
    assert bpe_characters.learn_merges(["aa"], 9) == [("a", "</w>"), ("a", "a</w>")]


def test_the_first_merges_computed_manually() -> None:
    """ab ×5, with a space ×4: a·b 5, then ␣·ab 4."""
    steps = list(islice(bpe_bytes.learn_merges(["ab ab ab ab ab"]), 2))
    assert [(step.pair, step.count) for step in steps] == [((b"a", b"b"), 5), ((b" ", b"ab"), 4)]
    assert str(steps[1]) == "b' ' + b'ab' -> b' ab'   4 times, as in ' ab'"
    result = train_bpe(["ab ab ab ab ab"], 258)
    assert result.tokens[256:] == (b"ab", b" ab")
    assert result.merges[1].examples == (b" ab",)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("split", SPLITS)
def test_lesson_plain_and_compiled_give_the_same_merges(name: str, split: str) -> None:
    text = CORPORA[name][:15_000]
    fast = most(text, 150, split=split)
    assert merges_of(most(text, 150, split=split, backend=PYTHON)) == merges_of(fast)
    lesson = islice(bpe_bytes.learn_merges([text], SPLITS[split]), len(fast.merges))
    assert merges_of(fast) == [(*step.pair, step.count) for step in lesson]


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.identical("merges learned from texts", "tokenizers' trainer")
def test_merges_are_those_of_tokenizers(name: str, family: str) -> None:
    """An independent trainer with the same rule for ties; its byte ids have GPT-2's order, too."""
    text = CORPORA[name][:60_000]
    fast = most(text, 500, split=family)
    theirs = with_pipeline(models.BPE(), family)
    trainer = trainers.BpeTrainer(
        vocab_size=len(fast.tokens),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)
    merges = [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]
    assert [(characters(left), characters(right)) for left, right, _ in merges_of(fast)] == merges


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab c", min_size=1, max_size=200))
def test_lesson_plain_and_compiled_on_any_text(text: str) -> None:
    fast = most(text, 40)
    assert merges_of(most(text, 40, backend=PYTHON)) == merges_of(fast)
    lesson = [
        (*step.pair, step.count)
        for step in islice(bpe_bytes.learn_merges([text]), len(fast.merges))
    ]
    assert merges_of(fast) == lesson


def test_order_of_words_and_texts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges, counts and examples are the same, also with tables of other sizes and hashes."""
    lines = CORPORA["prose"].splitlines(keepends=True)[:300]
    result = train_bpe(lines, 700, backend=COMPILED)
    shuffled = lines.copy()
    random.Random(5).shuffle(shuffled)
    assert train_bpe(shuffled, 700, backend=COMPILED) == result
    monkeypatch.setattr(word_table, "INITIAL_SLOTS", 4)
    monkeypatch.setattr(word_table, "INITIAL_LONG_BYTES", 8)
    monkeypatch.setattr(word_table, "BATCH_BYTES", 1000)
    monkeypatch.setattr(pair_counts, "INITIAL_CAPACITY", 4)
    monkeypatch.setattr(pair_counts, "CHUNK", 50)
    assert train_bpe(shuffled, 700, backend=COMPILED) == result


def test_words_are_counted() -> None:
    text = "the cat and the hat and the bat " + "incomprehensibilities " * 3 + "é" * 40
    words = WordCounts(SPLITS["llama3"])
    words.add(text)
    words.add(text)
    plain: dict[bytes, int] = {}
    for word in SPLITS["llama3"].pretokens(text) * 2:
        plain[word.encode()] = plain.get(word.encode(), 0) + 1
    assert dict(words) == plain
    counts = [count for _, count in words]
    assert counts == sorted(counts, reverse=True)


def test_texts_are_split_separately() -> None:
    """No merge crosses the boundary of two texts."""
    texts = [
        "ab",
        "cd",
        "",
        "1",
        "23",
        " ",
        " x",
        "\n",
        "\n",
        "don",
        "'t",
        "é",
        "é",
        "\x00",
        "!!",
    ] * 2
    for name, split in SPLITS.items():
        words = WordCounts(split)
        for text in texts:
            words.add(text)
        plain: dict[bytes, int] = {}
        for text in texts:
            for word in split.pretokens(text):
                plain[word.encode()] = plain.get(word.encode(), 0) + 1
        assert dict(words) == plain, name


def test_the_tokenizer_of_a_trained_vocabulary() -> None:
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
    calls: list[tuple[int, int]] = []
    result = train_bpe(
        [CORPORA["prose"]],
        800,
        specials,
        progress=lambda done, total: calls.append((done, total)),
        backend=COMPILED,
    )
    tokenizer = result.tokenizer
    assert tokenizer.vocab_size == 800
    assert len({*result.tokens}) == 797
    assert result.tokens[:256] == BYTE_TOKENS
    assert {*BYTE_TOKENS} == {bytes([value]) for value in range(256)}
    assert dict(tokenizer.specials) == {name: 797 + at for at, name in enumerate(specials)}
    assert (tokenizer.bos, tokenizer.stop_ids) == (797, {798})
    assert calls[-1] == (797, 797)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    for text in (CORPORA["prose"], CORPORA["mixed"], "<|end_of_text|>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_array(text).tolist() == ids
        assert not {*ids} & {*tokenizer.specials.values()}
    prose = CORPORA["prose"]
    assert len(tokenizer.encode(prose)) < 0.6 * len(prose.encode())


def test_hostile_texts() -> None:
    """One pretoken of a million bytes, NUL, BOM; a lone surrogate."""
    assert train_bpe(["a" * 1_000_000], 270, backend=COMPILED).tokens[257] == b"aaaa"
    for backend in (PYTHON, COMPILED):
        learned = train_bpe(["\x00\ufeff" * 50], 258, backend=backend)
        assert learned.tokens[256] in (b"\xef\xbb", b"\xbb\xbf")
        with pytest.raises(TokenizerError, match=r"character 1 is U\+DC80"):
            train_bpe(["ok", "x\udc80"], 256, backend=backend)


@pytest.mark.parametrize(
    ("size", "specials", "split", "message"),
    [
        (255, (), "llama3", "vocab_size 255: must be at least 256"),
        (257, ("<a>", "<b>"), "llama3", "at least 258, for 256 bytes and 2 special tokens"),
        (300, ("<a>", "<a>"), "llama3", "twice"),
        (300, ("",), "llama3", "empty"),
        (300, (), "words", "split 'words' is not known; known are llama3"),
        (300, ("<a>",), "llama3", "pairs for 258 tokens only .* ask for at most 258"),
    ],
)
def test_wrong_arguments(size: int, specials: tuple[str, ...], split: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        train_bpe(["aa aa"], size, specials, split=split)


def test_no_text_at_all() -> None:
    assert train_bpe([], 256).tokenizer.encode("hi") == [71, 72]  # GPT-2's order: "!" is 0
    with pytest.raises(TokenizerError, match="256 tokens only"):
        train_bpe([], 257)
