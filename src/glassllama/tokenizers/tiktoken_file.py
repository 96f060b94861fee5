"""Meta's `tokenizer.model` of Llama 3: one token a line, `base64-of-the-bytes rank`.

The 128,000 ranks are ids and merge order at once; 256 control tokens follow them. Their names are
not in the file: they are those of Llama 3.1 and later (3.0 called some of them reserved).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.bpe import BYTES, BytePairTokenizer, Vocabulary
from glassllama.tokenizers.files import read_bounded
from glassllama.tokenizers.pretokenizer import SPLITS

N_CONTROLS = 256
NAMED_CONTROLS = (
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>",  # end of message (a tool answers next), end of turn
    "<|python_tag|>", "<|image|>",
)  # fmt: skip
RESERVED_FROM = 2  # reserved tokens 0 and 1 are among the named
STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
FIRST_LINE = 4096  # bytes; no token is longer

# Meta's tokenizer cuts the text before it looks at it, and the ids of hostile texts depend on it.
CHUNK_CHARS = 400_000
LONGEST_RUN = 25_000  # blanks, or non-blanks, in a row
# Each long run whole; looked for only where a run begins, so that the search stays linear.
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN},}}|(?<!\s)\s{{{LONGEST_RUN},}}")
BLANK, SIGN = re.compile(r"\s"), re.compile(r"\S")


def read_meta_tokenizer(path: Path) -> BytePairTokenizer:
    """Llama 3's tokenizer from Meta's file. TokenizerError: names the line that is no rank."""
    tokens = read_ranks(path)
    names = control_names()
    controls = {name: len(tokens) + at for at, name in enumerate(names)}
    vocabulary = Vocabulary(
        tokens=(*tokens, *(name.encode() for name in names)),
        ids={token: rank for rank, token in enumerate(tokens)},
        merges=None,
        split=SPLITS["llama3"],
        whole_words=True,
        controls=controls,
        chunks=chunks,
    )
    stop_ids = [controls[name] for name in STOPS]
    return BytePairTokenizer(vocabulary, bos=controls["<|begin_of_text|>"], stop_ids=stop_ids)


def control_names() -> list[str]:
    n_reserved = N_CONTROLS - len(NAMED_CONTROLS)
    reserved = range(RESERVED_FROM, RESERVED_FROM + n_reserved)
    return [*NAMED_CONTROLS, *(f"<|reserved_special_token_{n}|>" for n in reserved)]


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a file of ranks, in the order of their rank, which must be 0, 1, 2, …"""
    tokens: list[bytes] = []
    for number, line in enumerate(read_bounded(path).splitlines(), 1):
        base64, _, rank = line.partition(b" ")
        try:
            tokens.append(binascii.a2b_base64(base64, strict_mode=True))
            in_order = int(rank) == number - 1
        except ValueError:
            in_order = False
        if not in_order or not tokens[-1]:
            raise TokenizerError(
                f"{path}: line {number} must be base64, a blank and the rank {number - 1}, "
                f"got {quoted(line)}"
            )
    known = set(tokens)
    missing = [byte for byte in BYTES if byte not in known]
    if missing or len(known) < len(tokens):
        what = f"no token for the byte {missing[0]!r}" if missing else "a token comes twice"
        raise TokenizerError(f"{path}: {what}; the file is damaged or no Llama 3 tokenizer")
    return tokens


def looks_like_ranks(path: Path) -> bool:
    """Whether a tokenizer.model is a list of ranks, and not SentencePiece's binary form."""
    with path.open("rb") as file:
        return RANK_LINE.match(file.read(FIRST_LINE)) is not None


def chunks(text: str) -> Iterator[str]:
    """Cut a text as Meta's tokenizer does: 400,000 characters, and no run over 25,000 of a kind."""
    for start in range(0, len(text), CHUNK_CHARS):
        chunk = text[start : start + CHUNK_CHARS]
        begin = 0
        for run in LONG_RUN.finditer(chunk) if may_hold_long_run(chunk) else ():
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def may_hold_long_run(chunk: str) -> bool:
    """A look at a few places instead of all: a long run fills one of the windows half its size."""
    half = LONGEST_RUN // 2
    windows = [(at, at + half) for at in range(0, len(chunk) - half + 1, half)]
    return any(not (BLANK.search(chunk, *w) and SIGN.search(chunk, *w)) for w in windows)
