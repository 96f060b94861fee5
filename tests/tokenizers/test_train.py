"""Learning a vocabulary: on paper, as the lesson, as Hugging Face's trainer, in any order."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_level_families import FAMILIES, mixed_text, with_pipeline
from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers import word_counts as counting
from glassllama.native.tokenizers.word_counts import WordCounts
from glassllama.tokenizers import bpe_first_lesson as first_lesson
from glassllama.tokenizers import train
from glassllama.tokenizers.bpe_lesson import learn_merges
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.train import BYTE_TOKENS, TrainedBPE, train_bpe
from glassllama.tokenizers.writers import characters
from tokenizers import models, pre_tokenizers, trainers

SOURCES = Path(train.__file__).parent
SENNRICH = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3

CORPORA = {
    "prose": (SOURCES.parents[2] / "docs" / "walkthrough.md").read_text("utf-8"),
    "code": "".join(path.read_text("utf-8") for path in sorted(SOURCES.glob("*.py"))[:6]),
    "mixed": "".join(map(mixed_text, range(12))),
    "runs": "aaaaaaaa aaaa aaa aabaab abab ababab bbbb\n" * 3 + "\n\n\n" * 20 + " " * 99,
    "made twice": "abc abc abc xabc ab ab bc bc bc zbc zbc abcd " * 9,
}


def merges_of(result: TrainedBPE) -> list[tuple[bytes, bytes, int]]:
    return [(result.tokens[m.left], result.tokens[m.right], m.count) for m in result.merges]


def most(text: str, wanted: int, **more: str) -> TrainedBPE:
    """As many of the wanted merges as the text has pairs for."""
    try:
        return train_bpe([text], 256 + wanted, **more)
    except TokenizerError as fault:
        size = int(str(fault).partition("ask for at most ")[2].partition(",")[0])
        return train_bpe([text], size, **more)


def test_the_first_lesson_is_the_papers_example() -> None:
    """Sennrich et al. (2016), figure 1: e·s, es·t, est·</w>, l·o, lo·w … with ties by alphabet."""
    merges = first_lesson.learn_merges([SENNRICH], 5)
    assert merges[:3] == [("e", "s"), ("es", "t"), ("est", "</w>")]
    assert {("l", "o"), ("lo", "w")} & {*merges}
    assert first_lesson.encode("lowest", merges)[-1] == "est</w>"
    text = "low newest widest"
    assert first_lesson.decode(first_lesson.encode(text, merges)) == text
    assert first_lesson.learn_merges(["aa"], 9) == [("a", "</w>"), ("a", "a</w>")]


def test_the_first_merges_on_paper() -> None:
    """ab ×5, with a blank ×4: a·b 5, then ␣·ab 4."""
    steps = list(islice(learn_merges(["ab ab ab ab ab"]), 2))
    assert [(step.pair, step.count) for step in steps] == [((b"a", b"b"), 5), ((b" ", b"ab"), 4)]
    assert str(steps[1]) == "b' ' + b'ab' -> b' ab'   4 times, as in ' ab'"
    result = train_bpe(["ab ab ab ab ab"], 258)
    assert result.tokens[256:] == (b"ab", b" ab")
    assert result.merges[1].examples == (b" ab",)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("split", SPLITS)
def test_lesson_and_fast_are_the_same(name: str, split: str) -> None:
    text = CORPORA[name][:15_000]
    fast = most(text, 150, split=split)
    lesson = islice(learn_merges([text], SPLITS[split]), len(fast.merges))
    assert merges_of(fast) == [(*step.pair, step.count) for step in lesson]


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.identical("merges learned from texts", "tokenizers' trainer")
def test_merges_are_those_of_tokenizers(name: str, family: str) -> None:
    """Another trainer, the same rule for ties: its ids of bytes have GPT-2's order, too."""
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
def test_lesson_and_fast_on_anything(text: str) -> None:
    fast = most(text, 40)
    lesson = [(*step.pair, step.count) for step in islice(learn_merges([text]), len(fast.merges))]
    assert merges_of(fast) == lesson


def test_order_of_words_and_texts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges, counts and examples stay; so they do with tables of other sizes and hashes."""
    lines = CORPORA["prose"].splitlines(keepends=True)[:300]
    result = train_bpe(lines, 700)
    shuffled = lines.copy()
    random.Random(5).shuffle(shuffled)
    assert train_bpe(shuffled, 700) == result
    monkeypatch.setattr(counting, "FIRST_SLOTS", 4)
    monkeypatch.setattr(counting, "FIRST_LONG_BYTES", 8)
    monkeypatch.setattr(counting, "AT_ONCE", 1000)
    monkeypatch.setattr(train, "FIRST_PAIRS", 4)
    monkeypatch.setattr(train, "PART", 50)
    assert train_bpe(shuffled, 700) == result


def test_words_are_counted() -> None:
    text = "the cat and the hat and the bat " + "incomprehensibilities " * 3 + "é" * 40
    words = WordCounts(SPLITS["llama3"])
    words.add(text)
    words.add(text)
    plain: dict[bytes, int] = {}
    for word in SPLITS["llama3"].words(text) * 2:
        plain[word.encode()] = plain.get(word.encode(), 0) + 1
    assert dict(words) == plain
    counts = [count for _, count in words]
    assert counts == sorted(counts, reverse=True)


def test_texts_do_not_run_into_each_other() -> None:
    """Each is split by itself: no word, blank or line end joins with what the next one begins."""
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
            for word in split.words(text):
                plain[word.encode()] = plain.get(word.encode(), 0) + 1
        assert dict(words) == plain, name


def test_a_tokenizer_of_ones_own() -> None:
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
    told: list[tuple[int, int]] = []
    result = train_bpe(
        [CORPORA["prose"]], 800, specials, progress=lambda done, total: told.append((done, total))
    )
    tokenizer = result.tokenizer
    assert tokenizer.vocab_size == 800
    assert len({*result.tokens}) == 797
    assert result.tokens[:256] == BYTE_TOKENS
    assert {*BYTE_TOKENS} == {bytes([value]) for value in range(256)}
    assert dict(tokenizer.specials) == {name: 797 + at for at, name in enumerate(specials)}
    assert (tokenizer.bos, tokenizer.stop_ids) == (797, {798})
    assert told[-1] == (797, 797)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    for text in (CORPORA["prose"], CORPORA["mixed"], "<|end_of_text|>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_array(text).tolist() == ids
        assert not {*ids} & {*tokenizer.specials.values()}  # FAULTS.md, T3
    prose = CORPORA["prose"]
    assert len(tokenizer.encode(prose)) < 0.6 * len(prose.encode())  # that is what it is for


def test_hostile_texts() -> None:
    """FAULTS.md, T1 and T2: one word of a million bytes, NUL, BOM; half a surrogate pair."""
    assert train_bpe(["a" * 1_000_000], 270).tokens[257] == b"aaaa"
    assert train_bpe(["\x00\ufeff" * 50], 258).tokens[256] in (b"\xef\xbb", b"\xbb\xbf")
    with pytest.raises(TokenizerError, match=r"character 1 is U\+DC80"):
        train_bpe(["ok", "x\udc80"], 256)


@pytest.mark.parametrize(
    ("size", "specials", "split", "said"),
    [
        (255, (), "llama3", "vocab_size 255: must be at least 256"),
        (257, ("<a>", "<b>"), "llama3", "at least 258, for 256 bytes and 2 control tokens"),
        (300, ("<a>", "<a>"), "llama3", "twice"),
        (300, ("",), "llama3", "empty"),
        (300, (), "words", "split 'words' is not known; known are llama3"),
        (300, ("<a>",), "llama3", "pairs for 258 tokens only .* ask for at most 258"),
    ],
)
def test_wrong_wishes(size: int, specials: tuple[str, ...], split: str, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        train_bpe(["aa aa"], size, specials, split=split)


def test_no_text_at_all() -> None:
    assert train_bpe([], 256).tokenizer.encode("hi") == [71, 72]  # GPT-2's order: "!" is 0
    with pytest.raises(TokenizerError, match="256 tokens only"):
        train_bpe([], 257)
