"""Small configurations of any model class of transformers, by rule: sizes are replaced by what their names say.

`COUNTS` and `SIZES` are the rule. It knows names, no classes: a class for which it fails is reported as such, and not
given sizes of its own.
"""

from __future__ import annotations

import re
from typing import Any

from mmkernels.testing.models import Config

LAYERS, HEADS, HEAD_DIM, WIDTH, VOCABULARY, POSITIONS, IMAGE, PATCH = 2, 4, 16, 64, 128, 128, 32, 8

_LAYERS = re.compile(
    r"^(num_(hidden_|encoder_|decoder_|global_|transformer_)?layers|n_layers?|(\w+_)?layers|depth|(\w+_)?depth"
    r"|(\w+_)?num_(hidden_)?layers|num_blocks|num_hidden_blocks)$"
)

COUNTS: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), count)
    for pattern, count in (
        (r"^mamba_(n_heads|num_heads)$|^n_mamba_heads$", 8),
        (r"^(\w+_)?(num_)?(key_value|kv)_heads$|^num_query_groups$", 2),
        (r"^(\w+_)?(heads?|num_attention_heads|n_heads?|num_heads)$", HEADS),
        (r"^linear_num_(key|value)_heads$", HEADS),
        (r"^(\w+_)?patch_size$", PATCH),
        (r"^(num_mel_bins|n_mels|mel_bins|num_mel_filters)$", 16),
        (r"^(\w+_)?(num_(local_|routed_)?experts|n_routed_experts)$", 4),
        (r"^(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_per_token|topk)$", 2),
        (r"^(n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace)$", 1),
        (r"^(sliding_window\w*|local_attention|attention_window|attention_chunk_size|window_size_\w+)$", 6),
        (r"^(index_topk|index_n_heads)$", 4),
        (r"^(num_queries|num_query_tokens|n_latents|resampler_n_latents|num_latents|num_image_tokens)$", 8),
        (r"^(codebook_size|num_embeddings)$", 32),
        (r"^(chunk_size|mamba_chunk_size|ssm_state_size|state_size|mamba_d_state)$", 16),
        (r"^num_frames$|^(max_)?num_tiles$", 2),
    )
]
"""What is the same in a larger model, by the names of fields, the first that fits; None, a bool or a fraction stays."""

SIZES: list[tuple[re.Pattern[str], int]] = [
    (re.compile(pattern), size)
    for pattern, size in (
        (r"^(qk_nope_head_dim|qk_rope_head_dim|index_head_dim)$", HEAD_DIM // 2),
        (r"^(\w+_)?(head_dim|dim_head|d_kv|head_size|attention_head_size)$", HEAD_DIM),
        (r"^(qk_head_dim|query_pre_attn_scalar)$", HEAD_DIM),
        (r"^(kv|q|o)_lora_rank$", HEAD_DIM),
        (
            r"^(\w+_)?(hidden_size|d_model|model_dim|embed_dim|emb_dim|hidden_dim|n_embd|dim|width|out_hidden_size)$",
            WIDTH,
        ),
        (
            r"^(\w+_)?(hidden_size_\w+|embedding_size|embedding_dim|word_embed_proj_dim|projection_dim|projection_size|output_dim)$",
            WIDTH,
        ),
        (r"^(vision_)?output_size$|^(text|encoder|decoder|projector|cross_attention)_(hidden|embed)_\w+$", WIDTH),
        (r"^lru_width$|^proj_dim$|^d_embed$|^bottleneck_dim$|^channels$|^output_channels$", WIDTH),
        (r"^(\w+_)?(intermediate_size\w*|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|d_inner|linear_units|n_inner)$", 96),
        (r"^(\w+_)?intermediate_dim$|^(\w+_)?feedforward_dim$|^ff_dim$|^(\w+_)?feed_forward\w*_size$", 96),
        (r"^(\w+_)?vocab_size\w*$|^(audio|image)_vocab_size$", VOCABULARY),
        (r"^(n_positions|(\w+_)?max_position_embeddings|max_sequence_length|max_seq_len|n_ctx|seq_len)$", POSITIONS),
        (r"^max_(source|target)_positions$|^(\w+_)?max_length$", POSITIONS),
        (r"^(\w+_)?image_size$|^img_size$|^input_resolution$", IMAGE),
    )
]
"""What is `times` as large in a larger model, in the same way."""

_DERIVED = ("id2label", "label2id", "out_features", "out_indices", "stage_names")
"""Fields that follow from others."""

_TOKEN = re.compile(r"^(\w+_)?(token_id|token_index)$|^(boi|eoi|boa|eoa)_\w+$")


def shrink(config: Config, times: int = 1) -> Config:
    """Returns the arguments of a configuration with small sizes, in its parts too.

    Args:
        config: as ``to_dict()`` of a configuration with its default values.
        times: by what widths, lengths and vocabularies are larger than the smallest; the layers stay as few.
    """
    config = {name: value for name, value in config.items() if name not in _DERIVED}
    if config and all(re.fullmatch(r"\d+", str(name)) for name in config):  # something for each of some layers
        return {
            name: shrink(part, times) if isinstance(part, dict) else part
            for name, part in config.items()
            if int(name) < LAYERS
        }
    counts = {name: count for name, count in config.items() if _is_size(count) and _LAYERS.match(name)}
    kept = _kept_layers(config, set(counts.values()))
    small: Config = {}
    for name, value in config.items():
        if isinstance(value, dict):
            small[name] = _rotary(value, times) if name in ("rope_parameters", "rope_scaling") else shrink(value, times)
        elif name in counts:
            small[name] = min(value, len(kept.get(value, range(LAYERS))))
        elif isinstance(value, list | tuple):
            small[name] = _list(name, value, kept, times)
        else:
            small[name] = _number(name, value, times)
    if config.get("num_key_value_heads") == config.get("num_attention_heads") and _is_size(
        small.get("num_key_value_heads")
    ):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small and config.get("head_dim") == config["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    if "head_dim" in small and small["head_dim"] is None:
        small["head_dim"] = HEAD_DIM * times
    _renumber_tokens(small, VOCABULARY * times)
    return small


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(name: str, value: Any, times: int) -> Any:
    if not _is_size(value):
        return value
    for pattern, size in (*COUNTS, *((pattern, size * times) for pattern, size in SIZES)):
        if pattern.match(name):
            return min(value, size)
    return value


def _kept_layers(config: Config, counts: set[int]) -> dict[int, list[int]]:
    """Returns for each number of layers which of them stay: the first of each kind, where lists say the kind."""
    kept = {}
    for count in counts:
        lists = [x for x in config.values() if isinstance(x, list | tuple) and len(x) == count > LAYERS]
        kinds = list(zip(*([str(item) for item in x] for x in lists))) if lists else [()] * count
        first = [place for place, kind in enumerate(kinds) if kind not in kinds[:place]][: 2 * LAYERS]
        more = [place for place in range(count) if place not in first]
        kept[count] = sorted(first + more[: max(0, LAYERS - len(first))])
    return kept


def _list(name: str, value: list[Any] | tuple[Any, ...], kept: dict[int, list[int]], times: int) -> Any:
    if len(value) in kept and len(value) > LAYERS:
        value = [value[place] for place in kept[len(value)]]
    if not value or not all(_is_size(x) for x in value):
        return value
    if re.search(r"(layers?|index\w*|indices|blocks)$", name):  # which layers: they must exist
        return sorted({min(x, LAYERS - 1) for x in value})
    if re.search(r"depths?$|num_blocks$|blocks_per_stage$", name):
        return [min(x, 1) for x in value]
    if re.search(r"heads\w*$", name):
        return [HEADS] * len(value)
    if re.search(r"hidden_sizes$|^embed_dims?(_per_stage)?$|^widths$", name):
        return [max(16, x * WIDTH * times // value[0] // 16 * 16) for x in value]
    return [_number(name, x, times) for x in value]


def _rotary(rope: Config, times: int) -> Config:
    """Returns rotary parameters whose lists fit the small head: some count the frequencies of an axis."""
    small = {name: _rotary(value, times) if isinstance(value, dict) else value for name, value in rope.items()}
    if "rope_type" not in rope:
        return small
    for name in ("short_factor", "long_factor"):
        if rope.get(name):
            small[name] = rope[name][: HEAD_DIM * times // 2]
    if "original_max_position_embeddings" in rope:
        small["original_max_position_embeddings"] = POSITIONS * times
    frequencies = int(HEAD_DIM * times * rope.get("partial_rotary_factor", 1.0)) // 2
    third = frequencies // 4
    small["mrope_section"] = [third, third, frequencies - 2 * third]  # classes that need it may keep it to themselves
    return small


def _renumber_tokens(config: Config, vocabulary: int) -> None:
    """Moves special tokens into the small vocabulary, each to a number of its own above those of text."""
    taken = 0
    for name, value in config.items():
        if _TOKEN.match(name) and isinstance(value, list | tuple) and value:
            value = config[name] = value[0]
        if _TOKEN.match(name) and _is_size(value) and value >= 5:
            taken += 1
            config[name] = vocabulary - taken
