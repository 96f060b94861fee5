"""A checkpoint's vocabulary → a `Tokenizer`: from GGUF metadata, or from the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_whole
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.bpe import BytePairTokenizer, Vocabulary
from glassllama.tokenizers.byte_level import (
    WRITTEN_BYTES,
    byte_level_vocabulary,
    is_written,
    with_merges,
)
from glassllama.tokenizers.char_json import chars_from_document, is_char_document
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.ends import END_OF_ANSWER, end_ids
from glassllama.tokenizers.files import read_json
from glassllama.tokenizers.hf_json import (
    first_token,
    has_compiled_split,
    vocabulary_from_json,
)
from glassllama.tokenizers.pieces import Kind
from glassllama.tokenizers.pipeline import PipelineTokenizer
from glassllama.tokenizers.pipeline_json import pipeline_from_json
from glassllama.tokenizers.pretokenizer import OTHER_SPLITS, SPLITS
from glassllama.tokenizers.sentencepiece import (
    DEFAULT_IDS,
    STOP_KEYS,
    SentencePieceTokenizer,
    as_long,
    gguf_fields,
    named_ids,
    read_sentencepiece,
    sentencepiece_from_gguf,
    token_id,
)
from glassllama.tokenizers.tiktoken_file import looks_like_ranks, read_meta_tokenizer
from glassllama.weights.tokenizer_files import (
    Settings,
    SideToken,
    check_size,
    optional_json,
    read_settings,
    with_side_pieces,
    with_side_tokens,
)

Found = BytePairTokenizer | PipelineTokenizer | SentencePieceTokenizer | CharTokenizer

# `tokenizer.ggml.pre` → name of a split. Converters wrote several names for the same pattern.
# Source: llama.cpp, src/llama-vocab.cpp (2026-11).
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), "llama3"),
    **dict.fromkeys(("pixtral", "midm-2.0", "lfm2", "smaug-bpe", "dbrx"), "llama3"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum"), "gpt2"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("gpt-4o", "llama4"), "gpt-4o"),
    **{name: name for name in ("tekken", "falcon", "default", "viking")},
    **{name: name for name in ("deepseek-llm", "deepseek-coder", "deepseek-v3")},
}
# Of these llama.cpp takes a word that is a token at once, and begins a text with bos.
NOT_LIKE_LLAMA3 = ("smaug-bpe", "dbrx")
# transformers' classes that read a tokenizer.model as Llama's where `legacy` is left out.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")

# A tokenizer beside weights: the vocabulary in one of two forms, and what goes with it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
)

# `tokenizer.ggml.token_type` (GGUF specification, "tokenizer").
KINDS = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
READ = (NORMAL, CONTROL, USER_DEFINED)  # from text


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. TokenizerError: names the key that is missing or unknown."""
    fields = gguf_fields(metadata)
    model = fields.text("model")
    if model == "llama":
        return sentencepiece_from_gguf(metadata)
    if model != "gpt2":
        fields.refuse("model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece)")
    texts = [str(text) for text in fields.items("tokens", of="text")]
    pre = gguf_pre(fields)
    # llama.cpp's rule where the file is silent: Llama 3 and Tekken begin with a token.
    as_llama3 = PRE_TOKENIZERS[pre] in ("llama3", "tekken") and pre not in NOT_LIKE_LLAMA3
    vocabulary = gguf_vocabulary(fields, texts, PRE_TOKENIZERS[pre], whole_words=as_llama3)
    stop_ids = end_ids({text: id for id, text in enumerate(texts) if text in END_OF_ANSWER})
    ids, notes = named_ids(fields, len(texts), dict.fromkeys(DEFAULT_IDS))
    stop_ids |= {id for key in STOP_KEYS if (id := ids[key]) is not None}
    bos = ids["bos_token_id"] if fields.boolean("add_bos_token", as_llama3) else None
    tokenizer = BytePairTokenizer(vocabulary, bos=bos, stop_ids=stop_ids)
    tokenizer.notes += notes
    return tokenizer


def gguf_vocabulary(
    fields: Fields, texts: list[str], split: str, *, whole_words: bool
) -> Vocabulary:
    kinds = as_long(fields, "token_type", len(texts), "whole")
    numbers = [NORMAL] * len(texts) if kinds is None else [int(kind) for kind in kinds]
    if strange := {*numbers} - {*KINDS}:
        raise TokenizerError(
            f"tokenizer.ggml: token_type: {min(strange)} has no place in a byte-level vocabulary"
        )
    numbers = [CONTROL if t in END_OF_ANSWER else n for t, n in zip(texts, numbers, strict=True)]
    written = of_kind(NORMAL, texts, numbers)
    # Of equal texts the last is used; what is empty, or no bytes in GPT-2's letters, is not.
    last = {text: id for id, text in written.items() if text and is_written(text)}
    controls, added = (by_text(of_kind(kind, texts, numbers)) for kind in (CONTROL, USER_DEFINED))
    used = {*last.values(), *controls.values(), *added.values()}
    left = {id for id, kind in enumerate(numbers) if kind in READ} - used
    if not last.keys() & WRITTEN_BYTES:
        raise TokenizerError("tokenizer.ggml: tokens: no byte has one: no byte-level vocabulary")
    vocabulary = byte_level_vocabulary(
        written={id: text for text, id in last.items()},
        merges=(),
        controls=controls,
        added=added,
        unused={id: texts[id] for id, kind in enumerate(numbers) if id in left or kind not in READ},
        split={**SPLITS, **OTHER_SPLITS}[split],
        whole_words=whole_words,
    )  # fmt: skip
    return with_merges(vocabulary, fields.items("merges", of="text"))


def of_kind(wanted: int, texts: list[str], kinds: list[int]) -> dict[int, str]:
    return {id: texts[id] for id, kind in enumerate(kinds) if kind == wanted}


def by_text(texts: Mapping[int, str]) -> dict[str, int]:
    """Text → id; of equal texts the last, as in llama.cpp, and none that is empty."""
    return {text: id for id, text in texts.items() if text}


def gguf_pre(fields: Fields) -> str:
    pre = fields.text("pre", "")
    if pre not in PRE_TOKENIZERS:
        came = f"is {quoted(pre)}, which is not supported" if pre else "is missing"
        raise TokenizerError(
            f"tokenizer.ggml: pre {came}; known are {', '.join(PRE_TOKENIZERS)}. Another pattern "
            "would split words wrongly: convert the model again, or set the key"
        )
    return pre


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.json, else tokenizer.model, here or above.

    Meta's download keeps one tokenizer.model for several folders of weights, hence "above".
    TokenizerError: nothing found (says where it looked), or a file that is not understood.
    """
    wanted = [folder / "tokenizer.json"]
    wanted += [place / "tokenizer.model" for place in (folder, folder.absolute().parent)]
    found = next((path for path in wanted if path.is_file()), None)
    if found is None:
        has_pair = (folder / "vocab.json").is_file()
        why = "; vocab.json with merges.txt does not say how text is split" if has_pair else ""
        raise TokenizerError(
            f"{folder}: no tokenizer; looked for {', '.join(map(str, wanted))}{why}. Copy the file "
            "from where the weights came from"
        )
    settings = read_settings(folder)
    blanks = blank_rule(settings, folder)
    tokenizer = read_tokenizer(found, settings.tokens, blanks)
    add_bos(tokenizer, settings, found)
    add_stops(tokenizer, settings, folder)
    return tokenizer


class Blanks(NamedTuple):
    """Which blanks a SentencePiece model adds to a text: `prefix_…` of tokenizers/pieces.py."""

    once: bool = False
    doubled: bool = True
    never: bool = False


AS_SENTENCEPIECE = Blanks()


def blank_rule(settings: Settings, folder: Path) -> Blanks:
    """What the files beside a SentencePiece model say of blanks, which it does not say itself.

    `legacy` does. Where it is left out it is true, but for transformers' LlamaTokenizer (which a
    Mistral never has), and that one doubles no blank. Only that class reads `add_prefix_space`.
    """
    is_llama = optional_json(folder / "config.json").get("model_type") in (None, "llama")
    fields = Fields(str(settings.path), settings.values, TokenizerError)
    is_llama &= fields.text("tokenizer_class", None) in LLAMA_CLASSES
    legacy = fields.boolean("legacy", not is_llama and "legacy" not in fields.values)
    never = is_llama and not fields.boolean("add_prefix_space", True)
    return Blanks(once=not legacy, doubled=legacy and not is_llama, never=never)


def read_tokenizer(
    path: Path, tokens: Sequence[SideToken] = (), blanks: Blanks = AS_SENTENCEPIECE
) -> Found:
    """One file's tokenizer, with the tokens that files beside it add to it.

    What a tokenizer.model is, its content tells; `blanks` is for one of SentencePiece.
    """
    if path.name == "tokenizer.model":
        if looks_like_ranks(path):
            return read_ranks(path, tokens)
        return read_pieces(path, tokens, blanks)
    document = with_side_tokens(read_json(path), tokens)
    try:
        if is_char_document(document):
            return chars_from_document(document)
        if not has_compiled_split(document):
            return pipeline_from_json(document)
        vocabulary = vocabulary_from_json(document)
        ordinary = document["model"]["vocab"]
        stop_ids = end_ids({**ordinary, **vocabulary.added, **vocabulary.controls})
        return BytePairTokenizer(vocabulary, bos=first_token(document), stop_ids=stop_ids)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def read_ranks(path: Path, tokens: Sequence[SideToken]) -> BytePairTokenizer:
    """Meta's ranks. TokenizerError: a file beside them names a token that they lack."""
    tokenizer = read_meta_tokenizer(path)
    for token in tokens:
        ids = tokenizer.encode(token.content, specials=True)
        if len(ids) != 1 or token.id not in (None, *ids):
            raise TokenizerError(
                f"{token.place}: {quoted(token.content)} is no token of {path}, to which none can "
                "be added; use the model's tokenizer.json"
            )
    return tokenizer


def read_pieces(path: Path, tokens: Sequence[SideToken], blanks: Blanks) -> SentencePieceTokenizer:
    """A SentencePiece model with the tokens that files beside it add to it."""
    tokenizer = read_sentencepiece(path)
    pieces = replace(tokenizer.pieces, prefix_once=blanks.once, prefix_doubled=blanks.doubled)
    if blanks.never:
        pieces = replace(pieces, prefix=False, drop_prefix=False)
    pieces = with_side_pieces(pieces, tokens) if tokens else pieces
    stop_ids = tokenizer.stop_ids | end_ids(pieces.of_kind(*Kind))
    return SentencePieceTokenizer(pieces, bos=tokenizer.bos, stop_ids=stop_ids)


def add_bos(tokenizer: Found, settings: Settings, path: Path) -> None:
    """Set the token that a text begins with, by `add_bos_token`.

    Beside a tokenizer.json it has no effect: as in transformers 5 the post_processor decides.
    Exception: vocabularies of characters, which are written here and have no post_processor.
    """
    fields = Fields(str(settings.path), settings.values, TokenizerError)
    adds_bos = fields.boolean("add_bos_token", None)
    if adds_bos is None:
        return
    if path.name == "tokenizer.model" or isinstance(tokenizer, CharTokenizer):
        tokenizer.bos = named_id(tokenizer, settings, "bos_token") if adds_bos else None
    elif adds_bos != (tokenizer.bos is not None):
        tokenizer.notes.append(
            f"tokenizer_config.json: add_bos_token {str(adds_bos).lower()} has no effect: the "
            "post_processor of tokenizer.json says what a text begins with"
        )


def add_stops(tokenizer: Found, settings: Settings, folder: Path) -> None:
    """Add the stop tokens that the files beside the weights name."""
    eos = named_id(tokenizer, settings, "eos_token")
    tokenizer.stop_ids |= generation_stops(tokenizer, folder) | (set() if eos is None else {eos})


def named_id(tokenizer: Found, settings: Settings, name: str) -> int | None:
    """The id of a token that the small files name by its text."""
    text = settings.named.get(name)
    if text is None:
        return None
    ids = tokenizer.encode(text, specials=True)
    if len(ids) != 1:
        raise TokenizerError(
            f"{settings.path}: {name} is {quoted(text)}, which is no token of the vocabulary"
        )
    return ids[0]


def generation_stops(tokenizer: Found, folder: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, or of config.json where there is none."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = optional_json(path).get("eos_token_id")
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        rows: Any = optional_json(folder / "config.json").get("vocab_size")  # may be more
        size = max(tokenizer.vocab_size, int(rows) if is_whole(rows) else 0)
        if not all(is_whole(id) and 0 <= id < size for id in ids):
            raise TokenizerError(
                f"{path}: eos_token_id is {quoted(named)}; expected ids from 0 to {size - 1}, "
                "the vocabulary's last"
            )
        return {*ids}
    return set()


TEMPLATE_FILE = "chat_template.jinja"


def chat_template_from_folder(folder: Path) -> str | None:
    """The jinja text of a folder, from chat_template.jinja or the `chat_template` of a JSON file.

    Of several named templates the one named "default" is taken, as in transformers. The others,
    for tools or documents, are not used.
    """
    for path in (folder / "additional_chat_templates" / "default.jinja", folder / TEMPLATE_FILE):
        if not path.is_file():
            continue
        check_size(path)
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as fault:
            raise TokenizerError(f"{path}: is no UTF-8 text ({fault})") from fault
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        template = optional_json(path).get("chat_template")
        if isinstance(template, list):
            each = [one for one in template if isinstance(one, dict)]
            named = [one.get("template") for one in each if one.get("name") == "default"]
            template = named[-1] if named else template
        elif isinstance(template, dict):
            template = template.get("default", template)
        if template is not None and not isinstance(template, str):
            raise TokenizerError(
                f"{path}: chat_template must be text or hold one named 'default', got "
                f"{quoted(template)}"
            )
        if template is not None:
            return template
    return None


TEMPLATE_TOKENS = ("bos_token", "eos_token")  # what templates call the ends of a text


def template_tokens_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts behind `bos_token` and `eos_token` in a template, where the file names them."""
    fields = gguf_fields(metadata)
    tokens = fields.items("tokens", of="text")
    ids = {name: token_id(fields, f"{name}_id") for name in TEMPLATE_TOKENS}
    return {n: str(tokens[id]) for n, id in ids.items() if id is not None and id < len(tokens)}


def template_tokens_from_folder(folder: Path) -> dict[str, str]:
    """The same, and other named tokens, from the small files beside a tokenizer."""
    return read_settings(folder).named
