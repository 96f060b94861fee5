"""Opening a checkpoint: which files belong together, and the errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glassllama.base.errors import ConfigError, FormatError, GlassError, WeightsError, quoted
from glassllama.base.machine import require_memory
from glassllama.weights.checkpoint import open_checkpoint
from glassllama.weights.load import load_model
from tiny_models import META_SHAPE, hf_model, meta_state, write_gguf, write_hf, write_meta


def check_same_weights(a: Path, b: Path) -> None:
    one, two = open_checkpoint(a), open_checkpoint(b)
    assert list(one.names) == list(two.names)
    for name in one.names:
        np.testing.assert_array_equal(one.float32(name), two.float32(name), err_msg=name)


@pytest.mark.parametrize("llama2", [False, True], ids=["vocabulary cut", "width cut"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_read_as_one(llama2: bool, tied: bool, tmp_path: Path) -> None:
    shape = {**META_SHAPE, "vocab_size": 132, "tie_word_embeddings": tied}
    model = hf_model(**shape)
    one = write_meta(model, tmp_path / "one")
    two = write_meta(model, tmp_path / "two", shards=2, llama2=llama2)
    check_same_weights(one, two)
    checkpoint = open_checkpoint(two)
    rows = checkpoint.float32("tok_embeddings.weight", slice(60, 75))  # across the boundary
    np.testing.assert_array_equal(rows, checkpoint.float32("tok_embeddings.weight")[60:75])


def test_every_path_of_a_meta_model(tmp_path: Path) -> None:
    folder = write_meta(hf_model(**{**META_SHAPE, "vocab_size": 132}), tmp_path / "m", shards=2)
    check_same_weights(folder, folder / "consolidated.01.pth")
    (tmp_path / "hub").mkdir()
    folder.rename(tmp_path / "hub" / "original")
    check_same_weights(tmp_path / "hub", tmp_path / "hub" / "original")


def test_old_single_file(tmp_path: Path) -> None:
    folder = write_meta(hf_model(), tmp_path / "m")
    (folder / "consolidated.00.pth").rename(folder / "llama.pth")
    assert open_checkpoint(folder).config == open_checkpoint(folder / "llama.pth").config


def test_every_path_of_sharded_safetensors(tmp_path: Path) -> None:
    model = hf_model()
    whole = write_hf(model, tmp_path / "whole")
    parts = write_hf(model, tmp_path / "parts", max_shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    check_same_weights(whole, parts)
    check_same_weights(whole / "config.json", next(parts.glob("*.safetensors")))


def test_three_formats_give_the_same_numbers(tmp_path: Path) -> None:
    model = hf_model()
    meta, file = write_meta(model, tmp_path / "m"), write_gguf(model, tmp_path / "x.gguf")
    check_same_weights(meta, file)
    assert open_checkpoint(write_hf(model, tmp_path / "h")).config.rope_layout == "half"


def test_wrong_rope_tables_are_ignored_with_a_notice(tmp_path: Path) -> None:
    note = "not the frequencies of the configuration, ignored: "
    model = hf_model()
    folder = write_meta(model, tmp_path / "m")
    state = {**meta_state(model), "rope.freqs": torch.zeros(4)}
    torch.save(state, folder / "consolidated.00.pth")
    assert note + "rope.freqs" in open_checkpoint(folder).notes
    hf = write_hf(model, tmp_path / "h")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: torch.zeros(4)}, hf / "model.safetensors")
    assert open_checkpoint(hf).notes == [note + name]


def test_all_mismatches_are_listed_at_once(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 48)
    tensors["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(48)
    tensors["lm_head.weight"] = torch.zeros(131, 48, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "4 tensors" in message
    assert "missing model.norm.weight" in message
    assert "unexpected model.layers.2.self_attn.q_proj.bias" in message
    assert "up_proj.weight is 3×48, the configuration says 140×48" in message
    assert "lm_head.weight is of type I32" in message
    assert "\n" not in message


def test_an_untied_model_without_output_is_an_error(tmp_path: Path) -> None:
    folder = write_hf(hf_model(**{**META_SHAPE, "tie_word_embeddings": True}), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(WeightsError, match=r"missing lm_head\.weight"):
        open_checkpoint(folder)


def test_vocabulary_that_does_not_match(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 130}))
    with pytest.raises(WeightsError, match="131×48, the configuration says 130×48"):
        open_checkpoint(folder)


def folder_with(folder: Path, file: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "no such file or folder"),
        (lambda p: p, "no model here"),
        (
            lambda p: folder_with(p, "settings.toml", ""),
            "run that has saved no model yet; .* --resume",
        ),
        (
            lambda p: folder_with(p, "notes.txt", "hi") / "notes.txt",
            "not a .gguf, .safetensors or .pth",
        ),
        (lambda p: folder_with(p, "config.json", "{}"), r"without \*\.safetensors"),
        (lambda p: folder_with(p, "params.json", "{}"), "without any .pth"),
        (lambda p: folder_with(p, "params.json", "[1]"), "expected a JSON object"),
        (lambda p: folder_with(p, "params.json", "{"), "not valid JSON"),
        (lambda p: folder_with(p, "params.json", "[" * 100_000), "not valid JSON"),
    ],
)
def test_paths_without_a_model(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(GlassError, match=words):
        open_checkpoint(make(tmp_path))


def test_several_models_in_one_folder_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(hf_model(), tmp_path / name)
    with pytest.raises(GlassError, match="2 GGUF models"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "b.gguf").config.dim == 48


def test_the_error_names_a_missing_meta_shard(tmp_path: Path) -> None:
    folder = write_meta(hf_model(**{**META_SHAPE, "vocab_size": 132}), tmp_path / "m", shards=2)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(GlassError, match=r"consolidated\.00\.pth is missing"):
        open_checkpoint(folder)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "bert")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"'bert', supported are .*'llama'"):
        open_checkpoint(tmp_path / "x.gguf")


def test_weights_are_copies_of_the_file(tmp_path: Path) -> None:
    """The file may be closed, or overwritten, after loading."""
    folder = write_hf(hf_model().bfloat16(), tmp_path)
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint)
    checkpoint.close()
    (folder / "model.safetensors").write_bytes(b"gone")
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_too_little_memory_is_an_error_before_anything_is_allocated() -> None:
    with pytest.raises(GlassError, match=re.escape("1000000.00 GB of memory")):
        require_memory(10**15, what="x.gguf in float32", instead="use less")


@pytest.mark.parametrize("name", ["sha256-74701a8c35f6", "model.GGUF", "model.bin", "model"])
def test_gguf_is_recognized_by_its_first_bytes(name: str, tmp_path: Path) -> None:
    named = write_gguf(hf_model(), tmp_path / "m.gguf")
    other = tmp_path / "alone" / name
    other.parent.mkdir()
    other.write_bytes(named.read_bytes())
    check_same_weights(named, other)
    check_same_weights(named, other.parent)


def test_safetensors_and_pth_are_recognized_by_their_first_bytes(tmp_path: Path) -> None:
    hf = write_hf(hf_model(), tmp_path / "hf")
    renamed = tmp_path / "other" / "weights"
    renamed.parent.mkdir()
    renamed.write_bytes((hf / "model.safetensors").read_bytes())
    (renamed.parent / "config.json").write_bytes((hf / "config.json").read_bytes())
    check_same_weights(hf, renamed)
    meta = write_meta(hf_model(), tmp_path / "meta")
    (meta / "consolidated.00.pth").rename(meta / "weights.pt")
    check_same_weights(meta / "weights.pt", write_meta(hf_model(), tmp_path / "again"))


@pytest.mark.parametrize(
    "name", ["model", "model.bin", "x.gguf", "x.pth", "MODEL.SAFETENSORS", "x.json"]
)
def test_safetensors_under_any_name(name: str, tmp_path: Path) -> None:
    """The file and its folder are recognized by the content."""
    hf = write_hf(hf_model(), tmp_path / "hf")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((hf / "config.json").read_bytes())
    (other / name).write_bytes((hf / "model.safetensors").read_bytes())
    check_same_weights(hf, other / name)
    check_same_weights(hf, other)
    check_same_weights(hf, other / "config.json")


@pytest.mark.parametrize(
    "name", ["weights", "x.gguf", "x.safetensors", "consolidated.00.bin", "x.pt", "X.PTH"]
)
def test_meta_weights_under_any_name(name: str, tmp_path: Path) -> None:
    meta = write_meta(hf_model(), tmp_path / "meta")
    other = write_meta(hf_model(), tmp_path / "other")
    (other / "consolidated.00.pth").rename(other / name)
    check_same_weights(meta, other / name)
    check_same_weights(meta, other)


def test_meta_shards_with_another_suffix(tmp_path: Path) -> None:
    folder = write_meta(hf_model(**{**META_SHAPE, "vocab_size": 132}), tmp_path / "m", shards=2)
    same = write_meta(hf_model(**{**META_SHAPE, "vocab_size": 132}), tmp_path / "n", shards=2)
    for file in same.glob("*.pth"):
        file.rename(file.with_suffix(".bin"))
    check_same_weights(folder, same)
    check_same_weights(folder, same / "consolidated.01.bin")
    for file in same.glob("*.bin"):
        file.rename(same / file.name.removeprefix("consolidated."))
    with pytest.raises(GlassError, match="2 files of PyTorch's, name one of them"):
        open_checkpoint(same)


@pytest.mark.parametrize("content", [b"", b"GARBAGE IN A FILE", b"GGU"])
def test_the_suffix_decides_if_the_bytes_do_not(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((write_hf(hf_model(), tmp_path / "hf") / "config.json")
                                          .read_text())  # fmt: skip
    for name, words in (
        ("x.GGUF", "is not GGUF|the file is empty|truncated"),
        ("x.safetensors", "header length|begins with 8 bytes|the file is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=words) as caught:
            open_checkpoint(tmp_path / name)
        assert name in str(caught.value)
        (tmp_path / name).unlink()


def test_a_torch_save_file_without_params_json_is_a_pickle_file(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.gguf"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(GlassError, match="pickle files"):
            open_checkpoint(tmp_path / name)


def test_a_single_file_that_the_index_does_not_name_is_the_model(tmp_path: Path) -> None:
    """As in transformers. The shards are read if the path is their index or one of them."""
    new, old = hf_model(1), write_hf(hf_model(0), tmp_path / "old", max_shard_size="60KB")
    single = write_hf(new, tmp_path / "new")
    same = write_hf(hf_model(0), tmp_path / "same")
    (old / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    check_same_weights(old, single)
    note = "model.safetensors is read, not the files that model.safetensors.index.json names"
    assert note in open_checkpoint(old).notes
    check_same_weights(old / "model.safetensors.index.json", same)
    check_same_weights(next(old.glob("model-*.safetensors")), same)


def test_a_single_file_that_the_index_names_is_a_shard(tmp_path: Path) -> None:
    parts = write_hf(hf_model(), tmp_path / "parts", max_shard_size="60KB")
    index = parts / "model.safetensors.index.json"
    shard = next(iter(json.loads(index.read_text())["weight_map"].values()))
    index.write_text(index.read_text().replace(shard, "model.safetensors"))
    (parts / shard).rename(parts / "model.safetensors")
    check_same_weights(parts, write_hf(hf_model(), tmp_path / "whole"))
    assert open_checkpoint(parts).notes == []


def test_the_given_file_is_opened(tmp_path: Path) -> None:
    """Two models in one folder: each by its file name, and the default of the folder by the
    folder."""
    folder, other = write_hf(hf_model(0), tmp_path / "a"), write_hf(hf_model(1), tmp_path / "b")
    (folder / "second.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    check_same_weights(folder / "second.safetensors", other)
    check_same_weights(folder / "model.safetensors", folder)


def test_an_index_of_another_name(tmp_path: Path) -> None:
    model = hf_model()
    parts = write_hf(model, tmp_path / "parts", max_shard_size="60KB")
    (parts / "model.safetensors.index.json").rename(parts / "other.safetensors.index.json")
    check_same_weights(write_hf(model, tmp_path / "whole"), parts)


def test_a_tied_matrix_that_is_stored_as_the_output_only(tmp_path: Path) -> None:
    model = hf_model(**{**META_SHAPE, "tie_word_embeddings": True})
    usual, other = write_hf(model, tmp_path / "usual"), write_hf(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, other / "model.safetensors")
    check_same_weights(usual, other)
    assert open_checkpoint(other).config.tie_embeddings


BUFFERS = (
    "model.layers.0.self_attn.masked_bias", "model.causal_mask",
    "model.embed_tokens.position_ids", "model.layers.1.self_attn.rotary_emb.cos_cached",
)  # fmt: skip


def test_buffers_of_old_versions_are_ignored_with_a_notice(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(3) for name in BUFFERS}, folder / "model.safetensors")
    (note,) = open_checkpoint(folder).notes
    assert all(name in note for name in BUFFERS)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path / "m")
    names = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({names: torch.ones(2, 48)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (note,) = open_checkpoint(folder).notes
    assert "adapter_config.json: the adapter beside the model is not applied" in note
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(GlassError, match=r"m: adapter_config.json without a model: .* merge"):
            open_checkpoint(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_error_for_pickle_files_contains_two_lines_to_convert_them(
    legacy: bool, tmp_path: Path
) -> None:
    model = hf_model()
    folder = write_hf(model, tmp_path / "old")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for given in (folder, path):
        with pytest.raises(GlassError, match="two lines of Python: from transformers") as caught:
            open_checkpoint(given)
        assert "\n" not in str(caught.value)
    if not legacy:
        lines = str(caught.value).split("two lines of Python: ")[1].split("; ")
        assert len(lines) == 2
        exec("\n".join(lines))  # the two lines work
        check_same_weights(tmp_path / "old-safetensors", write_hf(model, tmp_path / "new"))


def test_the_error_names_an_unsupported_model_and_its_folder(tmp_path: Path) -> None:
    """Also if its tensors could not be read either."""
    folder = folder_with(tmp_path / "m", "config.json", '{"model_type": "bloom"}')
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"?")
        with pytest.raises(ConfigError, match=r"bloom.*llama \(LlamaForCausalLM\)") as caught:
            open_checkpoint(folder)
        assert str(caught.value).startswith(f"{folder}: config.json: ")
        (folder / name).unlink()


def test_shards_below_the_folder(tmp_path: Path) -> None:
    parts = write_hf(hf_model(), tmp_path, max_shard_size="60KB")
    before = open_checkpoint(parts)
    (parts / "shards").mkdir()
    for shard in parts.glob("*.safetensors"):
        shard.rename(parts / "shards" / shard.name)
    index = parts / "model.safetensors.index.json"
    with pytest.raises(GlassError, match="no such file"):
        open_checkpoint(parts)
    values = json.loads(index.read_text())
    below = {name: f"shards/{shard}" for name, shard in values["weight_map"].items()}
    index.write_text(json.dumps({**values, "weight_map": below}))
    after = open_checkpoint(parts)
    assert all((before.read(name) == after.read(name)).all() for name in before.names)


@pytest.mark.parametrize(
    "name", ["x" * 70_000, "two\nlines.safetensors", "../m.safetensors", "", 5, None, ["a"]]
)
def test_an_index_with_invalid_file_names(name: object, tmp_path: Path) -> None:
    parts = write_hf(hf_model(), tmp_path, max_shard_size="60KB")
    index = parts / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(GlassError, match="name of a file beside or below the index") as caught:
        open_checkpoint(parts)
    assert "\n" not in str(caught.value)
    assert f"shard {quoted(name)} of tensor 'model.norm.weight'" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_long_tensor_names_are_shortened_in_errors(tmp_path: Path) -> None:
    folder = write_hf(hf_model(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"x" * 70_000: torch.zeros(1), "two\nlines": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"2 tensors.*'two.*unexpected 'xxx") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_chat_template_that_is_not_text(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(hf_model(), tmp_path / "m.gguf"))
    checkpoint.file.metadata = {"tokenizer.chat_template": ["a"]}  # type: ignore[misc]
    with pytest.raises(GlassError, match="chat_template must be text"):
        _ = checkpoint.chat_template


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_paths_that_are_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GlassError, match="neither a regular file nor a folder"):
        open_checkpoint(tmp_path / "pipe")
    write_gguf(hf_model(), tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path).config.dim == 48  # the pipe in the same folder is not opened
