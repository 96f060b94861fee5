"""Small Llamas that write a given text: each token is followed by the one that a script names.

Embeddings are unit vectors and the blocks add nothing, so the last token alone decides: row b of
the output matrix is the unit vector of a where the script says a → b.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

import tokenizers
from byte_level_families import trained

WIDTH = 384  # more than the vocabulary has tokens
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
QWEN3_LIKE = (
    "{%- for turn in messages %}{{- '<|im_start|>' + turn.role + '\\n' }}"
    "{%- if turn.reasoning_content and loop.last %}"
    "{{- '<think>\\n' + turn.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- turn.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
R1_LIKE = (
    "{%- for turn in messages %}{{- '<|im_start|>' + turn.role + '\\n' }}"
    "{{- turn.content.split('</think>')[-1] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)


def write_scripted_model(
    folder: Path,
    script: Sequence[str],
    template: str = QWEN3_LIKE,
    *,
    added: Sequence[str] = ("<think>", "</think>"),
    special: bool = False,
    **generation: Any,
) -> Path:
    """A Hugging Face folder; `script` are tokens, of which the first is the end of a prompt.

    Characters are tokens, and so are the texts in `added`. `generation` is written into
    generation_config.json.
    """
    inner = trained("gpt2", "", size=256, specials=[])
    inner.add_special_tokens([*CONTROLS, *(added if special else ())])
    inner.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    ).save_pretrained(folder)
    ids = [inner.encode(text).ids for text in script]
    assert all(len(each) == 1 for each in ids), "every text of a script is one token"
    assert len({each[0] for each in ids}) == len(ids), "a token has one successor"
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=32, vocab_size=inner.get_vocab_size(),
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size, WIDTH))
        model.lm_head.weight.zero_()
        for (a,), (b,) in itertools.pairwise(ids):
            model.lm_head.weight[b, a] = 1.0
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
