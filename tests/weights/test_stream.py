"""A streamed model is bit-identical to the loaded one, with one layer in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forks import run_script
from glassllama.base.errors import GenerationError
from glassllama.generation import GenerationSettings, generate
from glassllama.models.language_model import LanguageModel
from glassllama.models.llama import Llama
from glassllama.nn.hooks import add_hooks, hook_names
from glassllama.weights import load
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model, streamed_model
from tiny_models import VARIANTS, hf_model, write_gguf, write_hf, write_meta
from tolerances import assert_logits

V = 131
IDS = torch.arange(2 * 24).reshape(2, 24) * 29 % V
DTYPES = [torch.float32, torch.bfloat16]
FORMS = ["safetensors", "pth", "two shards", "gguf", "gguf-q8", "tied"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("streamed")
    model = hf_model()
    blocks = hf_model(**{**VARIANTS["plain"], "hidden_size": 64, "num_attention_heads": 8,
                         "intermediate_size": 96})  # fmt: skip
    return {
        "safetensors": write_hf(model, base / "hf"),
        "pth": write_meta(model, base / "meta"),
        "two shards": write_meta(model, base / "shards", shards=2),
        "gguf": write_gguf(model, base / "x.gguf"),
        "gguf-q8": write_gguf(blocks, base / "q.gguf", gguf.GGMLQuantizationType.Q8_0),
        "tied": write_hf(hf_model(**VARIANTS["tied"]), base / "tied"),
    }


@pytest.fixture(params=FORMS)
def checkpoint(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[Checkpoint]:
    opened = open_checkpoint(paths[request.param])
    yield opened
    opened.close()


def in_memory(model: LanguageModel) -> list[str]:
    """The parameters that have data."""
    return [name for name, p in model.named_parameters() if not p.is_meta and p.numel() > 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_cached_steps_equal_those_of_the_loaded_model(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    loaded, streamed = load_model(checkpoint, dtype=dtype), streamed_model(checkpoint, dtype=dtype)
    assert torch.equal(streamed(IDS), loaded(IDS))
    caches = streamed.new_cache(2, 30), loaded.new_cache(2, 30)
    assert caches[0].keys.dtype == dtype
    for piece in IDS.split([10, 1, 1, 12], dim=1):
        assert torch.equal(streamed(piece, caches[0]), loaded(piece, caches[1]))
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert in_memory(streamed) == ["norm.weight"]


def test_the_output_in_many_blocks(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # Close, not equal: the kernel for a narrower matrix may add in another order.
    monkeypatch.setattr(load, "BLOCK_NUMBERS", 7 * checkpoint.config.dim)
    loaded, streamed = load_model(checkpoint), streamed_model(checkpoint)
    assert_logits(streamed(IDS), loaded(IDS), checkpoint.config)


def test_rows_of_different_length(checkpoint: Checkpoint) -> None:
    loaded, streamed = load_model(checkpoint), streamed_model(checkpoint)
    caches = streamed.new_cache(3, 40), loaded.new_cache(3, 40)
    ids = torch.cat((IDS, IDS[:1]))
    for start, lengths in ((0, [3, 9, 6]), (9, [1, 0, 1]), (10, [5, 12, 1])):
        piece = ids[:, start : start + max(lengths)]
        ours = streamed.hidden(piece, caches[0], lengths=lengths)
        theirs = loaded.hidden(piece, caches[1], lengths=lengths)
        for row, n in enumerate(lengths):
            assert torch.equal(ours[row, :n], theirs[row, :n])
    assert caches[0].lengths == [9, 21, 8]


def test_generation(checkpoint: Checkpoint) -> None:
    prompts = [[5, 17, 99, 3], [8], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    settings = GenerationSettings(max_tokens=12)

    def ids(executor: TorchExecutor) -> list[tuple[int, int]]:
        return [(step.row, step.id) for step in generate(executor, prompts, settings)]

    assert ids(TorchExecutor(streamed_model(checkpoint))) == ids(
        TorchExecutor(load_model(checkpoint))
    )


def test_hooks_receive_every_intermediate_tensor(checkpoint: Checkpoint) -> None:
    loaded, streamed = load_model(checkpoint), streamed_model(checkpoint)
    assert hook_names(streamed) == hook_names(loaded)

    def seen_in(model: Llama) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        with add_hooks(model, [("*", lambda name, out: seen.update({name: out}))]):
            model(IDS)
        return seen

    ours, theirs = seen_in(streamed), seen_in(loaded)
    assert list(ours) == list(theirs)
    assert {"layers.0.attention.weights", "layers.2.feed_forward.gated"} < set(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_layer_can_be_loaded_for_inspection(checkpoint: Checkpoint) -> None:
    loaded, streamed = load_model(checkpoint), streamed_model(checkpoint)
    with streamed.layers[1].filled() as layer:
        assert torch.equal(layer.attention.wq.weight, loaded.layers[1].attention.wq.weight)
        logits = streamed(IDS)  # a pass in between keeps it loaded
        assert not layer.attention.wq.weight.is_meta
    assert torch.equal(logits, loaded(IDS))
    assert in_memory(streamed) == ["norm.weight"]


def test_a_layer_is_unloaded_after_an_error(checkpoint: Checkpoint) -> None:
    streamed = streamed_model(checkpoint)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = streamed.layers[1].attention.wk.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        streamed(IDS)
    assert in_memory(streamed) == ["norm.weight"]
    hook.remove()
    assert torch.equal(streamed(IDS), load_model(checkpoint)(IDS))


@pytest.mark.parametrize("id", [-1, V, 2**40])
def test_an_id_outside_the_vocabulary_reads_nothing(checkpoint: Checkpoint, id: int) -> None:
    with pytest.raises(GenerationError, match=f"id {id} is outside the vocabulary of {V}"):
        streamed_model(checkpoint)(torch.tensor([[3, id, 4]]))


SHAPE = {
    "hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 2736, "vocab_size": 16_000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
# A layer has 22 MB, the vocabulary's matrices 33 MB each, the file 288 MB. Allowed in addition to a
# layer and a block of output: the memory of PyTorch's computation, measured here as 20 to 40 MB.
ALLOWED = 60e6
BLOCK = 2_000_000  # numbers of the output matrix at once

MEASURE = """
import sys, torch
from glassllama.weights import load
from glassllama.weights.checkpoint import open_checkpoint
load.BLOCK_NUMBERS = int(sys.argv[2])
def high_water():  # of this process only: getrusage includes the parent's peak
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
torch.nn.functional.linear(*torch.ones(2, 64, 64, dtype=torch.bfloat16))
with torch.device("meta"):  # a part of PyTorch that is imported at its first use: 77 MB
    torch.nn.Embedding(2, 2)
before = high_water()
model = load.streamed_model(open_checkpoint(sys.argv[1]))
assert model(torch.arange(17)[None]).isfinite().all()
print(high_water() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in bfloat16, in three formats."""
    base = tmp_path_factory.mktemp("large")
    model = hf_model(**SHAPE).bfloat16()
    return {
        "safetensors": write_hf(model, base / "hf"),
        "pth": write_meta(model, base / "meta", multiple_of=16),
        "gguf": write_gguf(model, base / "x.gguf", gguf.GGMLQuantizationType.BF16),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "pth", "gguf"])
def test_peak_memory_is_one_layer(form: str, large: dict[str, Path]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    sizes = {name: 2 * p.numel() for name, p in model.named_parameters()}
    layer = sum(n for name, n in sizes.items() if ".layers.0." in name)
    allowed = layer + 4 * BLOCK + ALLOWED
    peak = int(run_script(MEASURE, large[form], BLOCK))
    assert peak <= allowed < sum(sizes.values()) / 2
