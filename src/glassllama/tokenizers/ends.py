"""Which tokens end an answer by their name, besides those that a file gives by number.

Files often name one end (of the text) and mean two (of a turn as well). The table has the names at
which llama.cpp ends; like there, a token of such a name is a control token, whatever its file says.
Source: llama.cpp, src/llama-vocab.cpp, end-of-generation tokens (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping

END_OF_ANSWER = frozenset((
    # end of a turn or a text
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
    "</s>", "<eos>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~[",
    # call of a tool, or what comes after an answer
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>",
    # filling in the middle: padding, the next file, the next repository
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
))  # fmt: skip


def end_ids(ids: Mapping[str, int]) -> set[int]:
    """The ids, of these tokens, that end an answer by their name."""
    ends = {name: ids[name] for name in END_OF_ANSWER if name in ids}
    calls = {"<|call|>", "<|calls|>"} & ends.keys()
    if calls and {"<|return|>", "<|flush|>"} & ends.keys():
        ends.pop("<|end|>", None)  # there it ends a part of the answer
    if "<|tool_response>" in ends:
        ends.pop("</s>", None)
    return {*ends.values()}
