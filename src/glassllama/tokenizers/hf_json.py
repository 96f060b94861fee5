"""Tokenizers from Hugging Face's `tokenizer.json`: any BPE whose stages are known.

The file describes normalizer → pre_tokenizer → model → post_processor, and a decoder. A byte-level
file with a known split (Llama 3, SmolLM, GPT-2, Qwen 2) becomes a `Vocabulary`; any other is run
stage by stage. An unknown field or option is a TokenizerError that names it, because leaving it out
would change ids. `truncation` and `padding` are not part of the pipeline: they are settings of the
last call before the file was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from glassllama.base.errors import TokenizerError, quoted
from glassllama.base.fields import Fields, is_integer
from glassllama.tokenizers import pipeline
from glassllama.tokenizers.backend import PYTHON, BPEBackend
from glassllama.tokenizers.bpe import (
    BYTE_CHARACTERS,
    BytePairTokenizer,
    byte_level_vocabulary,
    to_bytes,
)
from glassllama.tokenizers.pretokenizer import DIGIT_RUNS, EACH_DIGIT, GPT2, LLAMA3, QWEN2, Split
from glassllama.tokenizers.sentencepiece import BYTE_PIECE, SPACE_SYMBOL
from glassllama.tokenizers.vocabulary import (
    FLAGS,
    LARGEST_VOCABULARY,
    AddedToken,
    AddedTokens,
    is_special,
    size_of_vocabulary,
    stop_ids_by_name,
)

Json = Mapping[str, Any]

FIELDS = (
    "normalizer pre_tokenizer model post_processor decoder version truncation padding added_tokens"
).split()
CLS_AND_SEP = ("RobertaProcessing", "BertProcessing")  # post-processors with both ends
KNOWN_PATTERNS = (GPT2, LLAMA3, QWEN2)


def tokenizer_from_json(
    document: Json, backend: BPEBackend = PYTHON
) -> BytePairTokenizer | pipeline.PipelineTokenizer:
    """The tokenizer of a tokenizer.json. TokenizerError names what is not supported."""
    file = _TokenizerJson(document)
    make = file.byte_pair_tokenizer if file.has_known_split else file.pipeline_tokenizer
    return make(backend)


def pipeline_from_json(document: Json, backend: BPEBackend = PYTHON) -> pipeline.PipelineTokenizer:
    """The same, always run stage by stage."""
    return _TokenizerJson(document).pipeline_tokenizer(backend)


class _TokenizerJson:
    """The contents of a file. `vocab`: text → id of `model.vocab`."""

    def __init__(self, document: Json) -> None:
        self.fields = Fields("tokenizer.json", document, TokenizerError)
        if unknown := document.keys() - {*FIELDS}:
            raise TokenizerError(f"tokenizer.json: {quoted(min(unknown))} is not known")
        self.model = self.fields.object("model")
        if self.model.text("type", "BPE") != "BPE":
            self.model.refuse("type", "BPE")
        for option in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.text(option, ""):
                self.model.refuse(option, "empty")
        if self.model.number("dropout", 0.0):
            self.model.refuse("dropout", "null")
        vocab = self.model.object("vocab")
        for text, id in vocab.values.items():
            if not is_integer(id) or not 0 <= id < LARGEST_VOCABULARY:
                vocab.refuse(text, f"an id from 0 to {LARGEST_VOCABULARY - 1}")
        self.vocab: dict[str, int] = dict(vocab.values)
        if len({*self.vocab.values()}) < len(self.vocab):
            raise TokenizerError("tokenizer.json: model.vocab gives an id to two tokens")
        self.added = self._added_tokens()
        self.normalizers = pipeline.stage_list(self.fields, "normalizer", "normalizers")
        self.pre_tokenizers = pipeline.stage_list(self.fields, "pre_tokenizer", "pretokenizers")
        self.decoders = pipeline.stage_list(self.fields, "decoder", "decoders")
        self.ignore_merges = self.model.boolean("ignore_merges", False)
        self.stop_ids = stop_ids_by_name({**self.vocab, **{t.text: t.id for t in self.added}})

    def _added_tokens(self) -> list[AddedToken]:
        """The added tokens. As in tokenizers, a text of the vocabulary has its id there."""
        found: dict[str, AddedToken] = {}
        for number, value in enumerate(self.fields.items("added_tokens", ())):
            token = Fields(f"tokenizer.json: added_tokens[{number}]", value, TokenizerError)
            text = token.text("content")
            id = token.integer("id", minimum=0, maximum=LARGEST_VOCABULARY - 1)
            special = token.boolean("special") or is_special(text)
            if not text:
                token.refuse("content", "a text of at least one character")
            flags = {flag: token.boolean(flag, False) for flag in FLAGS}
            id = self.vocab.get(text, id)
            found[text] = AddedToken(id=id, text=text, is_special=special, **flags)
        ids = {token.id: text for text, token in found.items()}
        if twice := [token for text, token in found.items() if ids[token.id] != text]:
            raise TokenizerError(f"tokenizer.json: two added tokens have the id {twice[0].id}")
        return [*found.values()]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """`model.merges` in order, each written "a b" or ["a", "b"]."""
        return [*self._merges()]

    def _merges(self) -> Iterator[tuple[str, str]]:
        for number, merge in enumerate(self.model.items("merges")):
            if isinstance(merge, str) and merge.startswith("#version"):
                continue  # the first line of a merges.txt
            match merge.split(" ") if isinstance(merge, str) else merge:
                case [str(left), str(right)] if {left, right, left + right} <= self.vocab.keys():
                    yield left, right
                case _:
                    raise TokenizerError(
                        f"tokenizer.json: merges: number {number} must be two tokens that make a "
                        f"third, all in the vocabulary; got {quoted(merge)}"
                    )

    def check_byte_level_decoder(self) -> None:
        types = [
            stage.text("type") for stage in pipeline.stage_list(self.fields, "decoder", "decoders")
        ]
        if types != ["ByteLevel"]:
            raise TokenizerError(f"tokenizer.json: decoder must be ByteLevel, got {quoted(types)}")

    # Byte-level files with a known split

    @property
    def has_known_split(self) -> bool:
        """Whether the file can become a `Vocabulary`; else it is run stage by stage."""
        specials = {token.text for token in self.added if token.is_special}
        makes_special = not specials.isdisjoint(self.vocab) and any(
            left + right in specials for left, right in self.merges
        )
        complete = self.vocab.keys() >= BYTE_CHARACTERS
        return (
            [stage.text("type") for stage in self.normalizers] in ([], ["NFC"])
            and self.patterns is not None
            and not makes_special
            and not specials & BYTE_CHARACTERS
            and not self.model.boolean("byte_fallback", False)
            and (complete or self.model.text("unk_token", None) is None)
        )

    @cached_property
    def patterns(self) -> tuple[str, ...] | None:
        """The patterns of the pre-tokenizers, if they are known and the last stage is ByteLevel."""
        if not self.pre_tokenizers:
            return None
        last = self.pre_tokenizers[-1]
        if last.text("type") != "ByteLevel" or last.boolean("add_prefix_space", True):
            return None
        known = [_known_pattern(stage) for stage in self.pre_tokenizers[:-1]]
        known += [GPT2] if last.boolean("use_regex", True) else []
        found = [pattern for pattern in known if pattern is not None]
        return tuple(found) if found and len(found) == len(known) else None

    def byte_pair_tokenizer(self, backend: BPEBackend) -> BytePairTokenizer:
        """The tokenizer of a file that `has_known_split`."""
        self.check_byte_level_decoder()
        added_texts = {token.text for token in self.added}
        vocabulary = byte_level_vocabulary(
            tokens={id: token for token, id in self.vocab.items() if token not in added_texts},
            merges=self.merges,
            added_tokens=self.added,
            unused={},
            split=Split(self.patterns or (), normalize_nfc=bool(self.normalizers)),
            ignore_merges=self.ignore_merges,
            mergeable=self.vocab,
        )
        bos, _ = self.text_ends()
        return BytePairTokenizer(vocabulary, bos=bos, stop_ids=self.stop_ids, backend=backend)

    # The post-processor

    def text_ends(self) -> tuple[int | None, int | None]:
        """The ids that the post-processor puts before and after every text."""
        stages = pipeline.stage_list(self.fields, "post_processor", "processors")
        stages = [stage for stage in stages if stage.text("type") != "ByteLevel"]
        if not stages:
            return None, None
        stage, kind = stages[0], stages[0].text("type")
        if kind not in ("TemplateProcessing", *CLS_AND_SEP) or len(stages) > 1:
            stage.refuse("type", f"ByteLevel, or one of TemplateProcessing {' '.join(CLS_AND_SEP)}")
        if kind in CLS_AND_SEP:
            return _named_end(stage, "cls"), _named_end(stage, "sep")
        ends: list[int | None] = []  # None: the text
        for item in stage.items("single"):
            match item:
                case {"Sequence": _}:
                    ends.append(None)
                case {"SpecialToken": {"id": str(name)}}:
                    ends.append(_template_id(stage, name))
                case _:
                    ends += [None, None]
        is_text = [end is None for end in ends]
        if is_text not in ([True], [False, True], [True, False], [False, True, False]):
            stage.refuse(
                "single", "the text, with at most one special token before and one behind it"
            )
        return ends[0], ends[-1]

    # Other pipelines

    def pipeline_tokenizer(self, backend: BPEBackend) -> pipeline.PipelineTokenizer:
        """The tokenizer of any supported file, run stage by stage."""
        stages = (*self.normalizers, *self.pre_tokenizers)
        is_byte_level = any(stage.text("type") == "ByteLevel" for stage in stages)
        if is_byte_level:
            self.check_byte_level_decoder()
        drops = "" if is_byte_level else self._drops()
        bpe = self._character_bpe(is_byte_level, backend)
        bos, eos = self.text_ends()
        return pipeline.PipelineTokenizer(
            self._token_bytes(bpe.byte_ids, is_byte_level),
            AddedTokens(self.added, pipeline.normalizer(self.normalizers)),
            pipeline.pre_tokenizer(self.pre_tokenizers),
            bpe,
            hides_specials=not is_byte_level,
            drops_prefix=drops == "prefix",
            drops_spaces=drops == "spaces",
            bos=bos,
            stop_ids=self.stop_ids | ({eos} if eos is not None else set()),
        )

    def _character_bpe(self, is_byte_level: bool, backend: BPEBackend) -> pipeline.CharacterBPE:
        vocab, model = self.vocab, self.model
        merges = {
            (vocab[left], vocab[right]): (rank, vocab[left + right])
            for rank, (left, right) in enumerate(self.merges)
        }
        byte_ids: dict[int, int] = {}
        if model.boolean("byte_fallback", False):
            byte_ids = {int(t[3:5], 16): id for t, id in vocab.items() if BYTE_PIECE.fullmatch(t)}
        unknown = model.text("unk_token", None)
        complete = len(byte_ids) == 256 or (is_byte_level and vocab.keys() >= BYTE_CHARACTERS)
        if unknown is not None and unknown not in vocab and not complete:
            model.refuse("unk_token", "a token of the vocabulary")
        return pipeline.CharacterBPE(
            ids=vocab,
            merges=merges,
            byte_ids=byte_ids,
            unknown=None if unknown is None else vocab.get(unknown),
            fuse_unknown=model.boolean("fuse_unk", False),
            ignore_merges=self.ignore_merges,
            backend=backend,
        )

    def _token_bytes(self, byte_ids: Mapping[int, int], is_byte_level: bool) -> list[bytes | None]:
        added_ids = {token.id for token in self.added}
        size = size_of_vocabulary({*self.vocab.values(), *added_ids})
        found: list[bytes | None] = [None] * size
        for text, id in self.vocab.items():
            if not is_byte_level:
                found[id] = _utf8(text.replace(SPACE_SYMBOL, " "))
            elif id not in added_ids:
                found[id] = to_bytes(text) if {*text} <= BYTE_CHARACTERS else _utf8(text)
        for byte, id in byte_ids.items():
            found[id] = bytes([byte])
        for token in self.added:
            if found[token.id] is not None and self.vocab.get(token.text) != token.id:
                raise TokenizerError(
                    f"tokenizer.json: vocabulary: id {token.id} is a token's, and also that of the "
                    f"added token {quoted(token.text)}"
                )
            found[token.id] = _utf8(token.text)
        return found

    def _drops(self) -> str:
        """What decoding drops at the start: "prefix", a space; "spaces", those of the first token.

        Refuses decoders that do anything else.
        """
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        spaces = {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
        drops = ""
        for decoder in self.decoders:
            type = decoder.text("type")
            if decoder.values == strip:
                drops = "prefix"
            elif type == "Metaspace":
                adds = pipeline.prepend_scheme(decoder) != "never"
                drops = "spaces" if adds else ""
            elif decoder.values != spaces and type not in ("ByteFallback", "Fuse"):
                decoder.refuse("type", f"one of ByteFallback, Fuse, Metaspace, {strip}, {spaces}")
        if not self.decoders:
            raise TokenizerError(
                "tokenizer.json: decoder is missing: without one, words have no blanks"
            )
        return drops


def _known_pattern(stage: Fields) -> str | None:
    match stage.values:
        case {"type": "Digits"}:
            return EACH_DIGIT if stage.boolean("individual_digits", False) else DIGIT_RUNS
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if (
            pattern in KNOWN_PATTERNS and not stage.boolean("invert", False)
        ):
            return pattern
    return None


def _named_end(stage: Fields, name: str) -> int:
    """The id of a pair ["<s>", 0]."""
    pair = [*stage.items(name)]
    if len(pair) != 2 or not is_integer(pair[1]) or not 0 <= pair[1] < LARGEST_VOCABULARY:
        stage.refuse(name, "a token and its id")
    return int(pair[1])


def _template_id(template: Fields, name: str) -> int:
    ids = template.object("special_tokens").object(name).items("ids", of="integer")
    if len(ids) != 1:
        template.refuse("special_tokens", f"objects with one id each, also for {quoted(name)}")
    return int(ids[0])


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
