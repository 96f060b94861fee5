"""Chat templates of all families, with tools, calls, reasoning and lists, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenizers
from byte_level_families import trained
from family_templates import ADDED, FAMILIES, SPECIALS
from glassllama.base.errors import TokenizerError
from glassllama.base.interfaces import Tokenizer
from glassllama.tokenizers.chat import TemplateChat
from glassllama.weights.tokenizer import tokenizer_from_folder

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, in °C; \"now\" or <later> & 'tomorrow'.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {}}},
            "required": ["city"],
        },
    },
}
OTHER = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALL = {
    "id": "abcdefghi", "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich 🏔", "days": [1, 2.5, None]}},
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"t": -3}'}
TALKS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": " Who are you?\n"}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 × 7?"},
        {"role": "assistant", "content": "42", "reasoning_content": "\nsix sevens\n"},
        {"role": "user", "content": "Sure?"},
    ],
    "inline reasoning": [
        {"role": "user", "content": "6 × 7?"},
        {"role": "assistant", "content": "<think>\nsix sevens\n</think>\n\n42"},
        {"role": "user", "content": "Sure?"},
    ],
    "call": [
        {"role": "user", "content": "Cold?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        RESULT,
    ],
    "call and answer": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Cold?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [CALL],
        },
        RESULT,
        RESULT,
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Bye"},
    ],
    "two calls": [
        {"role": "user", "content": "Cold?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        RESULT,
        RESULT,
    ],
    "lists": [
        {"role": "user", "content": [{"type": "text", "text": " one "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}]},
    ],
    "assistant first": [{"role": "assistant", "content": "x"}],
    "prefilled": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"tools": [TOOL]}, {"tools": [TOOL, OTHER]}, {"tools": []}, {"enable_thinking": False},
    {"enable_thinking": True}, {"thinking": True},
    {"documents": [{"title": "t", "text": "first"}, {"title": "u", "text": "second"}]},
    {"controls": {"citations": True, "length": "long"}, "tools": [TOOL], "thinking": True},
    {"date_string": "3 May 2025", "tools_in_user_message": False, "tools": [TOOL]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One vocabulary with the marks of all families."""
    folder = tmp_path_factory.mktemp("families")
    text = "Answer the question: user, assistant, system\n" * 9
    inner = trained("gpt2", text, size=300, specials=[])
    inner.add_special_tokens(SPECIALS)
    inner.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ADDED])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return tokenizer_from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


CHATS = {
    name: TemplateChat(source, bos_token="<s>", eos_token="</s>")
    for name, source in FAMILIES.items()
}


def rendered(theirs: Any, name: str, talk: Any, prompt: bool, options: Any) -> list[int] | None:
    """The ids of transformers; None where the template fails."""
    if name == "R1 distill":  # its template needs the arguments of calls as text
        talk = json.loads(json.dumps(talk))
        for function in (c["function"] for turn in talk for c in turn.get("tool_calls") or ()):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    try:
        ids = theirs.apply_chat_template(
            talk, chat_template=FAMILIES[name], add_generation_prompt=prompt, tokenize=True,
            return_dict=False, **options,
        )  # fmt: skip
    except Exception:
        return None
    return list(ids)


def flat(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with texts in place of lists."""

    def text(content: Any) -> Any:
        is_list = isinstance(content, list)
        return "\n".join(part["text"] for part in content) if is_list else content

    return [{**turn, "content": text(turn.get("content"))} for turn in talk]


def compare(ours: Tokenizer, theirs: Any, name: str, talk: Any, prompt: bool, options: Any) -> bool:
    """The same ids, or an error of both -> whether there are ids."""
    chat = CHATS[name]
    readable = chat._template.variables
    if any(isinstance(turn.get("content"), list) and turn["role"] not in chat._part_roles
           for turn in talk):  # fmt: skip
        talk = flat(talk)
    expected = rendered(theirs, name, talk, prompt, options)
    unread = {*options} - readable
    calls = any(turn.get("tool_calls") for turn in talk)
    if unread or (calls and "tool_calls" not in FAMILIES[name]) or expected is None:
        with pytest.raises(TokenizerError) as caught:
            chat.encode(talk, ours, add_generation_prompt=prompt, options=options)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert all(option in message for option in unread)
        return False
    ids = chat.encode(talk, ours, add_generation_prompt=prompt, options=options)
    if "<think>" in json.dumps(talk):  # a mark in a message is text, where the template leaves it
        assert ours.decode(ids) == ours.decode(expected)
    else:
        assert ids == expected
    return True


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.identical("chat ids, templates in the styles of 16 families", "apply_chat_template")
def test_families_give_the_ids_of_transformers(name: str, ours: Tokenizer, theirs: Any) -> None:
    written = 0
    for talk in TALKS.values():
        for options in OPTIONS:
            for prompt in (True, False):
                written += compare(ours, theirs, name, talk, prompt, options)
    assert written >= 8, "conversations that the template accepts"


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-9, 99), st.floats(-9, 9), st.text("aé\"'<\n ")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text("ab é", max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
TEXT = st.text("ab.é日👩\n\t {}'\"\\%", max_size=8)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Random turns: mostly in the order that templates demand."""
    talk: list[dict[str, Any]] = []
    if draw(st.booleans()):
        talk.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        talk.append({"role": "user", "content": draw(TEXT)})
        if draw(st.integers(0, 3)) == 0:
            function = {"name": draw(st.text("ab_", min_size=1, max_size=3)),
                        "arguments": draw(st.dictionaries(st.text("ab", max_size=2), JSON_VALUES,
                                                          max_size=2))}  # fmt: skip
            call = {"id": "123456789", "type": "function", "function": function}
            turn: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
            turn |= {"content": draw(TEXT)} if draw(st.booleans()) else {}
            talk += [turn, {**RESULT, "tool_call_id": "123456789", "content": draw(TEXT)}]
        if draw(st.booleans()):
            talk.append({"role": "assistant", "content": draw(TEXT)})
            if draw(st.booleans()):
                talk[-1]["reasoning_content"] = draw(TEXT)
            if draw(st.integers(0, 4)) == 0:
                talk[-1]["content"] = f"<think>{draw(TEXT)}</think>{draw(TEXT)}"
    return talk


@pytest.mark.parametrize("name", FAMILIES)
@given(talk=conversations(), prompt=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_conversations_give_the_ids_of_transformers(
    name: str, talk: Any, prompt: bool, data: st.DataObject, ours: Tokenizer, theirs: Any
) -> None:
    schema = {"name": "f", "parameters": data.draw(JSON_VALUES)}
    options: dict[str, Any] = {}
    readable = CHATS[name]._template.variables
    if "tools" in readable and data.draw(st.booleans()):
        options["tools"] = [{"type": "function", "function": schema}]
    for switch in {"enable_thinking", "thinking"} & readable:
        if data.draw(st.booleans()):
            options[switch] = data.draw(st.booleans())
    compare(ours, theirs, name, talk, prompt, options)


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_only_the_template_writes_control_tokens(
    name: str, data: st.DataObject, ours: Tokenizer
) -> None:
    """Marks in every field that a user or a tool can fill: schemas, calls, results, reasoning."""
    chat = CHATS[name]
    ids = {**ours.added, **ours.specials}
    controls = {*ours.specials.values()} | {ids[t] for t in ADDED if t in FAMILIES[name]}
    marks = st.sampled_from([*SPECIALS, *ADDED, "<|im_", "end|>", "<", "|>", "/think>", "[IN", "x"])
    texts = st.lists(marks, max_size=4).map("".join)

    def conversation(text: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        function = {"name": text("f"), "arguments": {text("k"): [text("v"), 3]}}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        parts = [{"type": "text", "text": text("p")}, {"type": "text", "text": text("q")}]
        talk = [
            {"role": "user", "content": text("a")},
            {"role": "assistant", "content": "", "reasoning_content": text("r"),
             "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": text("t")},
            {"role": "assistant", "content": text("b")},
            {"role": "user", "content": parts},
        ]  # fmt: skip
        if "tool_calls" not in FAMILIES[name]:
            talk = [talk[0], talk[3], talk[4]]
        tool = {"type": "function", "function": {"name": text("n"), text("key"): text("d")}}
        options = {"tools": [tool], "documents": [{"text": text("doc")}]}
        return talk, {k: v for k, v in options.items() if k in chat._template.variables}

    typed: dict[str, str] = {}
    evil = conversation(lambda key: typed.setdefault(key, data.draw(texts) or "x"))
    harmless = conversation(lambda key: "x" * len(typed[key]))
    found = [
        [id for id in chat.encode(talk, ours, options=options) if id in controls]
        for talk, options in (evil, harmless)
    ]
    assert found[0] == found[1]


def test_parts_of_a_list_are_lines_where_a_template_reads_text_only(
    ours: Tokenizer, theirs: Any
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for name, is_read in (("Qwen 3", False), ("Qwen 2", False), ("Gemma 3", True)):
        listed = CHATS[name].encode([{"role": "user", "content": parts}], ours)
        content = parts if is_read else "one\ntwo"
        assert listed == rendered(theirs, name, [{"role": "user", "content": content}], True, {})


def test_arguments_of_calls_may_be_json_text(ours: Tokenizer) -> None:
    text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps({"city": "Rome"})}}
    plain = {**CALL, "function": {**CALL["function"], "arguments": {"city": "Rome"}}}
    bare = {"name": "weather", "arguments": {"city": "Rome"}}
    ids = [
        CHATS["Qwen 2.5"].encode(
            [TALKS["question"][0], {"role": "assistant", "tool_calls": [call]}], ours
        )
        for call in (text, plain, bare)
    ]
    assert ids[0] == ids[1] == ids[2]


def test_tools_of_a_system_message(ours: Tokenizer, theirs: Any) -> None:
    """Phi-4-mini reads them as text in a field of the message."""
    talk = [{"role": "system", "content": "Help.", "tools": json.dumps([TOOL])}, *TALKS["question"]]
    assert compare(ours, theirs, "Phi-4-mini", talk, True, {})
    with pytest.raises(TokenizerError, match="does not read tools of a message"):
        CHATS["Gemma 3"].encode(talk, ours)


NESTED: list[Any] = []
for _ in range(99):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant"}, "messages[1]: expected role and content (or reasoning_c"),
        ({"role": "assistant", "content": "x", "mood": 1}, "got role, content, mood"),
        ({"role": "assistant", "content": 3}, "messages[1].content: expected text, got int"),
        ({"role": "assistant", "content": [{"type": "audio"}]}, "content[0]: expected {"),
        ({"role": "assistant", "content": [{"type": "text", "text": 3}]}, "content[0]: expected"),
        ({"role": "assistant", "content": ["x"]}, "content[0]: expected"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3},
         "reasoning_content: expected"),
        ({"role": "user", "content": "x", "reasoning_content": "y"}, "only an assistant has"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant has"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls: expected a list, got str"),
        ({"role": "assistant", "tool_calls": ["x"]}, "tool_calls[0]: expected name and arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool_calls[0]: expected name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
         "tool_calls[0].arguments: expected an object, got '{'"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": {3}}}]},
         "messages[1].tool_calls: expected JSON values, got {3}"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": NESTED}}]},
         "messages[1].tool_calls: expected JSON values"),
    ],
)  # fmt: skip
def test_errors_name_the_field_of_a_message(message: Any, words: str, ours: Tokenizer) -> None:
    with pytest.raises(TokenizerError) as caught:
        CHATS["Qwen 3"].encode([*TALKS["question"], message], ours)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Qwen 2.5", {"enable_thinking": True}, "does not read enable_thinking; options that it"),
        ("Gemma 2", {"tools": [TOOL]}, "does not read tools; options that it reads: bos_token"),
        ("Qwen 3", {"messages": []}, "does not read messages"),
        ("Qwen 3", {"add_generation_prompt": False}, "does not read add_generation_prompt"),
        ("Qwen 3", {"tools": "x"}, "tools: expected a list, got 'x'"),
        ("Qwen 3", {"tools": [test_tools_of_a_system_message]}, "tools: expected JSON values, got"),
        ("Qwen 3", {"tools": [{3: 4}]}, "tools: expected JSON values"),
        ("Mistral", {"tools": [{"name": "bare"}]}, "has no attribute 'function'"),
    ],
)  # fmt: skip
def test_errors_name_the_option(name: str, options: Any, words: str, ours: Tokenizer) -> None:
    with pytest.raises(TokenizerError) as caught:
        CHATS[name].encode(TALKS["question"], ours, options=options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
