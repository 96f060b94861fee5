"""Steps 16 and 17: the accuracy that quantization costs, and the time of every part."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from glassllama.base.machine import usable_cores
from glassllama.formats.blocks import (
    BLOCK,
    BLOCKS,
    dequantize,
    pack_q4_0,
    pack_q8_0,
    quantize,
    unpack_q4_0,
    unpack_q8_0,
)
from glassllama.nn.hooks import HookFn, add_hooks, hook_names
from glassllama.walkthrough.manual_block import Transformer
from glassllama.walkthrough.step import Bars, Step, Table, sources
from glassllama.walkthrough.tracing import Intervention, kl_divergence, predictions, trace
from glassllama.walkthrough.walkthrough import Walkthrough, shape

WeightType = Literal["Q8_0", "Q4_0"]
TYPES: tuple[WeightType, ...] = ("Q8_0", "Q4_0")
ROWS = 512  # of a matrix, which may have a quarter of a gigabyte, at a time
NORMS, PROJECTIONS, MATRICES = "norms", "wq wk wv wo", "feed-forward matrices"
ELEMENTWISE = "activation, additions"
# Hook -> the part that the time since the hook before it counts for. Scores and weights are not
# among them: hooks there would replace the fused kernel. Each model has some of these hooks.
PART_OF_HOOK = {
    "tok_embeddings": "embedding",
    "pos_embeddings": "embedding",
    "embeddings": "embedding",
    "layers.*.attention_norm": NORMS,
    **{f"layers.*.attention.{name}": PROJECTIONS for name in ("wq", "wk", "wv", "wo")},
    "layers.*.attention.q_rope": "RoPE",
    "layers.*.attention.k_rope": "RoPE",
    "layers.*.attention.heads": "attention",
    "layers.*.after_attention": ELEMENTWISE,
    "layers.*.ffn_norm": NORMS,
    **{f"layers.*.feed_forward.{name}": MATRICES for name in ("gate", "up", "down")},
    "layers.*.feed_forward.gated": ELEMENTWISE,
    "layers.*.feed_forward.activated": ELEMENTWISE,
    "norm": NORMS,
    "last_logits": "logits",
}


@dataclass(frozen=True)
class QuantizationError:
    """Effect of one quantized matrix; errors of weights and output are relative L2 norms."""

    type: WeightType
    bits: float
    weights: float
    output: float
    logits: float  # the largest change of any logit after the last token
    divergence: float  # bits, of the next token's distribution (Kullback-Leibler)
    predicts: int


def quantization(walk: Walkthrough) -> Step:
    name = f"{walk.prefix}.feed_forward.down"
    matrix, stored = walk.parameter(f"{name}.weight"), walk.checkpoint.info(f"{name}.weight").dtype
    unchanged = logits_with_output(walk, down_output(walk, matrix))
    results = [quantization_error(walk, weight_type, matrix) for weight_type in TYPES]
    columns = ("stored as", "bits>", "error of weights>", "of output>", "largest logit change>",
               "KL bits>", "predicts")  # fmt: skip
    rows = [
        (e.type, f"{e.bits:.1f}", f"{e.weights:.3%}", f"{e.output:.3%}", f"{e.logits:.4f}",
         f"{e.divergence:.2e}", walk.piece(e.predicts)) for e in results
    ]  # fmt: skip
    what = "logits with the same matrix, unchanged"
    return Step(
        name="quantization",
        title="Quantization: the same with fewer bits",
        question="How much do Q8_0 and Q4_0 change weights, outputs and logits?",
        shapes=f"down {shape(matrix)}, stored as {stored} → blocks of 32 → {shape(matrix)}",
        sources=sources(
            (pack_q8_0, "scale =", "codes ="),
            (unpack_q8_0,),
            (pack_q4_0, "codes ="),
            (unpack_q4_0, "out -=", "out *="),
        ),
        text=f"Only the matrix {name} is quantized: 32 numbers have a common scale, and each is a "
        "small integer. The model runs again with the dequantized matrix.",
        pictures=[Table(columns, rows)],
        checks=[walk.compare_runs(what, unchanged, walk.plain_logits)],
        command=walk.command(f"--step 16 --layer {walk.config.n_layers - 1}"),
        command_shows="the error of a matrix in the last layer passes through no other layers",
        data={"matrix": name, "stored": stored, "types": [*map(asdict, results)]},
    )


def quantization_error(
    walk: Walkthrough, weight_type: WeightType, matrix: Tensor
) -> QuantizationError:
    """Run the model with the chosen layer's `down` quantized and dequantized."""
    quantized = round_trip(matrix, weight_type)
    weights, output = relative_error(quantized, matrix), down_output(walk, quantized)
    del quantized  # the model run needs memory as well
    logits = logits_with_output(walk, output)[0, -1]
    correct = walk.plain_logits[0, -1]
    return QuantizationError(
        type=weight_type,
        bits=8 * BLOCKS[weight_type].record.itemsize / BLOCK,
        weights=weights,
        output=relative_error(output, walk.trace[f"{walk.prefix}.feed_forward.down"]),
        logits=float((logits - correct).abs().max()),
        divergence=kl_divergence(correct, logits),
        predicts=int(predictions(logits).ids[0]),
    )


def round_trip(matrix: Tensor, weight_type: WeightType) -> Tensor:
    """The matrix quantized and dequantized; rows are padded to whole blocks."""
    columns, result = matrix.shape[1], torch.empty_like(matrix)
    for out, rows in zip(torch.split(result, ROWS), torch.split(matrix, ROWS), strict=True):
        padded = F.pad(rows.float(), (0, -columns % BLOCK)).numpy()
        unpacked = dequantize(quantize(padded, weight_type), weight_type, padded.shape)
        out.copy_(torch.from_numpy(unpacked)[:, :columns])
    return result


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference, divided by that of the exact matrix."""
    pairs = zip(torch.split(approximate, ROWS), torch.split(exact, ROWS), strict=True)
    differences = torch.stack([(a.float() - b.float()).norm() for a, b in pairs])
    norms = torch.stack([b.float().norm() for b in torch.split(exact, ROWS)])
    return float(differences.norm() / norms.norm().clamp(min=1e-30))


def down_output(walk: Walkthrough, matrix: Tensor) -> Tensor:
    """The output of the chosen layer's `down` with this matrix: (1, T, C)."""
    features = "gated" if walk.is_gated else "activated"
    x = walk.trace[f"{walk.prefix}.feed_forward.{features}"]
    return F.linear(x, matrix, walk.bias("feed_forward.down"))


def logits_with_output(walk: Walkthrough, output: Tensor) -> Tensor:
    """Logits (1, T, V) of a run in which the chosen layer's `down` has this output."""
    replaced = Intervention(f"{walk.prefix}.feed_forward.down", lambda out: output.to(out))
    return trace(walk.model, walk.ids, hooks=(), interventions=[replaced]).logits.cpu()


@torch.no_grad()
def seconds_by_part(model: Transformer, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Run the model on (B, T) ids -> its logits, and the seconds of each part in all layers."""
    names = [name.replace("layers.0.", "layers.*.") for name in hook_names(model)]
    parts = {hook: part for hook, part in PART_OF_HOOK.items() if hook in names}
    seconds = dict.fromkeys(parts.values(), 0.0)
    last = 0.0

    def end(part: str, _name: str, _out: Tensor) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    hooks: list[tuple[str, HookFn]] = [(hook, partial(end, part)) for hook, part in parts.items()]
    with add_hooks(model, hooks):
        last = time.perf_counter()
        logits = model(ids)
    return logits, seconds


def time_by_part(walk: Walkthrough) -> Step:
    logits, seconds = seconds_by_part(walk.model, walk.id_tensor)
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    rows = [(part, s, f"{s * 1e3:8.1f} ms {s / total:4.0%}") for part, s in parts]
    threads, cores = torch.get_num_threads(), usable_cores()
    return Step(
        name="time",
        title="Time by part",
        question="Which parts of the forward pass take how much time?",
        shapes=f"ids (1, {len(walk.ids)}) → logits {shape(logits)} in {total:.3f} s",
        sources=sources((walk.implementation().hidden, "for layer", "x = layer", "return")),
        text=f"One forward pass of the prompt in PyTorch, {threads} threads on {cores} cores: "
        f"{len(walk.ids) / total:,.0f} tokens per second. Products with weight matrices take most "
        "of the time; attention itself takes little for a short text.",
        pictures=[Bars("seconds", rows)],
        checks=[walk.compare_runs("logits of the timed run", logits.cpu(), walk.plain_logits)],
        command=f"glassllama bench {walk.name}",
        command_shows="the speed of the same model in the engine, which keeps weights quantized",
        data={"seconds": seconds, "threads": threads},
    )


STEPS = (quantization, time_by_part)
