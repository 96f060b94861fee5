"""The walkthrough of GPT-2: all steps, its tensors against transformers, and failing checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Verb
from glassllama.base.errors import GlassError
from glassllama.models.gpt import GPT, GPTConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.walkthrough.export import html_page, to_json
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.step import StepMismatchError
from glassllama.walkthrough.steps import run_step, step_of_hook
from glassllama.walkthrough.walkthrough import Walkthrough, open_walkthrough
from glassllama.weights.save import save_model
from tolerances import assert_logits
from walkthrough.conftest import IDS, gpt2_model, run_all_steps, warned

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {"n_inner": None},
    "relu": {"activation_function": "relu"},
    "exact gelu, own output": {"activation_function": "gelu", "tie_word_embeddings": False},
    "one layer, one head": {"n_layer": 1, "n_head": 1},
}


@pytest.fixture
def gpt2(tmp_path: Path) -> Iterator[Walkthrough]:
    """Layer 1, head 3; its weights may be changed."""
    gpt2_model().save_pretrained(tmp_path)
    walk = open_walkthrough(tmp_path, IDS, layer=1, head=3)
    yield walk
    walk.checkpoint.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_steps_of_every_variant(variant: str, tmp_path: Path) -> None:
    gpt2_model(**VARIANTS[variant]).save_pretrained(tmp_path)
    steps = run_all_steps(open_walkthrough(tmp_path, IDS))
    assert [steps[n].name for n in (8, 11)] == ["positions", "feed_forward"]
    assert steps[5].title == "LayerNorm"


def test_all_steps_without_biases(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("to be, or not to be")
    sizes = {"dim": 30, "n_layers": 2, "n_heads": 5, "ffn_dim": 77, "max_seq_len": 40}
    model = GPT(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size, bias=False))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(tmp_path, model, tokenizer)
    steps = run_all_steps(open_walkthrough(tmp_path, "to be", layer=1, head=4))
    assert not any("bias is added" in step.text for step in steps)


@torch.no_grad()
def test_tensors_are_those_of_transformers(gpt2: Walkthrough) -> None:
    theirs = gpt2_model()(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    config = gpt2.config
    names = [
        "embeddings",
        "layers.0",
        "layers.1",
        "norm",
    ]  # the last one of transformers is normalized
    for layers, (name, expected) in enumerate(zip(names, theirs.hidden_states, strict=True)):
        assert_logits(gpt2.trace[name], expected, config, layers=max(layers, 1))
    for layer, expected in enumerate(theirs.attentions):
        weights = gpt2.trace[f"layers.{layer}.attention.weights"]
        assert_logits(weights, expected, config, layers=layer + 1)
    assert_logits(gpt2.trace["last_logits"], theirs.logits, config)


def test_every_hook_has_a_step(gpt2: Walkthrough) -> None:
    steps = {name: step_of_hook(name) for name in gpt2.trace}
    assert steps["pos_embeddings"] == 4
    assert steps["layers.1.feed_forward.activated"] == 11
    assert set(steps.values()) == {4, 5, 6, 9, 10, 11, 13}


# The step whose check detects that this weight of the model differs from the file.
CHANGED = {
    "tok_embeddings.weight": 4, "pos_embeddings.weight": 4, "layers.1.attention_norm.bias": 5,
    "layers.1.attention.wq.weight": 6, "layers.1.attention.wv.bias": 6,
    "layers.1.attention.wo.bias": 10, "layers.1.ffn_norm.weight": 11,
    "layers.1.feed_forward.up.bias": 11, "layers.2.feed_forward.down.bias": 12, "norm.bias": 13,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_weight_is_detected(name: str, gpt2: Walkthrough) -> None:
    weight = gpt2.model.get_parameter(name)
    row = IDS[-1] if name.startswith("tok") else len(IDS) - 1 if name.startswith("pos") else 0
    weight.view(-1)[row * weight.shape[-1] if weight.ndim == 2 else 0] *= 1.01
    for number in range(3, CHANGED[name]):
        assert not warned(run_step(gpt2, number))
    assert warned(run_step(gpt2, CHANGED[name]))


def test_weights_in_another_order_are_an_error(gpt2: Walkthrough) -> None:
    weight = gpt2.model.get_parameter("layers.1.feed_forward.up.weight")
    weight.copy_(weight.roll(1, 0))
    with pytest.raises(StepMismatchError, match=r"step 11, .*running model"):
        run_step(gpt2, 11)


def test_mistakes(gpt2: Walkthrough) -> None:
    for name in ("no-mask", "scale"):
        assert max(compare_with_mistake(gpt2, MISTAKES[name]).divergence) > 1e-5
    with pytest.raises(GlassError, match="rope-layout: this GPT has no RoPE"):
        compare_with_mistake(gpt2, MISTAKES["rope-layout"])
    assert not run_step(gpt2, 13).checks[-1].warns


def test_the_html_page_contains_every_tensor(gpt2: Walkthrough) -> None:
    page = html_page(gpt2, to_json(gpt2, layers=[0, 1]))
    start = page.index('id="document">') + len('id="document">')
    document = json.loads(page[start : page.index("</script>", start)])
    assert document["walk"]["angles"] is None
    assert document["outside"]["embeddings"]["shape"] == [len(IDS), 30]
    assert "feed_forward.activated" in document["walk"]["layers"]["0"]


def test_the_command_with_every_output_format(
    gpt2_folder: Path, verb: Verb, tmp_path: Path
) -> None:
    text = verb("walkthrough", "lambda forms", "-m", gpt2_folder, "--layer", 1)
    assert (text.code, text.err) == (0, "")
    assert "✓ layers.1.feed_forward.activated" in text.out
    walked = json.loads(verb("walkthrough", "lambda", "-m", gpt2_folder, "--json").out)
    assert [step["number"] for step in walked["steps"]] == list(range(18))
    assert walked["config"]["n_kv_heads"] == walked["config"]["n_heads"]
    html = verb("walkthrough", "lambda", "-m", gpt2_folder, "--html", tmp_path / "gpt.html")
    assert (html.code, html.out) == (0, f"{tmp_path / 'gpt.html'}\n")
