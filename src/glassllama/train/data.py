"""The text of a run: which file, which vocabulary, what is learnt from and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.train.settings import DataSettings
from glassllama.train.tokens import Piece, Tokens, tokenizer_facts, write_tokens

HELD_OUT = 0.1  # of the characters, from the end


@dataclass(frozen=True, kw_only=True)
class Data:
    tokenizer: Tokenizer
    learnt: Tokens
    held_out: Tokens


def open_data(settings: DataSettings, folder: Path) -> Data:
    text = Path(settings.corpus).read_text(encoding="utf-8")
    tokenizer = CharTokenizer(text)
    cut = int(len(text) * (1 - HELD_OUT))
    facts = tokenizer_facts(tokenizer)
    halves = [
        write_tokens(folder / f"{name}.bin", [Piece(tokenizer.encode_array(part), True)], facts)
        for name, part in (("learnt", text[:cut]), ("held-out", text[cut:]))
    ]
    return Data(tokenizer=tokenizer, learnt=halves[0], held_out=halves[1])
