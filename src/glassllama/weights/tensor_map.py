"""Match the tensors of a file with those of an architecture: names, shapes and types.

One strict loop for all architectures and formats. All missing, unexpected, mis-shaped and wrongly
typed tensors are listed in one error, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from glassllama.base.errors import WeightsError, join_names, named
from glassllama.base.interfaces import TensorFile
from glassllama.formats.blocks import FLOATS, SUPPORTED
from glassllama.weights.architectures.description import Architecture, FileFormat, MappedTensor

OUTPUT = "output.weight"
# Heads for other tasks, and buffers that old versions of transformers stored beside the weights.
NOT_OF_A_LANGUAGE_MODEL = re.compile(
    r"v_head\..+|(.+\.)?(masked_bias|causal_mask|position_ids|rotary_emb\.(cos|sin)_cached)"
)
MOST_PROBLEMS = 12  # spelled out in an error; the rest are counted
COMPARED_NUMBERS = 1 << 20  # of two tensors, at once


class Match(NamedTuple):
    """Our name -> tensor in the file, the configuration, and notes on what else the file holds."""

    config: Any
    tensors: dict[str, MappedTensor]
    notes: list[str]


def match_tensors(
    file: TensorFile, architecture: Architecture, config: Any, file_format: FileFormat
) -> Match:
    """Find every tensor of the model in the file. Raises WeightsError listing all differences.

    If the file stores an output matrix of its own, the configuration comes back untied.
    """
    require_layers(file, getattr(config, "n_layers", 0))
    present, notes = set(file.names()), list[str]()
    tensors = architecture.tensors(config, file_format, present)
    embeddings, output = tensors[0].theirs, output_name(architecture, file_format)
    if getattr(config, "tie_embeddings", False) and output in present:
        if embeddings not in present:
            tensors[0] = replace(tensors[0], theirs=output)  # stored under its other name
        elif not same_numbers(file, embeddings, output):
            config = replace(config, tie_embeddings=False)
            tensors = architecture.tensors(config, file_format, present)
            notes.append(
                f"tie_word_embeddings is true, but the file holds another {output}, which is used"
            )
    others = sorted(present - {tensor.theirs for tensor in tensors} - {output})
    extras = architecture.extras.get(file_format, ())
    patterns = [NOT_OF_A_LANGUAGE_MODEL, *(extra.names for extra in extras)]
    unexpected = [name for name in others if not any(p.fullmatch(name) for p in patterns)]
    if problems := [*differences(file, tensors, present, unexpected)]:
        raise WeightsError(summary(problems))

    if ignored := [name for name in others if NOT_OF_A_LANGUAGE_MODEL.fullmatch(name)]:
        notes.append(f"no part of a language model, ignored: {join_names(ignored)}")
    for extra in extras:
        found = [name for name in others if extra.names.fullmatch(name)]
        if wrong := [name for name in found if not extra.as_expected(file, name, config)]:
            notes.append(f"{extra.note}: {join_names(wrong)}")
    zeros = [tensor.theirs for tensor in tensors if tensor.is_zero]
    if bad := [name for name in zeros if file.read(name).any()]:
        raise WeightsError(f"{join_names(bad)}: not zero, but the configuration says no bias")
    return Match(config, {t.ours: t for t in tensors if not t.is_zero}, notes)


def output_name(architecture: Architecture, file_format: FileFormat) -> str:
    """The file's name of the output matrix, also if it is tied; "" if there is never one."""
    rules = (rule for rule in architecture.rules if rule.ours == OUTPUT)
    return next((str(getattr(rule, file_format)) for rule in rules), "")


def require_layers(file: TensorFile, claimed: int) -> None:
    """Raise WeightsError if a configuration has more layers than the file has tensors.

    Lists of names are as long as the number of layers, so they are made after this check only.
    """
    names = file.names()
    if claimed > len(names):
        numbers = (re.search(r"(?:^|\.)(?:layers|h|blk)\.([0-9]+)\.", name) for name in names)
        found = len({number[1] for number in numbers if number})
        raise WeightsError(
            f"weights and configuration do not fit: the configuration says {claimed} layers, the "
            f"file holds {found} ({len(names)} tensors)"
        )


def differences(
    file: TensorFile, tensors: list[MappedTensor], present: set[str], unexpected: list[str]
) -> Iterator[str]:
    """Whatever is missing, unexpected, of another shape or of a type that is no weight's."""
    expected = {tensor.theirs: tensor for tensor in tensors}  # several may be stored as one
    yield from (f"missing {name}" for name in expected if name not in present)
    yield from (f"unexpected {named(name)}" for name in unexpected)
    for name, tensor in expected.items():
        if name not in present:
            continue
        info, shape = file.info(name), tensor.stored_shape
        if info.shape != shape:
            yield f"{name} is {written(info.shape)}, the configuration says {written(shape)}"
        if info.dtype not in (SUPPORTED if tensor.is_slice else FLOATS):
            yield f"{name} is of type {info.dtype}, which no weight is"


def summary(problems: Collection[str]) -> str:
    more = len(problems) - MOST_PROBLEMS
    shown = "; ".join([*problems][:MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return f"weights and configuration do not fit ({len(problems)} tensors): {shown}"


def written(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape) or "a scalar"


def same_numbers(file: TensorFile, one: str, other: str) -> bool:
    """Whether two matrices are equal bit for bit; if their types differ, as float32."""
    first, second = file.info(one), file.info(other)
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    if not {first.dtype, second.dtype} <= set(FLOATS):
        return False

    def equal(rows: slice) -> bool:
        a, b = file.read(one, rows), file.read(other, rows)
        if first.dtype != second.dtype:
            a, b = a.astype(np.float32), b.astype(np.float32)
        return np.array_equal(a.view(np.uint8), b.view(np.uint8))

    step = max(1, COMPARED_NUMBERS // max(1, first.shape[1]))
    same = all(equal(slice(n, n + step)) for n in range(0, first.shape[0], step))
    file.release_pages(one)
    file.release_pages(other)
    return same
