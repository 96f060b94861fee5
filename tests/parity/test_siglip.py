"""SigLIP against transformers: features, logits, loss and gradients; files; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig as TheirConfig
from transformers import SiglipModel

from glassllama.base.errors import ConfigError, GlassError
from glassllama.models.siglip import PRESETS, Siglip, SiglipConfig, sigmoid_loss
from glassllama.weights.vision import SIGLIP as NAMES
from glassllama.weights.vision import foreign_name, load_siglip, save_siglip, siglip_from_hf
from tolerances import difference, logits_tolerance

TEXT = {
    "vocab_size": 131, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 16, "projection_size": 20,
}  # fmt: skip
VISION = {
    "hidden_size": 20, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 30, "patch_size": 7,  # two pixels of each side fill no patch
}  # fmt: skip
IDS = torch.arange(3 * 16).reshape(3, 16) * 37 % 131


def their_model() -> Any:
    """With random numbers in all parameters, also in those that begin as zeros."""
    model = SiglipModel(TheirConfig(text_config=TEXT, vision_config=VISION)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + float("norm" in name and name.endswith("weight"))
    return model


def pixels(count: int, height: int = 30, width: int = 30) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("siglip")
    their_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Siglip:
    return load_siglip(folder)


def bar(config: SiglipConfig) -> float:
    return max(map(logits_tolerance, (config.vision, config.text)))


@torch.no_grad()
def test_features_and_logits(model: Siglip, parity: Any) -> None:
    theirs, x = their_model(), pixels(2)
    found = theirs(input_ids=IDS, pixel_values=x)
    images, texts = model.embed_image(x), model.embed_text(IDS)
    for what, ours, expected in (
        ("patches", model.vision(x), found.vision_model_output.last_hidden_state),
        ("embeddings of pictures", model.vision.embed(x), found.vision_model_output.pooler_output),
        ("embeddings of texts", model.text(IDS), found.text_model_output.pooler_output),
        ("normalized pictures", images, found.image_embeds),
        ("normalized texts", texts, found.text_embeds),
        ("logits", model.logits(images, texts), found.logits_per_image),
    ):
        apart = difference(ours, expected)
        parity(f"SigLIP, {what}", "transformers", bar(model.config), apart)
        assert apart <= bar(model.config), what
    for row in range(2):
        assert difference(model.embed_image(x[row : row + 1])[0], images[row]) <= bar(model.config)


@torch.no_grad()
@pytest.mark.parametrize("size", [(30, 30), (28, 28), (35, 35), (56, 21), (7, 70), (61, 45)])
def test_pictures_of_other_sizes(model: Siglip, size: tuple[int, int]) -> None:
    x = pixels(2, *size)
    theirs = their_model().vision_model(pixel_values=x, interpolate_pos_encoding=True)
    assert difference(model.vision(x), theirs.last_hidden_state) <= bar(model.config)
    assert model.vision(x).shape[1] == (size[0] // 7) * (size[1] // 7)


def test_loss_and_gradients(folder: Path) -> None:
    theirs, ours, x = their_model(), load_siglip(folder).requires_grad_(True), pixels(3)
    expected = theirs(input_ids=IDS, pixel_values=x, return_loss=True).loss
    expected.backward()
    loss = sigmoid_loss(ours.logits(ours.embed_image(x), ours.embed_text(IDS)))
    loss.backward()
    assert difference(loss.detach(), expected.detach()) <= bar(ours.config)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        other = gradients[foreign_name(name, NAMES)].grad
        # Backward runs every sum of the forward pass once more, in both directions.
        allowed = 3 * bar(ours.config)
        if name.endswith("wk.bias"):  # adds the same to all scores of a query: no gradient
            weight = ours.get_parameter(name.replace("bias", "weight")).grad
            assert weight is not None
            assert (
                max(parameter.grad.abs().max(), other.abs().max()) <= allowed * weight.abs().max()
            )
        else:
            assert difference(parameter.grad, other) <= allowed, name


def test_the_sigmoid_loss_written_out() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    pairs = [
        math.log1p(math.exp((-1 if i == j else 1) * float(logits[i, j])))
        for i in range(4) for j in range(4)
    ]  # fmt: skip
    assert float(sigmoid_loss(logits)) == pytest.approx(sum(pairs) / 4, rel=1e-6)


def test_training_learns_which_texts_belong_to_which_pictures(folder: Path) -> None:
    config = load_siglip(folder).config
    model, generator = Siglip(config), torch.Generator().manual_seed(3)
    model.initialize(generator)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(10)
    x, ids = torch.randn(8, 3, 30, 30, generator=generator), torch.arange(8 * 16).reshape(8, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = sigmoid_loss(model.logits(model.embed_image(x), model.embed_text(ids)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    with torch.no_grad():
        found = model.logits(model.embed_image(x), model.embed_text(ids)).argmax(1)
    assert found.tolist() == [*range(8)]


@torch.no_grad()
def test_transformers_reads_what_we_save(model: Siglip, tmp_path: Path) -> None:
    save_siglip(tmp_path, model)
    again, x = SiglipModel.from_pretrained(tmp_path).eval(), pixels(1)
    ours = model.logits(model.embed_image(x), model.embed_text(IDS))
    assert difference(ours, again(input_ids=IDS, pixel_values=x).logits_per_image) <= bar(
        model.config
    )
    assert load_siglip(tmp_path).config == model.config


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_of_the_presets(name: str) -> None:
    """Parameters as in transformers; the vision tower of so400m is that of PaliGemma."""
    config = PRESETS[name]
    text = {"projection_size": config.text.embedding_dim}
    part = config.text  # both towers have the same sizes
    text |= {
        "hidden_size": part.dim, "intermediate_size": part.ffn_dim,
        "num_hidden_layers": part.n_layers, "num_attention_heads": part.n_heads,
    }  # fmt: skip
    vision = {
        **text,
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
    }
    with torch.device("meta"):
        ours, theirs = Siglip(config), SiglipModel(TheirConfig(text_config=text, vision_config={
            **{k: v for k, v in text.items() if k != "projection_size"}, **vision,
        }))  # fmt: skip
    counts = [sum(p.numel() for p in one.parameters()) for one in (ours, theirs)]
    assert counts[0] == counts[1]


BAD: list[tuple[str, str, Any, str]] = [
    ("vision_config", "patch_size", 0, "patch_size"),
    ("vision_config", "patch_size", [7, 7], "patch_size"),
    ("vision_config", "patch_size", 99, "patch_size 99 is more than image_size 30"),
    ("vision_config", "hidden_size", 21, "multiple of n_heads"),
    ("vision_config", "num_channels", 4, "num_channels"),
    ("vision_config", "hidden_act", "gelu", "hidden_act"),
    ("vision_config", "vision_use_head", False, "needs the head"),
    ("vision_config", "num_patches", 256, "not supported: num_patches"),
    ("vision_config", "num_hidden_layers", 2, "unexpected vision_model.encoder.layers.2"),
    ("vision_config", "num_hidden_layers", 10**6, "says 1000000 layers"),
    ("vision_config", "image_size", 44, "position_embedding.weight is 16×20"),
    ("text_config", "projection_size", 21, "both must be equal"),
    ("text_config", "vocab_size", 130, "token_embedding.weight is 131×24"),
    ("text_config", "layer_norm_eps", math.inf, "layer_norm_eps"),
]


@pytest.mark.parametrize(("part", "key", "value", "words"), BAD)
def test_wrong_configurations(
    part: str, key: str, value: Any, words: str, folder: Path, tmp_path: Path
) -> None:
    values = json.loads((folder / "config.json").read_text())
    values[part][key] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(GlassError, match=words) as caught:
        load_siglip(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_tensors_are_all_listed(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["logit_bias"]
    tensors["vision_model.head.probe"] = tensors["vision_model.head.probe"][..., :7].contiguous()
    tensors["text_model.more.weight"] = torch.zeros(3)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(16)  # of old versions: ignored
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(GlassError, match="3 tensors") as caught:
        load_siglip(tmp_path)
    named = ("missing logit_bias", "head.probe is 1×1×7", "unexpected text_model.more.weight")
    assert all(words in str(caught.value) for words in named)


def test_defaults_of_a_short_configuration() -> None:
    ours = siglip_from_hf({"model_type": "siglip"})
    assert ours == PRESETS["base/16-224"]
    with pytest.raises(ConfigError, match="text_config"):
        siglip_from_hf({"text_config": 5})


@torch.no_grad()
def test_too_small_a_picture_and_too_long_a_text(model: Siglip) -> None:
    with pytest.raises(ConfigError, match=r"at least 7 pixels.*\(6, 30\)"):
        model.embed_image(pixels(1, 6, 30))
    with pytest.raises(ConfigError, match="17 tokens, but only 16"):
        model.embed_text(torch.zeros(1, 17, dtype=torch.long))
    assert np.isfinite(model.embed_text(IDS[:, :5]).numpy()).all()
