"""The Python API with the default model: text in, text out, and every way an answer can end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import glassllama
from glassllama import LLM, load
from glassllama.base.errors import ConfigError, GenerationError, GlassError
from glassllama.weights.backend import choose_backend
from tolerances import assert_logits, assert_same_greedy, logits_tolerance, unit

QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return load(default_model)


@pytest.fixture(scope="module")
def exact(default_model: Path) -> LLM:
    return load(default_model, exact=True)


def test_public_names_exist() -> None:
    for name in glassllama.__all__:
        assert getattr(glassllama, name)
    with pytest.raises(AttributeError, match="lood"):
        glassllama.lood  # noqa: B018


def test_chat_answers(llm: LLM) -> None:
    answer = llm.chat(QUESTION)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.ids[-1] in llm.tokenizer.stop_ids
    assert answer.timings.prompt_tokens == len(answer.prompt_ids)
    assert "<|im_end|>" not in answer.text


def test_streamed_text_equals_the_text(llm: LLM) -> None:
    prompt = "日本語と한국어と emoji 🙂: "
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    stream = llm.stream(prompt, **options)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text
    assert stream.completion.text == llm.generate(prompt, **options).text
    assert len(stream.completion.ids) == 40


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(exact: LLM) -> None:
    prompts = ["The sea", "def main():\n    ", "Once upon a time there was a", "1 + 1 ="]
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 11}
    together = exact.generate_batch(prompts, **options)
    for prompt, row in zip(prompts, together, strict=True):
        assert exact.generate(prompt, **options).ids == row.ids
    assert together[0].ids != exact.generate(prompts[0], **{**options, "seed": 12}).ids


def test_batches_are_streamed_row_by_row(exact: LLM) -> None:
    prompts = ["The sea", "1, 2, 3, 4,", "Once upon a time there was a"]
    options = {"max_tokens": 12, "stop": [" 7"]}
    together = exact.generate_batch(prompts, **options)
    stream, texts = exact.stream_batch(prompts, **options), ["", "", ""]
    for row, piece in stream:
        texts[row] += piece
    assert texts == [done.text for done in stream.completions] == [done.text for done in together]
    assert len({done.text for done in together}) == 3
    stream, rows = exact.stream_batch(prompts, **options), []
    for row, _ in stream:
        rows.append(row)
        stream.cancel(0)
    assert rows.count(0) == 1 < rows.count(2)
    assert stream.completions[2].ids == together[2].ids


def test_both_backends_give_the_same_text(default_model: Path, exact: LLM) -> None:
    torch = load(default_model, backend="torch", exact=True)
    ids = exact.encode_chat(QUESTION)
    theirs, ours = (llm.generate(ids, max_tokens=16).ids for llm in (torch, exact))
    assert_same_greedy(ours, theirs, ids, torch.logits, logits_tolerance(exact.checkpoint.config))
    assert_logits(exact.logits(ids), torch.logits(ids), exact.checkpoint.config)


def test_streamed_layers_give_the_same_text(default_model: Path, exact: LLM) -> None:
    streamed = load(default_model, stream_layers=True, exact=True)
    theirs, ours = (llm.generate("The sea", max_tokens=3).ids for llm in (streamed, exact))
    prompt, bar = exact.tokenizer.encode("The sea"), logits_tolerance(exact.checkpoint.config)
    assert_same_greedy(ours, theirs, prompt, streamed.logits, bar)


def test_stop_strings_end_the_answer_and_are_not_shown(llm: LLM) -> None:
    whole = llm.generate("1, 2, 3, 4,", max_tokens=30)
    assert ", 7," in whole.text
    cut = llm.generate("1, 2, 3, 4,", max_tokens=30, stop=[", 7", "zebra"])
    assert cut.text == whole.text[: whole.text.index(", 7")]
    assert cut.finish_reason == "stop"
    assert len(cut.ids) < len(whole.ids)
    rows = llm.generate_batch(["1, 2, 3, 4,", "A B C D"], max_tokens=30, stop=[", 7"])
    assert rows[0].text == cut.text


def test_logprobs_are_computed_before_sampling_settings(exact: LLM) -> None:
    out = exact.generate(
        "The capital of France is", max_tokens=4, logprobs=3, temperature=0.7, seed=1
    )
    assert out.logprobs is not None
    logits = exact.logits([*out.prompt_ids, *out.ids])
    for n, step in enumerate(out.logprobs):
        row = logits[len(out.prompt_ids) - 1 + n].astype(np.float64)
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert step.id == out.ids[n]
        # Bit-identical logits; the error of log-softmax in float32 is a few u of the largest.
        assert abs(step.logprob - expected[step.id]) <= 8 * unit() * np.abs(row).max()
        assert [t.id for t in step.top] == np.argsort(-row, kind="stable")[:3].tolist()
    assert exact.generate("Hi", max_tokens=1).logprobs is None


def test_limits_and_their_errors(llm: LLM) -> None:
    assert len(llm.generate("Hello", max_tokens=5, ignore_eos=True).ids) == 5
    short = llm.generate("Hello there, how", context=10, ignore_eos=True)
    assert len(short.prompt_ids) + len(short.ids) == 10
    assert short.finish_reason == "length"
    with pytest.raises(GenerationError, match="no room"):
        llm.generate([5] * 8192)
    with pytest.raises(GenerationError, match="empty"):
        llm.generate([])
    with pytest.raises(GenerationError, match="49152"):
        llm.generate([49152])
    with pytest.raises(GenerationError, match="temprature"):
        llm.generate("x", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(GenerationError, match=r"top_p.*1\.5"):
        llm.generate("x", top_p=1.5, temperature=1.0)
    with pytest.raises(GenerationError, match="at least one id"):
        llm.logits([])


def test_a_closed_stream_stops(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", max_tokens=200)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert len(stream.completion.ids) == 1


def test_invalid_combinations_of_backend_and_device() -> None:
    assert choose_backend("auto", "cpu", None) == "engine"
    assert choose_backend("auto", "cuda", None) == "torch"
    assert choose_backend("auto", "cpu", "float32") == "torch"
    for asked in (("engine", "cuda", None), ("engine", "cpu", "float32"), ("gpu", "cpu", None)):
        with pytest.raises(ConfigError):
            choose_backend(*asked)  # type: ignore[arg-type]


def test_streaming_layers_requires_the_torch_backend() -> None:
    assert choose_backend("auto", "cpu", None, True) == "torch"
    assert choose_backend("torch", "cpu", None, True) == "torch"
    with pytest.raises(ConfigError, match="--stream-layers is for the torch backend"):
        load("no-such-model", backend="engine", stream_layers=True)
    with pytest.raises(ConfigError, match="backend must be auto or engine or torch, got 'bogus'"):
        load("no-such-model", backend="bogus", stream_layers=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"quantize": "q8_0"}, {"cache": "int8"}], ids=str)
def test_errors_of_options_that_streamed_layers_do_not_support(
    asked: dict[str, str], default_model: Path
) -> None:
    with pytest.raises(ConfigError, match=r"for the engine.*--stream-layers"):
        load(default_model, stream_layers=True, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"dtype": "int8"}, "dtype must be None or float32 or bfloat16, got 'int8'"),
        ({"quantize": "q5"}, "quantize must be None or none or q8_0 or q4_0, got 'q5'"),
        ({"cache": "int4"}, "cache must be int16 or int8, got 'int4'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, .*, got 0"),
        ({"threads": -3}, "got -3"),
        ({"threads": "2"}, "got '2'"),
        ({"threads": True}, "got True"),
        ({"device": None}, "device must be a name such as cpu or cuda:0, got None"),
        ({"device": 0}, "device must be a name .*, got 0"),
    ],
    ids=str,
)
def test_invalid_options_of_load(asked: dict[str, object], words: str) -> None:
    for backend in ("auto", "torch"):
        with pytest.raises(ConfigError, match=words):
            load("no-such-model", backend=backend, **asked)  # type: ignore[arg-type]


def test_ids_may_be_an_array(llm: LLM) -> None:
    ids = llm.encode("The sea")
    array = np.array(ids)
    assert llm.generate(array, max_tokens=2).ids == llm.generate(ids, max_tokens=2).ids  # type: ignore[arg-type]
    np.testing.assert_array_equal(llm.logits(array), llm.logits(ids))  # type: ignore[arg-type]


def test_invalid_prompts_are_refused(llm: LLM) -> None:
    for bad in (b"hi", bytearray(b"hi"), None, 3):
        with pytest.raises(GenerationError, match="a prompt must be a text or a list of ids, got"):
            llm.generate(bad)  # type: ignore[arg-type]
        with pytest.raises(GenerationError, match="logits must be a list of ids"):
            llm.logits(bad)  # type: ignore[arg-type]
    for bad in (b"hi", None, 3, {"role": "user", "content": "hi"}):
        with pytest.raises(GenerationError, match="messages must be a text or a list of messages"):
            llm.chat(bad)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="prompts must be a list of texts or of ids"):
        llm.generate_batch("hi")
    for ids in ([1.5], ["a"], [True], [np.True_], np.zeros((2, 2), int)):
        with pytest.raises(GenerationError, match="is no id"):
            llm.logits(ids)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="logits: id 49152 at position 1"):
        llm.logits([5, 49152])
    assert llm.tokenizer.bos is None
    with pytest.raises(GenerationError, match=r"the text is empty.*at least one character"):
        llm.generate("")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", "0"), ("temperature", None), ("top_p", "1"), ("top_k", "1"),
        ("stop", 3), ("stop", "word"), ("stop", [3]), ("stop", None),
        ("max_tokens", "3"), ("logprobs", 1.5), ("context", "9"), ("seed", "x"),
    ],
)  # fmt: skip
def test_errors_name_options_of_the_wrong_type(option: str, value: object, llm: LLM) -> None:
    with pytest.raises(GenerationError, match=rf"{option} must be .*, got"):
        llm.generate("hi", **{option: value})  # type: ignore[typeddict-item]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate("a", stop=LONG),
        lambda llm: llm.generate("a", stop=[5] * 50_000),
        lambda llm: llm.logits(LONG),
        lambda llm: llm.logits([LONG]),
        lambda llm: llm.logits([10**5000]),
        lambda llm: llm.generate([LONG]),
        lambda llm: llm.generate_batch(LONG),
        lambda llm: llm.chat({"a": LONG}),
        lambda llm: llm.generate("a", **{LONG: 1}),
        lambda llm: llm.generate("a", **{f"x{n}": 1 for n in range(9999)}),
        lambda llm: llm.generate("a", temperature=LONG),
        lambda llm: llm.generate("a", temperature=10**5000),
        lambda llm: llm.generate("a", seed=LONG),
        lambda llm: llm.generate("a", context=10**5000),
        *(
            lambda _, option=option: load("no-such-model", **{option: LONG})
            for option in ("backend", "dtype", "quantize", "cache", "threads")
        ),
        lambda _: load("no-such-model", backend="engine", device=LONG),
    ],
)
def test_long_values_are_shortened_in_errors(ask: Callable[[LLM], object], llm: LLM) -> None:
    with pytest.raises(GlassError) as caught:
        ask(llm)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_errors_of_load(default_model: Path, tmp_path: Path) -> None:
    with pytest.raises(GlassError, match="smollm2-135m"):
        load("smolm2-135m")
    with pytest.raises(GlassError, match="no-such-device"):
        load(default_model, device="no-such-device")
    with pytest.raises(ConfigError, match="float32"):
        load(default_model, exact=True, dtype="bfloat16")


@pytest.mark.parametrize("count", [8193, 33_025])
def test_more_ids_than_the_context_are_refused(llm: LLM, count: int) -> None:
    """33,025 ids, one more than 129 times 256, once caused a write beyond a buffer."""
    ids = [1] * count
    with pytest.raises(GenerationError, match=f"{count} tokens.*context of 8192"):
        llm.logits(ids)
    for ask in (llm.generate, llm.stream, lambda ids: llm.generate_batch([[1], ids])):
        with pytest.raises(GenerationError, match=f"{count} ids and the context holds 8192"):
            ask(ids)


def test_a_prompt_that_is_far_too_long_is_refused_early(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without encoding all of it."""
    encoded: list[int] = []
    real = type(llm.tokenizer).encode

    def encode(self: object, text: str, **options: bool) -> list[int]:
        encoded.append(len(text))
        return real(self, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(llm.tokenizer), "encode", encode)
    with pytest.raises(GenerationError, match=r"30,000,000 characters, more than .* no room"):
        llm.stream("words " * 5_000_000, max_tokens=1)
    assert max(encoded) < 1_000_000
