"""Step 17: where the time went, part by part, on this machine."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from glassllama.base.machine import usable_cores
from glassllama.models.llama import Llama
from glassllama.walkthrough.pictures import Bars
from glassllama.walkthrough.step import Step, WhatIf, source
from glassllama.walkthrough.trace import looking
from glassllama.walkthrough.walk import Walk, shape

MATRICES, SMALL = "gate up down", "SwiGLU, additions"
# A place -> what the time since the place before it was spent on. Scores and weights are not among
# them: to watch them would replace the fused kernel.
PARTS = {
    "tok_embeddings": "embedding",
    "layers.*.attention_norm": "norms",
    **{f"layers.*.attention.{name}": "wq wk wv wo" for name in ("wq", "wk", "wv", "wo")},
    "layers.*.attention.q_rope": "RoPE",
    "layers.*.attention.k_rope": "RoPE",
    "layers.*.attention.heads": "attention",
    "layers.*.after_attention": SMALL,
    "layers.*.ffn_norm": "norms",
    **{f"layers.*.feed_forward.{name}": MATRICES for name in ("gate", "up", "down")},
    "layers.*.feed_forward.gated": SMALL,
    "norm": "norms",
    "last_logits": "logits",
}


@torch.no_grad()
def seconds_by_part(model: Llama, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Run the model on (B, T) ids -> its logits, and the seconds of each part: all together."""
    spent = dict.fromkeys(PARTS.values(), 0.0)
    last = 0.0

    def end(part: str, _place: str, _out: Tensor) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[part] += now - last
        last = now

    with looking(model, [(pattern, partial(end, part)) for pattern, part in PARTS.items()]):
        last = time.perf_counter()
        logits: Tensor = model(ids)
    return logits, spent


def where_the_time_went(walk: Walk) -> Step:
    logits, spent = seconds_by_part(walk.model, walk.id_tensor)
    total = sum(spent.values())
    parts = sorted(spent, key=lambda part: -spent[part])
    threads, cores = torch.get_num_threads(), usable_cores()
    return Step(
        number=17,
        name="time",
        title="Where the time went",
        question="What is all the work spent on?",
        shapes=f"ids (1, {len(walk.ids)}) → logits {shape(logits)} in {total:.3f} s",
        sources=(source(Llama.hidden, "for layer", "x = layer", "return"),),
        text=(
            f"One run of the prompt in PyTorch, {threads} threads on {cores} cores: "
            f"{len(walk.ids) / total:,.0f} tokens a second. Nearly all of it is matrices that meet "
            "the tokens; the idea of attention itself costs little until a text is long.",
        ),
        pictures=(
            Bars(
                "seconds",
                parts,
                [spent[part] for part in parts],
                [f"{spent[part] * 1e3:8.1f} ms {spent[part] / total:4.0%}" for part in parts],
            ),
        ),
        checks=(walk.compare_runs("logits of the timed run", logits.cpu(), walk.plain_logits),),
        what_if=WhatIf(
            command=f"glassllama bench {walk.name}",
            shows="the same model in the engine, which keeps quantised weights packed",
        ),
        data={"seconds": spent, "threads": threads},
    )
