"""BLIP-2 and InstructBLIP: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Saved, accepted_fields, change_weights, configure, refused

from mmkernels.models import BLIP2, BLIP2Config, BLIP2Retrieval, BLIP2RetrievalConfig, InternVL, blip2_weights
from mmkernels.models.blip2_config import RETRIEVAL_SIZES, SIZES

PLAIN, SHARDS, INSTRUCT, RETRIEVAL = "blip2_opt", "blip2_llama", "instruct_llama", "blip2_itm"
Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., Any]


def test_configurations_are_read(ours: Ours) -> None:
    opt, shards, instruct, retrieval = (ours(name) for name in (PLAIN, SHARDS, INSTRUCT, RETRIEVAL))
    assert opt.config.text_model == "opt" and not opt.config.instruct and opt.head.weight is opt.decoder.embed.weight
    assert shards.config.text_model == "llama" and shards.config.qformer_cross_every == 3
    assert shards.head.weight is not shards.decoder.embed.weight
    assert instruct.config.qformer_vocab == 96 and instruct.config.rope_theta == 5000.0
    assert retrieval.head is None and retrieval.config.marker_token_id is None
    assert (opt.config.bos_token_id, opt.config.eos_token_ids, opt.config.qformer_dropout) == (1, (2,), 0.1)
    assert not opt.vision.blocks[0].attention.q_proj.weight.requires_grad and opt.projection.weight.requires_grad


def test_constants_and_weights_that_are_not_used(copy: Copy, ours: Ours) -> None:
    """Those that other versions of transformers wrote, and those of a text that the Q-Former is never given."""
    unused = {
        "qformer.embeddings.position_ids": torch.arange(32)[None].float(),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    }
    text = {f"qformer.encoder.layer.0.{name}": torch.rand(3) for name in ("intermediate.dense.weight", "output.x")}
    for variant, more in ((INSTRUCT, unused), (PLAIN, unused | text)):
        folder = copy(variant)
        change_weights(folder, lambda tensors, more=more: tensors.update(more))
        for (name, x), y in zip(
            BLIP2.from_pretrained(folder).named_parameters(), ours(variant).parameters(), strict=True
        ):
            assert torch.equal(x, y), name
    folder = copy(INSTRUCT)
    change_weights(folder, lambda tensors: tensors.update(text))
    refused(folder, "must hold only the model's tensors, got qformer.encoder.layer.0.output.x|by config.json")


def test_a_head_that_is_apart(copy: Copy) -> None:
    """Of the hub's checkpoints, some hold the head, whatever the configuration says."""
    folder, name = copy(PLAIN), "language_model.lm_head.weight"
    other = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    change_weights(folder, lambda tensors: tensors.update({name: other}))
    assert torch.equal(BLIP2.from_pretrained(folder).head.weight, other)


def test_checkpoints_of_sister_classes(copy: Copy) -> None:
    only = r"architectures must be \['{}'\], got \['{}'\]"
    conditional, retrieval, instruct = (copy(name) for name in (PLAIN, RETRIEVAL, INSTRUCT))
    names = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
    refused(retrieval, only.format(*names), model=BLIP2)
    refused(conditional, only.format(*reversed(names)), model=BLIP2Retrieval)
    refused(instruct, "model_type must be one of blip-2, got 'instructblip'", model=BLIP2Retrieval)
    refused(conditional, "model_type must be one of internvl, got 'blip-2'", model=InternVL)
    configure(instruct, model_type="instructblipvideo")
    refused(instruct, "model_type must be one of blip-2, instructblip, got 'instructblipvideo'", model=BLIP2)
    configure(retrieval, architectures=..., image_token_index=99)  # nothing says which class it is
    refused(retrieval, "must hold", model=BLIP2)
    configure(conditional, architectures=..., qformer_config__use_qformer_text_input=True)
    refused(conditional, "must hold", model=BLIP2Retrieval)


def test_a_truncated_shard(copy: Copy) -> None:
    folder = copy(SHARDS)
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    for keep in (0.1, 0.999):
        path.write_bytes(content[: int(len(content) * keep)])
        refused(folder, f"{path.name}: must be a whole safetensors file")


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__hidden_size": 2**40}, f"hidden_size: vision_width {SIZE} 65536, got 1099511627776"),
        ({"vision_config__hidden_size": 33}, "vision_width must be a multiple of vision_heads = 2, got 33"),
        ({"vision_config__num_hidden_layers": 10**6}, "num_hidden_layers must be at most 512, got 1000000"),
        ({"vision_config__image_size": [16, 16]}, rf"image_size {SIZE} 8192, got [\[(]16, 16"),
        ({"vision_config__patch_size": 17}, "patch_size must be at most image_size = 16, got 17"),
        ({"vision_config__hidden_act": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"vision_config__qkv_bias": False}, "vision_config: qkv_bias must be true, got false"),
        ({"qformer_config__hidden_size": 50}, "qformer_width must be a multiple of qformer_heads = 4, got 50"),
        ({"qformer_config__cross_attention_frequency": 0}, "qformer_cross_every must be .*, got 0"),
        ({"qformer_config__num_hidden_layers": 10**9}, "num_hidden_layers must be at most 512"),
        ({"qformer_config__layer_norm_eps": 0.0}, "qformer_eps must be a number, positive and finite, got 0.0"),
        ({"qformer_config__hidden_dropout_prob": 2.0}, "qformer_residual_dropout must be a number between 0 and 1"),
        ({"qformer_config__intermediate_size": -1}, f"qformer_mlp {SIZE} 262144, got -1"),
        ({"num_query_tokens": 0}, f"num_query_tokens: num_queries {SIZE} 262144, got 0"),
        ({"num_query_tokens": 2**40}, f"num_queries {SIZE}"),
        ({"image_token_index": None}, "image_token_index: image_token_id must be an integer below vocab_size"),
        ({"image_token_index": 128}, "image_token_id must be an integer below vocab_size = 128, got 128"),
        ({"text_config__model_type": "t5"}, "text_config: model_type must be one of opt, llama, got 't5'"),
        ({"text_config__model_type": "gpt2"}, "text_config: model_type must be one of opt, llama, got 'gpt2'"),
        ({"text_config__hidden_size": 2**40, "text_config__word_embed_proj_dim": 2**40}, f"text_width {SIZE} 65536"),
        ({"text_config__word_embed_proj_dim": 32}, "text_config: word_embed_proj_dim must be 64, got 32"),
        ({"text_config__do_layer_norm_before": False}, "do_layer_norm_before must be True, got False"),
        ({"text_config__enable_bias": False}, "enable_bias must be True, got False"),
        ({"text_config__layerdrop": 0.1}, "layerdrop must be 0.0, got 0.1"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers must be at most 512"),
        ({"text_config__max_position_embeddings": 2**40}, f"text_length {SIZE}"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({"text_config": 3}, "text_config"),
        ({"qformer_config": "x"}, "qformer_config"),
        ({"architectures": ["Blip2Model"]}, "architectures must be .*Blip2ForConditionalGeneration"),
    ],
)
def test_config_values(copy: Copy, values: dict[str, Any], match: str) -> None:
    """Wrong types and huge sizes in ``config.json`` are refused before anything of that size is allocated."""
    folder = copy(PLAIN)
    configure(folder, **values)
    refused(folder, f"config.json.*(?:{match})")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_config__attention_bias": True}, "text_config: attention_bias must be false, got True"),
        ({"text_config__mlp_bias": True}, "mlp_bias must be false, got True"),
        ({"text_config__head_dim": 24}, "head_dim must be hidden_size / num_attention_heads, got 24"),
        ({"text_config__num_key_value_heads": 3}, "text_heads must be a multiple of text_kv_heads = 3, got 4"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be default, got 'linear'",
        ),
        ({"qformer_config__vocab_size": 0}, f"qformer_vocab {SIZE}"),
        ({"qformer_config__max_position_embeddings": 0}, f"qformer_length {SIZE}"),
    ],
)
def test_config_values_of_an_instructblip(copy: Copy, values: dict[str, Any], match: str) -> None:
    folder = copy(INSTRUCT)
    configure(folder, **values)
    refused(folder, f"config.json.*(?:{match})")


@pytest.mark.parametrize("value", ["x", None, -1, 10**12, 1.5, [1], {"a": 1}], ids=str)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any) -> None:
    """It is refused by a `CheckpointError`, not by another; a few values are harmless."""
    taken = {
        None: {"image_token_index"},  # for retrieval, whose texts then have no markers
        10**12: {"image_token_index", "qformer_config.cross_attention_frequency"},  # only the first layer looks
        1.5: {f"{part}.layer_norm_eps" for part in ("vision_config", "qformer_config")},
    }
    found = set()
    for variant, config_class, fields in (
        (PLAIN, BLIP2Config, blip2_weights.FIELDS | blip2_weights.TEXT_FIELDS["opt"]),
        (RETRIEVAL, BLIP2RetrievalConfig, blip2_weights.BRIDGE_FIELDS | {"x": "image_token_index"}),
    ):
        found |= accepted_fields(saved(variant).folder, fields.values(), value, config_class)
    assert found == (set() if isinstance(value, list | dict) else taken.get(value, set()))


def test_sizes_that_the_weights_do_not_have(copy: Copy) -> None:
    for values, match in (
        ({"vision_config__hidden_size": 65536}, "by config.json"),
        ({"vision_config__image_size": 8192}, "vision_model.embeddings.position_embedding must be .* by config.json"),
        ({"text_config__vocab_size": 2**24}, r"embed_tokens.weight must be \[16777216, 64\] by config.json"),
        ({"text_config__max_position_embeddings": 2**22}, r"embed_positions.weight must be \[4194306, 64\]"),
        ({"qformer_config__num_hidden_layers": 400}, r"must hold qformer.encoder.layer.\d+.\S+ .*and \d+ more"),
        ({"qformer_config__cross_attention_frequency": 1}, r"must hold qformer.encoder.layer.1.crossattention.\S+"),
        ({"num_query_tokens": 2**18}, r"query_tokens must be \[262144, 48\] by config.json, got \[1, 4, 48\]"),
        ({"text_config__num_hidden_layers": 1}, "must hold only the model's tensors, got language_model.model.decoder"),
    ):
        folder = copy(PLAIN)
        configure(folder, **values)
        refused(folder, match)


def test_text_is_what_retrieval_needs(copy: Copy) -> None:
    folder = copy(RETRIEVAL)
    configure(folder, qformer_config__use_qformer_text_input=False)
    refused(folder, "use_qformer_text_input must be true in a checkpoint for retrieval, got false")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_model": "t5"}, "text_model must be one of opt, llama, got 't5'"),
        ({"text_kv_heads": 2}, "text_kv_heads must be text_heads = 4 in OPT, got 2"),
        ({"text_model": "llama", "text_width": 68, "text_heads": 4}, "text_width / text_heads must be even .*, got 17"),
        ({"image_token_id": None}, "image_token_id must be an integer below vocab_size = 128, got None"),
        ({"bos_token_id": None}, "bos_token_id must be an integer below vocab_size = 128, got None"),
        ({"qformer_cross_every": 0}, "qformer_cross_every must be a positive integer, got 0"),
        ({"qformer_cross_every": 1.5}, "qformer_cross_every must be a positive integer, got 1.5"),
        ({"freeze_vision": "no"}, "freeze_vision must be a bool, got 'no'"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny"], **values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"qformer_vocab": None}, "qformer_vocab must be a positive integer, got None: the Q-Former reads texts here"),
        ({"marker_token_id": -1}, "marker_token_id must be an integer >= 0 or None, got -1"),
        ({"bos_token_id": 96}, "bos_token_id must be an integer below vocab_size = 96, got 96"),
        ({"embed_dim": 0}, f"embed_dim {SIZE}"),
        ({"generation": None}, "generation must be a bool, got None"),
        ({"label_smoothing": 2}, "label_smoothing must be a number between 0 and 1, got 2"),
    ],
)
def test_fields_of_a_configuration_for_retrieval(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(RETRIEVAL_SIZES["tiny"], **values)
