"""Sampling settings that a model's files recommend: generation_config.json, `general.sampling.*`.

They are the defaults of `generate` and `chat`. A file that says how to draw says it completely:
what it does not name is neutral (temperature 1, no top-k, …), as in vLLM. Sources: transformers 5,
GenerationConfig; gguf 0.19, constants.Keys.General.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassllama.base.errors import ConfigError, join_names
from glassllama.base.fields import Fields, is_number
from glassllama.weights.tokenizer_files import optional_json

FILE = "generation_config.json"
GGUF_PREFIX = "general.sampling."
GGUF_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}  # others are equal
SMALLEST = math.ulp(0.0)  # for what must be above 0
RANGES = {
    "temperature": (0.0, 1e6), "top_p": (SMALLEST, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
}  # fmt: skip
NEUTRAL: dict[str, float | None] = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
# Keys that change no answer, or only together with a key that gets a note.
HARMLESS = re.compile(
    r"_.*|transformers_version|(bos|eos|pad)_token_id|do_sample|trust_remote_code|use_cache"
    r"|cache_.*|return_dict_in_generate|output_.*|.*compile.*|prefill_chunk_size|chat_format"
    r"|num_return_sequences|(num_)?assistant_.*|prompt_lookup_.*|xtc_threshold|mirostat_.*"
    r"|early_stopping"
)
NEUTRAL_OF_OTHERS = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "length_penalty"), 1),
    "encoder_repetition_penalty": 1,
}  # of all others: 0, null, false or an empty list


@dataclass(frozen=True)
class SamplingDefaults:
    """`values` are options of `LLM.generate`; empty if the file recommends none."""

    source: str = FILE
    values: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`temperature 0.6, top_k 20 (generation_config.json)`; empty without values."""
        neutral = {**NEUTRAL, "repetition_penalty": 1.0, "temperature": None}.items()
        shown = [
            f"{name} {value:g}"
            for name, value in self.values.items()
            if value is not None and (name, value) not in neutral
        ]
        return f"{', '.join(shown)} ({self.source})" if shown else ""


def defaults_from_folder(folder: Path) -> SamplingDefaults:
    """Those of generation_config.json. ConfigError: a value out of its range."""
    fields = Fields(str(folder / FILE), optional_json(folder / FILE), ConfigError)
    return _defaults(fields, FILE, fields.boolean("do_sample", None))


def defaults_from_gguf(metadata: Mapping[str, Any]) -> SamplingDefaults:
    """Those of a GGUF file, which has no `do_sample`. ConfigError: a value out of its range."""
    named = {
        k.removeprefix(GGUF_PREFIX): v for k, v in metadata.items() if k.startswith(GGUF_PREFIX)
    }
    values = {GGUF_NAMES.get(name, name): value for name, value in named.items()}
    return _defaults(Fields(GGUF_PREFIX + "*", values, ConfigError), "GGUF", None)


def _defaults(fields: Fields, source: str, do_sample: bool | None) -> SamplingDefaults:
    given: dict[str, float | None] = {"top_k": fields.integer("top_k", None, minimum=0) or None}
    for name, (least, most) in RANGES.items():
        given[name] = fields.number(name, None, minimum=least, maximum=most)
    penalty = given.pop("repetition_penalty")
    drawing = {name: value for name, value in given.items() if value is not None}
    values: dict[str, float | None] = {}
    if do_sample is False:
        values = {**NEUTRAL, "temperature": 0.0}
    elif do_sample or drawing:
        values = {**NEUTRAL, **drawing}
    if values or penalty is not None:
        values["repetition_penalty"] = 1.0 if penalty is None else penalty
    others = [*_without_effect(fields.values)]
    note = f"{source}: {join_names(others)}: not supported, no effect" if others else None
    return SamplingDefaults(source, values, () if note is None else (note,))


def _without_effect(values: Mapping[str, Any]) -> Iterator[str]:
    """The other keys whose value would change an answer."""
    for name, value in values.items():
        if name in RANGES or name == "top_k" or HARMLESS.fullmatch(name):
            continue
        if is_number(value):
            is_neutral = bool(value == NEUTRAL_OF_OTHERS.get(name, 0))
        else:
            is_neutral = value in (None, False) if not isinstance(value, Sized) else not len(value)
        if not is_neutral:
            yield name
