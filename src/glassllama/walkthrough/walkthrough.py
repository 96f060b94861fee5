"""A model, a prompt and what the steps need of both, computed when first used."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from torch import Tensor, nn

from glassllama.base.errors import (
    ConfigError,
    GenerationError,
    GlassError,
    TokenizerError,
    WeightsError,
)
from glassllama.base.interfaces import Progress, Tokenizer
from glassllama.base.machine import require_memory
from glassllama.nn.hooks import hook_names
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.norm import RMSNorm
from glassllama.nn.rope import RopeTable, rope_angles, rope_table
from glassllama.tokenizers.vocabulary import prompt_ids
from glassllama.walkthrough.analysis import (
    Predictions,
    logit_lens,
    predictions_by_row,
)
from glassllama.walkthrough.manual_block import Tensors, Transformer, block_function
from glassllama.walkthrough.pictures import visible
from glassllama.walkthrough.step import LAYER_DEPTH, Check, compare
from glassllama.walkthrough.tracing import Trace, retain_freed_memory, trace
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import StreamedBlock, StreamedLlama, as_tensor, load_model

# Attention weights of all layers are recorded up to this length: they grow with its square.
MAX_TOKENS_FOR_ALL_MAPS = 64
SHOWN_TOKENS = 24
LENS_TOKENS = 5  # of each layer
COMMAND_WIDTH = 72  # columns
DEFAULT_MODEL = "smollm2-135m"  # of the command line
NEW_TOKENS = 6  # generated after the prompt in the step about the KV cache


class DamagedWeightsError(WeightsError):
    """A forward pass has NaN or infinities; `hook` is the first name where."""

    def __init__(self, hook: str, message: str) -> None:
        super().__init__(message)
        self.hook = hook


@dataclass(frozen=True, kw_only=True)
class Walkthrough:
    """A model, a prompt, and the layer and head that the steps show."""

    checkpoint: Checkpoint
    model: Transformer
    name: str  # the model as the user named it
    prompt: str | None  # None: ids were given
    ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    specials: bool = False  # special tokens written in the prompt are encoded as such
    layer: int = 0
    head: int = 0

    @property
    def config(self) -> Any:
        """The model's configuration: dim, n_layers, n_heads, head_dim, ffn_dim, vocab_size, …"""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.tok_embeddings.weight.dtype

    @property
    def prefix(self) -> str:
        return f"layers.{self.layer}"

    @cached_property
    def hooks(self) -> frozenset[str]:
        return frozenset(hook_names(self.model))

    @property
    def block_hooks(self) -> list[str]:
        """The hooks of a block that manual_block.py computes, below `layers.N.`."""
        return [name for name in self.manual if name != "output"]

    @property
    def has_rope(self) -> bool:
        return f"{self.prefix}.attention.q_rope" in self.hooks

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network has a gate, as SwiGLU."""
        return f"{self.prefix}.feed_forward.gate" in self.hooks

    @property
    def is_rms_norm(self) -> bool:
        """Whether the norms are RMSNorm; otherwise they are LayerNorm."""
        return isinstance(self.module("norm"), RMSNorm)

    @cached_property
    def n_kv_heads(self) -> int:
        keys = self.module(f"{self.prefix}.attention.wk")
        assert isinstance(keys, nn.Linear)
        return int(keys.out_features // self.config.head_dim)

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return int(self.config.n_heads // self.n_kv_heads)

    @property
    def kv_head(self) -> int:
        return self.head // self.group_size

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def implementation(self, name: str = "") -> Any:
        """The class in models/ or nn/ of a module, for its source: also if its weights stream."""
        parts = ("glassllama.models.", "glassllama.nn.")
        return next(c for c in type(self.module(name)).__mro__ if c.__module__.startswith(parts))

    @cached_property
    def pieces(self) -> list[str]:
        """The text of every token of the prompt."""
        return [self.piece(id) for id in self.ids]

    def piece(self, id: int) -> str:
        """The text of a token, spaces made visible; `#id` if there is no vocabulary."""
        raw = bytes_of_token(self.tokenizer, id)
        return f"#{id}" if raw is None else visible(raw)

    @property
    def recorded_hooks(self) -> tuple[str, ...]:
        """All hooks of the chosen layer; of all layers the residual stream and, if small, maps."""
        maps = ["layers.*.attention.weights"] if len(self.ids) <= MAX_TOKENS_FOR_ALL_MAPS else []
        layers = [f"layers.{n}" for n in range(self.config.n_layers)]
        return ("*embeddings", *layers, f"{self.prefix}.*", *maps, "norm", "last_logits")

    @cached_property
    def _run(self) -> tuple[Trace, KVCache]:
        max_len = min(len(self.ids) + NEW_TOKENS, self.config.max_seq_len)
        cache = self.model.new_cache(1, max_len)
        recorded = trace(self.model, self.ids, hooks=self.recorded_hooks, cache=cache)
        if (hook := recorded.first_non_finite()) is not None:
            raise self._damage(hook)
        return recorded, cache

    def _damage(self, hook: str) -> DamagedWeightsError:
        """Record all hooks of the layer where NaN or infinities appear first, to find the hook."""
        layer = ".".join(hook.split(".")[:2])
        hooks = [f"{layer}.*", layer] if hook.startswith("layers.") else [hook]
        recorded = trace(self.model, self.ids, hooks=hooks)
        hook = recorded.first_non_finite() or hook
        tensor = recorded[hook]
        count = int((~tensor.isfinite()).sum())
        return DamagedWeightsError(
            hook,
            f"{hook}: {count:,} of {tensor.numel():,} numbers are NaN or infinite, here first; the "
            f"weights are damaged or overflow: see 'glassllama validate {self.name}'",
        )

    @property
    def trace(self) -> Trace:
        return self._run[0]

    @property
    def cache(self) -> KVCache:
        """The KV cache of the traced run, with the tokens that a step added since."""
        return self._run[1]

    @cached_property
    def logits(self) -> Tensor:
        """(1, T, V), of the traced run."""
        return self.trace.logits.cpu()

    @cached_property
    def plain_logits(self) -> Tensor:
        """(1, T, V), of a run without hooks: fused attention in every layer."""
        with torch.no_grad():
            logits: Tensor = self.model(self.id_tensor).cpu()
        return logits

    @property
    def id_tensor(self) -> Tensor:
        """(1, T), on the model's device."""
        return torch.tensor([self.ids], device=self.model.tok_embeddings.weight.device)

    @property
    def block_input_hook(self) -> str:
        """The hook that has the input of the chosen layer."""
        first = "embeddings" if "embeddings" in self.hooks else "tok_embeddings"
        return f"layers.{self.layer - 1}" if self.layer else first

    @property
    def block_input(self) -> Tensor:
        """The residual stream before the chosen layer: (1, T, C)."""
        return self.trace[self.block_input_hook]

    @cached_property
    def lens(self) -> Predictions:
        """Logit lens after each of the last positions: (L + 1, 1, ≤ 64, k)."""
        last = range(max(len(self.ids) - MAX_TOKENS_FOR_ALL_MAPS, 0), len(self.ids))
        return logit_lens(self.model, self.trace, k=LENS_TOKENS, positions=last)

    @cached_property
    def predictions(self) -> Predictions:
        """The most probable tokens after each position: (T, 5)."""
        return predictions_by_row(self.logits[0], 5)

    @cached_property
    def angles(self) -> Tensor | None:
        """(1, T, D/2) radians of every position; None without RoPE."""
        if not self.has_rope:
            return None
        return rope_angles(torch.arange(len(self.ids))[None], self.frequencies)

    @property
    def frequencies(self) -> Tensor:
        """(D/2,) RoPE frequencies, radians per token."""
        frequencies = self.model.frequencies
        assert isinstance(frequencies, Tensor)
        return frequencies

    def rope(self, first: int = 0, count: int | None = None) -> RopeTable | None:
        """Of `count` positions from `first` on; None without RoPE."""
        if not self.has_rope:
            return None
        end = len(self.ids) if count is None else first + count
        return rope_table(rope_angles(torch.arange(first, end)[None], self.frequencies))

    def parameter(self, name: str) -> Tensor:
        """A tensor of the checkpoint, read from the file and not taken from the model."""
        tensor = as_tensor(self.checkpoint, name, self.dtype, torch.device("cpu"))
        self.checkpoint.release_pages(name)
        return tensor

    def block_parameter(self, name: str) -> Tensor:
        """The same for a parameter of the chosen layer, such as `attention.wq.weight`."""
        return self.parameter(f"{self.prefix}.{name}")

    def first_row_in_model(self, name: str) -> Tensor:
        """The first row of one of the chosen layer's matrices, as the model has it: (1, C)."""
        block = self.module(self.prefix)
        with block.filled() if isinstance(block, StreamedBlock) else nullcontext():
            return block.get_parameter(f"{name}.weight")[:1].clone().cpu()

    def compute_block(
        self,
        layer: int,
        x: Tensor,
        *,
        rope: RopeTable | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        fused: bool = False,
    ) -> Tensors:
        """A layer on its input (1, T, C), computed line by line (manual_block.py)."""

        def weight(name: str) -> Tensor:
            return self.parameter(f"layers.{layer}.{name}")

        return block_function(self.model)(weight, x, self.config, rope, past, fused)

    @cached_property
    def manual(self) -> Tensors:
        """All tensors of the chosen layer, computed line by line."""
        return self.compute_block(self.layer, self.block_input, rope=self.rope())

    @property
    def shown(self) -> range:
        """Positions that tables list: the last ones of a long prompt."""
        return range(max(len(self.ids) - SHOWN_TOKENS, 0), len(self.ids))

    def command(self, options: str) -> str:
        """The command line of this walkthrough with other options; long values as PROMPT, MODEL."""
        model = "" if self.name == DEFAULT_MODEL else f" -m {shlex.quote(self.name)}"
        prompts = [shlex.quote(self.prompt)] if self.prompt else []
        specials = "--specials " if self.specials else ""
        for prompt in (*prompts, "PROMPT"):
            command = f"glassllama walkthrough {prompt}{model} {specials}{options}"
            if cell_len(command) <= COMMAND_WIDTH:
                return command
        return f"glassllama walkthrough PROMPT -m MODEL {specials}{options}"

    def check(self, hook: str, manual: Tensor) -> Check:
        """Compare a computed tensor with the model's at a hook, or raise StepMismatchError."""
        return self.compare(hook, manual, self.trace[hook])

    def checks(self, *names: str) -> tuple[Check, ...]:
        """The same for tensors of the manual block."""
        return tuple(self.check(f"{self.prefix}.{name}", self.manual[name]) for name in names)

    def compare(self, what: str, manual: Tensor, model: Tensor, *, layers: int = 1) -> Check:
        """Compare results of two computations of so many layers."""
        depth, dtype = LAYER_DEPTH * layers, self.dtype
        return compare(what, manual, model, terms=self.longest_sum, depth=depth, dtype=dtype)

    def compare_runs(self, what: str, manual: Tensor, model: Tensor) -> Check:
        """Compare results of two computations of the whole model."""
        return self.compare(what, manual, model, layers=self.config.n_layers)

    @property
    def longest_sum(self) -> int:
        """The largest number of products that are added up for one number of a layer."""
        c = self.config
        return int(max(c.dim, c.ffn_dim, c.n_heads * c.head_dim, len(self.ids)))


def open_walkthrough(
    path: Path | str,
    prompt: str | Sequence[int],
    *,
    name: str | None = None,
    specials: bool = False,
    layer: int = 0,
    head: int = 0,
    stream_layers: bool = False,
    progress: Progress | None = None,
) -> Walkthrough:
    """Open and load a checkpoint, and prepare a walkthrough of a prompt (text or ids).

    Raises GlassError before anything is loaded: no prompt, a prompt that is longer than the
    context, an id, layer or head out of range; TokenizerError for a text without a vocabulary; and
    all errors of `open_checkpoint` and `load_model`. With `specials`, special tokens written in a
    text are encoded as such. `progress` counts loaded tensors. `stream_layers` keeps one layer at a
    time in memory: for models larger than memory, slow.
    """
    checkpoint = open_checkpoint(path)
    encode_checked(checkpoint, prompt, specials, layer, head)
    if stream_layers:
        model: Any = StreamedLlama(checkpoint)
    else:
        model = load_model(checkpoint, progress=progress)
        retain_freed_memory()
    return start_walkthrough(
        checkpoint, model, prompt, name=name, specials=specials, layer=layer, head=head
    )


def start_walkthrough(
    checkpoint: Checkpoint,
    model: Transformer,
    prompt: str | Sequence[int],
    *,
    name: str | None = None,
    specials: bool = False,
    layer: int = 0,
    head: int = 0,
) -> Walkthrough:
    """The same for a model that is loaded already from this checkpoint."""
    tokenizer, ids = encode_checked(checkpoint, prompt, specials, layer, head)
    block_function(model)
    return Walkthrough(
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


def encode_checked(
    checkpoint: Checkpoint, prompt: str | Sequence[int], specials: bool, layer: int, head: int
) -> tuple[Tokenizer | None, list[int]]:
    """The vocabulary and the ids of the prompt, after all arguments are checked."""
    config: Any = checkpoint.config
    if not hasattr(config, "n_heads"):
        raise ConfigError(
            f"{checkpoint.path}: the walkthrough is for transformers (Llama, GPT-2) and this is a "
            f"{checkpoint.architecture.title}"
        )
    require_below("--layer", layer, config.n_layers)
    require_below("--head", head, config.n_heads)
    tokenizer, ids = encode(checkpoint, prompt, specials)
    require_prompt(ids, config)
    return tokenizer, ids


def encode(
    checkpoint: Checkpoint, prompt: str | Sequence[int], specials: bool
) -> tuple[Tokenizer | None, list[int]]:
    """The vocabulary and the ids of the prompt; ids need no vocabulary."""
    if isinstance(prompt, str):
        tokenizer = checkpoint.tokenizer
        return tokenizer, prompt_ids(tokenizer, prompt, specials) if prompt else []
    with suppress(TokenizerError):
        return checkpoint.tokenizer, [int(id) for id in prompt]
    return None, [int(id) for id in prompt]


def require_prompt(ids: Sequence[int], config: Any) -> None:
    if not ids:
        raise GenerationError("the prompt is empty: give it at least one token")
    if len(ids) >= config.max_seq_len:
        raise GenerationError(
            f"the prompt has {len(ids):,} tokens; the context is {config.max_seq_len:,}, and one "
            "more token is generated; shorten the prompt"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise GenerationError(
            f"the prompt has ids outside the vocabulary 0 … {config.vocab_size - 1}"
        )
    require_memory(
        memory_needed(config, len(ids)),
        what=f"a walkthrough of {len(ids)} tokens",
        instead="take a shorter prompt",
    )


def memory_needed(config: Any, tokens: int) -> int:
    """Bytes besides the model: logits of three runs, and the chosen layer twice, in float32."""
    c = config
    layer = 2 * c.n_heads * tokens + 12 * c.dim + 4 * c.ffn_dim
    return int(4 * tokens * (3 * c.vocab_size + c.n_layers * c.dim + 2 * layer))


def bytes_of_token(tokenizer: Tokenizer | None, id: int) -> bytes | None:
    """The bytes of a token; None without a vocabulary or for an id without a token."""
    try:
        return None if tokenizer is None else tokenizer.token_bytes(id)
    except TokenizerError:
        return None


def require_below(option: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise GlassError(f"{option} {value} is out of range: this model has 0 … {count - 1}")


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"
