"""InternVL: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from checkpoints import Saved, accepted_fields, change_weights, configure, distance, refused
from internvl_checkpoints import VOCAB, inputs

from mmkernels.models import InternVL, InternVLConfig, internvl_weights
from mmkernels.models.internvl_config import SIZES

PLAIN, OTHER = "internvl_qwen2", "internvl_qwen3"
Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., InternVL]


def test_hub_checkpoints_untie_the_head(copy: Copy, saved: Checkpoints) -> None:
    """Their configurations do not say that the head is apart, and transformers' default is that it is not."""
    folder = copy(PLAIN)
    head = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(0))
    change_weights(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": head}))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    model = InternVL.from_pretrained(folder)
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(folder).eval()
    assert torch.equal(model.head.weight, head) and torch.equal(theirs.lm_head.weight, head)
    given = inputs(theirs)
    with torch.no_grad():
        assert distance(model(**given).logits[:, -1], theirs(**given).logits[:, -1]) < 5e-6

    embed = lambda tensors: tensors["language_model.model.embed_tokens.weight"]
    change_weights(folder, lambda tensors: tensors.update({"language_model.lm_head.weight": embed(tensors).clone()}))
    model = InternVL.from_pretrained(folder)
    assert model.head.weight is model.decoder.embed.weight
    change_weights(folder, lambda tensors: tensors.pop("language_model.model.embed_tokens.weight"))
    model = InternVL.from_pretrained(folder)
    assert model.head.weight is model.decoder.embed.weight
    change_weights(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    refused(folder, r"must hold language_model.model.embed_tokens.weight \[128, 48\]")


def test_names_of_transformers_five(copy: Copy, ours: Ours, saved: Checkpoints) -> None:
    folder = copy(PLAIN)
    renamed = dict(saved(PLAIN).theirs.state_dict())
    del renamed["lm_head.weight"]
    assert all(name.startswith("model.") for name in renamed)
    change_weights(folder, lambda tensors: (tensors.clear(), tensors.update(renamed)))
    for (name, x), y in zip(InternVL.from_pretrained(folder).named_parameters(), ours(PLAIN).parameters(), strict=True):
        assert torch.equal(x, y), name


def test_tokens_of_the_generation_configuration(copy: Copy) -> None:
    folder = copy(PLAIN)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 3}))
    config = InternVL.from_pretrained(folder).config
    assert config.eos_token_ids == (7, 8) and config.pad_token_id == 3


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__hidden_size": 2**40}, f"hidden_size: vision_width {SIZE} 65536, got 1099511627776"),
        ({"vision_config__hidden_size": 33}, "vision_width must be a multiple of vision_heads = 2, got 33"),
        ({"vision_config__hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"vision_config__num_hidden_layers": 10**6}, "num_hidden_layers.* 512, got 1000000"),
        ({"vision_config__num_attention_heads": 0}, f"vision_heads {SIZE}"),
        ({"vision_config__intermediate_size": -1}, f"vision_mlp {SIZE}"),
        ({"vision_config__image_size": [10**9, 10**9]}, f"image_size {SIZE} 8192, got 1000000000"),
        ({"vision_config__image_size": [32, 64]}, rf"image_size {SIZE} 8192, got \(32, 64\)|got \[32, 64\]"),
        ({"vision_config__image_size": 36}, "image_size must be a multiple of merge .* patch_size = 8, got 36"),
        ({"vision_config__patch_size": [4, 4, 4]}, f"patch_size {SIZE}"),
        ({"vision_config__patch_size": 0}, f"patch_size {SIZE} 8192, got 0"),
        ({"vision_config__num_channels": 10**9}, f"channels {SIZE} 256"),
        ({"vision_config__hidden_act": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"vision_config__norm_type": "batch"}, "norm_type must be one of layer_norm, rms_norm, got 'batch'"),
        ({"vision_config__layer_norm_eps": 0.0}, "vision_eps must be a number, positive and finite, got 0.0"),
        ({"vision_config__hidden_dropout_prob": 0.1}, "hidden_dropout_prob must be 0, got 0.1"),
        ({"vision_config__projection_dropout": 0.1}, "projection_dropout must be 0, got 0.1"),
        ({"vision_config__attention_dropout": 2.0}, "vision_dropout must be a number between 0 and 1, got 2.0"),
        ({"vision_feature_layer": 0}, "feature_layer must be an integer from 1 to vision_layers = 3, or from -3 to -1"),
        ({"vision_feature_layer": [-1, -2]}, r"feature_layer must be .*, got \[-1, -2\]"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy must be default, got 'full'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio must be 1, 1/2, 1/3, ..., got 0.3"),
        ({"downsample_ratio": 0.0}, "downsample_ratio must be 1, 1/2"),
        ({"downsample_ratio": 1e-12}, f"merge {SIZE} 64|downsample_ratio must be"),
        ({"projector_hidden_act": "swish9"}, "projector_activation must be one of gelu, .*got 'swish9'"),
        ({"image_token_id": VOCAB}, f"image_token_id must be an integer below vocab_size = {VOCAB}, got {VOCAB}"),
        ({"text_config__model_type": "gpt2"}, "model_type must be one of qwen2, qwen3, llama, got 'gpt2'"),
        ({"text_config__hidden_size": 2**40}, f"text_width {SIZE} 65536"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers.*"),
        ({"text_config__num_attention_heads": 3}, "text_heads must be a multiple of text_kv_heads = 2, got 3"),
        ({"text_config__num_attention_heads": 0}, f"text_heads {SIZE}"),
        ({"text_config__num_key_value_heads": 0}, f"text_kv_heads {SIZE}"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({"text_config__max_position_embeddings": 0}, f"text_length {SIZE}"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be",
        ),
        ({"text_config__use_sliding_window": True}, "use_sliding_window must be false, got True"),
        (
            {"text_config__layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must be full_attention, got 'sliding_attention'",
        ),
        ({"text_config": 3}, "'text_config' with value 3|text_config"),
        ({"architectures": ["InternVLModel"]}, "architectures must be .*InternVLForConditionalGeneration"),
    ],
)
def test_config_values(copy: Copy, values: dict[str, Any], match: str) -> None:
    """Wrong types and huge sizes in ``config.json`` are refused before anything of that size is allocated."""
    folder = copy(PLAIN)
    configure(folder, **values)
    refused(folder, f"config.json.*(?:{match})")


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        ("x", set()),
        (None, {"text_config.num_key_value_heads"}),  # as many as query heads
        (-1, {"vision_feature_layer"}),
        (10**12, set()),
        (1.5, {"vision_config.layer_norm_eps", "text_config.rms_norm_eps"}),
        ([1], set()),
        ({"a": 1}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order in a set's text is not fixed
)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any, taken: set[str]) -> None:
    """It is refused by a `CheckpointError`, not by another."""
    assert accepted_fields(saved(PLAIN).folder, internvl_weights.FIELDS.values(), value, InternVLConfig) == taken


def test_sizes_that_the_weights_do_not_have(copy: Copy) -> None:
    for values, match in (
        ({"vision_config__hidden_size": 65536}, r"must be \[\d*, ?\d*.*65536.*\] by config.json|by config.json"),
        ({"vision_config__image_size": 8192}, "position_embeddings must be .* by config.json"),
        ({"text_config__vocab_size": 2**24}, r"embed_tokens.weight must be \[16777216, 48\] by config.json"),
        (
            {"text_config__num_hidden_layers": 400, "text_config__layer_types": ["full_attention"] * 400},
            r"must hold language_model.model.layers.2.\S+ .*and \d+ more",
        ),
        ({"vision_config__use_qk_norm": True}, r"must hold vision_tower.encoder.layer.0.attention.q_norm.weight"),
        ({"vision_config__num_hidden_layers": 5}, r"must hold vision_tower.encoder.layer.3.\S+"),
        (
            {"vision_config__num_hidden_layers": 2},
            r"must hold only the model's tensors, got vision_tower.encoder.layer.2",
        ),
        ({"vision_config__use_mean_pooling": False}, r"must hold vision_tower.layernorm.weight \[32\]"),
    ):
        folder = copy(PLAIN)
        configure(folder, **values)
        refused(folder, match)


def test_a_truncated_shard(copy: Copy) -> None:
    folder = copy(OTHER)
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    for keep in (0.1, 0.999):
        path.write_bytes(content[: int(len(content) * keep)])
        refused(folder, f"{path.name}: must be a whole safetensors file")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_model": "gpt"}, "text_model must be one of qwen2, qwen3, llama, got 'gpt'"),
        ({"vision_norm": None}, "vision_norm must be one of layer, rms, got None"),
        ({"text_head_dim": 7}, "text_head_dim must be even, got 7"),
        ({"merge": 3}, "image_size must be a multiple of merge .* patch_size = 12, got 32"),
        ({"image_token_id": None}, "image_token_id must be an integer below vocab_size = 128, got None"),
        ({"feature_layer": True}, "feature_layer must be an integer"),
        ({"feature_layer": 3}, "feature_layer must be an integer from 1 to vision_layers = 2, or from -2 to -1, got 3"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny"], **values)


def test_published_sizes() -> None:
    """938 million and 2.1 billion parameters (the model cards of InternVL3-1B and 2B; the heads are apart)."""
    for size, millions in (("internvl3_1b", 938), ("internvl3_2b", 2089)):
        with torch.device("meta"):
            model = InternVL(SIZES[size])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    whole = transformers.InternVLConfig().to_dict()
    config = InternVLConfig.from_hf({"model_type": "internvl"})
    assert config == InternVLConfig.from_hf(json.loads(json.dumps(whole)))
    assert (config.vision_width, config.image_size, config.patch_size, config.merge) == (1024, 448, 14, 2)


def test_rotary_positions_of_hub_checkpoints() -> None:
    """They were written by older versions: InternVL2.5's scale beyond the longest text, to which none comes here."""
    text: dict[str, Any] = {"model_type": "llama", "vocab_size": 151674, "rope_theta": 2e6}
    text["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    config = InternVLConfig.from_hf({"model_type": "internvl", "text_config": text})
    assert (config.text_model, config.rope_theta) == ("llama", 2e6)
    text["rope_scaling"] = {"type": "linear", "factor": 2.0}
    with pytest.raises(checkpoints.CheckpointError, match="rope_type must be one of default, dynamic, got 'linear'"):
        InternVLConfig.from_hf({"model_type": "internvl", "text_config": text})
