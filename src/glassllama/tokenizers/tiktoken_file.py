"""Meta's `tokenizer.model` of Llama 3: one token per line, `base64-of-the-bytes rank`.

The 128,000 ranks are both the ids and the order of merges; 256 special tokens follow. Their names
are not in the file: they are those of Llama 3.1 and later (3.0 called some of them reserved).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.backend import PYTHON, BPEBackend
from glassllama.tokenizers.bpe import BytePairTokenizer, tokenizer_of_ranks
from glassllama.tokenizers.pretokenizer import SPLITS
from glassllama.tokenizers.vocabulary import BYTES, read_bounded

NUM_SPECIAL_TOKENS = 256
NAMED_SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>",
    "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>",  # end of message (a tool result follows), end of turn
    "<|python_tag|>", "<|image|>",
)  # fmt: skip
RESERVED_FROM = 2  # reserved tokens 0 and 1 are in the list above
STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
FIRST_LINE = 4096  # bytes; no token is longer

# Meta's tokenizer cuts a text into chunks first; the ids of unusual texts depend on it.
CHUNK_CHARS = 400_000
LONGEST_RUN = 25_000  # characters of whitespace, or of anything else, in a row
# Each long run as a whole; it is searched only at the start of a run, so that the time is linear.
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN},}}|(?<!\s)\s{{{LONGEST_RUN},}}")
WHITESPACE, NOT_WHITESPACE = re.compile(r"\s"), re.compile(r"\S")


def read_meta_tokenizer(path: Path, backend: BPEBackend = PYTHON) -> BytePairTokenizer:
    """Llama 3's tokenizer from Meta's file. TokenizerError: names the line that is wrong."""
    return tokenizer_of_ranks(
        read_ranks(path), special_token_names(), bos=NAMED_SPECIAL_TOKENS[0], stops=STOPS,
        split=SPLITS["llama3"], backend=backend, text_chunks=text_chunks,
    )  # fmt: skip


def special_token_names() -> list[str]:
    n_reserved = NUM_SPECIAL_TOKENS - len(NAMED_SPECIAL_TOKENS)
    reserved = range(RESERVED_FROM, RESERVED_FROM + n_reserved)
    return [*NAMED_SPECIAL_TOKENS, *(f"<|reserved_special_token_{n}|>" for n in reserved)]


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a file of ranks; the ranks must be 0, 1, 2, …"""
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


def is_rank_file(path: Path) -> bool:
    """Whether a tokenizer.model is a list of ranks, not a SentencePiece model."""
    with path.open("rb") as file:
        return RANK_LINE.match(file.read(FIRST_LINE)) is not None


def text_chunks(text: str) -> Iterator[str]:
    """Cut a text as Meta's tokenizer: at most CHUNK_CHARS, and no run longer than LONGEST_RUN."""
    for start in range(0, len(text), CHUNK_CHARS):
        chunk = text[start : start + CHUNK_CHARS]
        begin = 0
        for run in LONG_RUN.finditer(chunk) if may_have_long_run(chunk) else ():
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def may_have_long_run(chunk: str) -> bool:
    """A fast test at a few positions: a long run fills one of the windows of half its size."""
    half = LONGEST_RUN // 2
    windows = [(at, at + half) for at in range(0, len(chunk) - half + 1, half)]
    return any(
        not (WHITESPACE.search(chunk, *w) and NOT_WHITESPACE.search(chunk, *w)) for w in windows
    )
