"""Steps 0 to 4: text, token ids, the weights file, the configuration, embeddings."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import PurePath

import torch
from torch import Tensor

from glassllama.base.interfaces import Tokenizer
from glassllama.formats.blocks import dequantize
from glassllama.tokenizers.bpe import BytePairTokenizer, merge
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.sentencepiece import SentencePieceTokenizer
from glassllama.tokenizers.vocabulary import BYTES, NEVER, Vocabulary, find_tokens, pattern_of
from glassllama.walkthrough.step import (
    Bars,
    Check,
    Drawing,
    Numbers,
    Source,
    Step,
    Table,
    same,
    sources,
)
from glassllama.walkthrough.walkthrough import Walkthrough, bytes_of_token, encode, shape, visible
from glassllama.weights.architectures.description import LETTERS as LETTER_FIELDS
from glassllama.weights.checkpoint import Checkpoint
from glassllama.weights.inspection import decisions

BYTES_PER_LINE = 12
SHOWN_BYTES = 20
SHOWN_PRETOKENS = 24
LONGEST_SHOWN_PRETOKEN = 24  # bytes
LETTERS = {field: letter for letter, field in LETTER_FIELDS.items()}
PARTS = {
    "embeddings": "embeddings", "attention": ".attention.", "feed-forward": ".feed_forward.",
    "norms": "norm", "output": "output",
}  # fmt: skip


def prompt_bytes(walk: Walkthrough) -> Step:
    raw, parts = (walk.prompt or "").encode(), pretokens(walk)
    drawn = [f"{visible(p.encode()):<16.16} {p.encode()[:16].hex(' ')}" for p in parts]
    if len(parts) > SHOWN_PRETOKENS:
        drawn[SHOWN_PRETOKENS:] = [f"… and {len(parts) - SHOWN_PRETOKENS:,} more"]
    text = "Token ids were given, so there is no text."
    if walk.prompt is not None:
        text = f"{len(raw)} bytes of UTF-8, in {len(parts)} pre-tokens. ␣ is a space, ↵ a line "
        text += "break. " + (
            "Every character is a token."
            if isinstance(walk.tokenizer, CharTokenizer)
            else "The text is split into pre-tokens first: no token crosses their boundaries."
        )
    return Step(
        name="prompt",
        title="The prompt and its bytes",
        question="What does the tokenizer get, and how is it split first?",
        shapes=f"text of {len(walk.prompt or '')} characters → bytes ({len(raw)},)",
        sources=split_source(walk),
        text=text,
        pictures=[Drawing(drawn)],
        checks=[same("the pre-tokens joined", "".join(parts), normalized(walk))],
        command=walk.command("--step 0"),
        command_shows="add an emoji, a tab or two spaces to the prompt and compare their bytes",
        data={"text": walk.prompt, "pretokens": parts, "bytes": list(raw)},
    )


def pretokens(walk: Walkthrough) -> list[str]:
    """The pre-tokens of the prompt; special tokens that are encoded as such are parts as well."""
    specials = walk.tokenizer.specials if walk.specials and walk.tokenizer else ()
    parts = pattern_of(specials).split(walk.prompt or "")
    split = [[p] if n % 2 else split_text(walk.tokenizer, p) for n, p in enumerate(parts)]
    return [pretoken for group in split for pretoken in group]


def split_text(tokenizer: Tokenizer | None, text: str) -> list[str]:
    """The same for a text without special tokens."""
    if isinstance(tokenizer, BytePairTokenizer):
        return tokenizer.vocabulary.split.pretokens(text)
    if isinstance(tokenizer, CharTokenizer):
        return list(text)
    return [text] if text else []


def normalized(walk: Walkthrough) -> str:
    """The prompt in the Unicode normal form that the vocabulary uses."""
    text, tokenizer = walk.prompt or "", walk.tokenizer
    if isinstance(tokenizer, BytePairTokenizer) and tokenizer.vocabulary.split.normalize_nfc:
        return unicodedata.normalize("NFC", text)
    return text


def split_source(walk: Walkthrough) -> tuple[Source, ...]:
    if isinstance(walk.tokenizer, BytePairTokenizer):
        split = walk.tokenizer.vocabulary.split.pretokens
        return sources((split, "parts =", "for pattern", "split =", "parts = [found"))
    if isinstance(walk.tokenizer, SentencePieceTokenizer):
        return sources((SentencePieceTokenizer._with_spaces, "text = text.replace"))
    return sources((encode, "return tokenizer, prompt_ids", "return None"))


def token_ids(walk: Walkthrough) -> Step:
    rows = [
        (n, walk.ids[n], walk.pieces[n],
         (bytes_of_token(walk.tokenizer, walk.ids[n]) or b"")[:BYTES_PER_LINE].hex(" "))
        for n in walk.shown
    ]  # fmt: skip
    history, checks = encode_manually(walk)
    if isinstance(walk.tokenizer, CharTokenizer):
        code = sources((CharTokenizer._id_lists, "yield [self._ids"))
        text = (
            f"The {len(walk.tokenizer.characters)} characters of the training text have one id "
            "each, in the order of their code points. Any other character becomes "
            f"{walk.tokenizer.unknown}, the id for unknown characters."
        )
    else:
        code = sources((merge, "while ranks", "at =", "parts[at", "del ranks"))
        text = (
            "Neighboring parts are merged pair by pair, the pair with the lowest rank first. Ranks "
            "are the order in which training learned the merges, the most frequent pairs first."
        )
    return Step(
        name="ids",
        title="Merges: from bytes to token ids",
        question="How do bytes become token ids?",
        shapes=f"text → ids ({len(walk.ids)},), each from 0 to {walk.config.vocab_size - 1:,}",
        sources=code,
        text=text,
        pictures=[Drawing(history), Table(["position>", "id>", "token", "bytes"], rows)],
        checks=checks,
        command=walk.command("--step 1"),
        command_shows="add a space at the end of the prompt: the ids and the prediction change",
        data={"ids": list(walk.ids), "pieces": walk.pieces, "merges": history},
    )


def encode_manually(walk: Walkthrough) -> tuple[list[str], list[Check]]:
    """The merges of one pre-token, and a check of the prompt's ids as far as it is possible."""
    tokenizer = walk.tokenizer
    if walk.prompt is None or tokenizer is None:
        return [], []
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    if isinstance(tokenizer, CharTokenizer):
        order = {char: id for id, char in enumerate(sorted(tokenizer.characters))}
        ids = [order.get(char, tokenizer.unknown) for char in walk.prompt]
        return [], [same("ids, looked up manually", [*begin, *ids], list(walk.ids))]
    if not isinstance(tokenizer, BytePairTokenizer):
        return [], decoded(walk, tokenizer)
    parts = [part.encode() for part in pretokens(walk)]
    short = [part for part in parts if len(part) <= LONGEST_SHOWN_PRETOKEN] or [b""]
    history = merge_history(tokenizer.vocabulary, max(short, key=len))
    drawn = [" ".join(map(visible, line)) for line in history]
    cut_out = [*tokenizer.added, *(tokenizer.specials if walk.specials else [])]
    if find_tokens(walk.prompt, cut_out):
        return drawn, decoded(walk, tokenizer)  # these tokens are cut out before the text is split
    ids = [id for part in parts for id in ids_of_pretoken(tokenizer.vocabulary, part)]
    return drawn, [same("ids, merged manually", [*begin, *ids], list(walk.ids))]


def decoded(walk: Walkthrough, tokenizer: Tokenizer) -> list[Check]:
    """A check that the ids decode to the prompt, if the vocabulary can represent all of it."""
    text = tokenizer.decode(walk.ids[1:] if walk.ids[0] == tokenizer.bos else walk.ids)
    return [same("ids, decoded", text, walk.prompt)] if text == walk.prompt else []


def merge_history(vocabulary: Vocabulary, pretoken: bytes) -> list[list[bytes]]:
    """The parts of a pre-token before the first merge, after each, and at the end."""
    parts = [BYTES[value] for value in pretoken if BYTES[value] in vocabulary.ids]
    history = [list(parts)]
    while len(parts) > 1:
        ranks = [vocabulary.rank(left, right) for left, right in pairwise(parts)]
        if min(ranks) == NEVER:
            break
        at = ranks.index(min(ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        history.append(list(parts))
    return history


def ids_of_pretoken(vocabulary: Vocabulary, pretoken: bytes) -> list[int]:
    whole = vocabulary.ignore_merges and pretoken in vocabulary.ids
    parts = [pretoken] if whole else merge_history(vocabulary, pretoken)[-1]
    return [vocabulary.ids[part] for part in parts]


def weights_file(walk: Walkthrough) -> Step:
    checkpoint, name = walk.checkpoint, f"{walk.prefix}.attention.wq.weight"
    info = checkpoint.info(name)
    raw = checkpoint.read(name, slice(0, 1))
    values = torch.from_numpy(dequantize(raw, info.dtype, (1, *info.shape[1:])))
    in_model = walk.first_row_in_model("attention.wq")
    sizes = bytes_by_part(checkpoint)
    total, file = sum(sizes.values()), PurePath(info.path).name
    rows = [(p, size, f"{size / 1e6:9.1f} MB  {size / total:4.0%}") for p, size in sizes.items()]
    return Step(
        name="file",
        title="The weights file",
        question="How are the weights stored?",
        shapes=f"{info.name}: {info.nbytes:,} bytes as {info.dtype} → {sizes_text(*info.shape)}",
        sources=sources((Checkpoint.float32,)),
        text=f"{checkpoint.path.name}: {len(checkpoint.names)} tensors, {total:,} bytes, "
        f"format {checkpoint.file_format}. The file is mapped into memory, and only the bytes that "
        f"are used are read. The tensor above begins at byte {info.offset:,} of {file}.\n"
        "its first bytes: " + raw.tobytes()[:SHOWN_BYTES].hex(" "),
        numbers=[Numbers("the first row, as numbers", values)],
        pictures=[Bars("size of the parts", rows)],
        checks=[same(f"{name}, first row", values.to(in_model).tolist(), in_model.tolist())],
        command=f"glassllama show {walk.name}",
        command_shows="the types of all tensors, and the memory that the model needs here",
        data={
            "path": checkpoint.path.name,
            "format": checkpoint.file_format,
            "bytes": sizes,
            "tensor": dataclasses.asdict(info) | {"path": file},
        },
    )


def bytes_by_part(checkpoint: Checkpoint) -> dict[str, int]:
    sizes = dict.fromkeys(PARTS, 0)
    for name in checkpoint.names:
        part = next(part for part, word in PARTS.items() if word in name)
        sizes[part] += checkpoint.info(name).nbytes
    return {part: size for part, size in sizes.items() if size}


def sizes_text(*sizes: int) -> str:
    return "(" + ", ".join(f"{n:,}" for n in sizes) + ("," if len(sizes) == 1 else "") + ")"


def configuration(walk: Walkthrough) -> Step:
    c, (formula, count) = walk.config, parameter_count(walk)
    in_file = parameters_in_file(walk.checkpoint)
    values = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    rows = [(name, short(value), LETTERS.get(name, "")) for name, value in values.items()]
    label = "RoPE frequencies, radians per token"
    words = {} if walk.plan is None else decisions(walk.plan)
    design = [(name, word) for name, word in words.items() if word != "none"]
    plain = {n: v if isinstance(v, str | int | float) else short(v) for n, v in values.items()}
    return Step(
        name="config",
        title="The configuration",
        question="Which settings distinguish this model from others of its architecture?",
        shapes=f"{len(values)} settings → {in_file:,} parameters",
        sources=sources((walk.implementation(walk.prefix).__init__,)),
        text="\n".join([f"Number of parameters: {formula} = {count:,}.", *walk.checkpoint.notes]),
        numbers=[Numbers(label, walk.frequencies)] if walk.rope is not None else [],
        pictures=[
            Table(["setting", "value", "letter in shapes"], rows),
            *([Table(["design decision", ""], design)] if design else []),
        ],
        checks=[same("parameters in the file", count, in_file)],
        command="glassllama show MODEL",
        command_shows="the configuration of another checkpoint: compare its sizes and vocabulary",
        data={"config": plain, "decisions": words, "parameters": in_file},
    )


def parameter_count(walk: Walkthrough) -> tuple[str, int]:
    """The formula in letters, from the description of the architecture, and its value."""
    c, outside, in_layer = walk.config, Counter[str](), Counter[str]()
    for rule in walk.checkpoint.architecture.rules:
        if rule.ours.format(0) in walk.checkpoint.names:
            letters = sorted("*".join(rule.shape).split("*"), key=tuple(LETTER_FIELDS).index)
            (in_layer if "{}" in rule.ours else outside)["·".join(reversed(letters))] += 1
    counts = [
        sum(n * math.prod(getattr(c, LETTER_FIELDS[one]) for one in product.split("·"))
            for product, n in part.items()) for part in (outside, in_layer)
    ]  # fmt: skip
    texts = [
        " + ".join(f"{n}·{product}" if n > 1 else product for product, n in part.items())
        for part in (outside, in_layer)
    ]
    return f"{texts[0]} + {c.n_layers} layers × ({texts[1]})", counts[0] + c.n_layers * counts[1]


def parameters_in_file(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names)


def short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 44 else text[:43] + "…"


def embedding_rows(walk: Walkthrough) -> dict[str, Tensor]:
    """Hook -> what the embeddings are there, read from the file: (1, T, C) each."""
    rows = {"tok_embeddings": rows_from_file(walk, "tok_embeddings.weight", walk.ids)}
    if walk.plan is not None and walk.plan.embedding_multiplier != 1:
        rows["embeddings"] = rows["tok_embeddings"] * walk.plan.embedding_multiplier
    if "pos_embeddings" in walk.hooks:
        rows["pos_embeddings"] = rows_from_file(walk, "pos_embeddings.weight", walk.positions)
        rows["embeddings"] = rows["tok_embeddings"] + rows["pos_embeddings"]
    return rows


def rows_from_file(walk: Walkthrough, name: str, indices: range | tuple[int, ...]) -> Tensor:
    """(1, T, C): only these rows of the matrix are read."""
    rows = [walk.checkpoint.float32(name, slice(n, n + 1)) for n in indices]
    walk.checkpoint.release_pages(name)
    return torch.cat([torch.from_numpy(row) for row in rows])[None].to(walk.dtype)


def embedding_numbers(rows: dict[str, Tensor], first_label: str) -> list[Numbers]:
    """The last token's numbers in each of `embedding_rows`."""
    last = "sum" if "pos_embeddings" in rows else "multiplied"
    labels = {"tok_embeddings": first_label, "embeddings": last}
    position = f"position {rows['tok_embeddings'].shape[1] - 1}"
    return [Numbers(labels.get(hook, position), x[0, -1], hook) for hook, x in rows.items()]


def embedding(walk: Walkthrough) -> Step:
    c, rows = walk.config, embedding_rows(walk)
    last, id, end = walk.pieces[-1], walk.ids[-1], len(walk.ids) - 1
    text = (
        f"Token {last} has the id {id}, so its vector is row {id} of tok_embeddings, "
        f"{sizes_text(c.vocab_size, c.dim)}. At this point it does not depend on other tokens."
    )
    if "pos_embeddings" in rows:
        text += f" Row {end} of pos_embeddings is added, the learned vector of position {end}."
    elif walk.plan is not None and "embeddings" in rows:
        text += f" It is multiplied by {walk.plan.embedding_multiplier:g} before the first layer."
    title, tokens = "tok_embeddings: the first 64 channels of every token", rows["tok_embeddings"]
    return Step(
        name="embedding",
        title="Embedding: one row of a matrix for each token",
        question="How does a token id become a vector?",
        shapes=f"ids (1, {len(walk.ids)}) → x {shape(tokens)}",
        sources=walk.calls("", "tok_embeddings"),
        text=text,
        numbers=embedding_numbers(rows, f"row of {last}"),
        pictures=[walk.heat_map(title, tokens[0, :, :64])],
        checks=[walk.check(hook, x) for hook, x in rows.items() if hook != "pos_embeddings"],
        command=walk.command("--step 4"),
        command_shows="use a word twice in the prompt: both have the same row",
    )


STEPS = (prompt_bytes, token_ids, weights_file, configuration, embedding)
