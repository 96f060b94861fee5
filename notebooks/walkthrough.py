# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One prompt through a real Llama
#
# Eighteen steps, from the bytes of a text to the second token of the answer. Nothing here is a
# sketch: every number comes from the file of weights, is worked out by hand, line by line, and is
# then compared with what the running model had in the same place. Where the two differ by more
# than rounding, the cell stops with an error.
#
# Each step has a question, the lines of source that answer it, real numbers, a picture and the
# check (✓). After it comes a cell with a change to try: guess first, then run it, then change it
# further.
#
# Letters for sizes: T tokens, S tokens that are visible, C width of the model, H query heads,
# K key and value heads, D width of a head, F features of the feed-forward part, V vocabulary.

# %%
from dataclasses import replace

import torch
from IPython.display import display

from glassllama.generation.sampler import make_sampler
from glassllama.hub import resolve
from glassllama.nn.attention import attention_weights
from glassllama.nn.rope import ROTATE, rope_angles, rope_table
from glassllama.walkthrough import Edit, ablate_head, patch, predictions, run_with_trace
from glassllama.walkthrough.all_steps import take_step
from glassllama.walkthrough.experiment import experiment
from glassllama.walkthrough.interventions import MISTAKES
from glassllama.walkthrough.notebook import show
from glassllama.walkthrough.pictures import Bars, HeatMap, Table
from glassllama.walkthrough.steps.quantization import moved
from glassllama.walkthrough.steps.timing import seconds_by_part
from glassllama.walkthrough.walk import open_walk, start_walk

# %% [markdown]
# **The only line you need to change** is `MODEL`: a name that `glassllama list` knows, or a path:
# to a folder in Meta's format (`params.json`, `consolidated.00.pth`, `tokenizer.model`), to a
# Hugging Face folder, or to a GGUF file.

# %%
MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
LAYER, HEAD = 3, 4  # where to look closely; the last ones are taken where a model has fewer

# %%
walk = open_walk(resolve(MODEL), PROMPT, name=MODEL)
model, config = walk.model, walk.config
walk = replace(walk, layer=min(LAYER, config.n_layers - 1), head=min(HEAD, config.n_heads - 1))
here = walk.prefix  # the places of the chosen layer begin with this
last_layer = config.n_layers - 1


def other_prompt(text):
    """The same model, another text."""
    return start_walk(walk.checkpoint, model, text, name=MODEL, layer=walk.layer, head=walk.head)


def likeliest(logits, count=5):
    """The likeliest next tokens after a row of logits (V,), as bars."""
    best = predictions(logits, count)
    probs = best.probs.tolist()
    pieces = [walk.piece(id) for id in best.ids.tolist()]
    return show(Bars("next token", pieces, probs, [f"{p:.1%}" for p in probs], top=1.0))


print(f"{len(walk.ids)} tokens, {config.n_layers} layers, layer {walk.layer} and head {walk.head}")

# %% [markdown]
# ## 0 · The prompt and its bytes
# A model never sees letters. A text is bytes (UTF-8), and before anything else happens it is cut
# into pieces, roughly words. Nothing that follows reaches across such a cut.

# %%
show(take_step(walk, 0))

# %% [markdown]
# **What if** the text has two blanks, a tab, an umlaut and an emoji? How many bytes has each?

# %%
show(take_step(other_prompt("Two  blanks,\ta tab, Zürich 🙂"), 0))

# %% [markdown]
# ## 1 · Merges: from bytes to ids
# Inside a piece, neighbours are joined: first the pair that was most frequent in the text from
# which the vocabulary was learned. What cannot be joined any further is a token; its number in the
# vocabulary is its id. From here on the text is gone and only ids are left.

# %%
show(take_step(walk, 1))

# %% [markdown]
# **What if** a blank stands at the end? A blank usually begins the *next* token, so a blank on its
# own is a rare thing to end with, and the model expects something else after it.

# %%
without, with_blank = PROMPT.rstrip(), PROMPT.rstrip() + " "
for text in (without, with_blank):
    tried = other_prompt(text)
    print(list(tried.ids), tried.pieces)

# %%
likeliest(other_prompt(with_blank).logits[0, -1])

# %% [markdown]
# ## 2 · The file of weights
# All that the model has learned is a file of named tensors. It is mapped into memory, not loaded:
# only the bytes that somebody asks for are read. Below, the first row of one matrix, as bytes and
# as numbers.

# %%
show(take_step(walk, 2))

# %% [markdown]
# **What if** you look at another tensor? The weights of a norm are a single row.

# %%
info = walk.checkpoint.info(f"{here}.ffn_norm.weight")
print(info.name, info.dtype, info.shape, f"{info.nbytes:,} bytes from byte {info.offset:,}")
print(walk.weight(f"{here}.ffn_norm")[:8])

# %% [markdown]
# ## 3 · The configuration
# A dozen numbers tell one Llama from another. With them the parameters can be counted by hand: the
# sum must be what is in the file, or something was misread.

# %%
show(take_step(walk, 3))

# %% [markdown]
# **What if** this model were twice as wide, or twice as deep? Count again.


# %%
def parameters(c):
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    layer = 2 * c.dim * (queries + keys) + 3 * c.dim * c.ffn_dim + 2 * c.dim
    return (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim + c.n_layers * layer + c.dim


wide = replace(config, dim=2 * config.dim, n_heads=2 * config.n_heads,
               n_kv_heads=2 * config.n_kv_heads, ffn_dim=2 * config.ffn_dim)  # fmt: skip
deep = replace(config, n_layers=2 * config.n_layers)
for name, c in {"as it is": config, "twice as wide": wide, "twice as deep": deep}.items():
    print(f"{name:14} {parameters(c):>16,} parameters")

# %% [markdown]
# ## 4 · Embedding: a row of a matrix for every id
# An id is a number without meaning; its row in the embedding matrix is where its meaning begins.
# These vectors are the start of the **residual stream**, which runs up through all layers.

# %%
show(take_step(walk, 4))

# %% [markdown]
# **What if** a word comes twice? Both rows are the same here, wherever they stand. One layer later
# they no longer are: by then each has seen other neighbours.

# %%
twice = other_prompt("again and again")
_, trace = run_with_trace(model, twice.ids, watch=["tok_embeddings", "layers.0"])
for place in ("tok_embeddings", "layers.0"):
    rows = torch.nn.functional.normalize(trace[place][0].float(), dim=-1)
    alike = (rows @ rows.T).numpy()  # cosines: 1 for the same direction
    display(show(HeatMap(f"{place}: how alike the vectors are", alike, twice.pieces, top=1.0)))

# %% [markdown]
# ## 5 · RMSNorm by hand
# Before a layer works with a vector, its length is brought to a standard: divide by the root of
# the mean of the squares, then multiply every channel by a learned weight. The vector in the
# residual stream itself stays as it is.

# %%
show(take_step(walk, 5))

# %% [markdown]
# **What if** the vector were a thousand times longer? The norm would not notice.

# %%
norm = model.layers[walk.layer].attention_norm
x = walk.residual_before[0, -1]
with torch.no_grad():
    print("largest difference:", float((norm(1000 * x) - norm(x)).abs().max()))

# %% [markdown]
# ## 6 · Queries, keys and values
# Three matrices make three vectors of every token: what it looks for (q), what it can be found by
# (k), and what it gives to those who find it (v). Each is cut into heads.

# %%
show(take_step(walk, 6))

# %% [markdown]
# **What if** you look through another head? The same token asks for something else.

# %%
show(take_step(replace(walk, head=config.n_heads - 1), 6).pictures[0])

# %% [markdown]
# ## 7 · Heads and groups
# Several query heads share one key and one value head (grouped-query attention). It costs little
# accuracy, and the cache that you meet in step 15 becomes smaller by that factor.

# %%
show(take_step(walk, 7))

# %% [markdown]
# **What if** every query head had its own keys and values, or all shared one?

# %%
for name, heads in (("one each", config.n_heads), ("as it is", config.n_kv_heads), ("one", 1)):
    numbers = 2 * config.n_layers * heads * config.head_dim * config.max_seq_len
    print(f"{name:9} {2 * numbers / 1e6:10,.0f} MB of cache for a full context in bfloat16")

# %% [markdown]
# ## 8 · RoPE: position as rotation
# So far nobody knows where a token stands. Two coordinates at a time are read as a point in a
# plane, and turned by an angle that grows with the position: fast for the first pair, slower and
# slower for the later ones, like the hands of a clock. Which two coordinates belong together is
# a convention of the file: neighbours ("interleaved"), or one from each half ("half").

# %%
show(take_step(walk, 8))

# %% [markdown]
# **What if** the whole text began a hundred tokens later? Every vector would be turned further, and
# yet no score would change: when q meets k, only the *difference* of their positions is left.

# %%
q, k = walk.trace[f"{here}.attention.q"][:, :1], walk.trace[f"{here}.attention.k"][:, :1]
rotate = ROTATE[config.rope_layout]


def scores_from(start):
    positions = torch.arange(start, start + len(walk.ids))[None]
    turn = rope_table(rope_angles(positions, model.frequencies))
    return rotate(q.float(), turn) @ rotate(k.float(), turn).mT


moved_by_100 = (scores_from(100) - scores_from(0)).abs().max()
print(f"scores up to {float(scores_from(0).abs().max()):.2f}; moved by {float(moved_by_100):.1e}")
assert moved_by_100 < 1e-3 * scores_from(0).abs().max()

# %% [markdown]
# ## 9 · Scores, mask, softmax
# Every query meets every key: the product, divided by √D, is a score. What lies in the future is
# masked. Softmax turns each row into weights that sum to one: who listens to whom, and how much.

# %%
show(take_step(walk, 9))

# %% [markdown]
# **What if** there were no mask? The same scores, but now the first token listens to the last.

# %%
scores = walk.trace[f"{here}.attention.scores"]
everything = torch.ones(scores.shape[-2:], dtype=torch.bool)
unmasked = attention_weights(scores, everything)[0, walk.head]
show(HeatMap("without the mask", unmasked.numpy(), walk.pieces, top=1.0))

# %% [markdown]
# ## 10 · Weighted sum, wo, residual
# Each head takes home the values of those it listens to, in proportion. The matrix wo mixes the
# heads into one vector, which is **added** to the residual stream: a layer never replaces, it adds.

# %%
show(take_step(walk, 10))

# %% [markdown]
# **What if** one head were silent? Switch each head of this layer off in turn, and see how far the
# probability of the likeliest answer moves.

# %%
answer = int(walk.logits[0, -1].argmax())
before = float(walk.logits[0, -1].softmax(-1)[answer])
after = []
for head in range(config.n_heads):
    logits, _ = run_with_trace(model, walk.ids, watch=[], edits=[ablate_head(walk.layer, head)])
    after.append(float(logits[0, -1].float().softmax(-1)[answer]))
labels = [f"without head {head}" for head in range(config.n_heads)]
remarks = [f"{p:.1%} ({p - before:+.1%})" for p in after]
show(Bars(f"probability of {walk.piece(answer)}, {before:.1%} with all", labels, after, remarks))

# %% [markdown]
# ## 11 · SwiGLU: a gate for every feature
# The second half of a layer works on each token alone. Thousands of features are measured twice:
# *up* says how strongly a feature is there, *gate* whether it may pass. What comes through differs
# from token to token.

# %%
show(take_step(walk, 11))

# %% [markdown]
# **What if** the loudest feature were shut in this layer? And what if all of them were?

# %%
place = f"{here}.feed_forward.gated"
loudest = int(walk.trace[place][0, -1].abs().argmax())


def shut(features):
    def without(gated):
        left = gated.clone()
        left[..., features] = 0
        return left

    logits, _ = run_with_trace(model, walk.ids, watch=[], edits=[Edit(place, without)])
    return logits[0, -1].float().softmax(-1)[answer]


print(f"{walk.piece(answer)}: {before:.1%} with all features")
print(f"without feature {loudest}: {float(shut(loudest)):.1%}")
print(f"without the whole feed-forward part of this layer: {float(shut(slice(None))):.1%}")

# %% [markdown]
# ## 12 · All layers
# The same two additions, layer after layer. The **logit lens** asks after each layer what the model
# would say if it stopped there. Look for the layer from which on it knows its answer.

# %%
show(take_step(walk, 12))

# %% [markdown]
# **What if** a vector from another run is put in? Take the token in which two prompts differ: after
# some layer, what it has become in the other prompt replaces what it is here. Early on, the answer
# follows. Later the token has already been read, and the *last* token carries the answer.

# %%
other = other_prompt("The capital of Italy is")
_, italy = run_with_trace(model, other.ids, watch=["layers.*"])
pairs = enumerate(zip(walk.ids, other.ids, strict=False))
differs = next((n for n, (ours, theirs) in pairs if ours != theirs), 0)


def answer_with(layer, position):
    edits = [patch(f"layers.{layer}", italy, positions=[position])]
    logits, _ = run_with_trace(model, walk.ids, watch=[], edits=edits)
    return walk.piece(int(logits[0, -1].argmax()))


end = min(len(walk.ids), len(other.ids)) - 1
some = sorted({0, last_layer // 2, 3 * last_layer // 4, max(last_layer - 3, 0), last_layer})
rows = [(layer, answer_with(layer, differs), answer_with(layer, end)) for layer in some]
show(Table(["after layer>", f"token {differs} taken over", f"token {end} taken over"], rows))

# %% [markdown]
# ## 13 · Last norm, logits, top ten
# One more norm, then the vector is compared with a row for every token of the vocabulary. The
# products are logits; softmax makes them probabilities.

# %%
show(take_step(walk, 13))

# %% [markdown]
# **What if** you want the model's opinion on the whole text? It predicts after *every* token at
# once: that is what training uses. How surprising was each token?

# %%
probs = walk.logits[0].softmax(-1)  # (T, V)
rows = []
for n in range(len(walk.ids) - 1):
    came = walk.ids[n + 1]
    expected = walk.piece(int(probs[n].argmax()))
    bits = -float(probs[n, came].log2())
    rows.append((walk.pieces[n], expected, walk.pieces[n + 1], f"{bits:.1f}"))
show(Table(["after", "expected", "came", "bits of surprise>"], rows))

# %% [markdown]
# ## 14 · Sampling: temperature and top-p
# Taking the likeliest token every time is dull and tends to go in circles. Temperature makes the
# differences larger or smaller, top-p cuts the tail off, and a random number decides.

# %%
show(take_step(walk, 14))

# %% [markdown]
# **What if** it is colder or hotter? The same ten seeds at three temperatures.

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
# ## 15 · The second token, with the cache
# The chosen token is appended, and it starts again; but not from the beginning. Nobody before the
# new token can see it, so none of their keys and values change. They are kept, and only the new
# token is computed.

# %%
show(take_step(walk, 15))

# %% [markdown]
# **What if** there were no cache? The same logits come out, but for rounding. Count how many tokens
# had to be computed.

# %%
ids, computed = list(walk.ids), 0
new, cache, fed = list(walk.ids), model.new_cache(1, len(walk.ids) + 5), 0
for _ in range(5):
    whole, _ = run_with_trace(model, ids, watch=[])
    alone, _ = run_with_trace(model, new, watch=[], cache=cache)
    computed, fed = computed + len(ids), fed + len(new)
    largest = float((whole[0, -1] - alone[0, -1]).abs().max())
    new = [int(whole[0, -1].argmax())]
    ids += new
    print(f"{walk.piece(new[0]):12} logits with and without a cache differ by {largest:.1e}")
print(f"{computed} tokens computed without a cache, {fed} with it")

# %% [markdown]
# ## 16 · The same with fewer bits
# Weights need not be exact. In blocks of 32 they share a scale, and each becomes a small whole
# number: 8 or 4 bits. One matrix is rounded here, and the model runs again with it.

# %%
show(take_step(walk, 16))

# %% [markdown]
# **What if** the same is done in another layer? An error made early passes through all the layers
# after it; one made in the last layer goes straight to the logits.

# %%
rows = []
for layer in sorted({0, last_layer // 2, last_layer}):
    closer = replace(walk, layer=layer)
    result = moved(closer, "Q4_0", closer.layer_weight(layer, "feed_forward.down"))
    rows.append(
        (layer, f"{result.weights:.1%}", f"{result.logits:.3f}", f"{result.divergence:.1e}")
    )
show(Table(["layer>", "weights off>", "largest move of a logit>", "KL bits>"], rows))

# %% [markdown]
# ## 17 · Where the time went
# Nearly all of it goes into matrices. Attention itself, the famous part, costs little until a text
# is long: it grows with the square of the length, all else grows with the length.

# %%
show(take_step(walk, 17))

# %% [markdown]
# **What if** the text is forty times as long? (Times wobble; run it twice.)

# %%
room = config.max_seq_len - 1
for times in (1, 40):
    longer = torch.tensor([(list(walk.ids) * times)[:room]])
    _, spent = seconds_by_part(model, longer)
    total = sum(spent.values())
    count, share = longer.shape[1], spent["attention"] / total
    print(f"{count:4} tokens  {count / total:6,.0f} tokens a second  attention {share:5.1%}")

# %% [markdown]
# ## What breaks if …
# Three mistakes that people make when they write a Llama themselves. No shape is wrong and nothing
# warns: only the numbers are.

# %%
show(experiment(walk, MISTAKES["no-mask"]))

# %%
show(experiment(walk, MISTAKES["rope-layout"]))

# %%
show(experiment(walk, MISTAKES["scale"]))

# %% [markdown]
# ## Where to go from here
# - `walkthrough/manual_block.py`: a whole layer in twenty lines, the ones that were checked above.
# - `models/llama.py`, `nn/attention.py`, `nn/rope.py`: the model itself, in three files.
# - `glassllama walkthrough PROMPT --open`: the same walk as a page to click through.
# - Set `MODEL` to another checkpoint and run all cells again: every check holds there, too.

# %%
walk.checkpoint.close()
