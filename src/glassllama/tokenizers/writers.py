"""A learned vocabulary → files: Hugging Face's tokenizer.json, Meta's tokenizer.model, a table.

The files say the same: every text has the same ids, whichever is read, by us or by others
(tokenizers, tiktoken). For that tokenizer.json lists every way to make a token of two others, as
the published one of Llama 3 does, because in Meta's file the rank alone decides.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glassllama.base.errors import TokenizerError
from glassllama.native.tokenizers.pair_table import pairs
from glassllama.tokenizers.byte_level import BYTE_TO_CHARACTER
from glassllama.tokenizers.pretokenizer import EACH_DIGIT, GPT2, SPLITS, Split
from glassllama.tokenizers.tiktoken_file import control_names

if TYPE_CHECKING:
    from glassllama.tokenizers.bpe import BytePairTokenizer
    from glassllama.tokenizers.train import TrainedBPE

Form = Literal["hf", "meta", "both"]

TABLE_HEAD = "id\ttoken\tleft\tright\tcount\texamples\n"


def write_folder(trained: TrainedBPE, folder: Path, form: Form) -> list[Path]:
    """Write the files of a form into a folder, which is made; their paths.

    hf: tokenizer.json and tokenizer_config.json. meta: tokenizer.model. Each with vocabulary.tsv.
    TokenizerError: Meta's form has its own control tokens, and a split of its own.
    """
    files: dict[str, bytes] = {}
    if form in ("meta", "both"):
        files["tokenizer.model"] = meta_ranks(trained)
    if form in ("hf", "both"):
        files["tokenizer.json"] = as_json(hf_document(trained), indent=1)
        files["tokenizer_config.json"] = as_json(hf_config(trained), indent=2)
    files["vocabulary.tsv"] = table(trained).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def as_json(document: dict[str, Any], indent: int) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=indent) + "\n").encode()


def meta_ranks(trained: TrainedBPE) -> bytes:
    """`base64 rank` lines. Names of control tokens are no part of it: they are always Meta's."""
    if list(trained.specials) != control_names() or trained.split != "llama3":
        raise TokenizerError(
            "tokenizer.model: Meta's form has Llama 3's split and 256 control tokens of its own, "
            f"got split {trained.split!r} and {len(trained.specials)} control tokens; write "
            "tokenizer.json instead"
        )
    lines = [b64encode(token) + b" %d\n" % rank for rank, token in enumerate(trained.tokens)]
    return b"".join(lines)


def hf_document(trained: TrainedBPE) -> dict[str, Any]:
    """What tokenizer.json holds."""
    tokenizer, split = trained.tokenizer, SPLITS[trained.split]
    written = [characters(token) for token in trained.tokens]
    ways = sorted((id, left, right) for left, right, _, id in pairs(tokenizer.vocabulary))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for name, id in tokenizer.specials.items()
        ],
        "normalizer": {"type": "NFC"} if split.normal_form else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(split)},
        "post_processor": post_processor(tokenizer),
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: id for id, text in enumerate(written)},
            "merges": [f"{written[left]} {written[right]}" for _, left, right in ways],
        },
    }  # fmt: skip


def characters(token: bytes) -> str:
    """Bytes in GPT-2's characters: b" low" → "Ġlow"."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def pre_tokenizers(split: Split) -> list[dict[str, Any]]:
    """The stages that split: GPT-2's pattern is ByteLevel's own, others stand written."""
    stages: list[dict[str, Any]] = []
    for pattern in split.patterns:
        if pattern == GPT2:
            return [*stages, byte_level(use_regex=True)]
        if pattern == EACH_DIGIT:
            stages.append({"type": "Digits", "individual_digits": True})
        else:
            split_stage = {"type": "Split", "pattern": {"Regex": pattern}}
            stages.append({**split_stage, "behavior": "Isolated", "invert": False})
    return [*stages, byte_level(use_regex=False)]


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


def post_processor(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """Puts the begin-of-text token before every text, where there is one."""
    if tokenizer.bos is None:
        return byte_level(use_regex=True)
    name = tokenizer.token_bytes(tokenizer.bos).decode()
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": letter, "type_id": at}} for at, letter in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], {"SpecialToken": {"id": name, "type_id": 1}}, texts[1]],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}},
    }


def hf_config(trained: TrainedBPE) -> dict[str, Any]:
    """What tokenizer_config.json holds, so that transformers' AutoTokenizer reads the folder."""
    tokenizer = trained.tokenizer
    ends = {"bos_token": tokenizer.bos, "eos_token": min(tokenizer.stop_ids, default=None)}
    named = {n: tokenizer.token_bytes(id).decode() for n, id in ends.items() if id is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
    }


def table(trained: TrainedBPE) -> str:
    """The vocabulary for human eyes: of each token the two it was made of, how often, and where.

    Tokens stand in quotes; what is no printable character is \\xNN for every byte.
    """
    lines = [TABLE_HEAD]
    made = {merge.joined: merge for merge in reversed(trained.merges)}  # the first, if made twice
    for id, token in enumerate(trained.tokens):
        merge = made.get(id)
        cells = ["", "", "", ""]
        if merge is not None:
            left, right = (visible(trained.tokens[part]) for part in (merge.left, merge.right))
            cells = [left, right, str(merge.count), " ".join(map(visible, merge.examples))]
        lines.append("\t".join([str(id), visible(token), *cells]) + "\n")
    ids = trained.tokenizer.specials.items()
    lines += [f"{id}\t{visible(name.encode())}\t\t\tcontrol token\t\n" for name, id in ids]
    return "".join(lines)


def visible(token: bytes) -> str:
    """A token in quotes: b" low\\n" → '" low\\x0a"'; nothing is lost."""
    text = token.decode("utf-8", "surrogateescape")
    return '"' + "".join(map(visible_character, text)) + '"'


def visible_character(character: str) -> str:
    if character.isprintable() and character not in '\\"':
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
