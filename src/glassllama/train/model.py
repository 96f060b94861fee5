"""The model of a run: built from settings, with random weights or those of another model.

Also the dtypes of its matrix products (`run.precision` and `run.compile`), and how fast products
are here. Weights, optimizer state and everything that is summed stay float32. "auto" is bfloat16 if
the device has instructions for it, else float32. On a CPU a Llama's blocks are computed by
native/training/blocks.py if it supports their layer plan, all other models by PyTorch, with
autocast for bfloat16. This is the only file of train/ that imports native/.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from glassllama import hub
from glassllama.base.errors import ConfigError, TrainingError, WeightsError, quoted
from glassllama.base.interfaces import Tokenizer
from glassllama.base.layer_plan import llama_plan
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.native.jit import code_cache
from glassllama.native.training.blocks import FusedBlock, can_fuse, fuse_blocks
from glassllama.nn.init import add_dropout
from glassllama.train.distributed import accept_full_tensors, is_sharded
from glassllama.train.settings import RunSettings, Settings, check_value, quoted_key, suggestion
from glassllama.weights.architectures import ARCHITECTURES, architecture_of
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import as_tensor, torch_device

NOT_SIZES = ("max_seq_len", "rope_scaling", "rope_layout")  # given by data.context, or of others
LARGEST_SIZE, MAX_LAYERS = 1 << 20, 1000  # larger numbers are typing errors
# May differ from the model of init_from: a Llama has no weights for positions, and rows of query
# and key matrices can be reordered.
MAY_DIFFER = ("max_seq_len", "rope_layout")
ROTATED = ("attention.wq.weight", "attention.wk.weight")
COMPILERS = ("c++", "g++", "clang++", "cl")  # torch.compile needs one of these on a CPU
# Measuring the peak: rows of the smallest and the largest product, tries of each, and the seconds
# from which a product is large enough.
SMALLEST, LARGEST, TRIES, LONG_ENOUGH = 256, 8192, 5, 0.01
LOOKUPS = ("tok_embeddings.weight", "pos_embeddings.weight")  # read, not multiplied


def make_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A new model on `run.device`, its weights drawn from `run.seed`, in float32.

    Raises ConfigError as `new_config` does, or for a device that is not available.
    """
    model, device = new_model(settings, vocab_size), settings.run.device
    if torch_device(device, "run.device").type == "cpu" != device:
        raise ConfigError(f"run.device must be cpu without a number, got {quoted(device)}")
    model.initialize(torch.Generator().manual_seed(settings.run.seed))
    return model.to(device)


def model_class(kind: str) -> Any:
    """The class of the architecture that settings call `kind`."""
    return ARCHITECTURES["gpt2" if kind == "gpt" else kind].model_class()


def new_model(settings: Settings, vocab_size: int) -> LanguageModel:
    """A model with uninitialized weights. Raises ConfigError as `new_config` does."""
    model: LanguageModel = model_class(settings.model.kind)(new_config(settings, vocab_size))
    add_dropout(model, settings.model.dropout)
    return model


def new_config(settings: Settings, vocab_size: int) -> Any:
    """The model's configuration, with `model.vocab_size` or the tokenizer's number of tokens.

    Raises ConfigError that names `model.field`: unknown, missing, not possible.
    """
    kind = settings.model.kind
    config_class = get_type_hints(model_class(kind).__init__)["config"]
    hints, sizes = get_type_hints(config_class), dict(settings.model.sizes)
    known = [f.name for f in fields(config_class) if f.name not in NOT_SIZES]
    for name, value in sizes.items():
        if name not in known:
            hint = suggestion(name, known)
            raise ConfigError(f"model.{quoted_key(name)}: a {kind} has no such setting{hint}")
        limit = MAX_LAYERS if name == "n_layers" else LARGEST_SIZE
        interval = f"[1, {limit}]" if hints[name] is int else ""
        sizes[name] = check_value(f"model.{name}", value, hints[name], interval=interval)
    rows = sizes.setdefault("vocab_size", vocab_size)
    if rows < vocab_size:
        raise ConfigError(f"model.vocab_size: {rows}, but the tokenizer has {vocab_size} tokens")
    try:
        return config_class(**sizes, max_seq_len=settings.data.context)
    except TypeError:  # a field without a default is missing
        missing = [name for name in known if name not in sizes]
        raise ConfigError(f"model: a {kind} also needs {', '.join(missing)}") from None
    except ConfigError as error:
        raise ConfigError(f"model.{error}") from None


def planned_parameters(settings: Settings, vocab_size: int) -> int:
    """The number of parameters of such a model. Raises ConfigError as `new_config` does."""
    config = new_config(settings, vocab_size)
    return sum(math.prod(shape) for shape in architecture_of(config).shapes(config).values())


def count_parameters(model: LanguageModel) -> int:
    """The number of parameters; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


# --- weights of another model (model.init_from) ---------------------------------------------


def init_from(
    model: LanguageModel, source: str, tokenizer: Tokenizer, *, offline: bool = False
) -> None:
    """Copy the weights of the model that `source` names (as `load` takes it) into `model`.

    Raises WeightsError that lists every difference of configuration, shapes and vocabulary;
    GlassError if it cannot be found or read.
    """
    checkpoint = open_checkpoint(hub.resolve(source, offline=offline))
    try:
        require_same_model(checkpoint, model, tokenizer)
        sharded = is_sharded(model.tok_embeddings.weight)
        with torch.no_grad(), accept_full_tensors(sharded):
            for name, weight in model.named_parameters():
                tensor = as_tensor(checkpoint, name, torch.float32, weight.device)
                weight.copy_(in_layout_of(model.config, checkpoint.config, name, tensor))
                checkpoint.release_pages(name)
    finally:
        checkpoint.close()


def require_same_model(checkpoint: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> None:
    theirs: Any = checkpoint.config
    ours: Any = model.config
    where = f"model.init_from: {checkpoint.path}"
    if type(theirs) is not type(ours):
        kinds = f"it is a {checkpoint.architecture.title}, this run trains a {type(model).__name__}"
        raise WeightsError(f"{where}: {kinds}: set model.kind")
    differences = []
    for name in (field.name for field in fields(ours) if field.name not in MAY_DIFFER):
        there, here = getattr(theirs, name), getattr(ours, name)
        # Some file formats have float32 precision only.
        both = isinstance(there, float) and isinstance(here, float)
        if np.float32(there) != np.float32(here) if both else there != here:
            differences.append(f"{name} is {quoted(there)} there and {quoted(here)} here")
    if not differences:  # shapes of a table of positions follow from data.context
        for name, weight in model.named_parameters():
            there, here = checkpoint.info(name).shape, tuple(weight.shape)
            if there != here:
                differences.append(f"{name} has shape {there} there and {here} here")
    differences = differences or vocabulary_difference(checkpoint.tokenizer, tokenizer)
    if differences:
        raise WeightsError(
            f"{where}: another model: {'; '.join(differences)}; change the settings of [model] "
            "and [data] to its values"
        )


def vocabulary_difference(theirs: Tokenizer, ours: Tokenizer) -> list[str]:
    """Another number of tokens, or the first id that stands for another text."""
    if theirs.vocab_size != ours.vocab_size:
        return [f"its tokenizer has {theirs.vocab_size} tokens and this run's {ours.vocab_size}"]
    for id in range(ours.vocab_size):
        there, here = theirs.token_bytes(id), ours.token_bytes(id)
        if there != here:
            return [f"token {id} is {quoted(there)} there and {quoted(here)} here (data.tokenizer)"]
    return []


def in_layout_of(ours: Any, theirs: Any, name: str, tensor: Tensor) -> Tensor:
    """Reorder the rows of query and key matrices of a Llama for our `rope_layout`.

    Models that are trained here rotate halves: neighboring rows (0, 1), (2, 3), … become rows
    (0, D/2), (1, D/2 + 1), …
    """
    rotated = hasattr(ours, "rope_layout") and name.endswith(ROTATED)
    if not rotated or theirs.rope_layout == ours.rope_layout:
        return tensor
    heads = tensor.unflatten(0, (-1, ours.head_dim // 2, 2))  # (n, D/2, 2, C)
    return heads.transpose(1, 2).flatten(0, 2)  # (n·D, C)


# --- dtypes and speed -----------------------------------------------------------------------


def product_dtype(device: str) -> torch.dtype:
    """The dtype of the fastest matrix products: bfloat16 if the hardware has it, else float32.

    Elsewhere PyTorch emulates bfloat16: with AVX2 alone, 20 times slower than float32. On Arm,
    oneDNN supports bfloat16 only where there are instructions for it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and torch.backends.mkldnn.is_available():
        has = torch.cpu.get_capabilities()
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
            has.get("architecture") != "x86_64" or has.get("avx512_bf16") or has.get("amx_bf16")
        )
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def dtype_of(run: RunSettings) -> torch.dtype:
    """The dtype that `run.precision` means on its device."""
    auto = run.precision == "auto"
    return product_dtype(run.device) if auto else getattr(torch, run.precision)


def set_precision(model: LanguageModel, run: RunSettings, dropout: float) -> None:
    """Compile the model's layers, or use fused blocks, as the settings say.

    Raises TrainingError: nothing to compile, or no compiler.
    """
    on_cpu = run.device == "cpu"
    if run.compile:
        if on_cpu and not any(map(shutil.which, COMPILERS)):
            raise TrainingError("run.compile: no C++ compiler found; set run.compile=false")
        layers = dict(model.named_children()).get("layers")
        if layers is None:
            raise TrainingError(
                "run.compile: this model has no layers to compile; set run.compile=false"
            )
        for layer in layers.children():
            layer.compile(dynamic=False)
    elif on_cpu and isinstance(model, Llama) and can_fuse(llama_plan(model.config)):
        fuse_blocks(model, dropout, dtype_of(run))


def autocast(model: LanguageModel, run: RunSettings) -> AbstractContextManager[object]:
    """Inside, the model's matrix products are in `run.precision`."""
    fused = isinstance(model, Llama) and isinstance(model.layers[0], FusedBlock)
    if fused or dtype_of(run) == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, torch.bfloat16)


def save_compiled_code() -> None:
    """Let other processes use what was compiled in this one; call it when all kernels have run."""
    code_cache.save_checksums()


def flops_per_token(model: LanguageModel, context: int) -> float:
    """Floating point operations per token of a training step; 0 for a model without layers.

    Source: PaLM (Chowdhery et al., 2022), appendix B: 6 per weight of a matrix, and for attention
    12 · layers · heads · head_dim · context.
    """
    config: Any = model.config
    layers = getattr(config, "n_layers", 0)
    named = model.named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim == 2 and name not in LOOKUPS)
    if layers and config.tie_embeddings:
        weights += config.vocab_size * config.dim  # the embeddings, as the output matrix
    attention = layers * config.n_heads * config.head_dim * context if layers else 0
    return 6.0 * weights + 12.0 * attention


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product, measured."""
    peak, rows, seconds = 0.0, SMALLEST, 0.0
    while rows <= LARGEST and seconds < LONG_ENOUGH:
        a = torch.ones(rows, rows, device=device, dtype=dtype)
        times = []
        for _ in range(TRIES):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        seconds = min(times)
        peak, rows = max(peak, 2.0 * rows**3 / seconds), 2 * rows
    return peak
