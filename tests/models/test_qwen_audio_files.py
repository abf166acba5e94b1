"""Qwen2-Audio: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Saved, accepted_fields, change_weights, configure, refused
from qwen_audio_checkpoints import VOCAB

from mmkernels.models import QwenAudio, QwenAudioConfig, qwen_audio_weights
from mmkernels.models.qwen_audio_config import SIZES

PLAIN, OTHER = "qwen2_audio", "qwen2_audio_other"
Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., QwenAudio]


def test_names_of_transformers_five(copy: Copy, ours: Ours, saved: Checkpoints) -> None:
    folder = copy(PLAIN)
    renamed = {name: x.clone() for name, x in saved(PLAIN).theirs.state_dict().items()}
    assert any(name.startswith("model.audio_tower.") for name in renamed)
    change_weights(folder, lambda tensors: (tensors.clear(), tensors.update(renamed)))
    for (name, x), y in zip(
        QwenAudio.from_pretrained(folder).named_parameters(), ours(PLAIN).parameters(), strict=True
    ):
        assert torch.equal(x, y), name


def test_names_of_hub_checkpoints(copy: Copy, ours: Ours) -> None:
    """As version 4 wrote them."""
    folder = copy(PLAIN)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("language_model.model.model.", "language_model.model.")] = tensors.pop(name)

    change_weights(folder, rename)
    for x, y in zip(QwenAudio.from_pretrained(folder).parameters(), ours(PLAIN).parameters(), strict=True):
        assert torch.equal(x, y)


def test_positions_are_read_and_not_trained(ours: Ours, saved: Checkpoints) -> None:
    positions = next(x for name, x in saved(PLAIN).theirs.state_dict().items() if "embed_positions" in name)
    assert torch.equal(ours(PLAIN).audio.positions, positions)
    assert not ours(PLAIN).audio.positions.requires_grad
    made = QwenAudio.from_size("tiny")
    assert not made.audio.positions.requires_grad and float(made.audio.positions[0, 0]) == 0.0  # a sine
    assert float(made.audio.positions[0, 16]) == 1.0  # a cosine


def test_tokens_of_the_generation_configuration(copy: Copy) -> None:
    folder = copy(PLAIN)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "pad_token_id": 3}))
    config = QwenAudio.from_pretrained(folder).config
    assert config.eos_token_ids == (7, 8) and config.pad_token_id == 3


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"audio_config__d_model": 2**40}, f"d_model: audio_width {SIZE} 65536, got 1099511627776"),
        ({"audio_config__d_model": 33}, "audio_width must be a multiple of audio_heads = 2, got 33"),
        ({"audio_config__d_model": "32"}, "'d_model' expected int, got str"),
        ({"audio_config__encoder_layers": 10**6}, f"audio_layers {SIZE} 512, got 1000000"),
        ({"audio_config__encoder_attention_heads": 0}, f"audio_heads {SIZE}"),
        ({"audio_config__encoder_ffn_dim": -1}, f"audio_mlp {SIZE}"),
        ({"audio_config__max_source_positions": 10**9}, f"audio_positions {SIZE} 65536, got 1000000000"),
        ({"audio_config__num_mel_bins": 0}, f"mel_bins {SIZE} 1024, got 0"),
        ({"audio_config__activation_function": "swish9"}, "audio_activation must be one of gelu, .*got 'swish9'"),
        ({"audio_config__scale_embedding": True}, "scale_embedding must be False, got True"),
        ({"audio_config__dropout": 2.0}, "audio_residual_dropout must be a number between 0 and 1, got 2.0"),
        ({"audio_config__encoder_layerdrop": -0.1}, "audio_layer_dropout must be a number between 0 and 1, got -0.1"),
        ({"audio_config__model_type": "whisper"}, "model_type must be 'qwen2_audio_encoder', got 'whisper'"),
        ({"audio_token_index": VOCAB}, f"audio_token_id must be an integer below vocab_size = {VOCAB}, got {VOCAB}"),
        ({"text_config__model_type": "llama"}, "model_type must be 'qwen2', got 'llama'"),
        ({"text_config__hidden_size": 2**40}, f"text_width {SIZE} 65536"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers.*"),
        ({"text_config__num_attention_heads": 3}, "text_heads must be a multiple of text_kv_heads = 2, got 3"),
        ({"text_config__num_attention_heads": 0}, f"text_heads {SIZE}"),
        ({"text_config__hidden_size": 52}, "text_head_dim must be even, got 13"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({"text_config__max_position_embeddings": 0}, f"text_length {SIZE}"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be default, got 'linear'",
        ),
        ({"text_config__use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ({"text_config": 3}, "'text_config' with value 3|text_config"),
        ({"architectures": ["Qwen2AudioModel"]}, "architectures must be .*Qwen2AudioForConditionalGeneration"),
        ({"model_type": "whisper"}, "model_type must be one of qwen2_audio, got 'whisper'"),
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
        (-1, set()),
        (10**12, set()),
        (1.5, {"text_config.rms_norm_eps"}),
        ([1], set()),
        ({"a": 1}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order in a set's text is not fixed
)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any, taken: set[str]) -> None:
    """It is refused by a `CheckpointError`, not by another."""
    assert accepted_fields(saved(PLAIN).folder, qwen_audio_weights.FIELDS.values(), value, QwenAudioConfig) == taken


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"audio_config__d_model": 65536}, r"must be \[.*65536.*\] by config.json"),
        ({"audio_config__max_source_positions": 8192}, "embed_positions.weight must be .8192, 32. by config.json"),
        ({"audio_config__num_mel_bins": 128}, r"conv1.weight must be \[32, 128, 3\] by config.json, got \[32, 12, 3\]"),
        ({"audio_config__encoder_layers": 5}, r"must hold audio_tower.layers.2.\S+ .*and \d+ more"),
        ({"audio_config__encoder_layers": 1}, "must hold only the model's tensors, got audio_tower.layers.1"),
        ({"text_config__vocab_size": 2**24}, r"embed_tokens.weight must be \[16777216, 48\] by config.json"),
        (
            {"text_config__num_hidden_layers": 400, "text_config__layer_types": ["full_attention"] * 400},
            r"must hold language_model.model.layers.2.\S+ .*and \d+ more",
        ),
    ],
)
def test_sizes_that_the_weights_do_not_have(copy: Copy, values: dict[str, Any], match: str) -> None:
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
        ({"text_head_dim": 7}, "text_head_dim must be even, got 7"),
        ({"audio_token_id": None}, "audio_token_id must be an integer below vocab_size = 128, got None"),
        ({"audio_token_id": 128}, "audio_token_id must be an integer below vocab_size = 128, got 128"),
        ({"audio_heads": 3}, "audio_width must be a multiple of audio_heads = 3, got 32"),
        ({"mel_bins": True}, f"mel_bins {SIZE} 1024, got True"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny"], **values)


@pytest.mark.parametrize("reduce", ["select:0.5", "perceiver:4", "shuffle:2", "pool", "half"])
def test_reducers_that_sounds_do_not_have(reduce: str) -> None:
    model = QwenAudio.from_size("tiny")
    with pytest.raises(ValueError, match=f"(?:reduce|a reducer) must be .*got '{reduce}'"):
        model.set_reducer(reduce)
    assert model.reducer is None
    model.set_reducer("pool:2")
    before = model.reducer
    with pytest.raises(ValueError, match="must be"):
        model.set_reducer(reduce)
    assert model.reducer is before  # an error changes nothing
    with pytest.raises(ValueError, match=f"(?:reduce|a reducer) must be .*got '{reduce}'"):
        QwenAudio.from_size("tiny", reduce=reduce)


def test_published_sizes() -> None:
    """Those of transformers' class of the same sizes: 8.4 billion parameters (the model card: 8.4B)."""
    with torch.device("meta"):
        model = QwenAudio(SIZES["qwen2_audio_7b"])
        text = {
            "model_type": "qwen2",
            "intermediate_size": 11008,
            "vocab_size": 156032,
            "max_position_embeddings": 8192,
        }
        text |= {"rms_norm_eps": 1e-5, "eos_token_id": 151645, "pad_token_id": 151643, "rope_theta": 10000.0}
        config = transformers.Qwen2AudioConfig(text_config=text, audio_token_index=151646)
        theirs = transformers.Qwen2AudioForConditionalGeneration(config)
    count = lambda of: sum(p.numel() for p in of.parameters())
    assert count(model) == count(theirs) and count(model) / 1e9 == pytest.approx(8.397, abs=1e-3)
    assert QwenAudioConfig.from_hf(json.loads(config.to_json_string(use_diff=False))) == SIZES["qwen2_audio_7b"]
