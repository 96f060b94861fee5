"""Models that think before they answer, and sampling settings that a model's files recommend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glassllama import LLM, load
from glassllama.base.errors import ConfigError, GenerationError, GlassError, TokenizerError
from glassllama.tokenizers.chat import Message
from scripted_models import R1_LIKE, write_scripted_model

# After the prompt's last line end. A token can occur only once in a script.
THINKS = ["\n", "<think>", "S", "i", "x", "</think>", "4", "2", ".", "<|im_end|>"]
IN_PIECES = ["\n", "<th", "ink>", "S", "i", "x", "</thi", "nk>", "4", "2", ".", "<|im_end|>"]
OPENED = ["\n", "S", "i", "x", "</think>", "4", "2", ".", "<|im_end|>"]
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"script": THINKS},
    "special tokens": {"script": THINKS, "special": True},
    "several tokens": {"script": IN_PIECES, "added": IN_PIECES[1:3] + IN_PIECES[6:8]},
    "opened by the template": {"script": OPENED, "template": R1_LIKE},
}


def model(folder: Path, **changes: Any) -> LLM:
    return load(write_scripted_model(folder, **changes), exact=True)


@pytest.fixture(scope="module", params=KINDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with model(tmp_path_factory.mktemp("thinks"), **KINDS[request.param]) as llm:
        yield llm


def test_an_answer_is_apart_from_its_reasoning(llm: LLM) -> None:
    done = llm.chat("6 × 7?")
    assert (done.reasoning_content, done.text, done.finish_reason) == ("Six", "42.", "stop")
    stream = llm.stream_chat("6 × 7?")
    pieces = [*stream.pieces()]
    assert all(text for _, text in pieces)
    assert "".join(text for kind, text in pieces if kind == "reasoning_content") == "Six"
    assert [kind for kind, _ in pieces] == sorted((kind for kind, _ in pieces), reverse=True)
    assert "".join(llm.stream_chat("6 × 7?")) == "42."
    whole = llm.tokenizer.decode(done.ids)
    assert 0 < done.reasoning_tokens < len(done.ids)
    assert whole.startswith(("<think>Six", "Six"))
    assert llm.generate(llm.encode_chat("6 × 7?")).reasoning_content is None, "raw text is whole"


def test_reasoning_that_is_cut_off_leaves_no_answer(llm: LLM) -> None:
    for count in range(2, 4):
        done = llm.chat("6 × 7?", max_tokens=count)
        assert (done.text, done.finish_reason) == ("", "length")
        assert "Six".startswith(done.reasoning_content or "")


def test_stop_strings_end_the_answer_not_the_reasoning(llm: LLM) -> None:
    done = llm.chat("6 × 7?", stop=["i", "2"])
    assert (done.reasoning_content, done.text, done.finish_reason) == ("Six", "4", "stop")


def test_the_template_decides_about_earlier_reasoning(tmp_path: Path) -> None:
    with model(tmp_path, script=THINKS) as llm:
        answer = Message("assistant", "42.", reasoning_content="Six")
        question = Message("user", "6 × 7?")
        last = llm.chat_format.encode([question, answer], llm.tokenizer)
        assert "<think>\nSix\n</think>\n\n42." in llm.tokenizer.decode(last)
        earlier = llm.encode_chat([question, answer, Message("user", "Sure?")])
        assert "Six" not in llm.tokenizer.decode(earlier)


def test_thinking_can_be_turned_off_where_the_template_reads_it(tmp_path: Path) -> None:
    with model(tmp_path / "a", script=THINKS) as llm:
        ids = llm.encode_chat("Hi", enable_thinking=False)
        assert llm.tokenizer.decode(ids).endswith("<think>\n\n</think>\n\n")
        assert ids == llm.encode_chat("Hi", template_options={"enable_thinking": False})
        assert llm.encode_chat("Hi", enable_thinking=True) == llm.encode_chat("Hi")
        for bad in ("no", 0):
            with pytest.raises(GenerationError, match="enable_thinking must be True or False, got"):
                llm.chat("Hi", enable_thinking=bad)  # type: ignore[arg-type]
        with pytest.raises(GenerationError, match="template_options must be a dict, got 3"):
            llm.chat("Hi", template_options=3)  # type: ignore[arg-type]
        with pytest.raises(TokenizerError, match="does not read documents, tools; options that it"):
            llm.chat("Hi", tools=[{"name": "f"}], template_options={"documents": []})
        with pytest.raises(GenerationError, match="unknown options: tools"):
            llm.generate("Hi", tools=[])  # type: ignore[call-arg]
    with (
        model(tmp_path / "b", script=OPENED, template=R1_LIKE) as llm,
        pytest.raises(TokenizerError, match="does not read enable_thinking"),
    ):
        llm.chat("Hi", enable_thinking=True)


# Sampling settings of generation_config.json

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [259]}
NEUTRAL = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def settings_of(tmp_path: Path, values: Any) -> LLM:
    llm = model(tmp_path, script=THINKS)
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "generation_config.json").write_text(text)
    return llm


@pytest.mark.parametrize(
    ("given", "expected", "shown"),
    [
        ({}, {}, ""),
        ({"eos_token_id": 259, "transformers_version": "5", "_from_model_config": True}, {}, ""),
        (QWEN3, {**NEUTRAL, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
         "temperature 0.6, top_k 20, top_p 0.95"),
        ({"temperature": 0.15}, {**NEUTRAL, "temperature": 0.15}, "temperature 0.15"),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {**NEUTRAL, "top_k": 64, "top_p": 0.95},
         "temperature 1, top_k 64, top_p 0.95"),
        ({"do_sample": False, "temperature": 0.7, "top_k": 9}, {**NEUTRAL, "temperature": 0.0},
         "temperature 0"),
        ({"do_sample": True, "min_p": 0.1, "top_k": 0, "repetition_penalty": 1.05},
         {**NEUTRAL, "min_p": 0.1, "repetition_penalty": 1.05},
         "temperature 1, min_p 0.1, repetition_penalty 1.05"),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"do_sample": None, "temperature": None}, {}, ""),
    ],
)  # fmt: skip
def test_the_files_recommend_sampling_settings(
    given: Any, expected: Any, shown: str, tmp_path: Path
) -> None:
    with settings_of(tmp_path, given) as llm:
        assert llm.sampling_defaults == expected
        assert str(llm.checkpoint.sampling_defaults) == f"{shown} (generation_config.json)" * bool(
            shown
        )
        assert not [note for note in llm.notes if "generation_config" in note]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -1}, "temperature must be a finite number from 0 to 1e+06, got -1"),
        ({"temperature": "0.6"}, "temperature must be a finite number from 0 to 1e+06, got '0.6'"),
        ({"temperature": True}, "temperature must be .*, got True"),
        ('{"temperature": NaN}', "generation_config.json.*NaN|temperature must be .*, got nan"),
        ({"top_p": 2}, "top_p must be .*, got 2"),
        ({"top_p": 0}, "top_p must be .*, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number from 0 .*, got 2.5"),
        ({"top_k": -1}, "top_k must be .*, got -1"),
        ({"min_p": [1]}, "min_p must be .*, got"),
        ({"repetition_penalty": 0}, "repetition_penalty must be .*, got 0"),
        ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(given: Any, words: str, tmp_path: Path) -> None:
    with settings_of(tmp_path, given) as llm:
        for ask in (lambda: llm.generate("a", max_tokens=1), lambda: llm.chat("a")):
            with pytest.raises(GlassError, match=words.replace("+", r"\+")) as caught:
                ask()
            assert "generation_config.json" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_settings_without_effect_have_a_note(tmp_path: Path) -> None:
    given = {
        "num_beams": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [1], "mood": "good",
        "typical_p": 1.0, "length_penalty": 1.0, "bad_words_ids": None, "forced_eos_token_id": [],
        "use_cache": True, "pad_token_id": 0, "max_new_tokens": 5,
    }  # fmt: skip
    with settings_of(tmp_path, given) as llm:
        assert llm.sampling_defaults == {}
        [note] = [note for note in llm.notes if "generation_config" in note]
    named = "max_new_tokens, mood, no_repeat_ngram_size, num_beams, suppress_tokens"
    assert note == f"generation_config.json: {named}: not supported, no effect"


def test_options_of_the_user_win(tmp_path: Path) -> None:
    """At a high temperature random tokens follow; greedy, the script does."""
    hot = {"do_sample": True, "temperature": 1e5}
    with settings_of(tmp_path, hot) as llm:
        drawn = [llm.chat("6 × 7?", seed=n, max_tokens=9).ids for n in range(2)]
        assert drawn[0] != drawn[1]
        assert llm.chat("6 × 7?", temperature=0).text == "42."
        assert llm.chat("6 × 7?", top_k=1, seed=1).text == "42."


def gguf_defaults(**values: Any) -> Any:
    from glassllama.weights.generation_config import defaults_from_gguf

    return defaults_from_gguf({f"general.sampling.{k}": v for k, v in values.items()})


def test_gguf_files_recommend_settings_too() -> None:
    found = gguf_defaults(temp=0.6, top_k=20, penalty_repeat=1.1, mirostat=0, mirostat_tau=5.0)
    expected = {**NEUTRAL, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    assert found.values == expected
    assert found.notes == ()
    assert str(found) == "temperature 0.6, top_k 20, repetition_penalty 1.1 (GGUF)"
    assert gguf_defaults().values == {}
    assert gguf_defaults(mirostat=2, xtc_probability=0.5, sequence="kp").notes == (
        "GGUF: mirostat, sequence, xtc_probability: not supported, no effect",
    )
    with pytest.raises(ConfigError, match=r"general.sampling.\*: temperature must be .*, got -1"):
        gguf_defaults(temp=-1.0)


def test_the_gguf_package_writes_these_keys(tmp_path: Path) -> None:
    import gguf

    from glassllama.formats.gguf import open_gguf
    from glassllama.weights.generation_config import defaults_from_gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(7)
    writer.add_sampling_top_p(0.25)
    writer.add_sampling_min_p(0.125)
    writer.add_sampling_penalty_repeat(1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125}
    found = defaults_from_gguf(open_gguf(tmp_path / "m.gguf").metadata)
    assert found.values == {**expected, "repetition_penalty": 1.5}
