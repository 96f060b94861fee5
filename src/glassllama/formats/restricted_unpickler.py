"""Reads pickles of state dicts without executing code.

A pickle is a program for a stack machine, and Python's own unpickler imports and calls what it
names. This one implements 38 of the 68 opcodes, those that build data. A name outside a table is an
error, and only functions of that table are called. There are no imports, attributes, classes or
jumps, so the number of steps is bounded by the number of bytes.

Source: the opcode descriptions in Python's `pickletools` module, protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from glassllama.base.errors import FormatError, quoted

STOP = ord(".")
MOST_STEPS = 4_000_000  # 80,000 tensors; a step makes at most one object, so memory is bounded
DEEPEST_MARKS = 10_000  # Python's pickler leaves one open per nested list or dict
KEY_LIMIT = 2**32  # larger keys could be chosen so that they collide in a dict
SUPPORTED_PROTOCOLS = range(2, 6)


@dataclass(frozen=True, slots=True)
class Call:
    """A name in the table whose function may be called, with the tuple of arguments."""

    name: str
    function: Callable[[tuple[object, ...]], object]


class PickleMachine:
    """Runs one pickle. `names` maps "module.name" to a `Call` or to a plain value.

    `persistent` converts a persistent id (by which torch.save refers to a storage) to a value. It
    and the functions raise ValueError for unexpected arguments. `hints` explain known names that
    are not supported.
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
        """The pickled value: dicts, lists, tuples, text, numbers and values from `names`."""
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
    m.take(U64.size)  # the length of a frame: a hint for reading from streams


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
    """Ignored: torch sets module versions as attributes of a state dict."""
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
# Named in errors: opcodes that make objects or call code.
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

# --- names of torch -------------------------------------------------------------------------
#
# torch pickles a tensor as a call: rebuild(storage, offset, shape, strides, …). Nothing is rebuilt
# here: the arguments of the call become a `StoredTensor`, and formats/pth.py reads from the file.
# These functions raise ValueError for arguments that torch does not write.


@dataclass(frozen=True, slots=True)
class ElementType:
    """The type of a storage's elements, of a name such as torch.HalfStorage."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`count` elements in the zip entry data/`key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; offset and strides in elements, not yet checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def storage(persistent_id: object) -> Storage:
    """torch's persistent ids: ("storage", type, key, device, number of elements)."""
    match persistent_id:
        case ("storage", ElementType(dtype), str(key), str(), int(count)) if count >= 0:
            return Storage(key, dtype, count)
    raise ValueError("a persistent id of the pickle is not that of a storage")


def _tensor(arguments: tuple[object, ...]) -> StoredTensor:
    match arguments:
        case (Storage() as found, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest):
            # The seventh argument says that the values are to be negated or conjugated.
            numbers = all(type(number) is int for number in (offset, *shape, *strides))
            if numbers and rest in ([], [None], [{}]):
                return StoredTensor(found, offset, shape, strides)
    raise ValueError(f"torch._utils._rebuild_tensor_v2: unexpected arguments {_types(arguments)}")


def _parameter(arguments: tuple[object, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), dict()):
            return tensor
    raise ValueError(f"torch._utils._rebuild_parameter: unexpected arguments {_types(arguments)}")


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    match arguments:
        case (tuple(sizes),):
            return sizes
    raise ValueError(f"torch.Size: unexpected arguments {_types(arguments)}")


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise ValueError(f"collections.OrderedDict: unexpected arguments {_types(arguments)}")
    return {}


def _types(arguments: tuple[object, ...]) -> str:
    return quoted([type(argument).__name__ for argument in arguments])


STORAGE_TYPES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
CALLS = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
}
NAMES: dict[str, object] = {
    **{name: Call(name, function) for name, function in CALLS.items()},
    **{name: ElementType(dtype) for name, dtype in STORAGE_TYPES.items()},
    **{f"torch.{dtype}": f"torch.{dtype}" for dtype in DTYPES},  # settings beside the tensors
}

_WITHOUT_EXTRAS = "tensors with attributes are not supported; save tensor.detach().clone()"
HINTS = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensors are not supported; save .to_dense()",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor has no data to read",
    "torch._utils._rebuild_qtensor": "torch's quantized tensors are not supported; .dequantize()",
    "torch._utils._rebuild_tensor_v3": "element types beyond "
    f"{', '.join(DTYPES)} are not supported (float8, uint16 …)",
    "torch._utils._rebuild_parameter_with_state": _WITHOUT_EXTRAS,
    "torch._tensor._rebuild_from_type_v2": _WITHOUT_EXTRAS,
}
