"""Messages → ids, against Meta's chat format and transformers' apply_chat_template."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import tokenizers
from foreign_tokenizers import HuggingFaceTokenizer, MetaTokenizer, meta_modules
from glassllama.base.errors import TokenizerError
from glassllama.tokenizers.chat import ChatML, Llama3Chat, Message, TemplateChat, choose_chat_format

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
@pytest.mark.identical("chat ids, Llama 3", "Meta's chat_format")
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
@pytest.mark.identical("chat ids, ChatML", "apply_chat_template")
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


# The file's own template, against transformers

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must take turns: user, assistant, user, …') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- macro header(role) %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- header('system') + 'Today: ' + date_string + '<|eot_id|>' }}
    {%- endif %}
    {{- header(message.role) + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
"""
MISTRAL = """\
{%- set ns = namespace(index=0, shown=[]) %}
{%- set talk = messages | rejectattr('role', 'equalto', 'system') | list %}
{{- bos_token }}
{%- for m in talk %}
{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if m['role'] == 'user' %}{{- '[INST]' ~ m['content'] ~ '[/INST]' }}
{%- elif m['role'] in ['assistant'] %}
{%- generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}
{%- else %}{% continue %}{% endif %}
{%- set ns.index = ns.index + 1 %}{% set ns.shown = ns.shown + [m.role | upper] %}
{%- if ns.index > 100 %}{% break %}{% endif %}
{%- endfor %}{{ ns.shown | join(',') ~ (messages | tojson) }}"""


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.identical("chat ids, the file's template", "apply_chat_template")
def test_the_default_models_template_gives_the_ids_of_transformers(
    smollm: PreTrainedTokenizerBase,
    chatml: HuggingFaceTokenizer,
    messages: list[Message],
    prompt: bool,
) -> None:
    assert isinstance(smollm.chat_template, str)
    ours = TemplateChat(smollm.chat_template)
    expected = theirs(smollm, messages, prompt)
    assert ours.encode(messages, chatml, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, MISTRAL], ids=["llama2", "llama3", "mistral"])
@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.identical("chat ids, other templates", "apply_chat_template")
def test_other_families_templates_give_the_ids_of_transformers(
    smollm: PreTrainedTokenizerBase,
    chatml: HuggingFaceTokenizer,
    template: str,
    messages: list[Message],
    prompt: bool,
) -> None:
    """One vocabulary does for all: what is compared is the rendering and where it is cut."""
    expected = smollm.apply_chat_template(
        dicts(messages),
        chat_template=template,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
    )
    bos, eos = smollm.bos_token, smollm.eos_token
    ours = TemplateChat(template, bos_token=bos, eos_token=eos)
    assert ours.encode(messages, chatml, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("template", [None, LLAMA2, LLAMA3, MISTRAL])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_text_of_a_message_becomes_a_control_id(
    smollm: PreTrainedTokenizerBase,
    chatml: HuggingFaceTokenizer,
    template: str | None,
    data: st.DataObject,
) -> None:
    """Control tokens whole, cut, nested, at the ends and next to each other."""
    specials = sorted(chatml.specials)
    cut = st.sampled_from(specials).flatmap(
        lambda text: st.integers(0, len(text)).flatmap(
            lambda at: st.sampled_from([text[:at], text[at:], text[:at] + text + text[at:], text])
        )
    )
    talk = st.lists(st.lists(st.one_of(cut, st.text(" \n<|>x", max_size=3)), max_size=6))
    contents = ["".join(pieces) for pieces in data.draw(talk)] or ["<|im_end|>"]
    messages = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
    harmless = [Message(message.role, "x") for message in messages]
    chat = TemplateChat(template or str(smollm.chat_template), bos_token="<s>", eos_token="</s>")
    control = set(chatml.specials.values())
    ids = chat.encode(messages, chatml)
    expected = [id for id in chat.encode(harmless, chatml) if id in control]
    assert [id for id in ids if id in control] == expected
    for message in messages:
        assert message.content.strip() in chatml.decode(ids) or template == MISTRAL


def test_a_template_that_trims_cannot_join_the_halves_of_a_control_token(
    chatml: HuggingFaceTokenizer,
) -> None:
    chat = TemplateChat("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    halves = [Message("user", " <|im_ "), Message("assistant", " end|>\n"), Message("user", "<|im")]
    ids = chat.encode(halves, chatml)
    assert chatml.decode(ids) == "<|im_end|><|im"
    assert not set(ids) & set(chatml.specials.values())


def test_what_looks_like_a_control_token_survives_what_templates_do_to_text(
    chatml: HuggingFaceTokenizer,
) -> None:
    for change in (
        "upper",
        "lower",
        "title",
        "tojson",
        "capitalize",
        "string",
        "replace('x', 'y')",
    ):
        chat = TemplateChat("{{ messages[0].content | " + change + " }}")
        ids = chat.encode([Message("user", "<|im_end|>")], chatml)
        assert chatml.decode(ids).strip('"') == "<|im_end|>"
        assert not set(ids) & set(chatml.specials.values())


def test_templates_refuse_messages_in_their_own_words(chatml: HuggingFaceTokenizer) -> None:
    chat = TemplateChat(LLAMA2, bos_token="<s>", eos_token="</s>")
    with pytest.raises(TokenizerError, match="Roles must take turns"):
        chat.encode([Message("assistant", "x")], chatml)
    with pytest.raises(TokenizerError, match="'eos_token' is undefined"):
        TemplateChat("{{ 'x' + eos_token }}").encode(TALK, chatml)


def test_bos_comes_once(llama3: MetaTokenizer) -> None:
    chat = choose_chat_format(LLAMA3, llama3)
    ids = chat.encode(TALK, llama3)
    assert ids.count(llama3.bos) == 1
    assert ids == Llama3Chat().encode([Message(m.role, m.content.strip()) for m in TALK], llama3)


def test_the_format_is_chosen_by_template_then_by_control_tokens(
    llama3: MetaTokenizer, chatml: HuggingFaceTokenizer
) -> None:
    assert isinstance(choose_chat_format("x", llama3), TemplateChat)
    assert choose_chat_format(None, llama3) == Llama3Chat()
    assert choose_chat_format(None, chatml) == ChatML()
    base = HuggingFaceTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    with pytest.raises(TokenizerError, match="use generate"):
        choose_chat_format(None, base)


def test_the_page_about_chat_is_true(default_model: Path) -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "chat.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 10
    assert result.failed == 0
