"""The names that a state dict's pickle may use, and what each stands for here.

torch pickles a tensor as a call: rebuild(storage, offset, shape, strides, …). Nothing is rebuilt
here: the call's arguments are kept as a `StoredTensor`, and formats/pth.py reads from the file.
Functions raise ValueError for arguments that torch does not write.
"""

from __future__ import annotations

from dataclasses import dataclass

from glassllama.base.errors import quoted
from glassllama.formats.restricted_unpickler import Call


@dataclass(frozen=True, slots=True)
class ElementType:
    """What a name such as torch.HalfStorage says: the type of a storage's elements."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """`count` elements in the zip entry data/`key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; offset and strides in elements, nothing checked against it yet."""

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
        case (Storage() as kept, int(offset), tuple(shape), tuple(strides), bool(), dict(), *rest):
            # The seventh argument says that the values are to be negated or conjugated.
            numbers = all(type(number) is int for number in (offset, *shape, *strides))
            if numbers and rest in ([], [None], [{}]):
                return StoredTensor(kept, offset, shape, strides)
    raise ValueError(f"torch._utils._rebuild_tensor_v2: unexpected arguments {_kinds(arguments)}")


def _parameter(arguments: tuple[object, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), dict()):
            return tensor
    raise ValueError(f"torch._utils._rebuild_parameter: unexpected arguments {_kinds(arguments)}")


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    match arguments:
        case (tuple(sizes),):
            return sizes
    raise ValueError(f"torch.Size: unexpected arguments {_kinds(arguments)}")


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    if arguments:
        raise ValueError(f"collections.OrderedDict: unexpected arguments {_kinds(arguments)}")
    return {}


def _kinds(arguments: tuple[object, ...]) -> str:
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
    "torch._utils._rebuild_qtensor": "torch's quantised tensors are not supported; .dequantize()",
    "torch._utils._rebuild_tensor_v3": "element types beyond "
    f"{', '.join(DTYPES)} are not supported (float8, uint16 …)",
    "torch._utils._rebuild_parameter_with_state": _WITHOUT_EXTRAS,
    "torch._tensor._rebuild_from_type_v2": _WITHOUT_EXTRAS,
}
