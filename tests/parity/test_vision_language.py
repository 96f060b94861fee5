"""PaliGemma 1 and 2, Idefics3 and SmolVLM against transformers: reference and engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from glassllama.base.errors import GlassError
from glassllama.base.fields import Fields
from glassllama.base.interfaces import NewTokens, row_ids
from glassllama.models.paligemma import PaliGemma
from glassllama.models.smolvlm import SmolVLM
from glassllama.vision.processing import image_processor, read_image_processor
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint
from glassllama.weights.load import TorchExecutor, load_model
from glassllama.weights.pack import pack
from glassllama.weights.vision import load_images
from tiny_families import write_family_gguf
from tolerances import difference, logits_tolerance

DECODER = {
    "vocab_size": 137, "hidden_size": 48, "intermediate_size": 140, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
GEMMA2 = {
    **DECODER, "model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 17,
    "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
}  # fmt: skip
VISION = {
    "hidden_size": 20, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
IMAGE = 136  # the id of a placeholder
PALIGEMMA = {"image_token_index": IMAGE, "projection_dim": 48, "hidden_size": 48}
IDEFICS3 = {"image_token_id": IMAGE, "pad_token_id": 0}
# Model type, decoder, the rest of the configuration, changes of the tower.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "paligemma": ("paligemma", {**DECODER, "model_type": "gemma"}, PALIGEMMA,
                  {"vision_use_head": False, "projection_dim": 48}),
    "paligemma2": ("paligemma", GEMMA2, PALIGEMMA,
                   {"vision_use_head": False, "projection_dim": 48}),
    "idefics3": ("idefics3", {**DECODER, "model_type": "llama"},
                 {**IDEFICS3, "scale_factor": 2}, {}),
    # Of 25 patches of a side some have their neighbor's position.
    "smolvlm": ("smolvlm", {**DECODER, "model_type": "llama"},
                {**IDEFICS3, "scale_factor": 5}, {"image_size": 50, "patch_size": 2}),
}  # fmt: skip
CLASSES = {
    "paligemma": transformers.PaliGemmaForConditionalGeneration,
    "idefics3": transformers.Idefics3ForConditionalGeneration,
    "smolvlm": transformers.SmolVLMForConditionalGeneration,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def their_model(name: str) -> Any:
    kind, text, rest, changes = MODELS[name]
    config = transformers.AutoConfig.for_model(
        kind, text_config=text, vision_config={**VISION, **changes}, **rest
    )
    model = CLASSES[kind](config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        noise = scale * torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
        centre = float(is_norm and ("vision" in parameter_name or kind != "paligemma"))
        parameter.data = noise + centre
    return model


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(name: str) -> Any:
    return their_model(name)


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def ours(checkpoint: Checkpoint, name: str) -> PaliGemma:
    assert checkpoint.images is not None
    images = load_images(checkpoint.images)
    decoder = load_model(checkpoint, dtype=torch.float32)
    kind = PaliGemma if name.startswith("paligemma") else SmolVLM
    return kind(images, decoder)


def pixels(ours: PaliGemma, count: int) -> torch.Tensor:
    size = ours.config.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def prompts(ours: PaliGemma, lengths: list[int], rows: int) -> list[list[int]]:
    """Placeholders of one picture each, then ids of the vocabulary."""
    texts = [[(7 * n + length) % 130 + 1 for n in range(length)] for length in lengths]
    if ours.config.prefix:
        return [[IMAGE] * rows + text for text in texts]
    return [text[:2] + [IMAGE] * rows + text[2:] for text in texts]


def bar_of(ours: PaliGemma) -> float:
    """Both parts, one after the other: the decoder's input has the tower's error already."""
    return logits_tolerance(ours.config.vision) + logits_tolerance(ours.config.text)


def expected(theirs: Any, ours: PaliGemma, ids: torch.Tensor, x: torch.Tensor, **more: Any) -> Any:
    if ours.config.prefix:
        more["token_type_ids"] = torch.zeros_like(ids)
        return theirs(input_ids=ids, pixel_values=x, **more)
    return theirs(input_ids=ids, pixel_values=x[:, None], **more)


@torch.no_grad()
def test_features_and_logits(theirs: Any, ours: PaliGemma, name: str, parity: Any) -> None:
    x = pixels(ours, 2)
    rows = ours.embed_images(x)
    found = theirs.model.get_image_features(x if ours.config.prefix else x[:, None])
    features = found.pooler_output
    features = features if isinstance(features, torch.Tensor) else torch.stack(list(features))
    apart = difference(rows, features.view(rows.shape))
    parity("rows of a picture", f"transformers, {name}", bar_of(ours), apart)
    assert apart <= bar_of(ours)
    ids = torch.tensor(prompts(ours, [9, 9], rows.shape[1]))
    logits = expected(theirs, ours, ids, x).logits
    found = ours.prefill(ids, x, None)
    parity("logits of a picture and a prompt", f"transformers, {name}", bar_of(ours),
           difference(found, logits))  # fmt: skip
    assert difference(found, logits) <= bar_of(ours)


@torch.no_grad()
def test_cached_equals_uncached(theirs: Any, ours: PaliGemma) -> None:
    """A prompt, then ids one by one, as transformers does it; and all at once."""
    x = pixels(ours, 1)
    rows = ours.embed_images(x).shape[1]
    ids, answer = torch.tensor(prompts(ours, [7], rows)), [5, 9, 17, 2]
    cache = ours.decoder.new_cache(1, 400)
    logits = [ours.prefill(ids, x, cache)[:, -1:]]
    logits += [ours.decode(torch.tensor([[id]]), cache) for id in answer]
    result = expected(theirs, ours, ids, x, use_cache=True)
    their_logits = [result.logits[:, -1:]]
    past = result.past_key_values if hasattr(result, "past_key_values") else result.cache
    for id in answer:
        step = theirs(input_ids=torch.tensor([[id]]), cache=past, use_cache=True)
        their_logits.append(step.logits)
    assert difference(torch.cat(logits, 1), torch.cat(their_logits, 1)) <= bar_of(ours)


@torch.no_grad()
def test_a_batch_of_different_lengths(theirs: Any, ours: PaliGemma) -> None:
    x = pixels(ours, 2)
    rows = ours.embed_images(x).shape[1]
    alone = prompts(ours, [5, 11], rows)
    width = max(map(len, alone))
    padded = torch.tensor([one + [0] * (width - len(one)) for one in alone])
    together = ours.prefill(padded, x, None, [len(one) for one in alone])
    for n, one in enumerate(alone):
        logits = expected(theirs, ours, torch.tensor([one]), x[n : n + 1]).logits[0]
        assert difference(together[n, : len(one)], logits) <= bar_of(ours)


@torch.no_grad()
def test_the_engine(theirs: Any, ours: PaliGemma, checkpoint: Checkpoint, parity: Any,
                    name: str) -> None:  # fmt: skip
    """Rows as input, the prefix mask, an answer: exact mode against transformers."""
    engine, x = pack(checkpoint, exact=True), pixels(ours, 1)
    rows = ours.embed_images(x)[0].numpy()  # (P, C)
    [ids] = prompts(ours, [9], len(rows))
    logits = expected(theirs, ours, torch.tensor([ids]), x).logits[0]
    own = row_ids(x.numpy().tobytes(), len(rows))
    places = iter(own)
    keys = [next(places) if id == IMAGE else id for id in ids]
    table = dict(zip(own, rows, strict=True))
    for executor in (engine, TorchExecutor(ours.decoder)):
        cache = executor.new_cache()
        tokens = NewTokens(cache.add(), keys, "all", table, ours.config.prefix)
        apart = difference(executor.forward([tokens], cache), logits)
        parity(f"logits of {type(executor).__name__}", f"transformers, {name}", bar_of(ours), apart)
        assert apart <= bar_of(ours)
    engine.close()


def test_names_of_published_files(
    folder: Path, name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Older files name the tower vision_tower.vision_model, and have a model. in front."""
    if not name.startswith("paligemma"):
        pytest.skip("these names are those of PaliGemma")
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value
        for key, value in tensors.items()
    }
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    again = open_checkpoint(tmp_path)
    assert again.images is not None
    assert checkpoint.images is not None
    first, second = load_images(checkpoint.images), load_images(again.images)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


BAD: list[tuple[str, dict[str, Any] | None, str]] = [
    ("vision_config", None, "vision_config"), ("text_config", None, "text_config"),
    ("vision_config", {"hidden_act": "relu"}, "hidden_act"),
    ("vision_config", {"num_hidden_layers": 2}, "unexpected tower.encoder.layers.2"),
    ("vision_config", {"patch_size": 0}, "patch_size"),
    ("vision_config", {"patch_shape": 3}, "not supported: patch_shape"),
    ("text_config", {"model_type": "bloom"}, "model_type is 'bloom'"),
    ("text_config", {"hidden_size": 54}, "the configuration says"),
]  # fmt: skip


def open_all(folder: Path) -> None:
    images = open_checkpoint(folder).images
    assert images is not None
    load_images(images)


@pytest.mark.parametrize(("part", "changes", "words"), BAD)
def test_wrong_configurations(
    part: str, changes: dict[str, Any] | None, words: str, folder: Path, tmp_path: Path
) -> None:
    values = json.loads((folder / "config.json").read_text())
    values[part] = None if changes is None else {**values[part], **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(GlassError, match=words) as caught:
        open_all(tmp_path)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_positions_of_patches(ours: PaliGemma, name: str) -> None:
    """Usually 0, 1, …; of 25 patches of a side some have their neighbor's."""
    if name.startswith("paligemma"):
        return
    images: Any = ours.images
    side = images.config.vision.side
    places = images.positions(torch.device("cpu")).view(side, side)
    assert torch.equal(places - places[:, :1], places[:1].expand(side, -1))
    apart = (torch.arange(side) - places[0]).tolist()
    assert {*apart} == ({0, 1} if side == 25 else {0})


# --- GGUF with llama.cpp's second file --------------------------------------------------------

BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
OUTSIDE = {
    "vision_model.embeddings.patch_embedding": "v.patch_embd",
    "vision_model.embeddings.position_embedding": "v.position_embd",
    "vision_model.post_layernorm": "v.post_ln",
    "connector.modality_projection.proj": "mm.model.fc",
}


def write_mmproj(model: Any, path: Path, **changes: Any) -> Path:
    """The tower of an Idefics3 as llama.cpp's converter writes it."""
    config, writer = model.config.vision_config, gguf.GGUFWriter(str(path), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    numbers = {
        "image_size": config.image_size, "patch_size": config.patch_size,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "projector.scale_factor": model.config.scale_factor, "preproc_image_size": 112,
    }  # fmt: skip
    for key, value in {**numbers, **changes}.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    for name, tensor in model.model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("text_model."):
            continue
        if stem.startswith("vision_model.encoder.layers."):
            _, _, _, layer, part = stem.split(".", 4)
            theirs = f"v.blk.{layer}.{BLOCK[part]}.{kind}"
        else:
            theirs = f"{OUTSIDE[stem]}.{kind}"
        writer.add_tensor(theirs, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_pair(model: Any, folder: Path, **changes: Any) -> Path:
    """The decoder and its second file."""
    decoder = transformers.LlamaForCausalLM(model.config.text_config)
    own = {f"model.{name}": value for name, value in model.model.text_model.state_dict().items()}
    decoder.load_state_dict(own | {"lm_head.weight": model.lm_head.weight})
    folder.mkdir(exist_ok=True)
    write_family_gguf(decoder, "llama", folder / "tiny.gguf")
    write_mmproj(model, folder / "mmproj-tiny-f32.gguf", **changes)
    return folder


@torch.no_grad()
def test_a_gguf_with_its_second_file(tmp_path: Path, parity: Any) -> None:
    model = their_model("idefics3")
    model.save_pretrained(tmp_path / "hf")
    hf, pair = open_checkpoint(tmp_path / "hf"), open_checkpoint(write_pair(model, tmp_path / "gg"))
    assert hf.images is not None
    assert pair.images is not None
    first, second = (load_images(part) for part in (hf.images, pair.images))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 28}
    ).save_pretrained(tmp_path / "hf")
    assert pair.images.processor is not None
    own = image_processor(Fields("GGUF", pair.images.processor))
    assert own == read_image_processor(tmp_path / "hf")
    x = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    second.config = replace(second.config, image_token=IMAGE)  # that is in the vocabulary
    ours = SmolVLM(second, load_model(pair, dtype=torch.float32))
    rows = ours.embed_images(x).shape[1]
    ids = torch.tensor(prompts(ours, [9], rows))
    logits = expected(model, ours, ids, x).logits
    apart = difference(ours.prefill(ids, x, None), logits)
    parity("logits of a picture and a prompt, GGUF", "transformers, idefics3", bar_of(ours), apart)
    assert apart <= bar_of(ours)
    pair.close()


def test_second_files_that_are_not_read(tmp_path: Path) -> None:
    """The model reads texts, and a note says what is wrong with the file for pictures."""
    folder = write_pair(their_model("idefics3"), tmp_path / "pair")
    second = folder / "mmproj-tiny-f32.gguf"
    data = second.read_bytes()
    for broken, words in (
        (data.replace(b"idefics3", b"gemma3xx"), "'gemma3xx', only idefics3 is supported"),
        (data[:100], "mmproj"),
        (data.replace(b"vision.patch_size", b"vision.patch_sizx"), "patch_size is missing"),
    ):
        second.write_bytes(broken)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.images is None
        assert any(words in note and "pictures are not read" in note for note in checkpoint.notes)
    second.unlink()
    assert open_checkpoint(folder).images is None
