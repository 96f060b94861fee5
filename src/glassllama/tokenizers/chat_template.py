"""Renders chat templates of checkpoints in jinja2's sandbox, with limits on time and memory.

A template is an untrusted program. It gets messages and a short list of functions, and cannot reach
into Python objects. The clock is read at every loop iteration, call, filter, comparison and
concatenation. The cost of one such step is bounded, because no text or list is larger than
MAX_TEXT. So a template can be stopped without a thread, signal or process.

What is allowed behaves as in transformers' `apply_chat_template`, except that `safe` and `escape`
give ordinary text.

A template joins, cuts and edits texts of its own and of the conversation. A special token counts as
one only if the template wrote all of its characters, so every character carries its origin:

    "<|im_end|>" of the template, "hi" of a user   <|im_end|>hi
                                                   111111111100

Literals of the template are its own text; everything else that it gets or makes counts as text from
elsewhere. Every operation that `TemplateText` does not define returns an ordinary `str`, which
counts as text from elsewhere: where the origin is lost, nothing can become a special token.
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
from typing import Any, NoReturn, SupportsIndex

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import escape

from glassllama.base.errors import TokenizerError, quoted

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

    `tokens` (`bos_token`, …) are variables of the template; None leaves them undefined, as in
    transformers. TokenizerError: the template is too long or not valid jinja.
    """

    def __init__(self, source: str, **tokens: str | None) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(
                f"chat template: {len(source)} characters, more than the {MAX_TEMPLATE} allowed"
            )
        self._tokens = {n: from_template(text) for n, text in tokens.items() if text is not None}
        self._source = source
        with _as_template_errors():
            sandbox = _Sandbox()
            tree = sandbox.parse(source)
            _check_size(tree)
            self.literals = frozenset(_literals(tree))
            self.attributes = frozenset(node.attr for node in tree.find_all(nodes.Getattr))
            self._code = sandbox.compile(_Guards().visit(tree))

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads without having set them."""
        with _as_template_errors():
            sandbox = _Sandbox()
            found = find_undeclared_variables(sandbox.parse(self._source))
            return frozenset(found - sandbox.globals.keys())

    def render_chat(
        self, messages: Iterable[Mapping[str, Any]], prompt: bool, **options: object
    ) -> TemplateText:
        """The text of messages, and with `prompt` the start of an answer.

        Messages and options hold plain JSON values. Roles count as the template's own text.
        """
        variables: dict[str, object] = {
            **{"tools": None, "documents": None, **self._tokens, **options},
            "messages": [{**each, "role": from_template(each["role"])} for each in messages],
            "add_generation_prompt": prompt,
        }
        return self.render(**variables)

    def render(self, **variables: object) -> TemplateText:
        """The text for these variables: strings, numbers, lists and dicts only.

        TokenizerError: the template refuses the messages (`raise_exception`), breaks a rule of the
        sandbox or exceeds a limit.
        """
        with _as_template_errors():
            sandbox = _Sandbox()
            sandbox.charge(variables)
            template = sandbox.template_class.from_code(sandbox, self._code, sandbox.globals)
            return joined((sandbox.charge(joined(template.generate(**variables))),))


@contextmanager
def _as_template_errors() -> Iterator[None]:
    """Any error is the template's: hostile ones break parser and compiler in many ways.

    Garbage collection is paused: it takes half a second in a large process, which would count as
    the template's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except Exception as fault:
        message = " ".join(str(fault).split())[:200] or "gave up"
        name = "" if isinstance(fault, TemplateError) else f"{type(fault).__name__}: "
        raise TokenizerError(f"chat template: {name}{message}") from fault
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


class _Exceeded(TemplateError):
    """A limit of the sandbox is exceeded."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The rules of one rendering, its time limit, and how much it has made."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        self._end, self._total = time.thread_time() + MAX_SECONDS, 0
        allowed: dict[str, Any] = {name: FILTERS[name] for name in ALLOWED_FILTERS}
        allowed |= {name: _with_case(name) for name in ("upper", "lower", "capitalize")}
        allowed |= {"title": _title, "trim": _trim, "string": _text, "safe": _text}
        allowed |= {"escape": _escape, "e": _escape, "join": self.join, "replace": self.replace}
        allowed |= {"indent": _indent, "tojson": self.tojson}
        self.filters = {name: self._bounded(function) for name, function in allowed.items()}
        for name in LIST_FILTERS:
            self.filters[name] = self._bounded(FILTERS[name], makes_list=True)
        # Filters that _Guards inserts into a template.
        guards = {"literal": from_template, "shown": _text, "concatenated": self.join}
        self.filters |= {name: self._guard(function) for name, function in guards.items()}
        self.filters["charged"] = self._guard(lambda value: value)
        self.filters["timed"] = pass_context(lambda _, value: self.charge(None) or value)
        tests: dict[str, Any] = {name: TESTS[name] for name in TESTS.keys() - FORBIDDEN_TESTS}
        self.tests = {name: self._bounded(function) for name, function in tests.items()}
        self.globals = {
            **{"range": safe_range, "dict": dict, "namespace": _PlainNamespace},
            **{"cycler": Cycler, "joiner": Joiner},
            **{"raise_exception": _raise_exception, "strftime_now": _strftime_now},
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

    def _guard(self, function: Callable[[Any], Any]) -> Callable[..., Any]:
        """A filter that takes the context, so that jinja does not run it at compile time."""
        return pass_context(lambda _, value: self.charge(function(value)))

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
        for items, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(items, str | list | tuple) and isinstance(times, int):
                _within(len(items) * times)
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
        return str.__str__(self.join(encoder.iterencode(value)))


class _Guards(NodeTransformer):
    """Inserts the checks of the sandbox into a template where jinja has no hook for them."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        for n, part in enumerate(node.nodes):
            if isinstance(part, nodes.TemplateData):
                node.nodes[n] = _filtered(nodes.Const(part.data), "literal")
            else:
                node.nodes[n] = _filtered(part, "shown")
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
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, str):
            total += len(value)
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
    return str(escape(str.__str__(_text(value))))


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, size = str.__str__(_text(value)), width if isinstance(width, int) else len(width)
    _within(len(text) + (size + 1) * (len(text.splitlines()) + 1))
    return str(FILTERS["indent"](text, width, first, blank))


def _raise_exception(message: object) -> None:
    """A template calls this to refuse messages."""
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    """The current date, without widths, which are unbounded."""
    if len(pattern) > MAX_NEEDLE or re.search(r"%[^a-zA-Z%-]", pattern):
        raise SecurityError(f"strftime_now: pattern not allowed: {pattern[:40]!r}")
    return datetime.now().strftime(pattern)


# Text with the origin of each character

TEMPLATE, OTHER = b"\1", b"\0"
RUNS = re.compile(TEMPLATE + b"+|" + OTHER + b"+")


class TemplateText(str):
    """A text and the `origin` of its characters: 1 the template, 0 elsewhere."""

    __slots__ = ("origin",)
    origin: bytes

    def __new__(cls, text: str, origin: bytes) -> TemplateText:
        assert len(origin) == len(text), "one origin per character"
        result = super().__new__(cls, text)
        result.origin = origin
        return result

    def __str__(self) -> str:
        return self

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        if isinstance(at, slice):
            return TemplateText(str.__getitem__(self, at), self.origin[at])
        return _character(str.__getitem__(self, at), self.origin[at])

    def __iter__(self) -> Iterator[str]:
        return map(_character, str.__iter__(self), self.origin)

    def masked(self, mask: str, *, one_per_run: bool = False) -> str:
        """The template's characters, and `mask` for each other one, or for each run of them."""
        parts = []
        for run in RUNS.finditer(self.origin):
            times = 1 if one_per_run else run.end() - run.start()
            is_own = self.origin[run.start()]
            parts.append(self[run.start() : run.end()] if is_own else mask * times)
        return "".join(parts)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.rsplit(self, sep, maxsplit), sep)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, between, last = self._parts(str.partition(self, sep), "")
        return first, between, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, between, last = self._parts(str.rpartition(self, sep), "")
        return first, between, last

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._parts(str.splitlines(self, True), "")
        if keepends:
            return whole
        lengths = map(len, str.splitlines(self))
        return [line[:length] for line, length in zip(whole, lengths, strict=True)]

    def _parts(self, parts: Iterable[str], sep: str | None) -> list[str]:
        """The parts with their origin; `sep` is between them (None: whitespace)."""
        found: list[str] = []
        at = 0
        for n, part in enumerate(parts):
            # A part after whitespace starts with none, so it is found where the whitespace ends.
            at = self.index(part, at) if sep is None else at + len(sep) * (n > 0)
            found.append(self[at : at + len(part)])
            at += len(part)
        return found

    def __add__(self, other: str, /) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str, /) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex, /) -> str:
        return TemplateText(str.__mul__(self, times), self.origin * times)

    __rmul__ = __mul__

    def join(self, texts: Iterable[str], /) -> str:
        return joined(texts, self)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        text, limit = str.replace(self, old, new, count), int(count)
        origins, at = list[bytes](), 0
        while limit and (found := self.find(old, at + (not old and origins != []))) >= 0:
            origins.append(self.origin[at:found])
            at, limit = found + len(old), limit - 1
        return TemplateText(text, origin_of(new).join([*origins, self.origin[at:]]))

    def with_case(self, changed: str) -> str:
        """`changed` is this text in another case; it may be longer: ß becomes SS."""
        if len(changed) == len(self):
            return TemplateText(changed, self.origin)
        return changed if 0 in self.origin else from_template(changed)


def _case_method(name: str) -> Callable[[TemplateText], str]:
    def method(text: TemplateText) -> str:
        return text.with_case(getattr(str, name)(text))

    method.__name__ = name  # the sandbox finds methods by it
    return method


for _name in ("upper", "lower", "title", "capitalize", "swapcase"):
    setattr(TemplateText, _name, _case_method(_name))


@functools.lru_cache(2**10)
def _character(text: str, is_template: int) -> TemplateText:
    return TemplateText(text, TEMPLATE if is_template else OTHER)


def from_template(text: str) -> TemplateText:
    """A text that the template wrote."""
    return TemplateText(text, TEMPLATE * len(text))


def tracked(text: str) -> TemplateText:
    """A text with origins; those of an ordinary `str` are elsewhere."""
    return text if isinstance(text, TemplateText) else TemplateText(text, bytes(len(text)))


def origin_of(text: str) -> bytes:
    """1 for every character that the template wrote, 0 for all others."""
    return text.origin if isinstance(text, TemplateText) else bytes(len(text))


def joined(texts: Iterable[str], separator: str = "") -> TemplateText:
    """The texts joined, each character with its origin."""
    texts = [*texts]
    return TemplateText(
        str.join(separator, texts), origin_of(separator).join(map(origin_of, texts))
    )
