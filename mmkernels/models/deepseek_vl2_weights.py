"""How the released DeepSeek-VL2, of which transformers has no class, name what a `DeepSeekVL2` is made of."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.blocks.checkpoint import CheckpointError, Names
from mmkernels.models.blocks.config import token_ids

MODEL_TYPE, ARCHITECTURE = "deepseek_vl_v2", "DeepseekVLV2ForCausalLM"

# What a released ``config.json`` leaves out has these values in its code; the fields of ours that take them follow.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4,
        "class_token": False, "ignore_head": True, "model_name": "",
    },
    "projector_config": {
        "projector_type": "downsample_mlp_gelu", "input_dim": 1152, "n_embed": 2048, "depth": 2, "mlp_ratio": 1,
        "downsample_ratio": 2, "token_pooling": False,
    },
    "language_config": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
        "moe_intermediate_size": 1407, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32,
        "n_shared_experts": None, "n_routed_experts": None, "routed_scaling_factor": 1.0, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "topk_method": "greedy", "n_group": None, "topk_group": None, "num_experts_per_tok": None,
        "moe_layer_freq": 1, "first_k_dense_replace": 0, "norm_topk_prob": False, "scoring_func": "softmax",
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "pad_token_id": None,
        "eos_token_id": 100001, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
        "attention_bias": False, "attention_dropout": 0.0, "use_mla": True, "mlp_bias": False,
    },
}  # fmt: skip
_WHOLE: dict[str, Any] = {"tile_tag": "2D", "global_view_pos": "head", "candidate_resolutions": [[384, 384]]}
_MOST_LAYERS = 2**9  # as `check_config` has it

FIELDS = {
    "vision_width": "vision_config.width",
    "vision_layers": "vision_config.layers",
    "vision_heads": "vision_config.heads",
    "image_size": "vision_config.image_size",
    "patch_size": "vision_config.patch_size",
    "merge": "projector_config.downsample_ratio",
    "text_width": "language_config.hidden_size",
    "text_layers": "language_config.num_hidden_layers",
    "text_heads": "language_config.num_attention_heads",
    "text_kv_heads": "language_config.num_key_value_heads",
    "text_mlp": "language_config.intermediate_size",
    "text_activation": "language_config.hidden_act",
    "text_bias": "language_config.attention_bias",
    "text_length": "language_config.max_position_embeddings",
    "vocab_size": "language_config.vocab_size",
    "rms_norm_eps": "language_config.rms_norm_eps",
    "rope_theta": "language_config.rope_theta",
    "dropout": "language_config.attention_dropout",
    "tie_embeddings": "language_config.tie_word_embeddings",
    "latent": "language_config.use_mla",
    "experts": "language_config.n_routed_experts",
    "experts_used": "language_config.num_experts_per_tok",
    "expert_mlp": "language_config.moe_intermediate_size",
    "dense_layers": "language_config.first_k_dense_replace",
    "scoring": "language_config.scoring_func",
    "routing": "language_config.topk_method",
    "routing_scale": "language_config.routed_scaling_factor",
}
"""Field of `DeepSeekVL2Config` -> field of the released configuration."""

LATENT_FIELDS = {
    "kv_rank": "language_config.kv_lora_rank",
    "query_rank": "language_config.q_lora_rank",
    "nope_dim": "language_config.qk_nope_head_dim",
    "rope_dim": "language_config.qk_rope_head_dim",
    "value_dim": "language_config.v_head_dim",
    "text_head_dim": "language_config.qk_rope_head_dim",
}
"""The further fields of latent attention."""


def read(config: dict[str, Any], where: str) -> Any:
    """Returns a ``config.json`` with its defaults, as an object; raises a CheckpointError for one of another model."""
    if config.get("model_type") != MODEL_TYPE:
        given = repr(config["model_type"])[:200] if "model_type" in config else "nothing"
        raise CheckpointError(f"{where}: model_type must be {MODEL_TYPE!r}, got {given}")
    named = config.get("architectures")
    if named not in (None, [], [ARCHITECTURE]):
        raise CheckpointError(f"{where}: architectures must be {[ARCHITECTURE]}, got {repr(named)[:200]}")
    parts = {}
    for name, defaults in _DEFAULTS.items():
        part = config.get(name)
        if not isinstance(part, dict):
            raise CheckpointError(f"{where}: {name} must be an object, got {repr(part)[:200]}")
        parts[name] = SimpleNamespace(**(defaults | {key: x for key, x in part.items() if key in defaults}))
    for section, name, got in (
        ("vision_config", "layers", parts["vision_config"].layers),
        ("language_config", "num_hidden_layers", parts["language_config"].num_hidden_layers),
    ):
        if type(got) is int and got > _MOST_LAYERS:
            raise CheckpointError(f"{where}, {section}: {name} must be at most {_MOST_LAYERS}, got {got}")
    theirs = SimpleNamespace(**(_WHOLE | {key: config[key] for key in _WHOLE if key in config}), **parts)
    _check_fixed(theirs, where)
    return theirs


def _check_fixed(theirs: Any, where: str) -> None:
    """Raises a CheckpointError where a configuration has a value that models here don't have."""
    vision, projector, text = theirs.vision_config, theirs.projector_config, theirs.language_config
    fixed: list[tuple[str, str, Any, tuple[Any, ...]]] = [
        ("", "tile_tag", theirs.tile_tag, ("2D",)),
        ("", "global_view_pos", theirs.global_view_pos, ("head", "tail")),
        (", vision_config", "class_token", vision.class_token, (False,)),
        (", vision_config", "ignore_head", vision.ignore_head, (True,)),
        (", projector_config", "projector_type", projector.projector_type, ("downsample_mlp_gelu",)),
        (", projector_config", "depth", projector.depth, (2,)),
        (", projector_config", "token_pooling", projector.token_pooling, (False,)),
        (", projector_config", "input_dim", projector.input_dim, (vision.width,)),
        (", projector_config", "n_embed", projector.n_embed, (text.hidden_size,)),
        (", language_config", "model_type", text.model_type, ("deepseek_v2",)),
        (", language_config", "use_mla", text.use_mla, (True, False)),
        (", language_config", "rope_scaling", text.rope_scaling, (None,)),
        (", language_config", "mlp_bias", text.mlp_bias, (False,)),
        (", language_config", "moe_layer_freq", text.moe_layer_freq, (1,)),
        (", language_config", "norm_topk_prob", text.norm_topk_prob, (True, False)),
    ]
    for section, name, got, allowed in fixed:
        if got not in allowed or type(got) not in map(type, allowed):
            must = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{where}{section}: {name} must be {must}, got {repr(got)[:200]}")


def other_fields(theirs: Any, where: str) -> dict[str, Any]:
    """Returns the fields of a `DeepSeekVL2Config` that no field of the released configuration has alone."""
    vision, projector, text = theirs.vision_config, theirs.projector_config, theirs.language_config
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 2**20
    for section, name, got in (
        ("vision_config", "width", vision.width),
        ("vision_config", "mlp_ratio", vision.mlp_ratio),
        ("projector_config", "mlp_ratio", projector.mlp_ratio),
        ("language_config", "hidden_size", text.hidden_size),
        ("language_config", "num_attention_heads", text.num_attention_heads),
    ):
        if not number(got):
            raise CheckpointError(f"{where}, {section}: {name} must be a positive number, got {repr(got)[:200]}")
    sizes = theirs.candidate_resolutions
    is_pairs = isinstance(sizes, list) and all(isinstance(size, list) for size in sizes)
    shared, groups, tops = text.n_shared_experts, text.n_group, text.topk_group
    used = text.num_experts_per_tok
    grouped = text.topk_method != "greedy"  # which knows no groups, whatever the fields say
    fields = {
        "vision_mlp": int(vision.width * vision.mlp_ratio),
        "projector_mlp": int(text.hidden_size * projector.mlp_ratio),
        "candidate_resolutions": tuple(map(tuple, sizes)) if is_pairs else sizes,
        "whole_first": theirs.global_view_pos == "head",
        "shared_experts": 0 if shared is None else shared,
        "groups": groups if grouped and groups is not None else 1,
        "top_groups": tops if grouped and tops is not None else 1,
        "normalise": text.norm_topk_prob and used != 1,
        "pad_token_id": 0 if text.pad_token_id is None else text.pad_token_id,
        "eos_token_ids": token_ids(text.eos_token_id),
    }
    return fields if text.use_mla else fields | {"text_head_dim": int(text.hidden_size // text.num_attention_heads)}


_VISION_LAYER, _TEXT = "vision.blocks.#.", "language.model."
_TEXT_LAYER = _TEXT + "layers.#."

# The start of a parameter's name in `DeepSeekVL2` -> in the checkpoint: those of the image encoder are timm's.
_TABLE = {
    "vision.patch.": "vision.patch_embed.proj.",
    "vision.positions": "vision.pos_embed",
    "vision.blocks.#.attention_norm.": _VISION_LAYER + "norm1.",
    "vision.blocks.#.attention.out_proj.": _VISION_LAYER + "attn.proj.",
    "vision.blocks.#.attention.": _VISION_LAYER + "attn.",
    "vision.blocks.#.mlp_norm.": _VISION_LAYER + "norm2.",
    "vision.blocks.#.mlp.0.": _VISION_LAYER + "mlp.fc1.",
    "vision.blocks.#.mlp.2.": _VISION_LAYER + "mlp.fc2.",
    "vision_norm.": "vision.norm.",
    "projector.mlp.": "projector.layers.",
    "newline": "image_newline",
    "separator": "view_seperator",  # this is how the released code spells it
    "head.": "language.lm_head.",
    "decoder.embed.": _TEXT + "embed_tokens.",
    "decoder.norm.": _TEXT + "norm.",
    "decoder.blocks.#.attention_norm.": _TEXT_LAYER + "input_layernorm.",
    "decoder.blocks.#.mlp_norm.": _TEXT_LAYER + "post_attention_layernorm.",
    "decoder.blocks.#.mlp.router.weight": _TEXT_LAYER + "mlp.gate.weight",
    "decoder.blocks.#.mlp.router.correction_bias": _TEXT_LAYER + "mlp.gate.e_score_correction_bias",
    "decoder.blocks.#.mlp.shared.": _TEXT_LAYER + "mlp.shared_experts.",
    "decoder.blocks.#.mlp.": _TEXT_LAYER + "mlp.",
}
_PLAIN = {
    "decoder.blocks.#.attention.out_proj.": _TEXT_LAYER + "self_attn.o_proj.",
    "decoder.blocks.#.attention.": _TEXT_LAYER + "self_attn.",
}
_LATENT = {
    "decoder.blocks.#.attention.q_proj.0.": _TEXT_LAYER + "self_attn.q_a_proj.",
    "decoder.blocks.#.attention.q_proj.1.": _TEXT_LAYER + "self_attn.q_a_layernorm.",
    "decoder.blocks.#.attention.q_proj.2.": _TEXT_LAYER + "self_attn.q_b_proj.",
    "decoder.blocks.#.attention.kv_proj.": _TEXT_LAYER + "self_attn.kv_a_proj_with_mqa.",
    "decoder.blocks.#.attention.kv_norm.": _TEXT_LAYER + "self_attn.kv_a_layernorm.",
    "decoder.blocks.#.attention.expand_proj.": _TEXT_LAYER + "self_attn.kv_b_proj.",
    **_PLAIN,
}
# The pooling head is of SigLIP's contrastive loss.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|^vision\.(?:attn_pool|head|fc_norm)\.")


def names(latent: bool) -> Names:
    """Returns the names of checkpoints. `latent`: of those with latent attention."""
    return Names((_LATENT if latent else _PLAIN) | _TABLE, _IGNORED, convert=_convert)


def _convert(weights: dict[str, Tensor]) -> None:
    """Takes projections apart that timm has as one, and packs those of experts, which the checkpoint has one by one."""
    for name in [name for name in weights if name.startswith("vision.blocks.") and ".attention.qkv." in name]:
        whole = weights.pop(name)
        if whole.dim() == 0 or whole.shape[0] % 3:
            raise CheckpointError(f"{name} must hold query, key and value, got {list(whole.shape)}")
        for part, x in zip("qkv", whole.chunk(3), strict=True):
            weights[name.replace(".qkv.", f".{part}_proj.")] = x
    _pack_experts(weights)


_EXPERT = re.compile(r"(decoder\.blocks\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def _pack_experts(weights: dict[str, Tensor]) -> None:
    layers: dict[str, dict[str, dict[int, str]]] = {}  # start of the names -> projection -> expert -> name
    for name in weights:
        if match := _EXPERT.fullmatch(name):
            start, number, kind = match.groups()
            layers.setdefault(start, {}).setdefault(kind, {})[int(number)] = name
    for start, kinds in layers.items():
        count = 1 + max(number for experts in kinds.values() for number in experts)
        found = {kind: _stacked(weights, start, kind, kinds.get(kind, {}), count) for kind in ("gate", "up", "down")}
        if found["gate"].shape != found["up"].shape:
            got = f"{list(found['gate'].shape[1:])} and {list(found['up'].shape[1:])}"
            raise CheckpointError(f"gate_proj.weight and up_proj.weight of {start}* must be of one shape, got {got}")
        weights[start + "gate_up"] = torch.cat([found["gate"], found["up"]], dim=1)
        weights[start + "down"] = found["down"]


def _stacked(weights: dict[str, Tensor], start: str, kind: str, names: dict[int, str], count: int) -> Tensor:
    """Returns one projection of all experts of a layer, taken out of the weights."""
    for number in range(min(count, len(names) + 1)):
        if number not in names:
            must = f"{kind}_proj.weight of each of the {count} experts of a layer"
            raise CheckpointError(f"the weights must hold {must}, got none for {start}{number}")
    each = [weights.pop(names[number]) for number in range(count)]
    if each[0].dim() != 2:
        must = f"the {kind}_proj.weight of {start}* must have two dims"
        raise CheckpointError(f"{must}, got shape {list(each[0].shape)}")
    if len({(x.shape, x.dtype) for x in each}) > 1:
        raise CheckpointError(f"the {kind}_proj.weight of {start}* must be of one shape and dtype, got several")
    return torch.stack(each)
