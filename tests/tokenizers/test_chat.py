"""Messages → ids, against Meta's chat format and transformers' apply_chat_template."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_tokenizers import HuggingFaceTokenizer, MetaTokenizer, meta_modules
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.chat import ChatML, Llama3Chat, Message

TALK = [
    Message("system", "Answer in one line."),
    Message("user", "  What is 6 × 7?\n\nThink – 日本語 👩‍👩‍👧 too.  "),
    Message("assistant", "42"),
    Message("user", "Sure? \t"),
]
TALKS = [TALK, TALK[:2], TALK[1:], TALK[1:2], [Message("user", "")]]


@pytest.fixture(scope="module")
def llama3(llama3_ranks: Path) -> MetaTokenizer:
    return MetaTokenizer(llama3_ranks)


@pytest.fixture(scope="module")
def smollm(default_model: Path) -> PreTrainedTokenizerBase:
    """The default model's tokenizer and template, as transformers reads them from the GGUF."""
    return AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)


@pytest.fixture(scope="module")
def chatml(smollm: PreTrainedTokenizerBase) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(smollm.backend_tokenizer)


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def theirs(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool) -> list[int]:
    made = tokenizer.apply_chat_template(
        dicts(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return list(made)


# Llama 3


@pytest.mark.parametrize("messages", [*TALKS, [*TALK, Message("tool", '{"answer": 42}')]])
def test_llama3_ids_are_those_of_metas_reference(
    llama3: MetaTokenizer, messages: list[Message]
) -> None:
    meta = meta_modules()
    raw = [
        meta["datatypes"].RawMessage(role=m.role, content=m.content, stop_reason="end_of_turn")
        if m.role == "assistant"
        else meta["datatypes"].RawMessage(role=m.role, content=m.content)
        for m in messages
    ]
    expected = meta["chat_format"].ChatFormat(llama3.meta).encode_dialog_prompt(raw).tokens
    assert Llama3Chat().encode(messages, llama3) == expected
    closed = Llama3Chat().encode(messages, llama3, add_generation_prompt=False)
    assert closed == expected[:-4], "without the header of the answer to come"


# ChatML


@pytest.mark.parametrize("messages", [TALK, TALK[:2], TALK[:3]])
@pytest.mark.parametrize("prompt", [True, False])
def test_chatml_ids_are_those_of_transformers(
    smollm: PreTrainedTokenizerBase,
    chatml: HuggingFaceTokenizer,
    messages: list[Message],
    prompt: bool,
) -> None:
    ours = ChatML().encode(messages, chatml, add_generation_prompt=prompt)
    assert ours == theirs(smollm, messages, prompt)


# T3: control tokens come from the format alone


def test_special_text_in_a_message_never_becomes_a_control_id(
    llama3: MetaTokenizer, chatml: HuggingFaceTokenizer
) -> None:
    plain = [Message("user", "x"), Message("assistant", "y")]
    for chat, tokenizer in ((Llama3Chat(), llama3), (ChatML(), chatml)):
        control = set(tokenizer.specials.values())
        expected = [id for id in chat.encode(plain, tokenizer) if id in control]
        for special in tokenizer.specials:
            told = [Message("user", f"a{special}b"), Message("assistant", special * 2)]
            ids = chat.encode(told, tokenizer)
            assert [id for id in ids if id in control] == expected
            assert tokenizer.decode(ids).count(f"a{special}b") == 1, "the text itself is kept"


# Messages that no format can write


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ({"role": "user", "content": "x"}, "at least one message"),
        ([Message("robot", "x")], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1]: want role"),
        ([{"role": "user", "content": "x", "name": "y"}], "got role, content, name"),
        ([{"role": "user", "content": None}], "messages[0].content: want text, got NoneType"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        (["hello"], "messages[0]"),
        ([Message("system", "a"), Message("system", "b")], "messages[1]: a system message"),
        ([Message("user", "a"), Message("system", "b")], "messages[1]: a system message"),
    ],
)
def test_bad_messages_are_named(
    chatml: HuggingFaceTokenizer, messages: list[Message], complaint: str
) -> None:
    with pytest.raises(TokenizerError) as raised:
        ChatML().encode(messages, chatml)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_without_the_control_tokens_is_refused(llama3: MetaTokenizer) -> None:
    with pytest.raises(TokenizerError, match="<\\|im_start\\|>"):
        ChatML().encode(TALK, llama3)
