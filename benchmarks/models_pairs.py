"""A model of mmkernels and transformers' class of it, with the same random weights, at sizes that the model file names.

The sizes stand once, in `mmkernels/models/*_config.py`; transformers' configuration is made of them. Ours reads the
checkpoint that transformers writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from mmkernels.models import (
    BLIP2,
    DeepSeekVL,
    InternVL,
    Janus,
    QwenVL,
    blip2_weights,
    deepseek_vl_weights,
    internvl_weights,
    janus_weights,
    qwen_vl_weights,
)
from mmkernels.models.blocks.vision_language import VisionLanguageModel
from mmkernels.testing.models import Config, build, seeded

_AROUND = {"vision_start_token_id": 3, "vision_end_token_id": 4}
"""Tokens around an image, of any model; the prompts here have none."""


class Pair(NamedTuple):
    """The same model twice, in float32, in evaluation mode.

    Attributes:
        ours: with ``config.vision_layers`` and ``config.text_layers``, and an image encoder `vision`.
        theirs: transformers'.
    """

    ours: VisionLanguageModel
    theirs: Any


def qwen_vl(size: str, **changes: Any) -> Pair:
    """Returns a Qwen-VL.

    Args:
        size: a name in `QwenVL.sizes`.
        changes: fields of it that differ.
    """
    return _pair(QwenVL, _changed(QwenVL.sizes[size], changes), qwen_config)


def internvl(size: str, **changes: Any) -> Pair:
    """Returns an InternVL; `size` and `changes` as of `qwen_vl`."""
    return _pair(InternVL, _changed(InternVL.sizes[size], changes), internvl_config)


def blip2(size: str, **changes: Any) -> Pair:
    """Returns a BLIP-2 with OPT, of whose parameters those of the Q-Former and behind it are trained.

    `size` and `changes` are as of `qwen_vl`.
    """
    trained = ("query_tokens", "qformer", "language_projection")
    return _pair(BLIP2, _changed(BLIP2.sizes[size], changes), blip2_config, trained=trained)


def deepseek_vl(size: str, **changes: Any) -> Pair:
    """Returns a DeepSeek-VL, the hybrid one too; `size` and `changes` as of `qwen_vl`."""
    return _pair(DeepSeekVL, _changed(DeepSeekVL.sizes[size], changes), deepseek_vl_config)


def janus(size: str, **changes: Any) -> Pair:
    """Returns a Janus; `size` and `changes` as of `qwen_vl`."""
    return _pair(Janus, _changed(Janus.sizes[size], changes), janus_config, prepare=_prepare_janus)


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a configuration with changes. Where these leave fewer tokens, the markers of images are the last ones."""
    if "vocab_size" in changes:
        names = ("image_token_id", "video_token_id", "image_start_token_id")
        markers = [name for name in names if hasattr(config, name)]
        numbered = {name: changes["vocab_size"] - 1 - place for place, name in enumerate(markers)}
        changes = {"eos_token_ids": (), "pad_token_id": 0, **numbered, **changes}
    return replace(config, **changes)


def _pair(
    model_class: type[VisionLanguageModel],
    config: Any,
    translate: Any,
    *,
    trained: Sequence[str] = (),
    prepare: Callable[[Any, Any], None] = lambda theirs, config: None,
) -> Pair:
    """Returns both models.

    Args:
        prepare: gives transformers' model what its configuration does not say.
        trained: attributes of transformers' model of which alone a training step computes gradients; (): of all.
    """
    name, theirs_config = translate(config)
    with seeded(0):
        theirs = build(name, theirs_config).eval()
        redraw_zeros(theirs)
    prepare(theirs, config)
    theirs.requires_grad_(not trained)
    for part in trained:
        getattr(theirs, part).requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = model_class.from_pretrained(folder)
        for x in ours.parameters():  # else its pages, mapped from the file, would count as memory of the first run
            x.data = x.data.clone()
    assert ours.config == config, f"the checkpoint must have the sizes {config}, got {ours.config}"
    return Pair(ours, theirs)


@torch.no_grad()
def redraw_zeros(net: nn.Module) -> None:
    """Redraws parameters that are all 0, such as biases and class tokens: a 0 would hide errors."""
    for x in net.parameters():
        if not x.any():
            x.normal_(std=0.02)


# Configurations of transformers.


def qwen_config(config: Any) -> tuple[str, Config]:
    """Returns transformers' class of a `QwenVLConfig`, and the arguments of its configuration."""
    variant, w = config.variant, qwen_vl_weights
    theirs = _nested(config, w.FIELDS | w.FIELDS_OF[variant])
    rope: Config = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "mrope_section": list(config.rope_sections),
    }
    text, vision = theirs["text_config"], theirs["vision_config"]
    if variant == "qwen2":
        vision |= {"mlp_ratio": config.vision_mlp // config.vision_width, "hidden_size": config.text_width}
    else:
        vision["out_hidden_size"] = config.text_width
    if variant == "qwen2_5":
        vision["fullatt_block_indexes"] = list(config.full_layers)
    if variant == "qwen3":
        rope["mrope_interleaved"] = True
        vision["deepstack_visual_indexes"] = list(config.deep_layers)
        vision["num_position_embeddings"] = config.position_side**2
    theirs["text_config"] = text | _special(config) | {"rope_parameters": rope}
    (architecture,) = (w.ARCHITECTURES[name] for name, found in w.VARIANT_OF.items() if found == variant)
    return architecture, theirs | _AROUND


def internvl_config(config: Any) -> tuple[str, Config]:
    """Returns transformers' class of an `InternVLConfig`, and the arguments of its configuration."""
    theirs = _nested(config, internvl_weights.FIELDS)
    theirs["vision_config"] |= {
        "image_size": [config.image_size] * 2,
        "patch_size": [config.patch_size] * 2,
        "norm_type": f"{config.vision_norm}_norm",
        "use_mean_pooling": not config.vision_last_norm,
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    more = {"model_type": config.text_model, "head_dim": config.text_head_dim, "rope_parameters": rope}
    theirs["text_config"] |= _special(config) | more
    return internvl_weights.ARCHITECTURES["internvl"], theirs | {"downsample_ratio": 1 / config.merge}


def blip2_config(config: Any) -> tuple[str, Config]:
    """Returns transformers' class of a `BLIP2Config` with OPT, and the arguments of its configuration."""
    theirs = _nested(config, blip2_weights.FIELDS | blip2_weights.TEXT_FIELDS["opt"])
    theirs["text_config"] |= _special(config) | {
        "model_type": "opt",
        "word_embed_proj_dim": config.text_width,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return blip2_weights.ARCHITECTURES["blip-2"], theirs


def deepseek_vl_config(config: Any) -> tuple[str, Config]:
    """Returns transformers' class of a `DeepSeekVLConfig`, plain or hybrid, and the arguments of its configuration."""
    hybrid, w = config.sam_layers > 0, deepseek_vl_weights
    theirs = _nested(config, w.FIELDS | (w.SAM_FIELDS if hybrid else {}))
    theirs["vision_config"] |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    theirs["text_config"] |= _llama(config)
    if hybrid:
        theirs["high_res_vision_config"] |= {
            "model_type": "sam_vision_model",
            "num_channels": config.channels,
            "global_attn_indexes": list(config.sam_global),
        }
    return w.ARCHITECTURES["deepseek_vl_hybrid" if hybrid else "deepseek_vl"], theirs


def janus_config(config: Any) -> tuple[str, Config]:
    """Returns transformers' class of a `JanusConfig`, and the arguments of its configuration."""
    theirs = _nested(config, janus_weights.FIELDS)
    width = config.text_width
    theirs["vision_config"] |= {
        "mlp_ratio": config.vision_mlp / config.vision_width,
        "projection_dim": width,
        "num_image_tokens": config.image_tokens,
    }
    theirs["vq_config"] |= {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "channel_multiplier": list(config.vq_multipliers),
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    theirs["text_config"] |= _llama(config) | {"bos_token_id": config.bos_token_id}
    return janus_weights.ARCHITECTURES["janus"], theirs


def _prepare_janus(theirs: Any, config: Any) -> None:
    """Says what starts an image, and gives an argument that `generate` of transformers 5.17 leaves out, and raises."""
    settings = theirs.generation_config
    settings.bos_token_id, settings.pad_token_id = config.bos_token_id, config.pad_token_id
    settings.generation_kwargs = {"boi_token_id": config.image_start_token_id}
    theirs._prepare_static_cache = partial(theirs._prepare_static_cache, prefill_chunk_size=None)


def _llama(config: Any) -> Config:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return _special(config) | {"model_type": "llama", "head_dim": config.text_head_dim, "rope_parameters": rope}


def _special(config: Any) -> Config:
    return {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def _nested(config: Any, fields: Mapping[str, str]) -> Config:
    """Returns the values of a configuration's fields under their names at transformers, such as "text_config.x"."""
    found: Config = {}
    for ours, path in fields.items():
        *parts, name = path.split(".")
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = getattr(config, ours)
    return found


transformers.logging.set_verbosity_error()  # else each change of attention warns of parts without the interface
transformers.logging.disable_progress_bar()
