"""Steps 0 to 4: text, ids, the file of weights, its configuration, the first vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from glassllama.base.config import rope_frequencies
from glassllama.base.interfaces import Tokenizer
from glassllama.formats.blocks import dequantize
from glassllama.tokenizers.bpe import (
    BYTES,
    NEVER,
    BytePairTokenizer,
    Vocabulary,
    alternatives,
    merge,
    written_in,
)
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.sentencepiece import SentencePieceTokenizer
from glassllama.walkthrough.pictures import Bars, Drawing, HeatMap, Table, visible
from glassllama.walkthrough.step import Check, Numbers, Source, Step, WhatIf, same, source
from glassllama.walkthrough.walk import Walk, encoded, open_piece
from glassllama.weights.open import Checkpoint
from glassllama.weights.tensor_map import expected_shapes

BYTES_A_LINE = 12
SHOWN_BYTES = 20
SHOWN_WORDS = 24
LONGEST_SHOWN_WORD = 24  # bytes


def prompt_bytes(walk: Walk) -> Step:
    raw = (walk.prompt or "").encode()
    words = split_words(walk)
    drawn = [
        f"{visible(w.encode()):<16.16} {w.encode()[:16].hex(' ')}" for w in words[:SHOWN_WORDS]
    ]
    if len(words) > SHOWN_WORDS:
        drawn.append(f"… and {len(words) - SHOWN_WORDS:,} more")
    given = walk.prompt is None
    return Step(
        number=0,
        name="prompt",
        title="The prompt and its bytes",
        question="What does a model get to see of a text?",
        shapes=f"text of {len(walk.prompt or '')} characters → bytes ({len(raw)},)",
        sources=(text_source(walk),),
        text=(
            "Ids were given, there is no text to look at."
            if given
            else f"{len(raw)} bytes of UTF-8, in {len(words)} pieces. ␣ is a blank, ↵ a line end. "
            + cuts(walk),
        ),
        pictures=(Drawing(tuple(drawn)),),
        checks=(same("the pieces joined", "".join(words), joined(walk)),),
        what_if=WhatIf(
            command=walk.command("--step 0"),
            shows="write an emoji, a tab or two blanks into the prompt and look at their bytes",
        ),
        data={"text": walk.prompt, "words": words, "bytes": list(raw)},
    )


def cuts(walk: Walk) -> str:
    if isinstance(walk.tokenizer, CharTokenizer):
        return "Every character is a token of its own."
    return "They are cut before anything else happens: no token reaches across a cut."


def split_words(walk: Walk) -> list[str]:
    """The pieces between which nothing merges, as far as this kind of vocabulary has any.

    A control token that is read as such is a piece of its own.
    """
    pattern = alternatives(walk.tokenizer.specials) if walk.specials and walk.tokenizer else None
    parts = pattern.split(walk.prompt or "") if pattern else [walk.prompt or ""]
    cut = [[part] if n % 2 else words_of(walk.tokenizer, part) for n, part in enumerate(parts)]
    return [word for words in cut for word in words]


def words_of(tokenizer: Tokenizer | None, text: str) -> list[str]:
    """The same for a text without control tokens."""
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer.vocabulary.split.words(text)
    if isinstance(tokenizer, CharTokenizer):
        return list(text)
    return [text] if text else []


def joined(walk: Walk) -> str:
    """The prompt, in the normal form that the vocabulary wants."""
    if (
        isinstance(walk.tokenizer, BytePairTokenizer)
        and walk.tokenizer.vocabulary.split.normal_form
    ):
        import unicodedata

        return unicodedata.normalize("NFC", walk.prompt or "")
    return walk.prompt or ""


def text_source(walk: Walk) -> Source:
    if isinstance(walk.tokenizer, BytePairTokenizer):
        words = walk.tokenizer.vocabulary.split.words
        return source(words, "pieces =", "for pattern", "find =", "pieces = [word")
    if isinstance(walk.tokenizer, SentencePieceTokenizer):
        return source(SentencePieceTokenizer._with_blanks, "text = text.replace")
    return source(encoded, "return tokenizer, prompt_ids", "return None")


def token_ids(walk: Walk) -> Step:
    rows = [(n, walk.ids[n], walk.pieces[n], raw_bytes(walk, walk.ids[n])) for n in walk.shown]
    history, checks = merging(walk)
    return Step(
        number=1,
        name="ids",
        title="Merges: from bytes to ids",
        question="How do bytes become numbers of a vocabulary?",
        shapes=f"text → ids ({len(walk.ids)},), each from 0 to {walk.config.vocab_size - 1:,}",
        sources=(id_source(walk),),
        text=(how_ids(walk),),
        pictures=(Drawing(history), Table(["position>", "id>", "token", "bytes"], rows)),
        checks=checks,
        what_if=WhatIf(
            command=walk.command("--step 1"),
            shows="add a blank at the end of the prompt, or take it away: other ids, other answer",
        ),
        data={"ids": list(walk.ids), "pieces": walk.pieces, "merges": list(history)},
    )


def id_source(walk: Walk) -> Source:
    if isinstance(walk.tokenizer, CharTokenizer):
        return source(CharTokenizer.encode, "return ids + [")
    return source(merge, "while ranks", "at =", "parts[at", "del ranks")


def how_ids(walk: Walk) -> str:
    if isinstance(walk.tokenizer, CharTokenizer):
        return (
            f"The {len(walk.tokenizer.characters)} characters of the training text have an id "
            "each, in the order of their code points. Any other character becomes "
            f"{walk.tokenizer.unknown}, the unknown."
        )
    return (
        "Neighbours are joined pair by pair, the pair with the lowest rank first: it was "
        "learned first, because it was the most frequent in the training text."
    )


def raw_bytes(walk: Walk, id: int) -> str:
    return (open_piece(walk.tokenizer, id) or b"")[:BYTES_A_LINE].hex(" ")


def merging(walk: Walk) -> tuple[tuple[str, ...], tuple[Check, ...]]:
    """The joining of one word, told; and the prompt's ids, found by hand as far as we know how."""
    tokenizer = walk.tokenizer
    if walk.prompt is None or tokenizer is None:
        return (), ()
    if isinstance(tokenizer, CharTokenizer):
        return (), (same("ids, looked up by hand", char_ids(tokenizer, walk.prompt), walk.ids),)
    if not isinstance(tokenizer, BytePairTokenizer):
        return (), decoded(walk, tokenizer)
    words = [word.encode() for word in split_words(walk)]
    short = [word for word in words if len(word) <= LONGEST_SHOWN_WORD] or [b""]
    history = merge_history(tokenizer.vocabulary, max(short, key=len))
    told = tuple(" ".join(visible(part) for part in parts) for parts in history)
    cut_out = [*tokenizer.vocabulary.added, *(tokenizer.specials if walk.specials else [])]
    if written_in(walk.prompt, cut_out):
        return told, decoded(walk, tokenizer)  # these are cut out of the text before any word
    ids = [id for word in words for id in word_ids(tokenizer.vocabulary, word)]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    return told, (same("ids, merged by hand", [*begin, *ids], list(walk.ids)),)


def char_ids(tokenizer: CharTokenizer, text: str) -> tuple[int, ...]:
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    order = {char: id for id, char in enumerate(sorted(tokenizer.characters))}
    return (*begin, *(order.get(char, tokenizer.unknown) for char in text))


def decoded(walk: Walk, tokenizer: Tokenizer) -> tuple[Check, ...]:
    """That the ids are the prompt again, where the vocabulary can say all of it."""
    ids = walk.ids[1:] if walk.ids[0] == tokenizer.bos else walk.ids
    text = tokenizer.decode(ids)
    return (same("ids, decoded", text, walk.prompt),) if text == walk.prompt else ()


def merge_history(vocabulary: Vocabulary, word: bytes) -> list[list[bytes]]:
    """A word's parts before the first merge, after each, and at the end."""
    parts = [BYTES[value] for value in word if BYTES[value] in vocabulary.ids]
    history = [list(parts)]
    while len(parts) > 1:
        ranks = [vocabulary.rank(left, right) for left, right in pairwise(parts)]
        if min(ranks) == NEVER:
            break
        at = ranks.index(min(ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        history.append(list(parts))
    return history


def word_ids(vocabulary: Vocabulary, word: bytes) -> list[int]:
    if vocabulary.whole_words and word in vocabulary.ids:
        return [vocabulary.ids[word]]
    return [vocabulary.ids[part] for part in merge_history(vocabulary, word)[-1]]


def weight_file(walk: Walk) -> Step:
    checkpoint, ours = walk.checkpoint, f"{walk.prefix}.attention.wq.weight"
    info = checkpoint.info(ours)
    raw = checkpoint.read(ours, slice(0, 1))
    values = dequantize(raw, info.dtype, (1, *info.shape[1:]))
    held = walk.held("attention.wq")
    first = torch.from_numpy(values).to(held)  # in the model's number format
    sizes = bytes_by_part(checkpoint)
    total = sum(sizes.values())
    return Step(
        number=2,
        name="file",
        title="The file of weights",
        question="Where are the numbers that the model has learned?",
        shapes=f"{info.name}: {info.nbytes:,} bytes as {info.dtype} → {shape_of(info.shape)}",
        sources=(source(Checkpoint.float32),),
        text=(
            f"{checkpoint.path.name}: {len(checkpoint.names)} tensors, {total:,} bytes, family "
            f"{checkpoint.file_format}. One is read here: it begins at byte {info.offset:,} of "
            f"{info.path.rpartition('/')[2]}, and only the bytes asked for are touched.",
            "its first bytes: " + raw.tobytes()[:SHOWN_BYTES].hex(" "),
        ),
        numbers=(Numbers("the first row, as numbers", values),),
        pictures=(
            Bars(
                "where the bytes are",
                list(sizes),
                list(sizes.values()),
                [f"{size / 1e6:9.1f} MB  {size / total:4.0%}" for size in sizes.values()],
            ),
        ),
        checks=(same(f"{ours}, first row", first.tolist(), held.tolist()),),
        what_if=WhatIf(
            command=f"glassllama show {walk.name}",
            shows="what all tensors are stored as, and what the model needs of this machine",
        ),
        data={"path": str(checkpoint.path.name), "family": checkpoint.file_format, "bytes": sizes,
              "tensor": dataclasses.asdict(info) | {"path": info.path.rpartition("/")[2]}},
    )  # fmt: skip


def bytes_by_part(checkpoint: Checkpoint) -> dict[str, int]:
    parts = {"embeddings": "tok_embeddings", "attention": ".attention.", "feed-forward":
             ".feed_forward.", "norms": "norm", "output": "output"}  # fmt: skip
    sizes = dict.fromkeys(parts, 0)
    for ours in checkpoint.names:
        part = next(part for part, word in parts.items() if word in ours)
        sizes[part] += checkpoint.info(ours).nbytes
    return {part: size for part, size in sizes.items() if size}


def shape_of(shape: Sequence[int]) -> str:
    return "(" + ", ".join(f"{n:,}" for n in shape) + ("," if len(shape) == 1 else "") + ")"


def configuration(walk: Walk) -> Step:
    c = walk.config
    attention = 2 * c.n_heads * c.head_dim * c.dim + 2 * c.n_kv_heads * c.head_dim * c.dim
    layer = attention + 3 * c.dim * c.ffn_dim + 2 * c.dim
    matrices = 1 if c.tie_embeddings else 2
    by_hand = matrices * c.vocab_size * c.dim + c.n_layers * layer + c.dim
    held = sum(math.prod(walk.checkpoint.info(name).shape) for name in walk.checkpoint.names)
    values = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    letters = {"dim": "C", "n_heads": "H", "n_kv_heads": "K", "head_dim": "D", "ffn_dim": "F",
               "vocab_size": "V", "max_seq_len": "most tokens at once"}  # fmt: skip
    rows = [(name, short(value), letters.get(name, "")) for name, value in values.items()]
    return Step(
        number=3,
        name="config",
        title="The configuration",
        question="What distinguishes this Llama from another?",
        shapes=f"{len(values)} settings → {held:,} parameters",
        sources=(source(expected_shapes, "queries, keys", "shapes: dict"),),
        text=(
            f"Parameters by hand: {matrices} × V·C + {c.n_layers} layers × (2·H·D·C + 2·K·D·C + "
            f"3·C·F + 2·C) + C = {by_hand:,}.",
            *walk.checkpoint.notes,
        ),
        numbers=(Numbers("RoPE frequencies, radians a token", rope_frequencies(c)),),
        pictures=(Table(["setting", "value", "letter in shapes"], rows),),
        checks=(same("parameters in the file", by_hand, held),),
        what_if=WhatIf(
            command="glassllama show MODEL",
            shows="the same of any other checkpoint; compare n_kv_heads, theta and the vocabulary",
        ),
        data={"config": values | {"rope_scaling": short(c.rope_scaling)}, "parameters": held},
    )  # fmt: skip


def short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 44 else text[:43] + "…"


def embedding_rows(walk: Walk) -> Tensor:
    """(1, T, C): of the whole matrix only the rows of the prompt are read."""
    rows = [walk.checkpoint.float32("tok_embeddings.weight", slice(i, i + 1)) for i in walk.ids]
    walk.checkpoint.release_pages("tok_embeddings.weight")
    x = torch.cat([torch.from_numpy(row) for row in rows])[None]  # (1, T, C)
    return x.to(walk.dtype)


def embedding(walk: Walk) -> Step:
    x = embedding_rows(walk)
    last = walk.pieces[-1]
    c = walk.config
    return Step(
        number=4,
        name="embedding",
        title="Embedding: a row of a matrix for every id",
        question="How does a number of the vocabulary become something to compute with?",
        shapes=f"ids (1, {len(walk.ids)}) → x (1, {len(walk.ids)}, {c.dim})",
        sources=(source(type(walk.model).hidden, "x = self.tok_embeddings"),),
        text=(
            f"Id {walk.ids[-1]} ({last}) takes row {walk.ids[-1]} of tok_embeddings, "
            f"{shape_of((c.vocab_size, c.dim))}. Nothing is known of the neighbours yet: the same "
            "token has the same row everywhere.",
        ),
        numbers=(Numbers(f"row of {last}", x[0, -1], "tok_embeddings"),),
        pictures=(
            HeatMap(
                "the first channels of every token",
                x[0, walk.shown.start :, :64].float().numpy(),
                [walk.pieces[n] for n in walk.shown],
            ),
        ),
        checks=(walk.check("tok_embeddings", x),),
        what_if=WhatIf(
            command=walk.command("--step 4"),
            shows="use a word twice in the prompt: both rows are the same",
        ),
    )
