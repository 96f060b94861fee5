"""A pickle is a program for a stack machine; this machine can build data and do nothing else.

Python's own unpickler imports and calls what the file names. This one knows 38 of the 68 opcodes;
a name that is not in the table handed to it ends the run, and only functions from that table are
ever called. No imports, no attributes, no classes, no jumps: a run is as long as its bytes.

Source: the opcode descriptions in Python's `pickletools` module, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from glassllama.base.errors import FormatError, quoted

STOP = ord(".")
MOST_STEPS = 4_000_000  # 80,000 tensors; a step makes one object at most: this bounds memory
DEEPEST_MARKS = 10_000  # Python's pickler leaves one open per nested list or dict
KEY_LIMIT = 2**32  # larger whole numbers as keys could be chosen to collide in a dict
SUPPORTED_PROTOCOLS = range(2, 6)


@dataclass(frozen=True, slots=True)
class Call:
    """A name of the whitelist that may be called, with the tuple of arguments."""

    name: str
    function: Callable[[tuple[object, ...]], object]


class PickleMachine:
    """Runs one pickle. `names` maps "module.name" to a `Call` or to a plain value.

    `persistent` turns a persistent id (how torch.save refers to a storage) into a value. Both
    raise ValueError for what they do not expect. `hints` explain names that are known and refused.
    """

    def __init__(
        self,
        code: bytes,
        where: str,
        *,
        names: Mapping[str, object],
        persistent: Callable[[object], object],
        hints: Mapping[str, str],
    ) -> None:
        self.code, self.where = code, where
        self.names, self.persistent, self.hints = names, persistent, hints
        self.position = 0
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # the stacks below each open MARK
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """-> the pickled value, of dicts, lists, tuples, text, numbers and what `names` gives."""
        for _ in range(MOST_STEPS):
            opcode = self.take_number(U8)
            if opcode == STOP:
                return self.result()
            name, action = ACTIONS.get(opcode) or self.refuse(opcode)
            try:
                action(self)
            except IndexError:
                raise self.fault(f"{name} finds too little on the stack") from None
            except ValueError as error:
                raise self.fault(str(error)) from error
        raise self.fault(f"more than {MOST_STEPS} steps")

    def refuse(self, opcode: int) -> NoReturn:
        name = REFUSED.get(opcode, f"0x{opcode:02x}")
        raise self.fault(f"opcode {name} is not one that tensors need")

    def result(self) -> object:
        if self.outer or len(self.stack) != 1 or self.position != len(self.code):
            raise self.fault("ends with values left over, or with bytes after its end")
        return self.stack[0]

    def fault(self, what: str) -> FormatError:
        return FormatError(f"{self.where}, byte {self.position}: {what}; nothing was executed")

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the program."""
        taken = self.code[self.position : self.position + nbytes]
        if len(taken) < nbytes:
            raise self.fault("truncated")
        self.position += nbytes
        return taken

    def take_number(self, layout: struct.Struct) -> Any:
        start = self.position
        self.position += layout.size
        if self.position > len(self.code):
            raise self.fault("truncated")
        return layout.unpack_from(self.code, start)[0]

    def take_text(self, length: struct.Struct) -> str:
        return self.decoded(self.take(self.take_number(length)))

    def take_line(self) -> str:
        end = self.code.find(b"\n", self.position)
        line = self.take(end - self.position if end >= 0 else len(self.code) + 1)
        self.take(1)
        return self.decoded(line)

    def decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"text is not UTF-8: {quoted(raw[:40])}") from error

    def pop_to_mark(self) -> list[object]:
        above = self.stack
        self.stack = self.outer.pop()
        return above

    def look_up(self, module: object, name: object) -> object:
        dotted = f"{module}.{name}"
        if dotted not in self.names:
            hint = self.hints.get(dotted, "it is outside the whitelist of names that tensors need")
            raise self.fault(f"names {quoted(dotted)}: {hint}")
        return self.names[dotted]


U8, U16, I32, U32, U64, F64 = map(struct.Struct, ("<B", "<H", "<i", "<I", "<Q", ">d"))
Action = Callable[[PickleMachine], None]


def _number(layout: struct.Struct) -> Action:
    return lambda m: m.stack.append(m.take_number(layout))


def _text(length: struct.Struct) -> Action:
    return lambda m: m.stack.append(m.take_text(length))


def _raw(length: struct.Struct) -> Action:
    return lambda m: m.stack.append(m.take(m.take_number(length)))


def _constant(value: object) -> Action:
    return lambda m: m.stack.append(value)


def _memo_put(layout: struct.Struct) -> Action:
    def put(m: PickleMachine) -> None:
        m.memo[m.take_number(layout)] = m.stack[-1]

    return put


def _memo_get(layout: struct.Struct) -> Action:
    def get(m: PickleMachine) -> None:
        index = m.take_number(layout)
        if index not in m.memo:
            raise m.fault(f"memo {index} was never set")
        m.stack.append(m.memo[index])

    return get


def _memoize(m: PickleMachine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _protocol(m: PickleMachine) -> None:
    version = m.take_number(U8)
    if version not in SUPPORTED_PROTOCOLS:
        raise m.fault(f"protocol {version}, expected 2 … 5")


def _frame(m: PickleMachine) -> None:
    m.take(U64.size)  # how much to read at once: a hint for readers of streams


def _small_long(m: PickleMachine) -> None:
    m.stack.append(int.from_bytes(m.take(m.take_number(U8)), "little", signed=True))


def _mark(m: PickleMachine) -> None:
    if len(m.outer) >= DEEPEST_MARKS:
        raise m.fault(f"more than {DEEPEST_MARKS} open marks")
    m.outer.append(m.stack)
    m.stack = []


def _tuple_of(count: int) -> Action:
    def gather(m: PickleMachine) -> None:
        m.stack.append(tuple(reversed([m.stack.pop() for _ in range(count)])))

    return gather


def _tuple_to_mark(m: PickleMachine) -> None:
    items = m.pop_to_mark()
    m.stack.append(tuple(items))


def _extend_list(m: PickleMachine, items: list[object]) -> None:
    target = m.stack[-1]
    if not isinstance(target, list):
        raise m.fault(f"appends to a {type(target).__name__}")
    target.extend(items)


def _set_items(m: PickleMachine, items: list[object]) -> None:
    target = m.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise m.fault(f"sets items of a {type(target).__name__}, or a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str) and not (type(key) is int and abs(key) < KEY_LIMIT):
            raise m.fault(f"a dict key is a {type(key).__name__}, expected text or a small number")
        target[key] = value


def _append_one(m: PickleMachine) -> None:
    _extend_list(m, [m.stack.pop()])


def _set_one(m: PickleMachine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _set_items(m, [key, value])


def _name(m: PickleMachine) -> None:
    module = m.take_line()
    m.stack.append(m.look_up(module, m.take_line()))


def _name_from_stack(m: PickleMachine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise m.fault("a name is not text")
    m.stack.append(m.look_up(module, name))


def _call(m: PickleMachine) -> None:
    arguments, callee = m.stack.pop(), m.stack.pop()
    if not isinstance(callee, Call) or not isinstance(arguments, tuple):
        raise m.fault(f"calls a {type(callee).__name__}")
    m.stack.append(callee.function(arguments))


def _build(m: PickleMachine) -> None:
    """torch hangs module versions on a state dict as attributes: of no use here, left out."""
    m.stack.pop()
    if not isinstance(m.stack[-1], dict):
        raise m.fault(f"sets the state of a {type(m.stack[-1]).__name__}")


def _persistent(m: PickleMachine) -> None:
    m.stack.append(m.persistent(m.stack.pop()))


ACTIONS: dict[int, tuple[str, Action]] = {
    0x80: ("PROTO", _protocol),
    0x95: ("FRAME", _frame),
    ord("("): ("MARK", _mark),
    ord("N"): ("NONE", _constant(None)),
    0x88: ("NEWTRUE", _constant(True)),
    0x89: ("NEWFALSE", _constant(False)),
    ord("K"): ("BININT1", _number(U8)),
    ord("M"): ("BININT2", _number(U16)),
    ord("J"): ("BININT", _number(I32)),
    0x8A: ("LONG1", _small_long),
    ord("G"): ("BINFLOAT", _number(F64)),
    0x8C: ("SHORT_BINUNICODE", _text(U8)),
    ord("X"): ("BINUNICODE", _text(U32)),
    0x8D: ("BINUNICODE8", _text(U64)),
    ord("C"): ("SHORT_BINBYTES", _raw(U8)),
    ord("B"): ("BINBYTES", _raw(U32)),
    ord(")"): ("EMPTY_TUPLE", _constant(())),
    0x85: ("TUPLE1", _tuple_of(1)),
    0x86: ("TUPLE2", _tuple_of(2)),
    0x87: ("TUPLE3", _tuple_of(3)),
    ord("t"): ("TUPLE", _tuple_to_mark),
    ord("]"): ("EMPTY_LIST", lambda m: m.stack.append([])),
    ord("a"): ("APPEND", _append_one),
    ord("e"): ("APPENDS", lambda m: _extend_list(m, m.pop_to_mark())),
    ord("}"): ("EMPTY_DICT", lambda m: m.stack.append({})),
    ord("s"): ("SETITEM", _set_one),
    ord("u"): ("SETITEMS", lambda m: _set_items(m, m.pop_to_mark())),
    ord("q"): ("BINPUT", _memo_put(U8)),
    ord("r"): ("LONG_BINPUT", _memo_put(U32)),
    0x94: ("MEMOIZE", _memoize),
    ord("h"): ("BINGET", _memo_get(U8)),
    ord("j"): ("LONG_BINGET", _memo_get(U32)),
    ord("c"): ("GLOBAL", _name),
    0x93: ("STACK_GLOBAL", _name_from_stack),
    ord("R"): ("REDUCE", _call),
    ord("b"): ("BUILD", _build),
    ord("Q"): ("BINPERSID", _persistent),
}
# Named in errors, because they are how a pickle makes objects or reaches for code.
REFUSED = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
}
