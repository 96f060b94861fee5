"""The tokenizer of a GGUF file, as llama.cpp reads it."""

from __future__ import annotations

from pathlib import Path

import llama_cpp


class LlamaCppTokenizer:
    def __init__(self, path: Path | str) -> None:
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model.model)

    def encode(self, text: str, *, bos: bool = False, specials: bool = False) -> list[int]:
        """`bos`: with the ids that the file says a text begins with."""
        data = text.encode()
        room = 2 * len(data) + 16  # a space may be put before every part of the text
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, data, len(data), ids, room, bos, specials
        )  # fmt: skip
        assert count >= 0, f"llama.cpp has more than {room} ids"
        return list(ids[:count])
