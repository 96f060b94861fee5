"""A model, a prompt and what the steps need of both, computed when first used."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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
from glassllama.base.layer_plan import AttentionPlan, BlockPlan, ModelPlan, RopePlan, attention_plan
from glassllama.base.machine import require_memory
from glassllama.models.language_model import LanguageModel
from glassllama.nn.hooks import hook_names
from glassllama.nn.kv_cache import KVCache
from glassllama.nn.rope import rope_angles
from glassllama.tokenizers.vocabulary import prompt_ids
from glassllama.walkthrough.manual_block import Past, Tensors, gpt_block, planned_block, qk_norm
from glassllama.walkthrough.step import (
    LAYER_DEPTH,
    Check,
    HeatMap,
    Numbers,
    Source,
    calls,
    compare,
    source,
)
from glassllama.walkthrough.tracing import (
    Predictions,
    Trace,
    logit_lens,
    predictions_by_row,
    retain_freed_memory,
    trace,
)
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import StreamedBlock, as_tensor, load_model, streamed_model

UNPLANNED = ("gpt2",)  # architectures without a layer plan that manual_block.py computes
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
    model: LanguageModel
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

    @cached_property
    def plan(self) -> ModelPlan | None:
        """What every block computes; None for GPT-2."""
        planned = self.checkpoint.architecture.layer_plan is not None
        return self.checkpoint.layer_plan if planned else None

    @property
    def block(self) -> BlockPlan | None:
        """The plan of the chosen layer."""
        return None if self.plan is None else self.plan.blocks[self.layer]

    @property
    def attention(self) -> AttentionPlan:
        """The attention of the chosen layer."""
        if self.block is not None:
            return self.block.attention
        return attention_plan(self.config, rope=None, biases=frozenset("qkvo" * self.config.bias))

    @property
    def rope(self) -> RopePlan | None:
        return self.attention.rope

    def before_adding(self, *norms: str) -> str:
        """What happens to the output of a sublayer before it is added to the residual stream."""
        extra = " (an extra norm)" if len(self.norms) > 2 else ""
        parts = [f"normalized by {name}{extra}" for name in norms]
        if self.block is not None and self.block.residual_multiplier != 1:
            parts.append(f"multiplied by {self.block.residual_multiplier:g}")
        return f"{' and '.join(parts)} and then " if parts else ""

    @property
    def norms(self) -> list[str]:
        """The norms of the chosen layer, in the order of use."""
        return ["attention_norm", "ffn_norm"] if self.block is None else self.block.norm_names()

    @property
    def qk_norms(self) -> list[str]:
        """The norms with weights of queries and keys."""
        has_weights = self.attention.qk_norm in ("per_head", "full_width")
        return ["attention.q_norm", "attention.k_norm"] if has_weights else []

    @property
    def is_rms_norm(self) -> bool:
        """Whether the norms are RMSNorm; otherwise they are LayerNorm."""
        return self.plan is not None

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return int(self.config.n_heads // self.config.n_kv_heads)

    @property
    def kv_head(self) -> int:
        return self.head // self.group_size

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def calls(self, module: str, *names: str) -> tuple[Source, ...]:
        """The source code where a module calls its parts of these names."""
        return calls(self.implementation(module), *names)

    @property
    def layer_source(self) -> tuple[Source, ...]:
        """Where the model gives a layer its RoPE and its mask, if layers differ in them."""
        method = getattr(self.implementation(), "context_of", None)
        return () if method is None else (source(method),)

    def implementation(self, name: str = "") -> Any:
        """The class of a module, for its source: that of the model also if its weights stream."""
        streams = StreamedBlock.__module__
        return next(c for c in type(self.module(name)).__mro__ if c.__module__ != streams)

    @cached_property
    def pieces(self) -> list[str]:
        """The text of every token of the prompt."""
        return [self.piece(id) for id in self.ids]

    def piece(self, id: int) -> str:
        """The text of a token, spaces made visible; `#id` if there is no vocabulary."""
        raw = bytes_of_token(self.tokenizer, id)
        return f"#{id}" if raw is None else visible(raw)

    @cached_property
    def _run(self) -> tuple[Trace, KVCache]:
        """All hooks of the chosen layer; of all layers the residual stream and, if small, maps."""
        maps = ["layers.*.attention.weights"] if len(self.ids) <= MAX_TOKENS_FOR_ALL_MAPS else []
        layers = [f"layers.{n}" for n in range(self.config.n_layers)]
        hooks = ("*embeddings", *layers, f"{self.prefix}.*", *maps, "norm", "last_logits")
        cache = self.model.new_cache(1, min(len(self.ids) + NEW_TOKENS, self.config.max_seq_len))
        recorded = trace(self.model, self.ids, hooks=hooks, cache=cache)
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
        return self.run_without_hooks()

    @torch.no_grad()
    def run_without_hooks(self) -> Tensor:
        """The logits (1, T, V) of the model as it is now."""
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

    @property
    def frequencies(self) -> Tensor:
        """(R/2,) RoPE frequencies of the chosen layer, radians per token; (0,) without RoPE."""
        return torch.tensor(() if self.rope is None else self.rope.frequencies)

    def angles(self, positions: range) -> Tensor:
        """(1, T, R/2) radians of these positions."""
        return rope_angles(torch.tensor([positions]), self.frequencies)

    def parameter(self, name: str) -> Tensor:
        """A tensor of the checkpoint, read from the file and not taken from the model."""
        tensor = as_tensor(self.checkpoint, name, self.dtype, torch.device("cpu"))
        self.checkpoint.release_pages(name)
        return tensor

    def block_parameter(self, name: str) -> Tensor:
        """The same for a parameter of the chosen layer, such as `attention.wq.weight`."""
        return self.parameter(f"{self.prefix}.{name}")

    def bias(self, name: str) -> Tensor | None:
        """The bias of a part of the chosen layer, such as `attention.wo`, if it has one."""
        has_bias = f"{self.prefix}.{name}.bias" in self.checkpoint.names
        return self.block_parameter(f"{name}.bias") if has_bias else None

    def first_row_in_model(self, name: str) -> Tensor:
        """The first row of one of the chosen layer's matrices, as the model has it: (1, C)."""
        block = self.module(self.prefix)
        with block.filled() if isinstance(block, StreamedBlock) else nullcontext():
            return block.get_parameter(f"{name}.weight")[:1].clone().cpu()

    def compute_block(
        self, layer: int, x: Tensor, positions: range, past: Past = None, fused: bool = False
    ) -> Tensors:
        """A layer on its input (1, T, C), computed line by line (manual_block.py)."""

        def weight(name: str) -> Tensor:
            return self.parameter(f"layers.{layer}.{name}")

        if self.plan is None:
            return gpt_block(weight, x, self.config, self.attention, past, fused)
        plan, eps = self.plan.blocks[layer], self.plan.norm_eps
        return planned_block(weight, x, eps, plan, positions, past, fused)

    @property
    def positions(self) -> range:
        return range(len(self.ids))

    @cached_property
    def manual(self) -> Tensors:
        """All tensors of the chosen layer, computed line by line."""
        return self.compute_block(self.layer, self.block_input, self.positions)

    @property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as the scores are computed from them."""
        name = "" if self.plan is None else "_rope"
        return self.manual[f"attention.q{name}"], self.manual[f"attention.k{name}"]

    @property
    def unrotated(self) -> Tensor:
        """Queries before RoPE: (1, H, T, D)."""
        return self.qk_norm(self.manual["attention.q"], after_rope=False)

    def qk_norm(self, q: Tensor, *, after_rope: bool) -> Tensor:
        """Queries (1, H, T, D) with the chosen layer's norm, if it has one there."""
        plan, eps = self.attention, self.config.norm_eps
        if plan.qk_norm_after_rope != after_rope:
            return q
        return qk_norm(q, plan.qk_norm, self.block_parameter, "attention.q", eps)

    @property
    def shown(self) -> range:
        """Positions that tables list: the last ones of a long prompt."""
        return self.positions[-SHOWN_TOKENS:]

    def heat_map(self, title: str, rows: Tensor) -> HeatMap:
        """The rows (T, …) of the positions that tables list."""
        shown = rows[self.shown.start :].float().numpy()
        return HeatMap(title, shown, self.pieces[self.shown.start :])

    def numbers(self, tensors: Mapping[str, str]) -> list[Numbers]:
        """The last token's numbers in tensors of the manual block: label -> name of the tensor.

        Of a tensor with heads, those of the chosen one.
        """
        shown = []
        for label, name in tensors.items():
            last = self.manual[name][0, ..., -1, :]  # (C,) or (heads, D)
            if last.ndim == 2:
                last = last[self.head if len(last) == self.config.n_heads else self.kv_head]
            shown.append(Numbers(label, last, f"{self.prefix}.{name}"))
        return shown

    def command(self, options: str) -> str:
        """The command line of this walkthrough with other options; long values as PROMPT, MODEL."""
        model = "" if self.name == DEFAULT_MODEL else f" -m {shlex.quote(self.name)}"
        options = f"--specials {options}" if self.specials else options
        for prompt in (shlex.quote(self.prompt or "PROMPT"), "PROMPT"):
            command = f"glassllama walkthrough {prompt}{model} {options}"
            if cell_len(command) <= COMMAND_WIDTH:
                return command
        return f"glassllama walkthrough PROMPT -m MODEL {options}"

    def check(self, hook: str, manual: Tensor) -> Check:
        """Compare a computed tensor with the model's at a hook, or raise StepMismatchError."""
        return self.compare(hook, manual, self.trace[hook])

    def checks(self, *names: str) -> list[Check]:
        """The same for tensors of the manual block."""
        return [self.check(f"{self.prefix}.{name}", self.manual[name]) for name in names]

    def compare(self, what: str, manual: Tensor, model: Tensor, *, layers: int = 1) -> Check:
        """Compare results of two computations of so many layers."""
        extra_norms = len(self.norms) - 2 + (self.attention.qk_norm != "none")
        c, depth = self.config, (LAYER_DEPTH + extra_norms) * layers
        longest_sum = max(c.dim, c.ffn_dim, c.n_heads * c.head_dim, len(self.ids))
        return compare(what, manual, model, terms=longest_sum, depth=depth, dtype=self.dtype)

    def compare_runs(self, what: str, manual: Tensor, model: Tensor) -> Check:
        """Compare results of two computations of the whole model."""
        return self.compare(what, manual, model, layers=self.config.n_layers)


def open_walkthrough(
    path: Path | str | Checkpoint,
    prompt: str | Sequence[int],
    *,
    model: LanguageModel | None = None,
    name: str | None = None,
    specials: bool = False,
    layer: int = 0,
    head: int = 0,
    stream_layers: bool = False,
    progress: Progress | None = None,
) -> Walkthrough:
    """Open and load a checkpoint, and prepare a walkthrough of a prompt (text or ids).

    With `model`, the one that was loaded from this checkpoint before is used again. Raises
    GlassError before anything is loaded: no prompt, a prompt that is longer than the context, an
    id, layer or head out of range; TokenizerError for a text without a vocabulary; and all errors
    of `open_checkpoint` and `load_model`. With `specials`, special tokens written in a text are
    encoded as such. `progress` counts loaded tensors. `stream_layers` keeps one layer at a time in
    memory: for models larger than memory, slow.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    config: Any = checkpoint.config
    architecture = checkpoint.architecture
    if architecture.layer_plan is None and architecture.name not in UNPLANNED:
        raise ConfigError(
            f"{checkpoint.path}: the walkthrough explains models with attention, and this is a "
            f"{architecture.title}; LLM.trace reads the tensors of every model"
        )
    for option, value, count in (("layer", layer, config.n_layers), ("head", head, config.n_heads)):
        if not 0 <= value < count:
            limits = f"this model has 0 … {count - 1}"
            raise GlassError(f"--{option} {value} is out of range: {limits}")
    tokenizer, ids = encode(checkpoint, prompt, specials)
    require_prompt(ids, config)
    if model is None and stream_layers:
        model = streamed_model(checkpoint)
    elif model is None:
        model = load_model(checkpoint, progress=progress)
        retain_freed_memory()
    return Walkthrough(
        checkpoint=checkpoint, model=model, name=name or str(checkpoint.path),
        prompt=prompt if isinstance(prompt, str) else None, ids=tuple(ids), tokenizer=tokenizer,
        specials=specials, layer=layer, head=head,
    )  # fmt: skip


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
    """Raises GlassError: no ids, ids out of range, more than the context or the memory allow."""
    c, tokens = config, len(ids)
    if not ids:
        raise GenerationError("the prompt is empty: give it at least one token")
    if tokens >= c.max_seq_len:
        raise GenerationError(
            f"the prompt has {tokens:,} tokens; the context is {c.max_seq_len:,}, and one more "
            "token is generated; shorten the prompt"
        )
    if not 0 <= min(ids) <= max(ids) < c.vocab_size:
        raise GenerationError(f"the prompt has ids outside the vocabulary 0 … {c.vocab_size - 1}")
    # Besides the model: logits of three runs, and the chosen layer twice, in float32.
    layer = 2 * c.n_heads * tokens + 12 * c.dim + 4 * c.ffn_dim
    needed = 4 * tokens * (3 * c.vocab_size + c.n_layers * c.dim + 2 * layer)
    what = f"a walkthrough of {tokens} tokens"
    require_memory(needed, what=what, instead="take a shorter prompt")


def bytes_of_token(tokenizer: Tokenizer | None, id: int) -> bytes | None:
    """The bytes of a token; None without a vocabulary or for an id without a token."""
    try:
        return None if tokenizer is None else tokenizer.token_bytes(id)
    except TokenizerError:
        return None


def visible(raw: bytes) -> str:
    """The bytes of a token as text: ␣ a space, ↵ a line break, ⟨e2⟩ a byte that is no text."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "".join(chr(b) if 0x20 < b < 0x7F else f"⟨{b:02x}⟩" for b in raw)
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    return "".join(signs.get(c, c if c.isprintable() else f"⟨{ord(c):02x}⟩") for c in text)


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"
