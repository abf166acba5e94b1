"""DeepSeek-VL2: folders of checkpoints, those with errors too, configurations, inputs with errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, accepted_fields, change_weights, configure, refused
from deepseek_vl2_checkpoints import FIRST, MARKER, SIGMOID, VOCAB, images, inputs, prompt

from mmkernels.models import DeepSeekVL2, DeepSeekVL2Config, deepseek_vl2_weights
from mmkernels.models.deepseek_vl2_config import SIZES
from mmkernels.models.deepseek_vl2_tiles import candidate_resolutions

Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., DeepSeekVL2]

# What the released configurations hold; what they leave out has the values of the released code.
_WHOLE: dict[str, Any] = {
    "model_type": "deepseek_vl_v2",
    "tile_tag": "2D",
    "global_view_pos": "head",
    "candidate_resolutions": [list(size) for size in candidate_resolutions()],
    "vision_config": {
        "layers": 27, "mlp_ratio": 3.7362, "model_name": "siglip_so400m_patch14_384", "model_type": "vision",
        "patch_size": 14, "width": 1152,
    },
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
}
_TEXT |= {"num_experts_per_tok": 6, "max_position_embeddings": 4096, "q_lora_rank": None, "topk_method": "greedy"}
_LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_vl2_tiny": {
        "hidden_size": 1280, "intermediate_size": 6848, "kv_lora_rank": None, "moe_intermediate_size": 896,
        "n_routed_experts": 64, "num_attention_heads": 10, "num_hidden_layers": 12, "num_key_value_heads": 10,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "use_mla": False, "v_head_dim": 0, "vocab_size": 129280,
        "eos_token_id": 1,
    },
    "deepseek_vl2_small": _LATENT | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16, "vocab_size": 102400,
    },
    "deepseek_vl2": _LATENT | {
        "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 72,
        "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 32, "vocab_size": 129280,
        "norm_topk_prob": True, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "eos_token_id": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("size", RELEASED)
def test_the_released_configurations(size: str) -> None:
    text = _TEXT | RELEASED[size]
    projector = {"model_type": "mlp_projector", "n_embed": text["hidden_size"]}
    read = DeepSeekVL2Config.from_hf(
        _WHOLE | {"projector_config": projector, "language_config": text}, image_token_id=SIZES[size].image_token_id
    )
    published = replace(SIZES[size], projector_mlp=read.text_width)  # the same as None
    if not read.latent:
        published = replace(published, query_rank=read.query_rank)
    assert read == published
    with torch.device("meta"):
        names = set(DeepSeekVL2(replace(read, vision_layers=1, text_layers=2)).state_dict())
    assert ("decoder.blocks.1.attention.kv_proj.weight" in names) == read.latent
    assert ("decoder.blocks.1.mlp.router.correction_bias" in names) == (size == "deepseek_vl2")
    assert "decoder.blocks.0.mlp.gate_proj.weight" in names and "decoder.blocks.1.mlp.experts.gate_up" in names


def test_where_the_marker_is_named(copy: Copy) -> None:
    folder = copy(FIRST)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    refused(folder, "config.json: the folder's tokenizer.json must name <image>, or config.json image_token_id, got ")
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": 77}))
    assert DeepSeekVL2.from_pretrained(folder).config.image_token_id == 77
    configure(folder, image_token_id=78)
    assert DeepSeekVL2.from_pretrained(folder).config.image_token_id == 78
    configure(folder, image_token_id=VOCAB)
    refused(folder, f"image_token_id must be an integer below vocab_size = {VOCAB}, got {VOCAB}")


def test_tokens_of_the_generation_configuration(copy: Copy) -> None:
    folder = copy(FIRST)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 3}))
    config = DeepSeekVL2.from_pretrained(folder).config
    assert config.eos_token_ids == (7, 8) and config.pad_token_id == 3


SIZE, TEXT = "must be an integer from 1 to", "language_config__"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "deepseek_vl"}, "model_type must be 'deepseek_vl_v2', got 'deepseek_vl'"),
        ({"architectures": ["X"]}, r"architectures must be \['DeepseekVLV2ForCausalLM'\], got \['X'\]"),
        ({"vision_config": 3}, "vision_config must be an object, got 3"),
        ({"language_config": ...}, "language_config must be an object, got None"),
        ({"tile_tag": "1D"}, "tile_tag must be '2D', got '1D'"),
        ({"global_view_pos": "middle"}, "global_view_pos must be 'head' or 'tail', got 'middle'"),
        ({"candidate_resolutions": [[27, 28]]}, r"candidate_resolutions must be pairs of multiples .* 28.*\(27, 28\)"),
        ({"candidate_resolutions": []}, r"candidate_resolutions must be from 1 to 1024 pairs"),
        ({"candidate_resolutions": 7}, r"candidate_resolutions must be from 1 to 1024 pairs"),
        ({"candidate_resolutions": [[28 * 10**6, 28]]}, "candidate_resolutions must be pairs .* of at most 256 tiles"),
        ({"vision_config__width": 2**40}, "input_dim must be|width must be"),
        ({"vision_config__layers": 10**6}, "layers must be at most 512, got 1000000"),
        ({"vision_config__heads": 3}, "vision_width must be a multiple of vision_heads = 3, got 32"),
        ({"vision_config__mlp_ratio": "x"}, "mlp_ratio must be a positive number, got 'x'"),
        ({"vision_config__patch_size": 0}, f"patch_size {SIZE} 8192, got 0"),
        ({"vision_config__class_token": True}, "class_token must be False, got True"),
        ({"projector_config__projector_type": "linear"}, "projector_type must be 'downsample_mlp_gelu', got 'linear'"),
        ({"projector_config__depth": 3}, "depth must be 2, got 3"),
        ({"projector_config__n_embed": 47}, "n_embed must be 48, got 47"),
        ({"projector_config__downsample_ratio": 0}, f"downsample_ratio: merge {SIZE} 64, got 0"),
        ({TEXT + "num_hidden_layers": 10**6}, "num_hidden_layers must be at most 512, got 1000000"),
        ({TEXT + "kv_lora_rank": None}, f"kv_lora_rank: kv_rank {SIZE} 65536, got None"),
        ({TEXT + "q_lora_rank": 0}, f"query_rank {SIZE} 262144, got 0"),
        ({TEXT + "qk_rope_head_dim": 7}, "text_head_dim must be even, got 7"),
        ({TEXT + "n_routed_experts": None}, f"n_routed_experts: experts {SIZE} 16384, got None"),
        ({TEXT + "n_routed_experts": 10**9}, f"experts {SIZE} 16384, got 1000000000"),
        ({TEXT + "num_experts_per_tok": 9}, r"experts_used must be at most 8, the experts of 1 group\(s\), got 9"),
        ({TEXT + "n_shared_experts": -1}, "shared_experts must be an integer from 0 to 256, got -1"),
        ({TEXT + "first_k_dense_replace": 4}, "dense_layers must be an integer from 0 to 3, got 4"),
        ({TEXT + "topk_method": "best"}, "routing must be one of greedy, group_limited_greedy, noaux_tc, got 'best'"),
        ({TEXT + "scoring_func": "relu"}, "scoring must be one of softmax, sigmoid, got 'relu'"),
        ({TEXT + "routed_scaling_factor": 0}, "routing_scale must be a number, positive and finite, got 0"),
        ({TEXT + "hidden_act": "quick_gelu"}, "text_activation must be one of gelu, relu, silu, got 'quick_gelu'"),
        ({TEXT + "moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        ({TEXT + "rope_scaling": {"type": "yarn"}}, "rope_scaling must be None, got {'type': 'yarn'}"),
        ({TEXT + "use_mla": 1}, "use_mla must be True or False, got 1"),
        ({TEXT + "vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({TEXT + "max_position_embeddings": 0}, f"text_length {SIZE}"),
    ],
)
def test_config_values(copy: Copy, values: dict[str, Any], match: str) -> None:
    """Wrong types and huge sizes in ``config.json`` are refused before anything of that size is allocated."""
    folder = copy(FIRST)
    configure(folder, **values)
    refused(folder, f"config.json.*(?:{match})")


_NULLS = {"language_config.q_lora_rank"}
_NUMBERS = {f"language_config.{name}" for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor")}


@pytest.mark.parametrize(
    ("value", "taken"),
    [("x", set()), (None, _NULLS), (-1, set()), (10**12, _NUMBERS), ([1], set()), ({}, set())],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order in a set's text is not fixed
)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any, taken: set[str]) -> None:
    """It is refused by a `CheckpointError`, not by another."""
    fields = (deepseek_vl2_weights.FIELDS | deepseek_vl2_weights.LATENT_FIELDS).values()
    marked = lambda values: DeepSeekVL2Config.from_hf(values, image_token_id=MARKER)
    reads = type("Reads", (), {"from_hf": staticmethod(marked)})
    assert accepted_fields(saved(FIRST).folder, fields, value, reads) == taken


@pytest.mark.parametrize(
    ("drop", "match"),
    [
        ("language.model.layers.1.mlp.experts.3.up_proj.weight", "up_proj.weight of each of the 8 experts .*experts.3"),
        ("language.model.layers.2.mlp.gate.weight", "must hold language.model.layers.2.mlp.gate.weight"),
        ("vision.blocks.1.attn.qkv.bias", "must hold vision.blocks.1.attn.q_proj.bias"),
        ("view_seperator", r"must hold view_seperator \[48\]"),
        ("image_newline", r"must hold image_newline \[48\]"),
    ],
)
def test_missing_tensors(copy: Copy, drop: str, match: str) -> None:
    folder = copy(FIRST)
    change_weights(folder, lambda tensors: tensors.pop(drop))
    refused(folder, match)


def _gates_of_one_row_more(tensors: dict[str, torch.Tensor]) -> None:
    """As many rows of both together as there should be."""
    for name in [name for name in tensors if "layers.1.mlp.experts" in name and "down" not in name]:
        rows, width = tensors[name].shape
        tensors[name] = torch.zeros(rows + (1 if "gate" in name else -1), width)


def _gates_without_width(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1.mlp.experts" in name and "gate" in name]:
        tensors[name] = torch.zeros(5)


def _a_bias_without_dims(tensors: dict[str, torch.Tensor]) -> None:
    tensors["vision.blocks.1.attn.qkv.bias"] = torch.zeros(())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_gates_of_one_row_more, r"gate_proj.weight and up_proj.weight of \S+ must be of one shape, got \["),
        (_gates_without_width, r"the gate_proj.weight of \S+ must have two dims, got shape \[5\]"),
        (_a_bias_without_dims, r"must hold query, key and value, got \[\]"),
    ],
    ids=["gates of one row more", "gates without width", "a bias without dims"],
)
def test_damaged_tensors(copy: Copy, change: Callable[[dict[str, torch.Tensor]], None], match: str) -> None:
    folder = copy(FIRST)
    change_weights(folder, change)
    refused(folder, match)


def test_other_numbers_of_experts(copy: Copy) -> None:
    folder = copy(FIRST)
    configure(folder, language_config__n_routed_experts=9)
    refused(folder, r"layers.\d.mlp.\S+ must be \[9, .* by config.json, got \[8, ")
    configure(folder, language_config__n_routed_experts=8)

    def last(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts.7." in name]:
            tensors[name.replace(".7.", ".70000.")] = tensors.pop(name)

    change_weights(folder, last)
    refused(folder, "of each of the 70001 experts of a layer, got none for .*experts.7")


def test_a_bias_of_the_router_is_read(saved: Checkpoints, ours: Ours) -> None:
    model = ours(SIGMOID)
    bias = model.decoder.get_buffer("blocks.1.mlp.router.correction_bias")
    assert torch.equal(bias, saved(SIGMOID).theirs.language.model.layers[1].mlp.gate.e_score_correction_bias)
    assert bias.abs().max() > 0.1
    first = DeepSeekVL2.from_size("tiny_sigmoid").decoder.get_buffer("blocks.1.mlp.router.correction_bias")
    assert not first.any()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_head_dim": 16}, "text_head_dim must be rope_dim = 8, got 16"),
        ({"image_token_id": None}, "image_token_id must be an integer below vocab_size = 128, got None"),
        ({"latent": 1}, "latent must be a bool, got 1"),
        ({"groups": 3}, "groups must divide experts = 8, got 3"),
        ({"groups": 2}, 'groups must be 1 where routing is "greedy", which knows no groups, got 2'),
        ({"groups": 8, "routing": "noaux_tc"}, "groups must leave each group two experts"),
        ({"top_groups": 2}, "top_groups must be at most groups = 1, got 2"),
        ({"experts_used": 9}, "experts_used must be at most 8"),
        ({"candidate_resolutions": [[28, 28]]}, "candidate_resolutions must be from 1 to 1024 pairs"),
        ({"candidate_resolutions": ((28, 0),)}, "candidate_resolutions must be pairs of multiples"),
        ({"projector_mlp": 0}, "projector_mlp must be an integer from 1"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny"], **values)


# Inputs with errors.

PIXELS = torch.rand(8, 3, 28, 28)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tiles": [(2, 1), (1, 1)]}, r"tiles must be pairs of which 1 \+ columns \* rows add up to the 8 .* of 5"),
        ({"tiles": [(2, 1), (1, 1), (2, 2)]}, "add up to the 8 tiles of pixel_values, .*of 10"),
        ({"tiles": [(1, 1), (1, 2), (2, 1)]}, "input_ids must have the 19 tokens of image 1 in one row"),
        ({"tiles": [(1, 1)] * 4}, r"input_ids must have 52 tokens 99 \(image\) for 4 images .* got 4\d"),
        ({"tiles": None}, r"input_ids must have 52 tokens 99 \(image\) for 4 images"),
        ({"tiles": None, "pixel_values": PIXELS[:7]}, "pixel_values must have two for each image .* got 7"),
        ({"tiles": [(2, 0), (7, 1)]}, r"tiles must be pairs \(columns, rows\) of positive integers, .*got"),
        ({"tiles": [(True, 1), (3, 2)]}, r"tiles must be pairs \(columns, rows\) of positive integers"),
        ({"tiles": [2, 1]}, r"tiles must be pairs \(columns, rows\)"),
        ({"tiles": torch.ones(3, 2)}, r"tiles must be pairs \(columns, rows\)"),
        ({"tiles": "33"}, r"tiles must be pairs \(columns, rows\)"),
        ({"pixel_values": None}, "tiles must be None without pixel_values, got"),
        ({"pixel_values": PIXELS[:, :1]}, r"pixel_values must be \[B, 3, 28, 28\], got shape \(8, 1, 28, 28\)"),
        ({"pixel_values": PIXELS.byte()}, "pixel_values must be a floating tensor"),
        ({"images_spatial_crop": None}, "images_spatial_crop"),
    ],
)
def test_bad_inputs(ours: Ours, change: dict[str, Any], match: str) -> None:
    model, given = ours(FIRST), inputs()
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((TypeError, ValueError), match=match):
        model(**(given | change))
    hook.remove()
    assert not calls  # found before anything is encoded


def test_too_many_tiles(ours: Ours) -> None:
    pixels = torch.zeros(1, 3, 28, 28).expand(4100, -1, -1, -1)
    with pytest.raises(ValueError, match="pixel_values must have at most 4096 tiles in all, got 4100"):
        ours(FIRST).encode(pixels)


def test_a_text_that_is_too_long(ours: Ours) -> None:
    tiles = [(2, 1)] * 40
    with pytest.raises(ValueError, match=r"input_ids must have at most 512 tokens \(text_length\)"):
        ours(FIRST)(prompt([tiles])[0], **images(tiles))


def test_a_reducer_is_refused() -> None:
    model = DeepSeekVL2.from_size("tiny")
    with pytest.raises(ValueError, match=r"text must be None for a model with a newline .* got 'pool:2'"):
        model.set_reducer("pool:2")
    model.set_reducer(None)


def test_images_of_another_model(ours: Ours) -> None:
    visual = DeepSeekVL2.from_size("tiny").encode(torch.rand(2, 3, 28, 28))
    with pytest.raises(ValueError, match=r"images must be \[tokens, 48\], as encode returns, got"):
        ours(FIRST)(inputs()["input_ids"], images=visual)
    with pytest.raises(ValueError, match="pixel_values must be None with images, got both"):
        ours(FIRST)(inputs()["input_ids"], PIXELS, images=visual)
