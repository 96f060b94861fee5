"""All eighteen steps with every kind of checkpoint; and their checks can fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.cells import cell_len

from glassllama.base.errors import ConfigError, GenerationError, GlassError, TokenizerError
from glassllama.models.bigram import Bigram, BigramConfig
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.walkthrough import manual_block
from glassllama.walkthrough import step as step_module
from glassllama.walkthrough.export import Layout, render
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.step import LAYER_DEPTH, StepMismatchError, compare, same, source
from glassllama.walkthrough.steps import output, run_step, step_of_hook
from glassllama.walkthrough.steps.output import round_trip
from glassllama.walkthrough.walkthrough import DamagedWeightsError, Walkthrough, open_walkthrough
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.save import save_model
from rows import Rows
from tiny_models import VARIANTS
from tolerances import assert_logits
from walkthrough.conftest import IDS, random_llama, run_all_steps, warned, write_checkpoint

PROMPT = "the answer to the ultimate question of life, the universe, and everything is "


@pytest.mark.parametrize("family", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("variant", ["scaled-8", "tied", "one kv head"])
def test_every_format(family: str, variant: str, tmp_path: Path) -> None:
    path = write_checkpoint(family, tmp_path, **VARIANTS[variant])
    walk = open_walkthrough(path, IDS, layer=2, head=5)
    steps = run_all_steps(walk)
    layout = "half" if family == "hf" else "interleaved"
    assert steps[8].data["layout"] == walk.config.rope_layout == layout
    assert f"{layout:<11} " in render(steps[8], Layout(80))
    walk.checkpoint.close()


OTHERS: dict[str, dict[str, Any]] = {
    "wide heads": VARIANTS["wide heads"],
    "no groups": VARIANTS["no groups"],
    "linear": VARIANTS["linear"],
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("variant", OTHERS)
def test_every_shape(variant: str, tmp_path: Path) -> None:
    run_all_steps(open_walkthrough(write_checkpoint("hf", tmp_path, **OTHERS[variant]), IDS))


WITH_QK_NORM = {"qk_norm": True, "model_type": "glass_llama", "architectures": None}


@pytest.mark.parametrize("changes", [WITH_QK_NORM, {"max_position_embeddings": 8}], ids=str)
def test_odd_configurations(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_checkpoint("hf", tmp_path)
    written = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(written))
    run_all_steps(open_walkthrough(path, IDS, layer=1))


@pytest.mark.parametrize("text", ["to be, or not", "to bé 🙂"], ids=["known", "unknown"])
def test_a_model_trained_by_this_package(text: str, tmp_path: Path) -> None:
    """A character model with qk_norm, as written by `train`."""
    tokenizer = CharTokenizer("to be, or not to be: that is the question")
    shape = {"vocab_size": tokenizer.vocab_size, "qk_norm": True}
    save_model(tmp_path, random_llama(**shape), tokenizer)
    walk = open_walkthrough(tmp_path, text, layer=2, head=5)
    steps = run_all_steps(walk)
    assert walk.config.qk_norm
    assert walk.ids[0] == tokenizer.bos
    assert "Every character is a token" in steps[0].text
    assert f"becomes {tokenizer.unknown}" in steps[1].text
    assert [check.what for check in steps[1].checks] == ["ids, looked up manually"]
    lengths = walk.manual["attention.q_rope"][0].square().mean(-1)
    assert (
        (lengths - 1).abs() < 1e-3
    ).all()  # except for eps, which is small compared with the squares


def test_a_bigram_is_refused_before_loading(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc")
    model = Bigram(BigramConfig(vocab_size=tokenizer.vocab_size, max_seq_len=8))
    save_model(tmp_path, model, tokenizer)
    with pytest.raises(ConfigError, match=r"explains models with attention, and this is a bigram"):
        open_walkthrough(tmp_path, "abc")


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    from tiny_models import hf_model, write_hf

    walk = open_walkthrough(write_hf(hf_model().bfloat16(), tmp_path), IDS, layer=1)
    run_all_steps(walk)
    assert walk.manual["attention.heads"].dtype == torch.bfloat16


@pytest.mark.parametrize("ids", [[5], [5, 5, 5], [n * 7 % 131 for n in range(80)]], ids=len)
def test_prompts_of_any_length(ids: list[int], tmp_path: Path) -> None:
    walk = open_walkthrough(write_checkpoint("gguf", tmp_path), ids)
    run_all_steps(walk)
    kept = len(walk.trace.matching("layers.*.attention.weights"))
    assert kept == (3 if len(ids) <= 64 else 1)


@pytest.mark.parametrize("variant", ["scaled-8", "tied"])
def test_streamed_layers(variant: str, tmp_path: Path) -> None:
    path = write_checkpoint("meta", tmp_path, **VARIANTS[variant])
    walk = open_walkthrough(path, IDS, layer=1, stream_layers=True)
    run_all_steps(walk)
    whole = open_walkthrough(path, IDS, layer=1)
    assert_logits(walk.logits, whole.logits, walk.config)
    assert torch.equal(walk.lens.ids, whole.lens.ids)
    assert max(compare_with_mistake(walk, MISTAKES["rope-layout"]).divergence) > 1e-3


def test_a_text_with_a_byte_level_vocabulary(with_text: Path) -> None:
    walk = open_walkthrough(with_text, "Lambda forms:\n 🙂 two  blanks é", layer=1)
    steps = run_all_steps(walk)
    assert b"".join(walk.tokenizer.token_bytes(i) for i in walk.ids).decode() == walk.prompt  # type: ignore[union-attr]
    assert steps[0].data["bytes"] == list((walk.prompt or "").encode())
    assert "".join(steps[0].data["pretokens"]) == walk.prompt
    merges = steps[1].data["merges"]
    assert merges[0] == "␣ b l a n k s"  # the letters of the word with the most merges
    for before, after in pairwise(merges):  # two neighbors were merged
        gaps = [at for at, character in enumerate(before) if character == " "]
        assert after in [before[:at] + before[at + 1 :] for at in gaps]
    assert len(merges) > 1
    assert merges[-1] in " ".join(steps[1].data["pieces"])


def test_a_text_with_a_sentencepiece_vocabulary(with_pieces: Path) -> None:
    walk = open_walkthrough(with_pieces, "with statements é 🙂")
    steps = run_all_steps(walk)
    assert steps[1].checks[0].what == "ids, decoded"
    assert steps[1].data["merges"] == []  # merges of SentencePiece are not shown


def test_the_default_model(default_model: Path) -> None:
    from glassllama.weights.pack import pack

    walk = open_walkthrough(default_model, PROMPT, name="smollm2-135m", layer=4, head=7)
    steps = run_all_steps(walk)
    engine = pack(walk.checkpoint, exact=True)
    logits = Rows(engine).all_logits(walk.ids)
    assert_logits(logits, walk.logits[0], walk.config)
    assert walk.tokenizer is not None
    assert walk.tokenizer.decode(walk.ids) == PROMPT
    assert (
        walk.piece(steps[13].data["top"][0]["id"]) == "1"
    )  # a digit: 42 has two tokens in this model
    assert "135 million parameters" in steps[13].text
    assert "For Llama-3-8B the most probable token is 42" in steps[13].text
    assert steps[15].data["continuation"][0]["id"] == int(logits[-1].argmax())
    done = compare_with_mistake(walk, MISTAKES["no-mask"])
    assert max(done.divergence) > 1
    walk.checkpoint.close()


# The first step that detects that the model has another number than the file.
PERTURBED = {
    "tok_embeddings": 4,
    "layers.1.attention_norm": 5,
    "layers.1.attention.wq": 6,
    "layers.1.attention.wv": 6,
    "layers.1.attention.wo": 10,
    "layers.1.ffn_norm": 11,
    "layers.1.feed_forward.up": 11,
    "layers.2.attention.wk": 12,
    "norm": 13,
    "output": 13,
}


@pytest.mark.parametrize("name", PERTURBED)
def test_a_changed_weight_is_detected(name: str, tiny_walk: Walkthrough) -> None:
    weight = tiny_walk.model.get_submodule(name).weight
    weight.view(-1)[IDS[-1] * 48 if name == "tok_embeddings" else 0] *= 1.01
    for number in range(3, PERTURBED[name]):
        assert not warned(run_step(tiny_walk, number))
    assert warned(run_step(tiny_walk, PERTURBED[name]))


@pytest.mark.parametrize("name", PERTURBED)
def test_shifted_rows_of_weights_are_an_error(name: str, tiny_walk: Walkthrough) -> None:
    weight = tiny_walk.model.get_submodule(name).weight
    weight.copy_(weight.roll(1, 0))
    wrong = rf"step {PERTURBED[name]}, .*running model"
    with pytest.raises(StepMismatchError, match=wrong):
        run_step(tiny_walk, PERTURBED[name])


def test_a_changed_file_is_detected(tiny_walk: Walkthrough) -> None:
    weight = tiny_walk.model.get_submodule("layers.1.attention.wq").weight
    weight[0, 0] += 1e-3
    with pytest.raises(StepMismatchError, match=r"step 2, weights file: .*first row"):
        run_step(tiny_walk, 2)


WRONG: dict[str, tuple[int, Callable[..., Any]]] = {
    "rms_norm": (5, lambda x, eps: x),
    "split_heads": (6, lambda x, n: x.unflatten(-1, (-1, n)).movedim(-1, 1)),
    "attention_scores": (9, lambda q, k, scale: q.float() @ k.repeat_interleave(3, 1).float().mT),
    "attention_weights": (9, lambda scores, mask: scores.softmax(-1)),
    "weighted_sum": (10, lambda weights, v: weights @ v.repeat(1, 3, 1, 1)),
    "join_heads": (10, lambda x: x.permute(0, 2, 3, 1).flatten(2)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_changed_function_is_detected(
    name: str, tiny_walk: Walkthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, wrong = WRONG[name]
    monkeypatch.setattr(manual_block, name, wrong)
    for earlier in range(5, number):
        run_step(tiny_walk, earlier)
    with pytest.raises(StepMismatchError, match=f"step {number}, "):
        run_step(tiny_walk, number)


def test_a_wrong_rotation_is_detected(
    tiny_walk: Walkthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {"half": manual_block.ROTATE["interleaved"]}
    monkeypatch.setattr(manual_block, "ROTATE", swapped)
    with pytest.raises(StepMismatchError, match=r"step 8, positions: layers\.1\.attention\.q_rope"):
        run_step(tiny_walk, 8)


def test_a_wrong_top_p_set_is_detected(
    tiny_walk: Walkthrough, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = output.nucleus_ids
    monkeypatch.setattr(output, "nucleus_ids", lambda probs, p: right(probs, p)[:-1])
    with pytest.raises(StepMismatchError, match="step 14, sampling"):
        run_step(tiny_walk, 14)


def test_a_changed_cache_is_detected(tiny_walk: Walkthrough) -> None:
    run_step(tiny_walk, 15)
    tiny_walk.cache.values[1, 0, 0, 2, 0] += 0.1
    assert warned(run_step(tiny_walk, 15))
    tiny_walk.cache.values[1, 0, 0, 2] += 10
    with pytest.raises(StepMismatchError, match="step 15, kv cache"):
        run_step(tiny_walk, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_another_order_stay_within_the_rounding_bound(dtype: torch.dtype) -> None:
    """Nine successive products of random matrices, as in a layer, against float64."""
    chance = torch.Generator().manual_seed(0)
    for size in (48, 1536):
        x = torch.randn(8, size, generator=chance)
        other, exact = x.to(dtype), x.to(dtype).double()
        for _ in range(LAYER_DEPTH):
            matrix = (torch.randn(size, size, generator=chance) / size**0.5).to(dtype)
            order = torch.randperm(size, generator=chance)
            other = other[:, order] @ matrix[order]
            exact = exact @ matrix.double()
        check = compare("x", other, exact, terms=size, depth=LAYER_DEPTH, dtype=dtype)
        assert 0 < check.relative <= check.allowed


def test_the_report_of_a_small_difference() -> None:
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    sums = {"terms": 100, "depth": 2}  # 20 eps
    assert compare("x", a, a, **sums).error == 0
    tiny = compare("x", a + torch.tensor([[0, 1e-6], [0, 0]]), a, **sums)
    assert tiny.error == pytest.approx(1e-6, rel=0.1)
    assert not tiny.warns
    small = compare("x", a + torch.tensor([[0, 1e-5], [0, 0]]), a, **sums)
    assert small.warns
    assert small.result.startswith("warning: differs by 5.0e-06 of the largest")
    with pytest.raises(StepMismatchError, match=r"x: .* 0\.5, 0\.25 of the largest"):
        compare("x", a + torch.tensor([[0, 0.5], [0, 0]]), a, **sums)
    with pytest.raises(StepMismatchError):  # a large row does not hide an error in a small one
        compare("x", a + torch.tensor([[0, 0], [0, 1e-6]]), a, **sums)
    with pytest.raises(StepMismatchError, match="nan"):
        compare("x", a * math.nan, a, **sums)
    with pytest.raises(StepMismatchError, match=r"\(2, 2\), the running model has \(2,\)"):
        compare("x", a, a[0], **sums)
    with pytest.raises(StepMismatchError, match="x: computed 1, the running model has 2"):
        same("x", 1, 2)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("tok_embeddings", 4), ("layers.2.attention_norm", 5), ("layers.0.attention.wk", 6),
        ("layers.2.attention.wo", 10), ("layers.1.ffn_norm", 11), ("layers.1.feed_forward.up", 11),
        ("norm", 13), ("output", 13),
    ],
)  # fmt: skip
def test_the_first_nan_is_located(hook: str, number: int, tiny_walk: Walkthrough) -> None:
    weight = tiny_walk.model.get_submodule(hook).weight
    weight.view(-1)[IDS[0] * 48 if hook == "tok_embeddings" else 0] = math.nan
    seen = "last_logits" if hook == "output" else hook
    with pytest.raises(DamagedWeightsError, match=rf"step {number}, .*{seen}.*NaN") as caught:
        run_step(tiny_walk, 9)
    assert caught.value.hook == seen
    assert "\n" not in str(caught.value)


def test_infinity_is_located(tiny_walk: Walkthrough) -> None:
    tiny_walk.model.layers[1].feed_forward.gate.weight[0, 0] = math.inf
    with pytest.raises(DamagedWeightsError, match=r"step 11, .*layers\.1\.feed_forward\.gate"):
        run_step(tiny_walk, 13)


def test_every_hook_has_a_step(tiny_walk: Walkthrough) -> None:
    explained = {hook: step_of_hook(hook) for hook in tiny_walk.trace}
    assert explained["layers.1.attention.q_rope"] == 8
    assert explained["layers.1.attention.weights"] == 9
    assert explained["layers.1.after_attention"] == 10
    assert explained["layers.1"] == 11
    assert set(explained.values()) == {4, 5, 6, 8, 9, 10, 11, 13}


def test_invalid_requests(tmp_path: Path, with_text: Path) -> None:
    path = write_checkpoint("hf", tmp_path / "a", max_position_embeddings=7)
    for prompt, options, expected in (
        ([], {}, "the prompt is empty"),
        (IDS, {}, "7 tokens; the context is 7"),
        ([131], {}, "outside the vocabulary 0 … 130"),
        ([1], {"layer": 3}, r"--layer 3 .* 0 … 2"),
        ([1], {"layer": -1}, r"--layer -1 "),
        ([1], {"head": 6}, r"--head 6 .* 0 … 5"),
    ):
        with pytest.raises(GlassError, match=expected):
            open_walkthrough(path, prompt, **options)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="no tokenizer"):
        open_walkthrough(path, "text")
    with pytest.raises(GenerationError, match="the prompt is empty"):
        open_walkthrough(with_text, "")
    for number in (-1, 18):
        with pytest.raises(GlassError, match=rf"--step {number} is out of range: there are 0 … 17"):
            run_step(open_walkthrough(path, [1]), number)


def test_control_tokens_in_the_prompt(default_model: Path) -> None:
    """Encoded as text by default; on request as tokens with one id each."""
    prompt = "<|im_start|>user\nHi<|im_end|>"
    as_text = open_walkthrough(default_model, prompt)
    assert len(as_text.ids) > 10
    assert "".join(run_step(as_text, 0).data["pretokens"]) == prompt
    walk = open_walkthrough(as_text.checkpoint, prompt, specials=True, model=as_text.model)
    assert walk.tokenizer is not None
    assert list(walk.ids) == walk.tokenizer.encode(prompt, bos=True, specials=True)
    assert run_step(walk, 0).data["pretokens"] == ["<|im_start|>", "user", "\n", "Hi", "<|im_end|>"]
    step = run_step(walk, 1)
    assert [check.what for check in step.checks] == ["ids, decoded"]
    assert "--specials --step 1" in step.command


def test_the_error_names_an_unknown_architecture(tmp_path: Path) -> None:
    path = write_checkpoint("hf", tmp_path)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**written, "architectures": ["MambaForCausalLM"]})
    )
    with pytest.raises(ConfigError, match=r"Mamba.*, supported are .*llama"):
        open_walkthrough(path, [1])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tiny_walk: Walkthrough) -> None:
    done = compare_with_mistake(tiny_walk, MISTAKES[name])
    assert len(done.divergence) == len(IDS)
    assert done.runs["correct"].predictions.ids.shape == (7, 10)
    assert max(done.divergence) > 1e-3
    shown = render(done, Layout(80))
    assert "correct model predicts" in shown
    assert done.source.lines[-1] in shown or name != "rope-layout"
    assert all(cell_len(line) <= 80 for line in shown.splitlines())


def test_source_lines_equal_the_files(tiny_walk: Walkthrough) -> None:
    for number in range(18):
        for found in run_step(tiny_walk, number).sources:
            text = (step_module.PACKAGE / found.file).read_text().splitlines()
            assert text[found.line - 1].strip() == found.lines[0].strip()
            assert all(line.strip() in {known.strip() for known in text} for line in found.lines)
    with pytest.raises(LookupError, match="attention_scores has no statement 'gone ='"):
        source(manual_block.attention_scores, "gone =")


def test_colors_only_if_asked_for(tiny_walk: Walkthrough) -> None:
    step = run_step(tiny_walk, 5)
    assert "\x1b[" not in render(step, Layout(80))
    assert "\x1b[1m" in render(step, Layout(80, color=True))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rows_are_padded_to_whole_blocks(kind: Any) -> None:
    matrix = torch.randn(600, 96, generator=torch.Generator().manual_seed(3))
    back = round_trip(matrix[:, :70], kind)
    assert back.shape == (600, 70)
    assert torch.equal(back[:, :64], round_trip(matrix[:, :64], kind))
    theirs = gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType[kind])
    expected = gguf.dequantize(theirs, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(round_trip(matrix, kind).numpy(), expected)
    assert torch.equal(
        round_trip(matrix.bfloat16(), kind), round_trip(matrix.bfloat16().float(), kind).bfloat16()
    )


@pytest.mark.parametrize("spread", [0.01, 0.5, 4.0])
@pytest.mark.parametrize("size", [37, 50_000])
def test_ties_at_the_boundary_of_top_p(spread: float, size: int) -> None:
    """bfloat16 has few different logits: thousands of tokens may be equally likely."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)) * spread
    for kept in (logits.bfloat16().float(), logits, torch.zeros(size)):
        scaled, theirs = output.softmax(kept, 0.6), output.sampler_probs(kept)
        nucleus = output.nucleus_ids(scaled, 0.9)
        ours = output.nucleus_probs(scaled, nucleus, theirs)
        both = (torch.from_numpy(probs).float() for probs in (ours, theirs))
        assert not compare("probs", *both, terms=size, depth=output.DEPTH).warns
        assert abs(len(nucleus) - np.count_nonzero(theirs)) <= size // 10_000
        below = np.setdiff1d(np.arange(size), nucleus)
        assert scaled[below].max(initial=0.0) < scaled[nucleus].min()


def test_several_walkthroughs_of_one_model(tiny_walk: Walkthrough) -> None:
    other = open_walkthrough(tiny_walk.checkpoint, IDS[:3], model=tiny_walk.model, head=1)
    run_step(tiny_walk, 15)
    run_step(other, 15)
    assert torch.equal(run_step(replace(other, head=2), 4).numbers[0].values,
                       run_step(other, 4).numbers[0].values)  # fmt: skip
    again = open_checkpoint(tiny_walk.checkpoint.path)
    assert open_walkthrough(again, IDS, model=tiny_walk.model).layer == 0
    again.close()
