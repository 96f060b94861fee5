"""The tokenizer of a folder: from tokenizer.json or tokenizer.model, and the files beside it.

The functions that make tokenizers (here and in tokenizer_gguf.py) hand the compiled loops to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import is_integer
from glassllama.base.interfaces import Tokenizer
from glassllama.native.tokenizers import COMPILED
from glassllama.tokenizers.backend import BPEBackend
from glassllama.tokenizers.chars import CharTokenizer, chars_from_document
from glassllama.tokenizers.hf_json import tokenizer_from_json
from glassllama.tokenizers.sentencepiece import SentencePieceTokenizer, read_sentencepiece
from glassllama.tokenizers.tiktoken_file import is_rank_file, read_meta_tokenizer
from glassllama.tokenizers.vocabulary import TokenizerBase, read_bounded, read_json
from glassllama.weights import tokenizer_files as files
from glassllama.weights.tokenizer_files import SideToken, TokenizerSettings, optional_json

BACKEND: BPEBackend = COMPILED  # of all tokenizers that are read, and for learning vocabularies

# transformers' classes that read a tokenizer.model as Llama's where `legacy` is left out.
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")

TEMPLATE_FILE = "chat_template.jinja"
# A tokenizer beside weights: the vocabulary in one of two forms, and what goes with it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", TEMPLATE_FILE, "chat_template.json"),
)


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.json, else tokenizer.model, here or above.

    Meta's download keeps one tokenizer.model for several folders of weights, hence "above".
    TokenizerError: nothing found (says where it looked), or a file that is not understood.
    """
    candidates = [folder / "tokenizer.json"]
    candidates += [each / "tokenizer.model" for each in (folder, folder.absolute().parent)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        has_pair = (folder / "vocab.json").is_file()
        why = "; vocab.json with merges.txt does not say how text is split" if has_pair else ""
        raise TokenizerError(
            f"{folder}: no tokenizer; looked for {', '.join(map(str, candidates))}{why}. Copy the "
            "file from where the weights came from"
        )
    settings = files.read_settings(folder)
    tokenizer = read_tokenizer(found, settings.tokens, prefix_rule(settings, folder))
    set_bos(tokenizer, settings, is_model=found.name == "tokenizer.model")
    eos = named_id(tokenizer, settings, "eos_token")
    tokenizer.stop_ids |= generation_stops(tokenizer, folder) | (set() if eos is None else {eos})
    return tokenizer


def prefix_rule(settings: TokenizerSettings, folder: Path) -> dict[str, Any]:
    """Where a SentencePiece model puts a space before a text: values of `Pieces`.

    It follows from `legacy`. If that is missing it is true, except for transformers' LlamaTokenizer
    (which a Mistral never has); that class doubles no space. Only it reads `add_prefix_space`.
    """
    fields = settings.fields
    is_llama = optional_json(folder / "config.json").get("model_type") in (None, "llama")
    is_llama &= fields.text("tokenizer_class", None) in LLAMA_CLASSES
    legacy = fields.boolean("legacy", not is_llama and "legacy" not in fields.values)
    rule = {"prefix_once": not legacy, "prefix_doubled": legacy and not is_llama}
    if is_llama and not fields.boolean("add_prefix_space", True):
        rule |= {"add_prefix": False, "drop_prefix": False}
    return rule


def read_tokenizer(
    path: Path, tokens: Sequence[SideToken], prefix: dict[str, Any]
) -> TokenizerBase:
    """The tokenizer of one file, with the tokens that files beside it add.

    A tokenizer.model is recognized by its content; `prefix` applies to SentencePiece only.
    """
    if path.name == "tokenizer.model":
        if is_rank_file(path):
            return read_ranks(path, tokens)
        return read_pieces(path, tokens, prefix)
    document = files.with_side_tokens(read_json(path), tokens)
    try:
        return chars_from_document(document) or tokenizer_from_json(document, BACKEND)
    except TokenizerError as fault:
        raise TokenizerError(f"{path}: {fault}") from fault


def read_ranks(path: Path, tokens: Sequence[SideToken]) -> TokenizerBase:
    """Meta's tokenizer. TokenizerError: a file beside it names a token that it lacks."""
    tokenizer = read_meta_tokenizer(path, BACKEND)
    for token in tokens:
        ids = tokenizer.encode(token.content, specials=True)
        if len(ids) != 1 or token.id not in (None, *ids):
            raise TokenizerError(
                f"{token.source}: {quoted(token.content)} is no token of {path}, to which none can "
                "be added; use the model's tokenizer.json"
            )
    return tokenizer


def read_pieces(path: Path, tokens: Sequence[SideToken], prefix: files.Json) -> TokenizerBase:
    """A SentencePiece model with the tokens that files beside it add."""
    tokenizer = read_sentencepiece(path)
    pieces = replace(tokenizer.pieces, **prefix)
    pieces = files.with_side_pieces(pieces, tokens) if tokens else pieces
    bos, stop_ids = tokenizer.bos, tokenizer.stop_ids
    return SentencePieceTokenizer(pieces, bos=bos, stop_ids=stop_ids, backend=BACKEND)


def set_bos(tokenizer: TokenizerBase, settings: TokenizerSettings, is_model: bool) -> None:
    """Set the begin-of-text token by `add_bos_token`, beside a tokenizer.model.

    Beside a tokenizer.json it has no effect: as in transformers 5 the post_processor decides.
    Exception: our vocabularies of characters, which have no post_processor.
    """
    adds_bos = settings.fields.boolean("add_bos_token", None)
    if adds_bos is None:
        return
    if is_model or isinstance(tokenizer, CharTokenizer):
        tokenizer.bos = named_id(tokenizer, settings, "bos_token") if adds_bos else None
    elif adds_bos != (tokenizer.bos is not None):
        tokenizer.notes.append(
            f"tokenizer_config.json: add_bos_token {str(adds_bos).lower()} has no effect: the "
            "post_processor of tokenizer.json says what a text begins with"
        )


def named_id(tokenizer: TokenizerBase, settings: TokenizerSettings, name: str) -> int | None:
    """The id of a token that the small files name by its text."""
    text = settings.named.get(name)
    if text is None:
        return None
    ids = tokenizer.encode(text, specials=True)
    if len(ids) != 1:
        where = f"{settings.fields.source}: {name}"
        raise TokenizerError(f"{where} is {quoted(text)}, which is no token of the vocabulary")
    return ids[0]


def generation_stops(tokenizer: TokenizerBase, folder: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, or of config.json where there is none."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = optional_json(path).get("eos_token_id")
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        rows: Any = optional_json(folder / "config.json").get("vocab_size")  # may be more
        size = max(tokenizer.vocab_size, int(rows) if is_integer(rows) else 0)
        if not all(is_integer(id) and 0 <= id < size for id in ids):
            raise TokenizerError(
                f"{path}: eos_token_id is {quoted(named)}; expected ids from 0 to {size - 1}, "
                "the vocabulary's last"
            )
        return {*ids}
    return set()


def chat_template_from_folder(folder: Path) -> str | None:
    """The jinja text of a folder, from chat_template.jinja or the `chat_template` of a JSON file.

    Of several named templates the one named "default" is taken, as in transformers. The others,
    for tools or documents, are not used.
    """
    for path in (folder / "additional_chat_templates" / "default.jinja", folder / TEMPLATE_FILE):
        if path.is_file():
            try:
                read_bounded(path, files.SMALL_FILE)  # checks its size
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
        if isinstance(template, str):
            return template
        if template is not None:
            raise TokenizerError(
                f"{path}: chat_template must be text or hold one named 'default', got "
                f"{quoted(template)}"
            )
    return None


def template_tokens_from_folder(folder: Path) -> dict[str, str]:
    """The texts of `bos_token`, `eos_token` and other named tokens in a chat template."""
    return files.read_settings(folder).named
