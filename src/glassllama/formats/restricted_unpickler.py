"""Reads pickles of state dicts without executing code.

A pickle is a program for a stack machine, and Python's own unpickler imports and calls what it
names. This one implements 38 of the 68 opcodes, those that build data; `pickletools` decodes them.
A name outside a table is an error, and only functions of that table are called. There are no
imports, attributes, classes or jumps, so the number of steps is bounded by the number of bytes.

torch pickles a tensor as a call: rebuild(storage, offset, shape, strides, …). Nothing is rebuilt
here: the arguments of the call become a `StoredTensor`, and formats/pth.py reads from the file.

Source: the opcode descriptions in Python's `pickletools` module, protocols 2 to 5.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glassllama.base.errors import FormatError, quoted

MOST_STEPS = 3_000_000  # 60,000 tensors; a step makes at most one object, so memory is bounded
DEEPEST_MARKS = 10_000  # Python's pickler leaves one open per nested list or dict
KEY_LIMIT = 2**32  # larger keys could be chosen so that they collide in a dict
SUPPORTED_PROTOCOLS = range(2, 6)

# Opcodes that push their argument, and those that push a value of their own.
ARGUMENTS = frozenset(
    "BININT1 BININT2 BININT LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES".split()
)
VALUES: dict[str, Callable[[], object]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip


# --- names of torch -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A name that may be called."""

    name: str


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


def call(name: str, arguments: tuple[object, ...]) -> object:
    """The value of a call by torch's names. Raises ValueError for arguments of other types."""
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.Size", (tuple(sizes),):
            return sizes
        case "torch._utils._rebuild_parameter", (StoredTensor() as tensor, bool(), dict()):
            return tensor
        case (
            "torch._utils._rebuild_tensor_v2",
            (Storage() as found, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest),
        ):
            # The seventh argument says that the values are to be negated or conjugated.
            numbers = all(type(number) is int for number in (offset, *shape, *strides))
            if numbers and rest in ([], [None], [{}]):
                return StoredTensor(found, offset, shape, strides)
    types = quoted([type(argument).__name__ for argument in arguments])
    raise ValueError(f"{name}: unexpected arguments {types}")


STORAGE_TYPES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64",
    "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL",
}  # fmt: skip
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
CALLS = (
    "collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)  # fmt: skip
NAMES: dict[str, object] = {
    **{name: Call(name) for name in CALLS},
    **{f"torch.{name}Storage": ElementType(dtype) for name, dtype in STORAGE_TYPES.items()},
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


# --- the stack machine ----------------------------------------------------------------------


def read_pickle(code: bytes, where: str) -> object:
    """The pickled value: dicts, lists, tuples, text, numbers and values from NAMES.

    Raises FormatError; nothing in the pickle is ever executed.
    """
    from pickletools import genops  # a large module, for this format only

    machine, stream = PickleMachine(), io.BytesIO(code)
    name = ""
    try:
        for step, (opcode, argument, _) in enumerate(genops(stream)):
            name = opcode.name
            if step >= MOST_STEPS:
                raise ValueError(f"more than {MOST_STEPS} steps")
            machine.run(name, argument)
        if machine.outer or len(machine.stack) != 1 or stream.tell() != len(code):
            raise ValueError("ends with values left over, or with bytes after its end")
        return machine.stack[0]
    except IndexError:
        problem = f"{name} finds too little on the stack"
    except ValueError as error:
        problem = str(error)
    raise FormatError(f"{where}, byte {stream.tell()}: {problem}; nothing was executed")


class PickleMachine:
    """Stack and memory of a pickle. `run` raises IndexError: the stack is too short, ValueError."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, object] = {}

    def run(self, opcode: str, argument: Any) -> None:
        """One step."""
        stack = self.stack
        if opcode in ARGUMENTS:
            if isinstance(argument, str):
                argument.encode()  # half a surrogate pair is a UnicodeEncodeError, a ValueError
            stack.append(argument)
            return
        if opcode in VALUES:
            stack.append(VALUES[opcode]())
            return
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"memo {argument} was never set")
                stack.append(self.memo[argument])
            case "MARK":
                if len(self.outer) >= DEEPEST_MARKS:
                    raise ValueError(f"more than {DEEPEST_MARKS} open marks")
                self.outer.append(stack)
                self.stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode[-1]))][::-1]))
            case "TUPLE":
                items = self.pop_to_mark()
                self.stack.append(tuple(items))
            case "APPEND":
                self.extend_list([stack.pop()])
            case "APPENDS":
                self.extend_list(self.pop_to_mark())
            case "SETITEM":
                self.set_items([stack.pop(), stack.pop()][::-1])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL" | "STACK_GLOBAL":
                # Of GLOBAL, pickletools joins module and name by a space.
                names = argument.split(" ", 1) if argument else [stack.pop(), stack.pop()][::-1]
                stack.append(value_of(*names))
            case "REDUCE":
                arguments, callee = stack.pop(), stack.pop()
                if not isinstance(callee, Call) or not isinstance(arguments, tuple):
                    raise ValueError(f"calls a {type(callee).__name__}")
                stack.append(call(callee.name, arguments))
            case "BUILD":  # ignored: torch sets module versions as attributes of a state dict
                stack.pop()
                require(stack[-1], dict, "sets the state of")
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "PROTO" if argument not in SUPPORTED_PROTOCOLS:
                raise ValueError(f"protocol {argument}, expected 2 … 5")
            case "PROTO" | "FRAME" | "STOP":  # a frame is a hint for reading from streams
                pass
            case _:
                raise ValueError(f"opcode {opcode} is not one that tensors need")

    def pop_to_mark(self) -> list[Any]:
        above = self.stack
        self.stack = self.outer.pop()
        return above

    def extend_list(self, items: list[Any]) -> None:
        require(self.stack[-1], list, "appends to")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        require(target, dict, "sets items of")
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str) and not (type(key) is int and abs(key) < KEY_LIMIT):
                kind = type(key).__name__
                raise ValueError(f"a dict key is a {kind}, expected text or a small number")
            target[key] = value


def require(value: object, kind: type, action: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{action} a {type(value).__name__}")


def value_of(module: object, name: object) -> object:
    """The value of a name. Raises ValueError for one that is not in NAMES."""
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a name is not text")
    dotted = f"{module}.{name}"
    if dotted not in NAMES:
        hint = HINTS.get(dotted, "it is outside the whitelist of names that tensors need")
        raise ValueError(f"names {quoted(dotted)}: {hint}")
    return NAMES[dotted]
