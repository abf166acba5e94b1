"""DeepSeek-VL: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Saved, accepted_fields, change_weights, configure, distance, refused
from deepseek_vl_checkpoints import HYBRID, PLAIN, VOCAB, inputs

from mmkernels.models import DeepSeekVL, DeepSeekVLConfig, deepseek_vl_weights
from mmkernels.models.deepseek_vl_config import SIZES

Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., DeepSeekVL]


def test_hub_checkpoints_untie_the_head(copy: Copy) -> None:
    """Their configurations do not say that the head is apart, and transformers' default is that it is not."""
    folder = copy(PLAIN)
    head = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(0))
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    model = DeepSeekVL.from_pretrained(folder)
    theirs = transformers.DeepseekVLForConditionalGeneration.from_pretrained(folder).eval()
    assert torch.equal(model.head.weight, head) and torch.equal(theirs.lm_head.weight, head)
    given = inputs(theirs)
    with torch.no_grad():
        assert distance(model(**given).logits[:, -1], theirs(**given).logits[:, -1]) < 5e-6
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = DeepSeekVL.from_pretrained(folder)
    assert model.head.weight is model.decoder.embed.weight


def test_names_of_older_versions(copy: Copy, ours: Ours) -> None:
    """SigLIP was a model in a model there."""
    folder = copy(HYBRID)
    old = lambda name: name.replace("model.vision_model.", "model.vision_model.vision_model.")
    constants = {"model.vision_model.vision_model.embeddings.position_ids": torch.zeros(1, 16)}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {old(name): x for name, x in tensors.items()} | constants
        tensors.clear()
        tensors.update(renamed)

    change_weights(folder, rename)
    parameters = DeepSeekVL.from_pretrained(folder).named_parameters()
    for (name, x), y in zip(parameters, ours(HYBRID).parameters(), strict=True):
        assert torch.equal(x, y), name


def test_tokens_of_the_generation_configuration(copy: Copy) -> None:
    folder = copy(PLAIN)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 3}))
    config = DeepSeekVL.from_pretrained(folder).config
    assert config.eos_token_ids == (7, 8) and config.pad_token_id == 3


SIZE, SAM = "must be an integer from 1 to", "high_res_vision_config__"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__hidden_size": 2**40}, f"hidden_size: vision_width {SIZE} 65536, got 1099511627776"),
        ({"vision_config__hidden_size": 33}, "vision_width must be a multiple of vision_heads = 2, got 33"),
        ({"vision_config__hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"vision_config__num_hidden_layers": 10**6}, "num_hidden_layers.* 512, got 1000000"),
        ({"vision_config__patch_size": 0}, f"patch_size {SIZE} 8192, got 0"),
        ({"vision_config__num_channels": 10**9}, "num_channels|channels"),
        ({"vision_config__hidden_act": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"vision_config__attention_dropout": 2.0}, "vision_dropout must be a number between 0 and 1, got 2.0"),
        ({"vision_config__model_type": "clip_vision_model"}, "model_type must be 'siglip_vision_model', got 'clip_"),
        ({SAM + "hidden_size": 2**40}, f"sam_width {SIZE} 65536, got 1099511627776"),
        ({SAM + "hidden_size": 25}, "sam_width must be a multiple of sam_heads = 2, got 25"),
        ({SAM + "num_hidden_layers": 10**6}, "num_hidden_layers.* 512, got 1000000"),
        ({SAM + "num_hidden_layers": 1}, r"sam_global must be layers, .* below sam_layers = 1, got \(1,\)"),
        ({SAM + "global_attn_indexes": []}, r"sam_global must be layers, .* below sam_layers = 3, got \(\)"),
        ({SAM + "global_attn_indexes": [-1]}, r"sam_global must be layers, integers from 0, .*got \(-1,\)"),
        ({SAM + "num_attention_heads": 0}, f"sam_heads {SIZE}"),
        ({SAM + "mlp_dim": -1}, f"sam_mlp {SIZE}"),
        ({SAM + "image_size": [64, 32]}, rf"sam_image_size {SIZE} 8192, got [\[(]64, 32"),
        ({SAM + "image_size": 10**9}, f"sam_image_size {SIZE} 8192"),
        ({SAM + "patch_size": 7}, "sam_image_size must be a multiple of sam_patch_size = 7, got 64"),
        ({SAM + "window_size": 0}, f"sam_window {SIZE} 1024, got 0"),
        ({SAM + "output_channels": 10**9}, f"sam_channels {SIZE} 16384"),
        ({SAM + "num_channels": 1}, "num_channels must be 3, got 1"),
        ({SAM + "hidden_act": "swish9"}, "sam_activation must be one of gelu, .*got 'swish9'"),
        ({SAM + "layer_norm_eps": 0.0}, "sam_eps must be a number above 0"),
        ({SAM + "attention_dropout": 2.0}, "sam_dropout must be a number from 0 to 1, got 2.0"),
        ({SAM + "model_type": "siglip_vision_model"}, "model_type must be 'sam_vision_model', got 'siglip_"),
        ({"image_token_id": VOCAB}, f"image_token_id must be an integer below vocab_size = {VOCAB}, got {VOCAB}"),
        ({"text_config__model_type": "gpt2"}, "model_type must be 'llama', got 'gpt2'"),
        ({"text_config__hidden_size": 2**40}, f"text_width {SIZE} 65536"),
        ({"text_config__num_attention_heads": 3}, "text_heads must be a multiple of text_kv_heads = 2, got 3"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({"text_config__max_position_embeddings": 0}, f"text_length {SIZE}"),
        ({"text_config__attention_bias": True}, "attention_bias must be False, got True"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be 'default', got 'linear'",
        ),
        ({"text_config": 3}, "'text_config' with value 3|text_config"),
        ({"architectures": ["DeepseekVLModel"]}, "architectures must be .*DeepseekVLHybridForConditionalGeneration"),
        ({"model_type": "deepseek_vl_v2"}, "model_type must be one of deepseek_vl, deepseek_vl_hybrid, got"),
    ],
)
def test_config_values(copy: Copy, values: dict[str, Any], match: str) -> None:
    """Wrong types and huge sizes in ``config.json`` are refused before anything of that size is allocated."""
    folder = copy(HYBRID)
    configure(folder, **values)
    refused(folder, f"config.json.*(?:{match})")


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("x", set()),
        (None, {"text_config.num_key_value_heads", "high_res_vision_config.mlp_dim"}),  # as theirs fills in
        (-1, set()),
        (10**12, set()),
        ([1], set()),
        ({"a": 1}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order in a set's text is not fixed
)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any, taken: set[str]) -> None:
    """It is refused by a `CheckpointError`, not by another."""
    fields = (deepseek_vl_weights.FIELDS | deepseek_vl_weights.SAM_FIELDS).values()
    assert accepted_fields(saved(HYBRID).folder, fields, value, DeepSeekVLConfig) == taken


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__image_size": 8192}, "position_embedding.weight must be .* by config.json"),
        ({SAM + "image_size": 128}, r"pos_embed must be \[16, 16, 24\] by config.json, got \[1, 8, 8, 24\]"),
        ({SAM + "window_size": 4}, r"layers.0.attn.rel_pos_h must be \[7, 12\] by config.json, got \[5, 12\]"),
        ({SAM + "global_attn_indexes": [0]}, r"layers.\d.attn.rel_pos_\w must be .* by config.json"),
        ({SAM + "qkv_bias": False}, "must hold only the model's tensors, got .*attn.qkv.bias"),
        ({SAM + "num_hidden_layers": 5}, r"must hold model.high_res_vision_model.vision_encoder.layers.3.\S+"),
        ({"text_config__vocab_size": 2**24}, r"embed_tokens.weight must be \[16777216, 48\] by config.json"),
    ],
)
def test_sizes_that_the_weights_do_not_have(copy: Copy, values: dict[str, Any], match: str) -> None:
    folder = copy(HYBRID)
    configure(folder, **values)
    refused(folder, match)


def test_a_hybrid_is_not_read_as_a_plain_model(copy: Copy) -> None:
    folder = copy(HYBRID)
    plain = ["DeepseekVLForConditionalGeneration"]
    configure(folder, model_type="deepseek_vl", architectures=plain, high_res_vision_config=...)
    refused(folder, "must hold only the model's tensors, got model.")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_head_dim": 7}, "text_head_dim must be even, got 7"),
        ({"image_token_id": None}, "image_token_id must be an integer below vocab_size = 128, got None"),
        ({"sam_layers": -1}, "sam_layers must be an integer from 0 to 512, got -1"),
        ({"sam_layers": True}, "sam_layers must be an integer from 0 to 512, got True"),
        ({"sam_layers": 1}, r"sam_global must be layers, integers from 0, the first of them below sam_layers = 1"),
        ({"sam_global": [1]}, r"sam_global must be layers, .*got \[1\]"),
        ({"sam_global": ()}, r"sam_global must be layers, .*got \(\)"),
        ({"sam_bias": 1}, "sam_bias must be a bool, got 1"),
        ({"sam_dropout": True}, "sam_dropout must be a number from 0 to 1, got True"),
        ({"text_width": 63, "text_heads": 3, "text_kv_heads": 3}, "text_width must be even, half of it for each"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny_hybrid"], **values)
    if next(iter(values)) in ("sam_global", "sam_bias", "sam_dropout"):
        replace(SIZES["tiny"], **values)  # they count for nothing


def test_defaults_are_those_of_transformers() -> None:
    text = {"model_type": "llama", "vocab_size": 102400}  # theirs does not hold the default marker
    whole = json.loads(json.dumps(transformers.DeepseekVLHybridConfig(text_config=text).to_dict()))
    config = DeepSeekVLConfig.from_hf({"model_type": "deepseek_vl_hybrid", "text_config": text})
    assert config == DeepSeekVLConfig.from_hf(whole)
    published = SIZES["deepseek_vl_7b"].sam_sizes
    assert config.sam_sizes == published and published.global_layers == (2, 5, 8, 11)
