"""One prompt on its way through one model: what all steps look at, computed when first needed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.cells import cell_len
from torch import Tensor

from glassllama.base.config import LlamaConfig
from glassllama.base.errors import (
    ConfigError,
    GenerationError,
    GlassError,
    TokenizerError,
    WeightsError,
)
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.base.machine import require_memory
from glassllama.models.llama import Llama
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.rope import RopeTable, rope_angles, rope_table
from glassllama.tokenizers.bpe import prompt_ids
from glassllama.walkthrough.analysis import Predictions, logit_lens, predictions
from glassllama.walkthrough.manual_block import PLACES, LayerByHand, layer_by_hand
from glassllama.walkthrough.pictures import visible
from glassllama.walkthrough.step import LAYER_DEPTH, Check, compare
from glassllama.walkthrough.trace import Trace, first_non_finite, keep_freed_memory, run_with_trace
from glassllama.weights.load import as_tensor, load_llama
from glassllama.weights.open import Checkpoint, open_checkpoint
from glassllama.weights.stream import StreamedBlock, StreamedLlama

# Attention of every layer is kept for prompts up to this length; its size grows with the square.
LONGEST_FOR_ALL_MAPS = 64
SHOWN_TOKENS = 24
LENS = 5  # likeliest tokens kept of each layer
LONGEST_COMMAND = 72  # columns
DEFAULT_MODEL = "smollm2-135m"  # what the command line takes where no model is named
MORE_TOKENS = 6  # made after the prompt, to watch the cache grow


class DamagedWeightsError(WeightsError):
    """NaN or infinities appear on the way; `place` is where first."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A model, a prompt, and the layer and head to look into."""

    checkpoint: Checkpoint
    model: Llama
    name: str  # what the model was called when it was asked for
    prompt: str | None  # None: ids were given
    ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    specials: bool = False  # control tokens written in the prompt are read as such, not as text
    layer: int = 0
    head: int = 0

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.tok_embeddings.weight.dtype

    @property
    def prefix(self) -> str:
        return f"layers.{self.layer}"

    @property
    def kv_head(self) -> int:
        return self.head // self.config.group_size

    @cached_property
    def pieces(self) -> list[str]:
        return [self.piece(id) for id in self.ids]

    def piece(self, id: int) -> str:
        """A token so that all of it shows; its number where there is no vocabulary."""
        raw = open_piece(self.tokenizer, id)
        return f"#{id}" if raw is None else visible(raw)

    @cached_property
    def watched(self) -> tuple[str, ...]:
        """The chosen layer in full; of the others the residual stream and, if small, the maps."""
        layers = [f"layers.{n}" for n in range(self.config.n_layers)]
        maps = ["layers.*.attention.weights"] if len(self.ids) <= LONGEST_FOR_ALL_MAPS else []
        return (
            "tok_embeddings", *layers, f"{self.prefix}.*", *maps, "norm", "last_logits",
        )  # fmt: skip

    @cached_property
    def _run(self) -> tuple[Tensor, Trace, KVCache]:
        room = min(len(self.ids) + MORE_TOKENS, self.config.max_seq_len)
        cache = self.model.new_cache(1, room)
        logits, trace = run_with_trace(self.model, self.ids, watch=self.watched, cache=cache)
        if (place := first_non_finite(trace)) is not None:
            raise self._damage(place)
        return logits.cpu(), trace, cache

    def _damage(self, place: str) -> DamagedWeightsError:
        """Look closer at the layer where it shows first, which may not have been watched whole."""
        layer = ".".join(place.split(".")[:2])
        closer = [f"{layer}.*", layer] if place.startswith("layers.") else [place]
        _, trace = run_with_trace(self.model, self.ids, watch=closer)
        place = first_non_finite(trace) or place
        bad = trace[place]
        count = int((~bad.isfinite()).sum())
        return DamagedWeightsError(
            place,
            f"{place}: {count:,} of {bad.numel():,} numbers are NaN or infinite, here first; the "
            f"weights are damaged or overflow: see 'glassllama validate {self.name}'",
        )

    @property
    def logits(self) -> Tensor:
        """(1, T, V), of the watched run."""
        return self._run[0]

    @property
    def cache(self) -> KVCache:
        """Of the watched run: the prompt's keys and values, and what was appended since."""
        return self._run[2]

    @property
    def trace(self) -> Trace:
        return self._run[1]

    @cached_property
    def plain_logits(self) -> Tensor:
        """(1, T, V), of a run that nobody watches: fused attention in every layer."""
        with torch.no_grad():
            logits: Tensor = self.model(self.id_tensor).cpu()
        return logits

    @property
    def id_tensor(self) -> Tensor:
        """(1, T), where the weights are."""
        return torch.tensor([self.ids], device=self.model.tok_embeddings.weight.device)

    @property
    def residual_before(self) -> Tensor:
        """What enters the chosen layer: (1, T, C)."""
        before = "tok_embeddings" if self.layer == 0 else f"layers.{self.layer - 1}"
        return self.trace[before]

    @cached_property
    def lens(self) -> Predictions:
        """What each layer would say after each of the last positions: (L + 1, 1, ≤ 64, k)."""
        last = range(max(len(self.ids) - LONGEST_FOR_ALL_MAPS, 0), len(self.ids))
        return logit_lens(self.model, self.trace, k=LENS, positions=last)

    @cached_property
    def expected(self) -> Predictions:
        """What the model expects after each position: (T, 1)."""
        each = [predictions(row) for row in self.logits[0]]  # one by one: (T, V) is large
        return Predictions(torch.stack([e.ids for e in each]), torch.stack([e.probs for e in each]))

    @cached_property
    def angles(self) -> Tensor:
        """(1, T, D/2) radians of every position."""
        return rope_angles(torch.arange(len(self.ids))[None], self.model.frequencies)

    @cached_property
    def rope(self) -> RopeTable:
        return rope_table(self.angles)

    def weight(self, name: str) -> Tensor:
        """A tensor of the checkpoint, read from the file and not taken from the model."""
        tensor = as_tensor(self.checkpoint, f"{name}.weight", self.dtype, torch.device("cpu"))
        self.checkpoint.release_pages(f"{name}.weight")
        return tensor

    def held(self, name: str) -> Tensor:
        """The first row of one of the chosen layer's matrices, as the running model holds it."""
        layer = self.model.layers[self.layer]
        with layer.filled() if isinstance(layer, StreamedBlock) else nullcontext():
            return layer.get_parameter(f"{name}.weight")[:1].clone().cpu()

    def layer_weight(self, layer: int, name: str) -> Tensor:
        return self.weight(f"layers.{layer}.{name}")

    @cached_property
    def by_hand(self) -> LayerByHand:
        """The chosen layer, unrolled."""
        weight = partial(self.layer_weight, self.layer)
        return layer_by_hand(weight, self.residual_before, self.rope, self.config)

    @property
    def shown(self) -> range:
        """Positions that tables list: the last ones of a long prompt."""
        return range(max(len(self.ids) - SHOWN_TOKENS, 0), len(self.ids))

    def command(self, options: str) -> str:
        """This walk again, with other options; what is too long to be typed is named only."""
        model = "" if self.name == DEFAULT_MODEL else f" -m {shlex.quote(self.name)}"
        prompts = [shlex.quote(self.prompt)] if self.prompt else []
        specials = "--specials " if self.specials else ""
        for prompt, named in [*((prompt, model) for prompt in prompts), ("PROMPT", model)]:
            command = f"glassllama walkthrough {prompt}{named} {specials}{options}"
            if cell_len(command) <= LONGEST_COMMAND:
                return command
        return f"glassllama walkthrough PROMPT -m MODEL {specials}{options}"

    def check(self, place: str, ours: Tensor) -> Check:
        """Our numbers against the running model's at a place, or StepMismatchError."""
        return self.compare(place, ours, self.trace[place])

    def compare(self, what: str, ours: Tensor, theirs: Tensor) -> Check:
        """Two ways to what one layer computes."""
        terms = self.longest_sum
        return compare(what, ours, theirs, terms=terms, depth=LAYER_DEPTH, dtype=self.dtype)

    def compare_runs(self, what: str, ours: Tensor, theirs: Tensor) -> Check:
        """The same for what comes out of two ways through the whole model."""
        depth, terms = LAYER_DEPTH * self.config.n_layers, self.longest_sum
        return compare(what, ours, theirs, terms=terms, depth=depth, dtype=self.dtype)

    @property
    def longest_sum(self) -> int:
        """The most products that one number of a layer is the sum of."""
        c = self.config
        return max(c.dim, c.ffn_dim, c.n_heads * c.head_dim, len(self.ids))

    def checks(self, *fields: str) -> tuple[Check, ...]:
        """Fields of the layer by hand against the running model's places."""
        return tuple(
            self.check(f"{self.prefix}.{PLACES[field]}", getattr(self.by_hand, field))
            for field in fields
        )


def open_walk(
    path: Path | str,
    prompt: str | Sequence[int],
    *,
    name: str | None = None,
    specials: bool = False,
    layer: int = 0,
    head: int = 0,
    stream_layers: bool = False,
    progress: Progress | None = None,
) -> Walk:
    """Open a checkpoint, load it, and make ready to walk a prompt (text or ids) through it.

    Raises GlassError before anything is loaded: no prompt, too long for the context, an id, layer
    or head that is not there; TokenizerError where a text is to be read without a vocabulary; and
    what `open_checkpoint` and `load_llama` raise. With `specials`, control tokens written in a text
    are read as such. `progress` counts tensors loaded. `stream_layers` holds one layer at a time:
    for models larger than memory, and patient people.
    """
    checkpoint = open_checkpoint(path)
    checked(checkpoint, prompt, specials, layer, head)
    model: Llama
    if stream_layers:
        model = StreamedLlama(checkpoint)
    else:
        model = load_llama(checkpoint, progress=progress)
        keep_freed_memory()
    where = {"layer": layer, "head": head}
    return start_walk(checkpoint, model, prompt, name=name, specials=specials, **where)


def start_walk(
    checkpoint: Checkpoint,
    model: Llama,
    prompt: str | Sequence[int],
    *,
    name: str | None = None,
    specials: bool = False,
    layer: int = 0,
    head: int = 0,
) -> Walk:
    """The same through a model that is loaded already, with this checkpoint's weights."""
    tokenizer, ids = checked(checkpoint, prompt, specials, layer, head)
    return Walk(
        checkpoint=checkpoint,
        model=model,
        name=name or str(checkpoint.path),
        prompt=prompt if isinstance(prompt, str) else None,
        ids=tuple(ids),
        tokenizer=tokenizer,
        specials=specials,
        layer=layer,
        head=head,
    )


def checked(
    checkpoint: Checkpoint, prompt: str | Sequence[int], specials: bool, layer: int, head: int
) -> tuple[Tokenizer | None, list[int]]:
    """The vocabulary and the prompt's ids, if all that was asked for is there."""
    if not isinstance(checkpoint.model_config, LlamaConfig):
        raise ConfigError(
            f"{checkpoint.path}: the walkthrough is for Llamas and this is a "
            f"{checkpoint.architecture}; expected Hugging Face's LlamaForCausalLM, Meta's "
            "params.json or a GGUF file of the architecture llama"
        )
    require_inside("--layer", layer, checkpoint.config.n_layers)
    require_inside("--head", head, checkpoint.config.n_heads)
    tokenizer, ids = encoded(checkpoint, prompt, specials)
    require_walkable(ids, checkpoint.config)
    return tokenizer, ids


def encoded(
    checkpoint: Checkpoint, prompt: str | Sequence[int], specials: bool
) -> tuple[Tokenizer | None, list[int]]:
    """The vocabulary and the prompt's ids; ids can be walked without a vocabulary."""
    if isinstance(prompt, str):
        tokenizer = checkpoint.tokenizer
        return tokenizer, prompt_ids(tokenizer, prompt, specials) if prompt else []
    with suppress(TokenizerError):
        return checkpoint.tokenizer, [int(id) for id in prompt]
    return None, [int(id) for id in prompt]


def require_walkable(ids: Sequence[int], c: LlamaConfig) -> None:
    if not ids:
        raise GenerationError("the prompt is empty: expected at least one token to walk with")
    if len(ids) >= c.max_seq_len:
        raise GenerationError(
            f"the prompt has {len(ids)} tokens and the context holds {c.max_seq_len}, with room "
            "for one more: shorten the prompt"
        )
    if not 0 <= min(ids) <= max(ids) < c.vocab_size:
        raise GenerationError(f"the prompt has ids outside the vocabulary 0 … {c.vocab_size - 1}")
    require_memory(
        memory_needed(c, len(ids)),
        what=f"a walkthrough of {len(ids)} tokens",
        instead="take a shorter prompt",
    )


def memory_needed(c: LlamaConfig, tokens: int) -> int:
    """Bytes beside the model: logits of three runs, and the chosen layer twice, in float32."""
    layer = 2 * c.n_heads * tokens + 12 * c.dim + 4 * c.ffn_dim
    return 4 * tokens * (3 * c.vocab_size + c.n_layers * c.dim + 2 * layer)


def open_piece(tokenizer: Tokenizer | None, id: int) -> bytes | None:
    """The bytes of a token; None for a number without one: models have some to spare."""
    try:
        return None if tokenizer is None else tokenizer.token_bytes(id)
    except TokenizerError:
        return None


def require_inside(option: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise GlassError(f"{option} {value} is out of range: this model has 0 … {count - 1}")


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"
