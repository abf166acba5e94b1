"""Folders of Qwen-VL checkpoints: names on disk, published configurations, and files with errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, change_weights, configure, load, refused
from qwen_checkpoints import PLAIN, config, prompts
from safetensors.torch import load_file

from mmkernels.models import QwenVL, QwenVLConfig
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.qwen_vl_config import SIZES

Copy = Callable[[str], Path]
Checkpoints = Callable[[str], Saved]

OLD, NEW = ("visual.", "model."), ("model.visual.", "model.language_model.")


def rename(weights: dict[str, torch.Tensor], starts: tuple[str, str]) -> None:
    """Renames the tensors of a checkpoint, whatever its names are, to names with other starts."""
    for name in list(weights):
        vision, rest = re.fullmatch(r"(?:model\.)?(visual\.|language_model\.|)(.*)", name).groups()  # type: ignore[union-attr]
        if name != "lm_head.weight":
            weights[(starts[0] if vision == "visual." else starts[1]) + rest] = weights.pop(name)


@pytest.mark.parametrize(
    ("variant", "starts"), [("qwen2_vl", OLD), ("qwen2_vl", NEW), ("qwen2_5_vl", OLD), ("qwen2_5_vl", NEW)]
)
def test_names_of_all_versions(saved: Checkpoints, copy: Copy, variant: str, starts: tuple[str, str]) -> None:
    """Those of the hub's checkpoints, and those that newer versions of transformers can write: it reads both."""
    folder, theirs = copy(variant), saved(variant).theirs
    change_weights(folder, lambda weights: rename(weights, starts))
    assert any(name.startswith(starts[1] + "layers.0.") for name in load_file(folder / "model.safetensors"))
    again = type(theirs).from_pretrained(folder)
    assert torch.equal(again.model.language_model.norm.weight, theirs.model.language_model.norm.weight)
    model = load(folder)
    assert torch.equal(model.decoder.norm.weight, theirs.model.language_model.norm.weight)
    assert torch.equal(model.vision.blocks[0].qkv.weight, theirs.model.visual.blocks[0].attn.qkv.weight)


def test_tensors_by_both_names(copy: Copy) -> None:
    folder = copy("qwen2_5_vl")
    change_weights(folder, lambda x: x.update({f"{NEW[1]}norm.weight": x["model.norm.weight"].clone()}))
    refused(folder, r"must not hold model\.\S*norm\.weight, which .*model\.safetensors holds too")


@pytest.mark.parametrize("variant", ["qwen2_vl_tied", "qwen2_5_vl_deep", "qwen3_vl_tied"])
def test_a_truncated_shard(copy: Copy, variant: str) -> None:
    folder = copy(variant)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    for length in (len(whole) - 100, 1000, 4, 0):
        shards[1].write_bytes(whole[:length])
        refused(folder, f"{shards[1].name}: must be a whole safetensors file, got an error")
    shards[1].unlink()
    refused(folder, f"must hold {shards[1].name}, got no such file", FileNotFoundError)


# Published configurations, as the hub has them: flat, with fields that are not read, and sizes that are left out.
QWEN2_5_3B = """{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "bos_token_id": 151643,
"eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
"image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
"intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70, "model_type": "qwen2_5_vl",
"num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.41.2", "use_cache": true, "use_sliding_window": false, "vision_config": {"depth": 32,
"hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
"out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936}"""
QWEN2_2B = """{"architectures": ["Qwen2VLForConditionalGeneration"], "bos_token_id": 151643,
"eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
"image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 1536,
"intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
"num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.41.2", "use_cache": true, "use_sliding_window": false, "vision_config": {"depth": 32,
"embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14,
"spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936}"""
QWEN3_2B = """{"architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
"text_config": {"attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
"eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
"intermediate_size": 6144, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
"rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
"rope_theta": 5000000, "tie_word_embeddings": true, "use_cache": true, "vocab_size": 151936},
"tie_word_embeddings": true, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
"vision_config": {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
"hidden_size": 1024, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
"num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2,
"temporal_patch_size": 2}, "vision_end_token_id": 151653, "vision_start_token_id": 151652}"""


@pytest.mark.parametrize(
    ("published", "size"), [(QWEN2_5_3B, "qwen2_5_3b"), (QWEN2_2B, "qwen2_2b"), (QWEN3_2B, "qwen3_2b")]
)
def test_published_configurations(published: str, size: str) -> None:
    assert replace(QwenVLConfig.from_hf(json.loads(published)), pad_token_id=151643) == SIZES[size]


def test_tokens_of_the_generation_config(copy: Copy) -> None:
    """They count more than those of config.json."""
    folder = copy("qwen2_5_vl")
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [7, 2], "pad_token_id": 3}')
    assert (load(folder).config.eos_token_ids, load(folder).config.pad_token_id) == ((7, 2), 3)
    path.write_text('{"do_sample": false}')
    assert (load(folder).config.eos_token_ids, load(folder).config.pad_token_id) == ((2,), 0)
    for content, match in (
        ("[]", "must hold a JSON object"),
        ('{"pad_token_id": -1}', "pad_token_id must be an integer"),
    ):
        path.write_text(content)
        refused(folder, f"generation_config.json: {match}")
    path.unlink()
    assert load(folder).config.eos_token_ids == (2,)


def fields(values: dict[str, Any], *outer: str) -> list[tuple[str, ...]]:
    """Returns the path of every value of a configuration, and of every section."""
    found = []
    for key, value in values.items():
        found.append((*outer, key))
        found += fields(value, *outer, key) if isinstance(value, dict) else []
    return found


def reading(values: dict[str, Any]) -> tuple[QwenVLConfig | None, str]:
    """Returns the configuration that is read, or why none is."""
    try:
        return QwenVLConfig.from_hf(values, "config.json"), ""
    except CheckpointError as error:
        return None, str(error)


HOSTILE = (10**12, -1, 0, 1.5, float("nan"), "x", None, [], [10**12], {"x": 1}, True)


@pytest.mark.parametrize("variant", PLAIN)
def test_hostile_configurations(saved: Checkpoints, variant: str) -> None:
    """In any field, any value is read or refused by an error that names the file: no other error, no large size."""
    values = json.loads((saved(variant).folder / "config.json").read_text())
    paths = fields(values)
    assert ("text_config", "num_hidden_layers") in paths and ("vision_config", "depth") in paths
    reads = 0
    for *outer, last in paths:
        for value in HOSTILE:
            changed = json.loads(json.dumps(values))
            section = changed
            for name in outer:
                section = section[name]
            section[last] = value
            read, message = reading(changed)
            reads += read is not None
            if read is None:
                assert message.startswith("config.json") and len(message) < 1000, (outer, last, value)
            else:
                sizes = [x for name, x in vars(read).items() if isinstance(x, int) and name != "rope_theta"]
                assert max(sizes) <= 2**22, (outer, last, value)
    assert 0 < reads < len(paths) * len(HOSTILE) * 0.75


INTEGER = "must be an integer from"


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        ("qwen2_vl", {"text_config__hidden_size": 2**40}, "text_config|hidden_size"),
        ("qwen2_vl", {"text_config__num_hidden_layers": 10**9}, "text_config: num_hidden_layers must be at most 512"),
        ("qwen2_vl", {"vision_config__depth": 10**9}, "vision_config: depth must be at most 512, got 1000000000"),
        ("qwen2_vl", {"vision_config__mlp_ratio": 10**9}, f"vision_mlp {INTEGER} 1 to"),
        ("qwen2_vl", {"text_config__vocab_size": 2**40}, f"text_config.vocab_size: vocab_size {INTEGER} 1 to"),
        ("qwen2_vl", {"text_config__num_attention_heads": 0}, "must be a divisor of hidden_size = 64, got 0"),
        ("qwen2_vl", {"text_config__num_key_value_heads": 3}, "must be a multiple of text_kv_heads = 3, got 4"),
        ("qwen2_vl", {"vision_config__patch_size": 2**20}, f"vision_config.patch_size: patch_size {INTEGER} 1 to"),
        ("qwen2_vl", {"vision_config__spatial_merge_size": 10**6}, f"spatial_merge_size: merge {INTEGER} 1 to"),
        ("qwen2_vl", {"vision_config__temporal_patch_size": 10**6}, f"patch_frames {INTEGER} 1 to"),
        ("qwen2_vl", {"vision_config__hidden_size": 32}, "vision_config: hidden_size must be 64, got 32"),
        ("qwen2_vl", {"video_token_id": 128}, "video_token_id must be an integer below vocab_size = 128, got 128"),
        ("qwen2_vl", {"video_token_id": 99}, "video_token_id must differ from image_token_id, got 99"),
        ("qwen2_vl", {"text_config__use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("qwen2_5_vl", {"vision_config__window_size": 2**40}, f"window {INTEGER} 0 to"),
        ("qwen2_5_vl", {"vision_config__window_size": 40}, "window must be a multiple of .*16, got 40"),
        ("qwen2_5_vl", {"vision_config__tokens_per_second": 10**9}, f"tokens_per_second {INTEGER} 0 to"),
        ("qwen2_5_vl", {"vision_config__fullatt_block_indexes": [2]}, r"full_layers must be layers below .* \(2,\)"),
        ("qwen2_5_vl", {"text_config__rope_parameters__mrope_section": [1, 2, 3]}, "add up to text_head_dim / 2 = 8"),
        ("qwen2_5_vl", {"text_config__rope_parameters__mrope_section": 8}, "rope_sections must be three integers"),
        ("qwen3_vl", {"vision_config__num_position_embeddings": 10**12}, f"position_side {INTEGER} 0 to"),
        ("qwen3_vl", {"vision_config__num_position_embeddings": 65}, "must be a square, got 65"),
        ("qwen3_vl", {"vision_config__deepstack_visual_indexes": [1, 0]}, "deep_layers must be layers .* ascending"),
        ("qwen3_vl", {"vision_config__deepstack_visual_indexes": [9]}, "deep_layers must be layers below .* = 3"),
        ("qwen3_vl", {"text_config__head_dim": 2**40}, f"head_dim: text_head_dim {INTEGER} 1 to"),
        ("qwen3_vl", {"text_config__attention_bias": True}, "text_config: attention_bias must be False, got True"),
        ("qwen3_vl", {"architectures": ["Qwen3VLModel"]}, "architectures must be"),
        ("qwen3_vl", {"model_type": "qwen3_vl_moe"}, "model_type must be one of qwen2_vl, qwen2_5_vl, qwen3_vl, got"),
    ],
)
def test_config_values(copy: Copy, variant: str, values: dict[str, Any], match: str) -> None:
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, f"config.json.*({match})", model=QwenVL)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_config__vocab_size": 2**24}, r"embed_tokens.weight must be \[16777216, 64\] by config.json, got \["),
        ({"vision_config__in_channels": 200}, r"patch_embed.proj.weight must be \[32, 25600\] by config.json, got"),
        ({"vision_config__depth": 500, "vision_config__mlp_ratio": 2**12}, r"must hold visual.blocks.2.\S+ \["),
    ],
)
def test_sizes_that_the_weights_do_not_have(copy: Copy, values: dict[str, Any], match: str) -> None:
    folder = copy("qwen2_vl")
    configure(folder, **values)
    refused(folder, match)


def test_changed_sizes() -> None:
    """`from_size` takes fewer layers of published widths, and refuses those that do not go together."""
    model = QwenVL.from_size("tiny", vision_layers=1, full_layers=(), text_layers=1)
    assert (len(model.vision.blocks), len(model.decoder.blocks)) == (1, 1)
    with pytest.raises(ValueError, match=r"full_layers must be layers below vision_layers = 1, got \(1,\)"):
        QwenVL.from_size("tiny", vision_layers=1)
    with pytest.raises(ValueError, match=r"text_head_dim must be text_width / text_heads = 16.0 in a qwen2_5, got 32"):
        QwenVL.from_size("tiny", text_head_dim=32, rope_sections=(4, 6, 6))
    with pytest.raises(ValueError, match=r'window is for "qwen2_5" and position_side for "qwen3"'):
        QwenVL.from_size("tiny_qwen2", window=16)


def test_prompts_are_of_the_small_models() -> None:
    """The markers of the tests' prompts are those of the configurations."""
    for variant in PLAIN:
        assert (prompts(variant, ((1, 2, 2),))["input_ids"] == config(variant)["image_token_id"]).sum() == 1
