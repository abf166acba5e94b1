"""How Hugging Face's ``CLIPModel`` and ``SiglipModel`` checkpoints map to a `CLIP`: configuration, tensor names."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import Checkpoint, Section, joined, renamed

ARCHITECTURES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""By model type, which is also `CLIPConfig.variant`."""


def config_fields(config: Section) -> dict[str, Any]:
    """`CLIPConfig`'s fields, of ``config.json``. What the file leaves out has transformers' default."""
    if config.choice("model_type", "", ARCHITECTURES) == "siglip":
        return _siglip_fields(config)
    vision, text = _section(config, "vision_config"), _section(config, "text_config")
    eos = text.integer("eos_token_id", 49407, least=0)
    return {
        "variant": "clip",
        **_tower_fields("vision", vision, width=768, mlp=3072, heads=12, activation="quick_gelu", eps=1e-5),
        **_tower_fields("text", text, width=512, mlp=2048, heads=8, activation="quick_gelu", eps=1e-5),
        **_input_fields(vision, text, patch_size=32, vocab_size=49408, text_length=77),
        "embed_dim": config.integer("projection_dim", 512),
        # 2 was written by mistake into early checkpoints, whose end-of-text token has the highest id.
        "eos_token_id": None if eos == 2 else eos,
    }


def _siglip_fields(config: Section) -> dict[str, Any]:
    vision, text = config.section("vision_config"), config.section("text_config")
    if not vision.flag("vision_use_head", True):
        raise vision.error("vision_use_head", "true: without the head there is no image feature")
    towers = {
        **_tower_fields("vision", vision, width=768, mlp=3072, heads=12, activation="gelu_pytorch_tanh", eps=1e-6),
        **_tower_fields("text", text, width=768, mlp=3072, heads=12, activation="gelu_pytorch_tanh", eps=1e-6),
    }
    projected = text.values.get("projection_size") is not None
    return {
        "variant": "siglip",
        **towers,
        **_input_fields(vision, text, patch_size=16, vocab_size=32000, text_length=64),
        "embed_dim": text.integer("projection_size", 0) if projected else towers["text_width"],
    }


def _section(config: Section, key: str) -> Section:
    """A tower's configuration. Early versions of transformers saved it under another name too, which then counts."""
    early = f"{key}_dict"
    return config.section(early if config.values.get(early) is not None else key)


def _tower_fields(
    tower: str, section: Section, *, width: int, mlp: int, heads: int, activation: str, eps: float
) -> dict[str, Any]:
    """The fields that both towers have; after `section`, transformers' defaults."""
    return {
        f"{tower}_width": section.integer("hidden_size", width),
        f"{tower}_layers": section.integer("num_hidden_layers", 12),
        f"{tower}_heads": section.integer("num_attention_heads", heads),
        f"{tower}_mlp": section.integer("intermediate_size", mlp),
        f"{tower}_activation": section.choice("hidden_act", activation, ACTIVATIONS),
        f"{tower}_eps": section.number("layer_norm_eps", eps),
        f"{tower}_dropout": section.number("attention_dropout", 0.0),
    }


def _input_fields(
    vision: Section, text: Section, *, patch_size: int, vocab_size: int, text_length: int
) -> dict[str, Any]:
    return {
        "image_size": vision.integer("image_size", 224),
        "patch_size": vision.integer("patch_size", patch_size),
        "channels": vision.integer("num_channels", 3),
        "vocab_size": text.integer("vocab_size", vocab_size),
        "text_length": text.integer("max_position_embeddings", text_length),
    }


class _Source(NamedTuple):
    """Where in the checkpoint a parameter comes from: a tensor, its shape there, and which third of its rows."""

    name: str
    shape: tuple[int, ...]
    third: int | None = None


def read_weights(
    checkpoint: Checkpoint, model: nn.Module, variant: str, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """`model`'s state, from the checkpoint. Everything is checked before the first tensor is read."""
    state = {name: x.shape for name, x in model.state_dict().items()}
    sources = {name: _source(name, shape, variant) for name, shape in state.items()}
    ignored = [name for name in checkpoint.names if _IGNORED.search(name)]
    checkpoint.check({source.name: source.shape for source in sources.values()}, ignored)
    return {name: joined([_read(checkpoint, sources[name])], shape, dtype, device) for name, shape in state.items()}


def _source(name: str, shape: torch.Size, variant: str) -> _Source:
    for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
        start = f"image_pool.attention.{projection}."
        if name.startswith(start):  # PyTorch's own attention keeps the three projections in one tensor
            theirs = f"vision_model.head.attention.in_proj_{name[len(start) :]}"
            return _Source(theirs, (3 * shape[0], *shape[1:]), third)
    if variant == "siglip" and name in ("logit_scale", "logit_bias"):
        return _Source(name, (1,))
    prefixes = _SIGLIP_PREFIXES if variant == "siglip" else _CLIP_PREFIXES
    return _Source(renamed(name, prefixes), (1, 1, *shape) if name == "image_pool.probe" else tuple(shape))


def _read(checkpoint: Checkpoint, source: _Source) -> Tensor:
    whole = checkpoint.read(source.name)
    # A copy: a view would keep all three alive.
    return whole if source.third is None else whole.chunk(3)[source.third].clone()


_IGNORED = re.compile(r"\.position_ids$")  # a constant that older versions of transformers saved

_VISION = "vision_model."
_TEXT = "text_model."

# The start of a name in `CLIP`, and of the same tensor's name in the checkpoint.
_BOTH = {
    "logit_scale": "logit_scale",
    "vision.patch.": _VISION + "embeddings.patch_embedding.",
    "vision.class_token": _VISION + "embeddings.class_embedding",
    "vision.positions": _VISION + "embeddings.position_embedding.weight",
    "vision.norm.": _VISION + "pre_layrnorm.",  # so spelt
    "vision_norm.": _VISION + "post_layernorm.",
    "text.embed.": _TEXT + "embeddings.token_embedding.",
    "text.positions": _TEXT + "embeddings.position_embedding.weight",
    "text.norm.": _TEXT + "final_layer_norm.",
    **{
        f"{tower}.blocks.#.{ours}": f"{tower}_model.encoder.layers.#.{theirs}"
        for tower in ("vision", "text")
        for ours, theirs in (
            ("attention_norm.", "layer_norm1."),
            ("attention.", "self_attn."),
            ("mlp_norm.", "layer_norm2."),
            ("mlp.0.", "mlp.fc1."),
            ("mlp.2.", "mlp.fc2."),
        )
    },
}
_CLIP_PREFIXES = {
    **_BOTH,
    "image_projection.": "visual_projection.",
    "text_projection.": "text_projection.",
}
_SIGLIP_PREFIXES = {
    **_BOTH,
    "image_pool.probe": _VISION + "head.probe",
    "image_pool.attention.out_proj.": _VISION + "head.attention.out_proj.",
    "image_pool.norm.": _VISION + "head.layernorm.",
    "image_pool.mlp.0.": _VISION + "head.mlp.fc1.",
    "image_pool.mlp.2.": _VISION + "head.mlp.fc2.",
    "text_projection.": _TEXT + "head.",
}
