# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A prompt through a Llama, step by step
#
# Eighteen steps, from the bytes of a text to the second token of the answer. Every number is
# computed from the weights in the file, line by line, and then compared with the one that the
# running model has at the same point. If the two differ by more than rounding, the cell stops with
# an error.
#
# Each step has a question, the lines of source code that answer it, numbers, a picture and the
# check (✓). The cell after it changes something: guess the result first, then run it, then change
# it further.
#
# Letters for sizes: T tokens, S visible tokens, C model width, H query heads, K KV heads, D head
# width, F feed-forward width, V vocabulary.

# %%
from dataclasses import replace

import torch
from IPython.display import display
from notebook_display import show

from glassllama.generation.sampler import make_sampler
from glassllama.hub import resolve
from glassllama.nn.attention import attention_weights
from glassllama.nn.rope import ROTATE, rope_angles, rope_table
from glassllama.walkthrough import Intervention, ablate_head, patch, predictions, trace
from glassllama.walkthrough.mistakes import MISTAKES, compare_with_mistake
from glassllama.walkthrough.step import Bars, HeatMap, Table
from glassllama.walkthrough.steps import run_step
from glassllama.walkthrough.steps.output import quantization_error, seconds_by_part
from glassllama.walkthrough.walkthrough import open_walkthrough

# %% [markdown]
# **The only line you need to change** is `MODEL`: a name that `glassllama list` knows, or a path:
# a folder in Meta's format (`params.json`, `consolidated.00.pth`, `tokenizer.model`), a Hugging
# Face folder, or a GGUF file.

# %%
MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
LAYER, HEAD = 3, 4  # the layer and head to show; the last ones if the model has fewer

# %%
walk = open_walkthrough(resolve(MODEL), PROMPT, name=MODEL)
model, config = walk.model, walk.config
walk = replace(walk, layer=min(LAYER, config.n_layers - 1), head=min(HEAD, config.n_heads - 1))
prefix = walk.prefix  # the hooks of the chosen layer begin with this
last_layer = config.n_layers - 1


def other_prompt(text):
    """The same model, another text."""
    return open_walkthrough(
        walk.checkpoint, text, model=model, name=MODEL, layer=walk.layer, head=walk.head
    )


def next_token_bars(logits, count=5):
    """The most probable next tokens for a row of logits (V,)."""
    best = predictions(logits, count)
    pairs = zip(best.ids.tolist(), best.probs.tolist(), strict=True)
    rows = [(walk.piece(id), p, f"{p:.1%}") for id, p in pairs]
    return show(Bars("next token", rows, top=1.0))


print(f"{len(walk.ids)} tokens, {config.n_layers} layers, layer {walk.layer} and head {walk.head}")

# %% [markdown]
# ## 0 · The prompt and its bytes
# A model does not see letters. A text is a sequence of bytes (UTF-8), which is first split into
# pre-tokens, roughly words. No token crosses the boundary of a pre-token.

# %%
show(run_step(walk, 0))

# %% [markdown]
# **What if** the text has two spaces, a tab, an umlaut and an emoji? How many bytes has each?

# %%
show(run_step(other_prompt("Two  spaces,\ta tab, Zürich 🙂"), 0))

# %% [markdown]
# ## 1 · Merges: from bytes to token ids
# Inside a pre-token, neighboring parts are merged: first the pair that was most frequent in the
# text on which the tokenizer was trained. What cannot be merged further is a token; its number in
# the vocabulary is its id. The rest of the model works with ids only.

# %%
show(run_step(walk, 1))

# %% [markdown]
# **What if** the text ends with a space? A space usually begins the *next* token, so a single space
# at the end is unusual, and the prediction is different.

# %%
without_space, with_space = PROMPT.rstrip(), PROMPT.rstrip() + " "
for text in (without_space, with_space):
    tried = other_prompt(text)
    print(list(tried.ids), tried.pieces)

# %%
next_token_bars(other_prompt(with_space).logits[0, -1])

# %% [markdown]
# ## 2 · The weights file
# Everything that the model has learned is in a file of named tensors. The file is mapped into
# memory: only the bytes that are used are read. Below is the first row of one matrix, as bytes and
# as numbers.

# %%
show(run_step(walk, 2))

# %% [markdown]
# **What if** you look at another tensor? The weights of a norm are a single row.

# %%
info = walk.checkpoint.info(f"{prefix}.ffn_norm.weight")
print(info.name, info.dtype, info.shape, f"{info.nbytes:,} bytes from byte {info.offset:,}")
print(walk.block_parameter("ffn_norm.weight")[:8])

# %% [markdown]
# ## 3 · The configuration
# About a dozen numbers distinguish one Llama from another. The number of parameters follows from
# them, and must be the number of parameters in the file.

# %%
show(run_step(walk, 3))

# %% [markdown]
# **What if** this model were twice as wide, or twice as deep?


# %%
def parameters(c):
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer = 2 * c.dim * (queries + keys) + 3 * c.dim * c.ffn_dim + 2 * c.dim
    return (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim + c.n_layers * layer + c.dim


wide = replace(config, dim=2 * config.dim, n_heads=2 * config.n_heads,
               n_kv_heads=2 * config.n_kv_heads, ffn_dim=2 * config.ffn_dim)  # fmt: skip
deep = replace(config, n_layers=2 * config.n_layers)
for name, c in {"this model": config, "twice as wide": wide, "twice as deep": deep}.items():
    print(f"{name:14} {parameters(c):>16,} parameters")

# %% [markdown]
# ## 4 · Embedding: one row of a matrix for each token
# The id of a token selects a row of the embedding matrix. These vectors are the beginning of the
# **residual stream**, to which every layer adds.

# %%
show(run_step(walk, 4))

# %% [markdown]
# **What if** a word occurs twice? Both rows are the same here. After one layer they are not,
# because attention has added information about different neighbors.

# %%
twice = other_prompt("again and again")
recorded = trace(model, twice.ids, hooks=["tok_embeddings", "layers.0"])
for hook in ("tok_embeddings", "layers.0"):
    rows = torch.nn.functional.normalize(recorded[hook][0].float(), dim=-1)
    cosines = (rows @ rows.T).numpy()
    display(show(HeatMap(f"{hook}: cosine similarity", cosines, twice.pieces, top=1.0)))

# %% [markdown]
# ## 5 · RMSNorm
# A layer first normalizes its input: each vector is divided by the root of the mean of its
# squares, then every channel is multiplied by a learned weight. The residual stream itself does
# not change.

# %%
show(run_step(walk, 5))

# %% [markdown]
# **What if** the vector were a thousand times longer? The output of the norm is nearly the same.

# %%
norm = model.layers[walk.layer].attention_norm
x = walk.block_input[0, -1]
with torch.no_grad():
    print("largest difference:", float((norm(1000 * x) - norm(x)).abs().max()))

# %% [markdown]
# ## 6 · Queries, keys and values
# Three matrices compute three vectors for every token: the query and the key, from which attention
# weights are computed, and the value, which is added up with these weights. Each is split into
# heads.

# %%
show(run_step(walk, 6))

# %% [markdown]
# **What if** you look at another head? The same token has another query there.

# %%
show(run_step(replace(walk, head=config.n_heads - 1), 6).pictures[0])

# %% [markdown]
# ## 7 · Heads and groups
# Several query heads share one KV head (grouped-query attention). This costs little accuracy, and
# makes the KV cache of step 15 smaller by that factor.

# %%
show(run_step(walk, 7))

# %% [markdown]
# **What if** every query head had its own KV head, or all shared one?

# %%
for name, heads in (("one each", config.n_heads), ("as here", config.n_kv_heads), ("one", 1)):
    numbers = 2 * config.n_layers * heads * config.head_dim * config.max_seq_len
    print(f"{name:9} {2 * numbers / 1e6:10,.0f} MB of cache for a full context in bfloat16")

# %% [markdown]
# ## 8 · RoPE: positions as rotations
# So far no tensor depends on the position of a token. RoPE reads two coordinates at a time as a
# point in a plane and rotates it by an angle that is proportional to the position: fast for the
# first pair, more slowly for later ones. Which two coordinates form a pair differs between file
# formats: neighbors ("interleaved"), or one from each half ("half").

# %%
show(run_step(walk, 8))

# %% [markdown]
# **What if** the text began at position 100? Every vector would be rotated further, but the scores
# would be the same: they depend on the *difference* of two positions only.

# %%
q, k = walk.trace[f"{prefix}.attention.q"][:, :1], walk.trace[f"{prefix}.attention.k"][:, :1]
rotate = ROTATE[config.rope_layout]


def scores_from(start):
    positions = torch.arange(start, start + len(walk.ids))[None]
    rope = rope_table(rope_angles(positions, model.frequencies))
    return rotate(q.float(), rope) @ rotate(k.float(), rope).mT


difference = (scores_from(100) - scores_from(0)).abs().max()
print(f"scores up to {float(scores_from(0).abs().max()):.2f}; difference {float(difference):.1e}")
assert difference < 1e-3 * scores_from(0).abs().max()

# %% [markdown]
# ## 9 · Scores, mask, softmax
# The score of a query and a key is their product, divided by √D. Scores of later tokens are masked.
# Softmax turns each row into weights that sum to one: how much attention a token pays to each of
# the tokens before it.

# %%
show(run_step(walk, 9))

# %% [markdown]
# **What if** there were no mask? With the same scores, the first token attends to the last.

# %%
scores = walk.trace[f"{prefix}.attention.scores"]
all_visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
unmasked = attention_weights(scores, all_visible)[0, walk.head]
show(HeatMap("without the mask", unmasked.numpy(), walk.pieces, top=1.0))

# %% [markdown]
# ## 10 · Weighted sum, wo, residual
# Each head adds up the values of the visible tokens with its attention weights. The matrix wo maps
# all heads to one vector, which is **added** to the residual stream.

# %%
show(run_step(walk, 10))

# %% [markdown]
# **What if** a head is ablated, that is, its output is set to zero? Ablate each head of this layer
# in turn and see how much the probability of the predicted token changes.

# %%
answer = int(walk.logits[0, -1].argmax())
before = float(walk.logits[0, -1].softmax(-1)[answer])
after = []
for head in range(config.n_heads):
    ablated = trace(model, walk.ids, hooks=[], interventions=[ablate_head(walk.layer, head)])
    after.append(float(ablated.logits[0, -1].float().softmax(-1)[answer]))
rows = [(f"without head {n}", p, f"{p:.1%} ({p - before:+.1%})") for n, p in enumerate(after)]
show(Bars(f"probability of {walk.piece(answer)}, {before:.1%} with all", rows))

# %% [markdown]
# ## 11 · SwiGLU feed-forward network
# The second part of a layer works on each token separately. *up* computes thousands of features,
# and *gate* decides how much of each has an effect. Different tokens have different active
# features.

# %%
show(run_step(walk, 11))

# %% [markdown]
# **What if** the largest feature of this layer were 0? And all of them?

# %%
hook = f"{prefix}.feed_forward.gated"
largest = int(walk.trace[hook][0, -1].abs().argmax())


def probability_without(features):
    def set_to_zero(gated):
        changed = gated.clone()
        changed[..., features] = 0
        return changed

    changed = trace(model, walk.ids, hooks=[], interventions=[Intervention(hook, set_to_zero)])
    return float(changed.logits[0, -1].float().softmax(-1)[answer])


print(f"{walk.piece(answer)}: {before:.1%} with all features")
print(f"without feature {largest}: {probability_without(largest):.1%}")
print(f"without the feed-forward part of this layer: {probability_without(slice(None)):.1%}")

# %% [markdown]
# ## 12 · All layers
# The same two additions, layer after layer. The **logit lens** shows what the model would predict
# if it stopped after each layer. From which layer on is it the final prediction?

# %%
show(run_step(walk, 12))

# %% [markdown]
# **What if** a vector comes from another run (activation patching)? At the token in which two
# prompts differ, its vector after some layer replaces the one of this prompt. In early layers the
# prediction follows it. In later layers attention has already moved the information to the *last*
# token.

# %%
other = other_prompt("The capital of Italy is")
italy = trace(model, other.ids, hooks=["layers.*"])
pairs = enumerate(zip(walk.ids, other.ids, strict=False))
different = next((n for n, (one, two) in pairs if one != two), 0)


def predicted_with(layer, position):
    patches = [patch(f"layers.{layer}", italy, positions=[position])]
    patched = trace(model, walk.ids, hooks=[], interventions=patches)
    return walk.piece(int(patched.logits[0, -1].argmax()))


end = min(len(walk.ids), len(other.ids)) - 1
some = sorted({0, last_layer // 2, 3 * last_layer // 4, max(last_layer - 3, 0), last_layer})
rows = [(layer, predicted_with(layer, different), predicted_with(layer, end)) for layer in some]
show(Table(["after layer>", f"token {different} patched", f"token {end} patched"], rows))

# %% [markdown]
# ## 13 · Last norm, logits, top ten
# After one more norm the vector is multiplied by a row for every token of the vocabulary. The
# products are the logits; softmax makes them probabilities.

# %%
show(run_step(walk, 13))

# %% [markdown]
# **What if** you want predictions for the whole text? The model predicts after *every* token at
# once, which is what training uses. How surprising was each token?

# %%
probs = walk.logits[0].softmax(-1)  # (T, V)
rows = []
for n in range(len(walk.ids) - 1):
    following = walk.ids[n + 1]
    predicted = walk.piece(int(probs[n].argmax()))
    bits = -float(probs[n, following].log2())
    rows.append((walk.pieces[n], predicted, walk.pieces[n + 1], f"{bits:.1f}"))
show(Table(["after", "prediction", "following token", "surprisal, bits>"], rows))

# %% [markdown]
# ## 14 · Sampling: temperature and top-p
# The most probable token every time often leads to repetition. The temperature makes differences
# of probabilities larger or smaller, top-p removes improbable tokens, and a random number selects
# one of the others.

# %%
show(run_step(walk, 14))

# %% [markdown]
# **What if** the temperature is lower or higher? The same ten seeds at three temperatures.

# %%
logits = walk.logits[0, -1].numpy()
rows = []
for temperature in (0.3, 1.0, 1.8):
    drawn = [
        make_sampler(temperature=temperature, seed=seed).start(walk.ids, len(logits)).choose(logits)
        for seed in range(10)
    ]
    rows.append((temperature, " ".join(walk.piece(id) for id in drawn)))
show(Table(["temperature>", "seeds 0 to 9"], rows))

# %% [markdown]
# ## 15 · The second token, with the KV cache
# The chosen token is appended, and the model runs again. No token before it can see the new one,
# so their keys and values do not change. They are in the cache, and only the new token is computed.

# %%
show(run_step(walk, 15))

# %% [markdown]
# **What if** there were no cache? The logits are the same, except for rounding. Count how many
# tokens are computed.

# %%
ids, without_cache = list(walk.ids), 0
new, cache, with_cache = list(walk.ids), model.new_cache(1, len(walk.ids) + 5), 0
for _ in range(5):
    whole = trace(model, ids, hooks=[]).logits
    cached = trace(model, new, hooks=[], cache=cache).logits
    without_cache, with_cache = without_cache + len(ids), with_cache + len(new)
    largest_difference = float((whole[0, -1] - cached[0, -1]).abs().max())
    new = [int(whole[0, -1].argmax())]
    ids += new
    print(f"{walk.piece(new[0]):12} logits differ by {largest_difference:.1e}")
print(f"{without_cache} tokens computed without a cache, {with_cache} with it")

# %% [markdown]
# ## 16 · Quantization: the same with fewer bits
# Weights need not be exact. Blocks of 32 weights have a common scale, and each weight becomes a
# small integer of 8 or 4 bits. One matrix is quantized here, and the model runs again with it.

# %%
show(run_step(walk, 16))

# %% [markdown]
# **What if** the matrix of another layer is quantized? An error in an early layer passes through
# all layers after it; one in the last layer changes the logits directly.

# %%
rows = []
for layer in sorted({0, last_layer // 2, last_layer}):
    at_layer = replace(walk, layer=layer)
    matrix = at_layer.block_parameter("feed_forward.down.weight")
    error = quantization_error(at_layer, "Q4_0", matrix)
    rows.append((layer, f"{error.weights:.1%}", f"{error.logits:.3f}", f"{error.divergence:.1e}"))
show(Table(["layer>", "error of weights>", "largest logit change>", "KL bits>"], rows))

# %% [markdown]
# ## 17 · Time by part
# Products with weight matrices take most of the time. Attention itself takes little for a short
# text: it grows with the square of the length, everything else in proportion to the length.

# %%
show(run_step(walk, 17))

# %% [markdown]
# **What if** the text is forty times as long? (Times vary; run it twice.)

# %%
longest = config.max_seq_len - 1
for times in (1, 40):
    longer = torch.tensor([(list(walk.ids) * times)[:longest]])
    _, seconds = seconds_by_part(model, longer)
    total = sum(seconds.values())
    count, share = longer.shape[1], seconds["attention"] / total
    print(f"{count:4} tokens  {count / total:6,.0f} tokens per second  attention {share:5.1%}")

# %% [markdown]
# ## Common mistakes
# Three mistakes that are common in implementations of a Llama. All shapes are right, so there is no
# error; only the numbers are wrong.

# %%
show(compare_with_mistake(walk, MISTAKES["no-mask"]))

# %%
show(compare_with_mistake(walk, MISTAKES["rope-layout"]))

# %%
show(compare_with_mistake(walk, MISTAKES["scale"]))

# %% [markdown]
# ## Where to go from here
# - `walkthrough/manual_block.py`: a whole layer in twenty lines, which were checked above.
# - `models/llama.py`, `nn/attention.py`, `nn/rope.py`: the model itself, in three files.
# - `glassllama walkthrough PROMPT --open`: the same steps as an interactive page.
# - Set `MODEL` to another Llama and run all cells again: all checks are made there, too.

# %%
walk.checkpoint.close()
