"""The walkthrough of all families of decoders: every step, what it names, and what it detects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassllama.base.errors import GlassError
from glassllama.base.layer_plan import BlockPlan, ModelPlan
from glassllama.walkthrough.export import html_page, to_json
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.step import StepMismatchError
from glassllama.walkthrough.steps import run_step, step_of_hook
from glassllama.walkthrough.tracing import trace
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough
from parity.test_families import GGUF
from tiny_families import FAMILIES, SCORES, STEP_WORDS, family_model, write_family
from walkthrough.conftest import run_all_steps, warned

IDS = [n * 37 % 131 for n in range(13)]  # longer than all windows
# The chosen layer: one that has what the family is known for.
LAYER = {"gemma2": 2, "gemma3": 6, "smollm3": 3, "qwen2 windows": 3}
SHARED = {"models/language_model.py", "models/decoder.py", "models/qwen.py"}  # QK-norm of Gemma 3
SAME_CODE_AS_OTHERS = {"mistral nemo", "ministral3", "qwen2", "qwen2 yarn", "phi3 longrope"}


def opened(name: str, folder: Path, file_format: str = "hf") -> Walkthrough:
    path = write_family(name, folder, file_format)
    return open_walkthrough(path, IDS, layer=LAYER.get(name, 1), head=4, name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_steps_name_what_differs(name: str, tmp_path: Path) -> None:
    walk = opened(name, tmp_path)
    steps = run_all_steps(walk)
    for number, words in {each for some in STEP_WORDS.values() for each in some}:
        assert (words in steps[number].text) == ((number, words) in STEP_WORDS[name]), words
    assert ("×" in "".join(steps[SCORES].pictures[0].lines(100))) == bool(walk.attention.window)
    quoted = {source.file for step in steps for source in step.sources}
    models = {file for file in quoted if file.startswith("models/")}
    module = walk.checkpoint.architecture.model.partition(":")[0]
    own = {f"models/{module.rpartition('.')[2]}.py"}
    assert models <= {*own, *SHARED}
    assert name in SAME_CODE_AS_OTHERS or own <= models
    assert {step_of_hook(hook) for hook in walk.trace} <= {4, 5, 6, 8, 9, 10, 11, 13}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files(name: str, tmp_path: Path) -> None:
    """Other names, layouts and transforms of tensors: every layer is compared in step 12."""
    walk = opened(name, tmp_path, "gguf")
    for number in (2, 3, 4, 5, 6, 8, 12, 13):
        assert not warned(run_step(walk, number))


@pytest.mark.parametrize("name", FAMILIES)
def test_mistakes_change_the_predictions(name: str, tmp_path: Path) -> None:
    """The largest divergence of any position, in bits; 1e-9 would be rounding."""
    walk = opened(name, tmp_path)
    for mistake in MISTAKES.values():
        done = compare_with_mistake(walk, mistake)
        assert max(done.divergence) > 1e-2, mistake.name
        weights = done.runs["wrong"].weights
        later = weights.triu(1).sum()
        assert (later > 0) == (mistake.name == "no-mask")
        if walk.attention.window is not None:  # the window stays
            assert weights.tril(-walk.attention.window).sum() == 0


def test_a_mistake_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    path = write_family("granite", tmp_path, "hf")
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**written, "attention_multiplier": 1.0}))
    with pytest.raises(GlassError, match="scale: this model does not make its scores smaller"):
        compare_with_mistake(open_walkthrough(path, IDS), MISTAKES["scale"])
    walk = open_walkthrough(write_family("smollm3", tmp_path / "nope", "hf"), IDS)
    assert walk.plan is not None
    blocks = [replace(b, attention=replace(b.attention, rope=None)) for b in walk.plan.blocks]
    walk.__dict__["plan"] = replace(walk.plan, blocks=tuple(blocks))
    with pytest.raises(GlassError, match="rope-layout: this SmolLM3 has no RoPE"):
        compare_with_mistake(walk, MISTAKES["rope-layout"])


# A weight of the model that differs from the file -> the step that detects it.
CHANGED = [
    ("gemma2", "post_attention_norm.weight", 10), ("gemma2", "post_ffn_norm.weight", 11),
    ("olmo2", "attention.k_norm.weight", 6), ("qwen2", "attention.wv.bias", 6),
    ("phi3", "feed_forward.gate.weight", 11), ("qwen3", "attention.q_norm.weight", 6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameter", "step"), CHANGED)
def test_a_changed_weight_is_detected(name: str, parameter: str, step: int, tmp_path: Path) -> None:
    walk = opened(name, tmp_path)
    walk.model.get_parameter(f"{walk.prefix}.{parameter}").view(-1)[0] *= 1.01
    for number in range(6, step):
        assert not warned(run_step(walk, number))
    assert warned(run_step(walk, step))


def attention(**changes: Any) -> Callable[[BlockPlan], BlockPlan]:
    return lambda block: replace(block, attention=replace(block.attention, **changes))


def rope(**changes: Any) -> Callable[[BlockPlan], BlockPlan]:
    def changed(block: BlockPlan) -> BlockPlan:
        assert block.attention.rope is not None
        return attention(rope=replace(block.attention.rope, **changes))(block)

    return changed


# A field of the plan that the model does not have like that -> the first step that detects it.
NOT_PLANNED: list[tuple[str, Callable[[BlockPlan], BlockPlan], int]] = [
    ("mistral", attention(window=8), 9), ("gemma2", attention(softcap=None), 7),
    ("granite", attention(scale=0.21), 7), ("qwen2", attention(biases=frozenset()), 6),
    ("qwen3", attention(qk_norm="unweighted"), 7), ("qwen3", attention(qk_norm="none"), 7),
    ("gemma3", attention(qk_norm_after_rope=True), 6), ("smollm3", attention(window=4), 9),
    ("phi3 longrope", rope(attention_factor=1.0), 7), ("qwen2", rope(layout="interleaved"), 7),
    ("phi3 longrope", rope(frequencies=(1.0, 0.1)), 7), ("gemma3", attention(rope=None), 7),
    ("granite", lambda block: replace(block, residual_multiplier=0.5), 10),
    ("gemma2", lambda block: replace(block, norms=frozenset({"pre_attention", "pre_ffn"})), 10),
    ("gemma", lambda block: replace(
        block, feed_forward=replace(block.feed_forward, activation="silu")), 11),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "step"), NOT_PLANNED)
def test_a_wrong_plan_is_detected(
    name: str, change: Callable[[BlockPlan], BlockPlan], step: int, tmp_path: Path
) -> None:
    """The second computation follows the layer plan and not the model."""
    walk = opened(name, tmp_path)
    assert walk.plan is not None
    blocks = tuple(change(block) for block in walk.plan.blocks)
    walk.__dict__["plan"] = replace(walk.plan, blocks=blocks)
    for number in range(5, step):
        run_step(walk, number)
    with pytest.raises(StepMismatchError, match=f"step {step}, "):
        run_step(walk, step)


MODEL_PLANS: list[tuple[str, dict[str, Any], int]] = [
    ("gemma", {"embedding_multiplier": 7.0}, 4), ("granite", {"logit_multiplier": 0.3}, 13),
    ("gemma2", {"logit_softcap": None}, 13),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "step"), MODEL_PLANS)
def test_a_wrong_plan_of_the_model_is_detected(
    name: str, changes: dict[str, Any], step: int, tmp_path: Path
) -> None:
    walk = opened(name, tmp_path)
    plan: ModelPlan | None = walk.plan
    assert plan is not None
    walk.__dict__["plan"] = replace(plan, **changes)
    with pytest.raises(StepMismatchError, match=f"step {step}, "):
        run_step(walk, step)


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "smollm3", "granite", "qwen3"])
def test_the_object_has_every_tensor_of_the_chosen_layer(name: str, tmp_path: Path) -> None:
    walk = opened(name, tmp_path)
    walked = json.loads(json.dumps(to_json(walk, steps=[8, 9])))
    recorded = trace(walk.model, IDS)
    tensors = walked["layers"][str(walk.layer)]
    modules = {"attention", "feed_forward", "attention.wq", "attention.wk", "attention.wv"}
    hooks = {h.removeprefix(f"{walk.prefix}.") for h in recorded if h.startswith(walk.prefix + ".")}
    assert set(tensors) == (hooks - modules) | {"input", "output"}
    for hook in ("attention.weights", "attention.q_rope", "feed_forward.down"):
        array = np.array(tensors[hook]["values"]).reshape(tensors[hook]["shape"])
        assert np.allclose(array, recorded[f"{walk.prefix}.{hook}"][0], rtol=1e-3, atol=1e-6)
    first = recorded[walk.block_input_hook][0].numpy()
    assert np.allclose(np.array(tensors["input"]["values"]), first.reshape(-1), rtol=1e-3)
    plan = walk.checkpoint.layer_plan
    assert walked["windows"] == [block.attention.window for block in plan.blocks]
    assert (walked["angles"] is None) == (name == "smollm3")


def test_the_input_of_the_first_layer_is_multiplied(tmp_path: Path) -> None:
    walk = open_walkthrough(write_family("gemma", tmp_path, "hf"), IDS)
    rows = family_model("gemma").model.embed_tokens.weight[IDS]
    assert torch.allclose(walk.block_input[0], rows * 48**0.5)
    page = html_page(walk, to_json(walk, steps=[4]))
    assert '"embeddings":{"shape":[13,48]' in page


@pytest.mark.parametrize("name", ["gemma3", "phi3 longrope", "olmo2"])
def test_streamed_layers_and_bfloat16(name: str, tmp_path: Path) -> None:
    path = write_family(name, tmp_path, "hf", dtype=torch.bfloat16)
    walk = open_walkthrough(path, IDS, layer=1, stream_layers=True)
    assert walk.dtype == torch.bfloat16
    for number in (*range(4, 14), 15):
        assert not warned(run_step(walk, number))
