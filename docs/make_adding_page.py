"""Write docs/adding-an-architecture.md: a lesson for contributors, with the files of an example.

The example's files are copied from the sources; the commands of the lesson are run for their
output.

python docs/make_adding_page.py          (a test fails while the page is stale)
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).parent / "adding-an-architecture.md"
MODEL = "src/glassllama/models/exaone4.py"
DESCRIPTION = "src/glassllama/weights/architectures/exaone4.py"
FIXTURES = "tests/tiny_families.py"

HEAD = """# Adding an architecture

A new family of decoders is three files: a **model file**, a **description** and a **row of
fixtures**. This lesson adds EXAONE 4.0 (LG AI Research, 2025); no other file of the program names
it. All code below is the code of the repository; the page is written by
`python docs/make_adding_page.py`.

## 1. Find out what differs from a Llama

Read the paper, the class in transformers (here `modeling_exaone4.py`) and the graph of llama.cpp
(`src/models/exaone4.cpp`). Go through a block from the input to the output, and write down every
difference. Only these questions matter, because a layer plan
([`base/layer_plan.py`](../src/glassllama/base/layer_plan.py)) has no other fields:

| question | EXAONE 4.0 | field of the layer plan |
|---|---|---|
| Where are the norms? | after attention and after the feed-forward network, none before | `norms` |
| Are q and k normalized? | yes, every head, before RoPE | `qk_norm` |
| Has every layer RoPE? | large model: only those with a window; small model: all | `rope` |
| Are there sliding windows? | large model: in three of four layers; small model: none | `window` |
| Biases? | none | `biases` |
| Activation? | SiLU | `activation` |
| Factors of embeddings, residuals, scores, logits? Soft caps? | none | `embedding_multiplier`, … |

If a family needs something that is not in the table, the plan, the reference and the engine get a
new field first, in a change of its own.

## 2. The model file

`{model}` is the model in PyTorch, to be read from top to bottom. It uses the parts of
[`nn/`](../src/glassllama/nn) and [`models/decoder.py`](../src/glassllama/models/decoder.py), which
has embeddings, the loop over the layers and the logits. What is left are the differences of the
table: the norms of q and k, a block with its norms after each part, and what a layer is given.
Parameters have the names of the whole project: `attention.wq`, `post_attention_norm`, …

```python
{model_code}```

## 3. The description

`{description}` says how files name and shape things. The registry imports every module of that
folder, so it needs no entry elsewhere. It contains:

- a **configuration**, a frozen dataclass. It checks itself: wrong sizes are an error that names the
  field.
- a **layer plan**, all that the CPU engine gets to know. There is no engine code to write.
- **readers** of config.json and of GGUF metadata, and a writer of config.json. A key that changes
  the arithmetic and is not read must be in `neutral`, with the only value that is supported; any
  other unread key is named in a note.
- **rules**: our names of the tensors, their names in files, and their shapes.

Take the defaults of missing keys from the configuration class in transformers, not from a published
file: files leave out what is the default. Look up in llama.cpp what the metadata does *not* say;
here it is which layers have a window.

```python
{description_code}```

## 4. The row of fixtures

In `{fixtures}` a family is a tiny random model, written by transformers and by the
`gguf` package. All sizes differ, so that swapped axes are found, and every option is on: the
window is shorter than the prompts. The other rows say which words `show` and the walkthrough must
use, and how the GGUF writer names the norms.

```diff
{fixtures_diff}```

Other conventions of GGUF files that a family may have: the rows of q and k are permuted
(`PERMUTED`), or norms are stored as 1 + w where Hugging Face has w (`ADDS_ONE`).

## 5. Run the tests of the family

```console
$ pytest tests/parity/test_families.py tests/weights/test_bad_families.py \\
      tests/walkthrough/test_families.py tests/cli/test_cli_families.py -k exaone4
```

They compare logits of the reference and of the engine with transformers: whole prompts, chunks with
a cache, batches, both file formats, and what transformers reads of a saved copy. They damage the
files in every way, and run `show`, `validate`, `perplexity` and all steps of the walkthrough. None
of them is written for this family.

## 6. If the logits differ

Compare the layers one by one. The first that differs has the mistake.

```python
{compare_code}```

```console
{right}```

Now with a mistake. Suppose the description forgot that layers without a window have no RoPE:

```python
{mistake_code}```

```console
{wrong}```

Layer 3 is the first one without a window: the error is in what such a layer is given, not in the
norms or the weights, which all layers share. The layer after it differs because its input does.
Then compare the parts within the layer in the same way; [the names of hooks](hooks.md) lists what
can be read.

| what is seen | usual mistake |
|---|---|
| the first layer differs | a norm at another place, rows of q and k permuted, base of RoPE |
| differences grow with the position | RoPE: the order of the pairs, scaling, the rotary width |
| equal up to some position, then not | a window, or scaling beyond the original context |
| all layers equal, logits differ | the last norm, tied embeddings, factor or cap of logits |
| prompts equal, single tokens not | the cache: positions, or keys stored before their norm |
| Hugging Face equal, GGUF not | names of norms, permuted rows, 1 + w, values not in the file |

## 7. Afterwards

- `python docs/make_compare.py` adds the family to the [table of files](compare.md); for a column of
  its own, add a published model to `docs/families.py`.
- `python docs/make_map.py` adds the two files to the [map](map.md).
- If its tokenizer has a new split pattern, see [tokenizers](tokenizers.md); an unknown one is an
  error, never a guess.
"""

COMPARE = """\
import torch
from transformers import Exaone4Config, Exaone4ForCausalLM
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import load_model

torch.manual_seed(0)
theirs = Exaone4ForCausalLM(Exaone4Config(
    hidden_size=48, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
    intermediate_size=140, vocab_size=131, sliding_window=7, layer_types=(
        ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    ),
)).eval()
for name, parameter in theirs.named_parameters():  # fresh weights are too small to be seen
    parameter.data += 0.2 * torch.randn(parameter.shape)
theirs.save_pretrained("tiny")
ids = torch.arange(40)[None]  # (1, T)


@torch.no_grad()
def compare_layers():
    ours, found = load_model(open_checkpoint("tiny")), []
    for layer in ours.layers:
        layer.register_forward_hook(lambda module, inputs, output: found.append(output))
    ours(ids)
    expected = theirs(ids, output_hidden_states=True).hidden_states[1:-1]  # without the last norm
    for number, (a, b) in enumerate(zip(found, expected)):
        apart = float((a - b).abs().max() / b.abs().max())
        print(f"layer {number}:", "equal" if apart < 1e-5 else "DIFFERENT")


compare_layers()
"""
MISTAKE = """\
from glassllama.weights.architectures.exaone4 import Exaone4Config

Exaone4Config.has_rope = lambda config, layer: True
compare_layers()
"""


def outputs() -> tuple[str, str]:
    """What the two pieces of code of the last chapter print."""
    from glassllama.weights.architectures.exaone4 import Exaone4Config

    right, wrong, names = io.StringIO(), io.StringIO(), {}
    whole, method = Path.cwd(), Exaone4Config.has_rope
    with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(right):
                exec(COMPARE, names)
            with contextlib.redirect_stdout(wrong):
                exec(MISTAKE, names)
        finally:
            os.chdir(whole)
            Exaone4Config.has_rope = method  # type: ignore[method-assign]
    return right.getvalue(), wrong.getvalue()


def fixtures() -> str:
    """The statements of the fixtures that name the family, as added lines."""
    added, is_open = [], False
    for line in (ROOT / FIXTURES).read_text("utf-8").split("\n"):
        if "exaone4" in line or is_open:
            added.append(f"+{line}")
            is_open = line.endswith("{") or (is_open and line.strip() != "},")
    return "\n".join(added) + "\n"


def page() -> str:
    right, wrong = outputs()
    return HEAD.format(
        model=MODEL, description=DESCRIPTION, fixtures=FIXTURES,
        model_code=(ROOT / MODEL).read_text("utf-8"),
        description_code=(ROOT / DESCRIPTION).read_text("utf-8"),
        fixtures_diff=fixtures(), compare_code=COMPARE, mistake_code=MISTAKE, right=right,
        wrong=wrong,
    )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
