"""Chat templates are untrusted programs: what they may do, and limits on time and memory."""

from __future__ import annotations

import gc
import time
from datetime import datetime

import pytest

from glassllama.base.errors import TokenizerError
from glassllama.tokenizers import chat_template
from glassllama.tokenizers.chat_template import ChatTemplate
from processor_time import seconds

GROW = "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = STEP %}{% endfor %}"
LONG = "{% set s = 'ab' * 999999 %}{% for i in range(99999) %}STEP{% endfor %}"

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ messages.__init__ }}",
    "{{ namespace.mro() }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({}) }}",
    "{{ ('{0.__class__}'|safe).format(1) }}",
    "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "{{ '%s' % messages }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
    "{% for m in 'x' %}{{ loop.__class__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% block a %}{% endblock %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ lipsum() }}",
]
TIME = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1] recursive %}{% if loop.depth < 99 %}{{ loop('ab') }}{% endif %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9)|list }}",
    "{{ 'x'.strip('b' * 99999) }}",
    "{{ 'x'.rfind('b' * 99999) }}",
    "{{ 2 ** 9999999999 }}",
    GROW.replace("STEP", "9 ** 300").replace("'x'", "3") + "{{ ns.s * ns.s }}",
    LONG.replace("STEP", "{% if s[1:] in s %}{% endif %}"),
    LONG.replace("STEP", "{% set x = s|title %}"),
    LONG.replace("STEP", "{% set x = s.split('a') %}"),
    LONG.replace("STEP", "{% set x = s == s ~ 'a' %}"),
]
MEMORY = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ [0] * 10**10 }}",
    "{{ ['x' * 999999] * 1000 }}",
    GROW.replace("STEP", "ns.s ~ ns.s"),
    GROW.replace("STEP", "ns.s + ns.s"),
    GROW.replace("STEP", "[ns.s, ns.s]") + "{{ ns.s }}",
    GROW.replace("STEP", "(ns.s, ns.s)") + "{{ {ns.s: 1} }}",
    GROW.replace("STEP", "{'a': ns.s, 'b': ns.s}") + "{{ ns.s|tojson }}",
    GROW.replace("STEP", "ns.s|replace('x', 'xx')"),
    GROW.replace("STEP", "ns.s.replace('', 'xx')"),
    GROW.replace("STEP", "ns.s|tojson"),
    GROW.replace("STEP", "ns.s|escape ~ '&&'") + LONG.replace("STEP", "{{ ns.s }}"),
    GROW.replace("STEP", "ns.s.join([ns.s, ns.s, ns.s])"),
    GROW.replace("STEP", "[ns.s, ns.s]|join(ns.s)"),
    GROW.replace("'x'", "7").replace("STEP", "ns.s * ns.s"),
    "{% set s = 'x' * 9999 %}{{ (['a'] * 1999)|map('replace', 'a', s)|list }}",
    "{% set s = 'x' * 999999 %}{% macro m() %}{{ varargs }}{% endmacro %}{{ m(ARGS) }}".replace(
        "ARGS", ",".join("s" * 5000)
    ),
    "{% macro m() %}" + LONG.replace("STEP", "{{ s }}") + "{% endmacro %}{{ m() }}",
    "{% set x %}" + LONG.replace("STEP", "{{ s }}") + "{% endset %}",
    LONG.replace("STEP", "y" * 9999),
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ [[1]]|tojson(separators=('x' * 999999, '')) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'|center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ strftime_now('%9999999999d') }}",
]
SOURCES = [
    "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "{{ 1" + "+1" * 20_000 + " }}",
    "{{ x" + ".a" * 20_000 + " }}",
    "{{ x" + "~x" * 20_000 + " }}",
    "{{ x" * 16_000,
    "{{x}}" * 13_000,
    "{% for x in y %}" * 200 + "{% endfor %}" * 200,
    "{{ " + "9" * 60_000 + " }}",
    "x" * 70_000,
    "{% if %}",
]


@pytest.mark.parametrize("source", ESCAPES + TIME + MEMORY + SOURCES, ids=lambda s: s[:60])
def test_a_hostile_template_fails_fast_in_one_line(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]

    def refused() -> None:
        with pytest.raises(TokenizerError, match=r"^chat template: ") as raised:
            ChatTemplate(source).render(messages=messages)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300

    assert seconds(refused, enough=1.0) < 1.0
    assert messages == [{"role": "user", "content": "x"}]


def test_a_hostile_conversation_does_not_affect_the_next() -> None:
    template = ChatTemplate(
        "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}x"
    )
    with pytest.raises(TokenizerError, match="seconds"):
        template.render(n=99_999)
    assert template.render(n=3) == "x"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ [1, 'ü', none]|tojson }}", '[1, "ü", null]'),
        ("{{ {'b': '<', 'a': 1}|tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": "<"\n}'),
        ("{{ [1, 2]|tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ 'a b'.split()|join('-') ~ '-'.join(['c', 'd']) }}", "a-bc-d"),
        ("{{ 'aXbX'.replace('X', '', 1) ~ ('aXbX'|replace('X', '')) }}", "abXab"),
        ("{{ 'a\nb'|indent(2) ~ ' x '|trim ~ 'xax'.strip('x') }}", "a\n  bxa"),
        ("{{ missing }}{{ missing is defined }}{% if missing %}y{% endif %}", "False"),
        ("{% set ns = namespace(n=1) %}{% for i in 'ab' %}{% set ns.n = ns.n * 3 %}{% endfor %}"
         "{{ ns.n % 4 }}", "1"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 3 %}{% break %}"
         "{% endif %}{{ i }}{% endfor %}", "013"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% macro m(a, b='y') %}{{ a ~ b }}{% endmacro %}{{ m('x') ~ m('x', b='z') }}", "xyxz"),
        ("{{ 'abc'[::-1] ~ 'abc'[1:] ~ 'abc'[-1] }}", "cbabcc"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ [3, 1]|sort|first ~ ([1, 2]|map('string')|list|last) }}", "12"),
        ("{{ dict(a=1).a ~ {'content': 'c'}.content ~ {'get': 1}['get'] }}", "1c1"),
    ],
)  # fmt: skip
def test_features_that_templates_need(source: str, text: str) -> None:
    assert ChatTemplate(source).render() == text


def test_strftime_now_is_the_current_date() -> None:
    shown = ChatTemplate("{{ strftime_now('%Y') }}").render()
    assert abs(int(shown) - datetime.now().year) <= 1


def test_the_garbage_collector_does_not_count_as_the_templates_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a large process one collection exceeds the time limit of a template."""

    def slow_collection(phase: str, details: dict[str, int]) -> None:
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            pass

    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    thresholds = gc.get_threshold()
    gc.callbacks.append(slow_collection)
    gc.set_threshold(100)
    try:
        text = ChatTemplate("{% for n in range(200) %}{{ [n] | first }}{% endfor %}").render()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(slow_collection)
    assert text == "".join(map(str, range(200)))
