"""Renders chat templates of checkpoints in jinja2's sandbox, with limits on time and memory.

A template is an untrusted program. It gets messages and a short list of functions, and cannot reach
into Python objects. The clock is read at every loop iteration, call, filter, comparison and
concatenation. The cost of one such step is bounded, because no text or list is larger than
MAX_TEXT. So a template can be stopped without a thread, signal or process.

What is allowed behaves as in transformers' `apply_chat_template`, except that `safe` and `escape`
give ordinary text. Literals of the template are marked as its own text (template_text.py);
everything else that it gets or makes counts as text from elsewhere.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from glassllama.base.errors import TokenizerError, quoted
from glassllama.tokenizers.template_text import (
    TemplateText,
    from_template,
    joined,
    origin_of,
    replace_characters,
    tracked,
)

MAX_TEMPLATE = 2**16  # characters; the longest published ones have about 25,000
MAX_NODES = 8_000  # expressions and statements; compiling more takes longer than a second
MAX_NESTED = 40  # statements within each other; compiling takes time with the square of it
MAX_TEXT = 2_000_000  # characters of one value, and of the conversation
MAX_TOTAL = 40_000_000  # characters made by all steps together: a bound on memory
ITEM_SIZE = 8  # characters that an item of a list counts as
MAX_SECONDS = 0.5  # of processor time of this thread; real templates need milliseconds
MAX_BITS = 1024  # of an integer
MAX_NEEDLE = 256  # characters to search for or to strip; the time is proportional

# The filters of jinja2 that published templates need; none that formats to a given width, repeats,
# makes batches, or reads Python attributes.
ALLOWED_FILTERS = (
    "abs count d default dictsort first float int items last length list map max min reject "
    "rejectattr reverse select selectattr sort unique"
).split()
LIST_FILTERS = {"list", "sort"}  # of a text they make one object per character
SPLITS = {"split", "rsplit", "splitlines"}
ESCAPED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}
FORBIDDEN_TESTS = {"filter", "test"}
SEARCHES = {
    "strip", "lstrip", "rstrip", "split", "rsplit", "partition", "rpartition",
    "find", "rfind", "index", "rindex", "count",
}  # fmt: skip
ALLOWED_METHODS: tuple[tuple[type | tuple[type, ...], set[str]], ...] = (
    (
        str,
        SEARCHES
        | {"startswith", "endswith", "removeprefix", "removesuffix", "splitlines", "replace"}
        | {"upper", "lower", "title", "capitalize", "swapcase", "join"}
        | {"isalnum", "isalpha", "isdigit", "isdecimal", "isnumeric", "isspace"}
        | {"islower", "isupper"},
    ),
    (dict, {"get", "items", "keys", "values", "copy"}),
    ((list, tuple), {"index", "count", "copy"}),
    ((int, float, bytes, type), set()),
)


class ChatTemplate:
    """A compiled chat template; `literals` are all texts in its source.

    TokenizerError: it is too long or not valid jinja.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(
                f"chat template: {len(source)} characters, more than the {MAX_TEMPLATE} allowed"
            )
        try:
            with _without_collector():
                sandbox = _Sandbox()
                tree = sandbox.parse(source)
                _check_size(tree)
                self.literals = frozenset(_literals(tree))
                self._code = sandbox.compile(_Guards().visit(tree))
        except Exception as fault:  # hostile sources break the parser and compiler in many ways
            raise _template_error(fault) from fault

    def render(self, **variables: object) -> TemplateText:
        """The text for these variables: strings, numbers, lists and dicts only.

        TokenizerError: the template refuses the messages (`raise_exception`), breaks a rule of the
        sandbox or exceeds a limit.
        """
        try:
            with _without_collector():
                sandbox = _Sandbox()
                sandbox.charge(variables)
                template = sandbox.template_class.from_code(sandbox, self._code, sandbox.globals)
                return joined((sandbox.charge(joined(template.generate(**variables))),))
        except Exception as fault:  # all errors in there are the template's
            raise _template_error(fault) from fault


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause garbage collection, which takes half a second in a large process: that would count as
    the template's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_size(tree: nodes.Template) -> None:
    """TemplateError: compiling the template would take long."""
    count, pending = 0, list[tuple[int, nodes.Node]]([(0, tree)])
    while pending:
        depth, node = pending.pop()
        count += 1
        if count > MAX_NODES:
            raise _Exceeded(f"more than {MAX_NODES} expressions and statements")
        if depth > MAX_NESTED:
            raise _Exceeded(f"more than {MAX_NESTED} statements within each other")
        depth += isinstance(node, nodes.Stmt)
        pending += [(depth, child) for child in node.iter_child_nodes()]


def _template_error(fault: Exception) -> TokenizerError:
    message = " ".join(str(fault).split())[:200] or "gave up"
    name = "" if isinstance(fault, TemplateError) else f"{type(fault).__name__}: "
    return TokenizerError(f"chat template: {name}{message}")


class _Exceeded(TemplateError):
    """A limit of the sandbox is exceeded."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The rules of one rendering, its time limit, and how much it has made."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        self._end = time.thread_time() + MAX_SECONDS
        self._total = 0
        allowed: dict[str, Any] = {name: FILTERS[name] for name in ALLOWED_FILTERS}
        allowed |= {name: _with_case(name) for name in ("upper", "lower", "capitalize")}
        allowed |= {"title": _title, "trim": _trim, "string": _text, "safe": _text}
        allowed |= {"escape": _escape, "e": _escape, "join": self.join, "replace": self.replace}
        allowed |= {"indent": self.indent, "tojson": self.tojson}
        self.filters = {
            name: self._bounded(function, makes_list=name in LIST_FILTERS)
            for name, function in allowed.items()
        }
        self.filters |= {
            "timed": self._timed,
            "charged": self._charged,
            "literal": self._mark_literal,
        }
        self.filters |= {"shown": self._shown, "concatenated": self._concatenated}
        tests: dict[str, Any] = {name: TESTS[name] for name in TESTS.keys() - FORBIDDEN_TESTS}
        self.tests = {name: self._bounded(function) for name, function in tests.items()}
        self.globals = {
            "range": safe_range,
            "dict": lambda *items, **more: dict(*items, **more),
            "namespace": _PlainNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def charge(self, value: Any) -> Any:
        """Returns the value. TemplateError: it is too large, or a total is exceeded."""
        if time.thread_time() > self._end:
            raise _Exceeded(f"stopped after {MAX_SECONDS} seconds")
        if isinstance(value, str):
            self._total += _within(len(value))
        elif isinstance(value, list | tuple | dict):
            _within(_size_of(value))
            self._total += ITEM_SIZE * len(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _Exceeded(f"a number of more than {MAX_BITS} bits")
        if self._total > MAX_TOTAL:
            raise _Exceeded(f"makes more than {MAX_TOTAL} characters")
        return value

    def _bounded(
        self, function: Callable[..., Any], *, makes_list: bool = False
    ) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps jinja's mark on functions that get the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.charge(None)
            if makes_list:
                _within(ITEM_SIZE * max(len(text) if isinstance(text, str) else 0 for text in args))
            return self.charge(function(*args, **kwargs))

        return bounded

    # The filters that _Guards inserts into a template. They take the context, though it is unused,
    # so that jinja does not evaluate them at compile time.

    @pass_context
    def _timed(self, context: Context, value: Any) -> Any:
        self.charge(None)
        return value

    @pass_context
    def _charged(self, context: Context, value: Any) -> Any:
        return self.charge(value)

    @pass_context
    def _mark_literal(self, context: Context, text: str) -> Any:
        return self.charge(from_template(text))

    @pass_context
    def _shown(self, context: Context, value: Any) -> Any:
        return self.charge(_text(value))

    @pass_context
    def _concatenated(self, context: Context, values: list[Any]) -> Any:
        return self.charge(self.join(values))

    def concat(self, texts: Iterable[str]) -> str:  # jinja joins the output of a macro with it
        return joined(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in ALLOWED_METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No `format`: its fields read attributes, and its widths are unbounded."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"{type(obj).__name__}.{attribute} is not allowed in a chat template")

    def getitem(self, obj: Any, argument: Any) -> Any:
        value = super().getitem(obj, argument)
        return self.charge(value) if isinstance(argument, slice) else value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.charge(args)
        __self.charge(kwargs)
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str):
            return __self.charge(__self._call_on_text(tracked(text), name, *args, **kwargs))
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def _call_on_text(self, text: str, name: str, *args: Any, **kwargs: Any) -> Any:
        for scope in ("_loop_vars", "_block_vars"):  # from jinja, for macros
            kwargs.pop(scope, None)
        if name == "join":
            (values,) = args
            return self.join(values, text)
        if name == "replace":
            return self.replace(text, *args, **kwargs)
        if name in SEARCHES:
            for argument in (*args, *kwargs.values()):
                _short(argument)
        if name in SPLITS:
            _within(ITEM_SIZE * len(getattr(str, name)(text, *args, **kwargs)))
        return getattr(text, name)(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not allowed")
        if operator == "**" and not (isinstance(right, int) and 0 <= right <= MAX_BITS):
            raise _Exceeded(f"an exponent that is not within 0 … {MAX_BITS}")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(many, str | list | tuple) and isinstance(times, int):
                _within(len(many) * times)
        return self.charge(super().call_binop(context, operator, left, right))

    def join(self, values: Iterable[Any], separator: str = "") -> str:
        texts, total = list[str](), 0
        for value in values:
            texts.append(_text(value))
            total = _within(total + len(texts[-1]) + len(separator))
        return joined(texts, _text(separator))

    def replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        whole, part, other = tracked(_text(text)), _text(old), _text(new)
        _within(len(whole) + whole.count(part) * len(other))
        return whole.replace(part, other, -1 if count is None else count)

    def indent(
        self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        lines = joined((_text(text), "\n")).splitlines()
        size = width if isinstance(width, int) else len(width)
        _within(sum(map(len, lines)) + (size + 1) * (len(lines) + 1))
        step = " " * width if isinstance(width, int) else width
        for n, line in enumerate(lines):
            if first if n == 0 else line or blank:
                lines[n] = joined((step, line))
        return joined(lines, "\n")

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        for spacing in (indent, *(separators or ())):
            _short(" " * min(spacing, 2 * MAX_NEEDLE) if isinstance(spacing, int) else spacing)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        text = self.join(encoder.iterencode(value))
        return from_template(text) if _is_from_template(value) else str.__str__(text)


class _Guards(NodeTransformer):
    """Inserts the checks of the sandbox into a template where jinja has no hook for them."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_shown(part) for part in node.nodes]
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return _filtered(node, "literal") if isinstance(node.value, str) else node

    def _repeated(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), "timed")))
        return node

    visit_For = visit_Macro = visit_CallBlock = _repeated

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "timed")
        return node

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target else _filtered(node, "charged")

    visit_List = visit_Tuple = visit_Dict = _literal

    def _refused(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"{type(node).__name__.lower()} is not allowed in a chat template")

    visit_Block = visit_Extends = visit_Include = visit_Import = visit_FromImport = _refused


def _shown(part: nodes.Expr) -> nodes.Expr:
    if isinstance(part, nodes.TemplateData):
        return _filtered(nodes.Const(part.data), "literal")
    return _filtered(part, "shown")


def _literals(tree: nodes.Template) -> Iterable[str]:
    yield from (node.data for node in tree.find_all(nodes.TemplateData))
    yield from (n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str))


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks text for training; it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _PlainNamespace(Namespace):
    """Variables of a template that outlive a loop; none starts with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace: a name with an underscore in front: {quoted(name)}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _size_of(value: Any) -> int:
    """The size of a nested value in characters, counted until it is too large."""
    total, pending = 0, [value]
    while pending and total <= MAX_TEXT:
        value = pending.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
            total += ITEM_SIZE * len(value)
        elif isinstance(value, list | tuple):
            pending += value
            total += ITEM_SIZE * len(value)
    return total


def _within(size: int) -> int:
    """Returns the size. TemplateError: more than MAX_TEXT characters."""
    if size > MAX_TEXT:
        raise _Exceeded(f"a text or list of more than {MAX_TEXT} characters")
    return size


def _short(text: object) -> None:
    if isinstance(text, str) and len(text) > MAX_NEEDLE:
        raise _Exceeded(f"more than {MAX_NEEDLE} characters to search for, strip or indent with")


def _text(value: Any) -> str:
    """A value as text. The digits of a number count as the template's: `<|image_{{ n }}|>`."""
    if isinstance(value, str):
        return value
    text = str(value)
    return from_template(text) if isinstance(value, int | float) else text


def _trim(value: Any, chars: str | None = None) -> str:
    _short(chars)
    return tracked(_text(value)).strip(chars)


def _with_case(name: str) -> Callable[[Any], str]:
    def changed(value: Any) -> str:
        text: str = getattr(tracked(_text(value)), name)()
        return text

    return changed


def _title(value: Any) -> str:
    return tracked(_text(value)).with_case(FILTERS["title"](value))


def _escape(value: Any) -> str:
    text = _text(value)
    _within(len(text) + sum(text.count(c) * len(code) for c, code in ESCAPED.items()))
    return replace_characters(text, ESCAPED)


def _is_from_template(value: Any) -> bool:
    """Whether all characters in a nested value are the template's."""
    if isinstance(value, str):
        return 0 not in origin_of(value)
    if isinstance(value, Mapping):
        return all(map(_is_from_template, (*value.keys(), *value.values())))
    return not isinstance(value, list | tuple) or all(map(_is_from_template, value))


def _raise_exception(message: object) -> None:
    """A template calls this to refuse messages."""
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """The current date, without widths, which are unbounded."""
    if len(pattern) > MAX_NEEDLE or re.search(r"%[^a-zA-Z%-]", pattern):
        raise SecurityError(f"strftime_now: pattern not allowed: {pattern[:40]!r}")
    return datetime.now().strftime(pattern)
