"""Vision towers and SigLIP in files: names of tensors, configurations, loading and saving.

Our modules have the structure of Hugging Face's, so a table of names is all that is needed; no
tensor is changed. Names are matched in one strict loop (weights/tensor_map.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from glassllama.base.errors import ConfigError, WeightsError
from glassllama.base.fields import Fields
from glassllama.base.interfaces import TensorFile
from glassllama.formats.blocks import dequantize
from glassllama.models.paligemma import PaliGemmaConfig, PaliGemmaImages
from glassllama.models.siglip import (
    CHANNELS,
    EncoderConfig,
    Siglip,
    SiglipConfig,
    TextConfig,
    VisionConfig,
)
from glassllama.models.smolvlm import SmolVLMConfig, SmolVLMImages
from glassllama.nn.init import shapes_only
from glassllama.weights.architectures.decoder import MAX_LAYERS
from glassllama.weights.architectures.description import MappedTensor, ReadKeys, require_neutral
from glassllama.weights.model_files import OPEN, read_json
from glassllama.weights.save import CONFIG, WEIGHTS, put, save_tensors, writer_of
from glassllama.weights.tensor_map import differences, require_layers, summary
from glassllama.weights.vision_language import PALIGEMMA, ImagePart

Model = TypeVar("Model", bound=nn.Module)
Names = Mapping[str, str]  # ours → theirs, without .weight and .bias; {} is the number of the layer

ENCODER: Names = {
    f"encoder.layers.{{}}.{ours}": f"encoder.layers.{{}}.{theirs}"
    for ours, theirs in {
        "attention_norm": "layer_norm1", "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.out_proj", "mlp_norm": "layer_norm2", "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }.items()
}  # fmt: skip
VISION: Names = {
    "patches": "embeddings.patch_embedding", "positions": "embeddings.position_embedding",
    **ENCODER, "encoder.norm": "post_layernorm", "head.probe": "head.probe",
    "head.wqkv.weight": "head.attention.in_proj_weight",
    "head.wqkv.bias": "head.attention.in_proj_bias", "head.wo": "head.attention.out_proj",
    "head.norm": "head.layernorm", "head.mlp.up": "head.mlp.fc1",
    "head.mlp.down": "head.mlp.fc2",
}  # fmt: skip
TEXT: Names = {
    "tokens": "embeddings.token_embedding", "positions": "embeddings.position_embedding",
    **ENCODER, "encoder.norm": "final_layer_norm", "head": "head",
}  # fmt: skip
SIGLIP: Names = {
    **{f"vision.{ours}": f"vision_model.{theirs}" for ours, theirs in VISION.items()},
    **{f"text.{ours}": f"text_model.{theirs}" for ours, theirs in TEXT.items()},
    "logit_scale": "logit_scale", "logit_bias": "logit_bias",
}  # fmt: skip
IMAGES: Names = {
    **{f"tower.{ours}": f"tower.{theirs}" for ours, theirs in VISION.items()},
    "projector": "projector", "connector": "connector",
}  # fmt: skip
BUFFERS = re.compile(r"(.+\.)?position_ids")  # numbers 0, 1, … that old versions stored
LAYER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
NEUTRAL = {"hidden_act": "gelu_pytorch_tanh"}
WITHOUT_EFFECT = frozenset(
    "attention_dropout dropout model_type dtype torch_dtype initializer_range initializer_factor "
    "bos_token_id eos_token_id pad_token_id transformers_version architectures _name_or_path "
    "return_dict output_attentions output_hidden_states projection_dim num_image_tokens "
    "num_positions max_image_size size tie_word_embeddings use_base_siglip".split()
)
OF_SIGLIP = VisionConfig()
OF_IDEFICS3 = VisionConfig(  # transformers' defaults
    dim=1152, ffn_dim=3072, n_heads=16, image_size=224, patch_size=32, head=False
)


# --- configurations ---------------------------------------------------------------------------


def encoder_sizes(get: Fields, default: EncoderConfig) -> dict[str, Any]:
    return {
        "dim": get.integer("hidden_size", default.dim),
        "n_layers": get.integer("num_hidden_layers", default.n_layers, maximum=MAX_LAYERS),
        "n_heads": get.integer("num_attention_heads", default.n_heads),
        "ffn_dim": get.integer("intermediate_size", default.ffn_dim),
        "norm_eps": get.number("layer_norm_eps", default.norm_eps),
    }


def require_all_read(get: Fields) -> None:
    """Raise ConfigError for keys that nothing has read: they may change the arithmetic."""
    assert isinstance(get.values, ReadKeys)
    if unread := sorted(get.values.unused(WITHOUT_EFFECT)):
        raise ConfigError(f"{get.source}: not supported: {', '.join(unread)}")


def part_of(values: Mapping[str, Any], name: str) -> Fields:
    """An object of config.json, which may be missing: all has defaults."""
    inner = Fields("config.json", values).object(name, None)
    get = Fields(f"config.json: {name}", ReadKeys({} if inner is None else inner.values))
    require_neutral(get.values, NEUTRAL, get.source)
    return get


def vision_from_hf(values: Mapping[str, Any], default: VisionConfig = OF_SIGLIP) -> VisionConfig:
    """`vision_config` of a config.json. Raises ConfigError naming the field."""
    get = part_of(values, "vision_config")
    require_neutral(get.values, {"num_channels": CHANNELS}, get.source)
    config = VisionConfig(
        **encoder_sizes(get, default),
        image_size=get.integer("image_size", default.image_size),
        patch_size=get.integer("patch_size", default.patch_size),
        head=get.boolean("vision_use_head", default.head),
    )
    require_all_read(get)
    return config


def siglip_from_hf(values: Mapping[str, Any]) -> SiglipConfig:
    """A config.json of SigLIP. Raises ConfigError naming the field."""
    get, default = part_of(values, "text_config"), TextConfig()
    sizes = encoder_sizes(get, default)
    text = TextConfig(
        **sizes,
        vocab_size=get.integer("vocab_size", default.vocab_size),
        max_seq_len=get.integer("max_position_embeddings", default.max_seq_len),
        embedding_dim=get.integer("projection_size", sizes["dim"]),
    )
    require_all_read(get)
    return SiglipConfig(vision=vision_from_hf(values), text=text)


def paligemma_from_hf(values: Mapping[str, Any], text: Any) -> PaliGemmaConfig:
    """A config.json of PaliGemma; `text` is the decoder's configuration. Raises ConfigError."""
    get = Fields("config.json", values)
    token = get.integer("image_token_id", get.integer("image_token_index", 256_000))
    vision = replace(vision_from_hf(values), head=False)
    return PaliGemmaConfig(vision=vision, text=text, image_token=token)


def smolvlm_from_hf(values: Mapping[str, Any], text: Any) -> SmolVLMConfig:
    """The same for Idefics3 and SmolVLM."""
    get = Fields("config.json", values)
    return SmolVLMConfig(
        vision=vision_from_hf(values, OF_IDEFICS3), text=text,
        image_token=get.integer("image_token_id", 128_257), scale=get.integer("scale_factor", 2),
    )  # fmt: skip


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.norm_eps, **NEUTRAL,
    }  # fmt: skip


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    return {
        **encoder_to_hf(config), "model_type": "siglip_vision_model", "num_channels": CHANNELS,
        "image_size": config.image_size, "patch_size": config.patch_size,
        "vision_use_head": config.head,
    }  # fmt: skip


def siglip_to_hf(config: SiglipConfig) -> dict[str, Any]:
    text = {
        **encoder_to_hf(config.text), "model_type": "siglip_text_model",
        "vocab_size": config.text.vocab_size, "projection_size": config.text.embedding_dim,
        "max_position_embeddings": config.text.max_seq_len,
    }  # fmt: skip
    return {
        "architectures": ["SiglipModel"], "model_type": "siglip", "text_config": text,
        "vision_config": vision_to_hf(config.vision),
    }  # fmt: skip


# --- weights ----------------------------------------------------------------------------------


def foreign_name(ours: str, names: Names) -> str:
    """The file's name of one of our parameters."""
    found = LAYER.search(ours)
    number = found[0] if found else ""
    pattern = LAYER.sub("{}", ours, count=1) if found else ours
    if pattern in names:
        return names[pattern].format(number)
    stem, _, kind = pattern.rpartition(".")
    return f"{names[stem].format(number)}.{kind}"


def load_parameters(
    model: Model, file: TensorFile, names: Names, present: Iterable[str], dtype: torch.dtype
) -> Model:
    """Fill a model on the meta device from a file, and return it in evaluation mode.

    `present` are the names in the file that belong to this model. Raises WeightsError listing all
    tensors that are missing, unexpected, of another shape or of a type that no weight has.
    """
    tensors = {
        ours: MappedTensor(
            ours=ours, theirs=foreign_name(ours, names), shape=tuple(parameter.shape),
            stored_shape=tuple(parameter.shape), transposed=False, less_one=False, first_row=0,
            is_zero=False,
        )
        for ours, parameter in model.named_parameters()
    }  # fmt: skip
    expected = {tensor.theirs for tensor in tensors.values()}
    there = {name for name in present if not BUFFERS.fullmatch(name)}
    unexpected = sorted(there - expected)
    if problems := [*differences(file, [*tensors.values()], there, unexpected)]:
        raise WeightsError(summary(problems))
    for ours, tensor in tensors.items():
        info = file.info(tensor.theirs)
        numbers = dequantize(file.read(tensor.theirs), info.dtype, info.shape)
        module, _, name = ours.rpartition(".")
        parameter = nn.Parameter(torch.from_numpy(numbers).to(dtype), requires_grad=False)
        setattr(model.get_submodule(module), name, parameter)
        file.release_pages(tensor.theirs)
    return model.eval()


def load_images(part: ImagePart, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The vision tower and projection of a vision-language model. Raises GlassError."""
    is_paligemma = part.family is PALIGEMMA
    config = (paligemma_from_hf if is_paligemma else smolvlm_from_hf)(part.values, part.text)
    require_layers(part.file, config.vision.n_layers)
    with shapes_only():
        model: nn.Module = (
            PaliGemmaImages(config)
            if not isinstance(config, SmolVLMConfig)
            else SmolVLMImages(config)
        )
    return load_parameters(model, part.file, IMAGES, part.file.names(), dtype)


@torch.inference_mode()
def run(module: Callable[..., Tensor], *arrays: NDArray[Any]) -> NDArray[np.float32]:
    """A function of PyTorch on arrays -> its result as float32."""
    result: NDArray[np.float32] = module(*map(torch.from_numpy, arrays)).float().numpy()
    return result


def load_siglip(folder: Path, dtype: torch.dtype = torch.float32) -> Siglip:
    """A SigLIP folder of Hugging Face's form. Raises GlassError."""
    values = read_json(folder / CONFIG)
    config = siglip_from_hf(values)
    file = OPEN["hf"](folder)
    for part in (config.vision, config.text):
        require_layers(file, part.n_layers)
    with shapes_only():
        model = Siglip(config)
    try:
        return load_parameters(model, file, SIGLIP, file.names(), dtype)
    finally:
        file.close()


def save_siglip(folder: Path, model: Siglip) -> None:
    """Write weights and configuration, which transformers reads, into `folder`."""
    tensors: dict[str, Tensor] = {
        foreign_name(ours, SIGLIP): parameter.detach().cpu().contiguous()
        for ours, parameter in model.named_parameters()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    put(folder / WEIGHTS, lambda path: save_tensors(tensors, path, {"format": "pt"}))
    values = siglip_to_hf(model.config)
    dtype = str(model.logit_scale.dtype).removeprefix("torch.")
    put(folder / CONFIG, writer_of({**values, "dtype": dtype}))
