"""BLIP: folders of checkpoints, those with errors too, and configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blip_checkpoints import LENGTH, SEP, VOCAB
from checkpoints import change_weights, configure, refused

from mmkernels.models import BLIP, CLIP, BLIPConfig

CAPTION, UNTIED = "blip_caption", "blip_caption_shards"
RETRIEVAL, SHARDS = "blip_retrieval", "blip_retrieval_shards"
Copy = Callable[[str], Path]
Ours = Callable[..., BLIP]


def same(model: BLIP, other: BLIP) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_names_of_hub_checkpoints(copy: Copy, ours: Ours) -> None:
    """They have positions' numbers, a pooler that nothing uses, and the last layer under each of its names."""
    folder = copy(CAPTION)
    numbers = torch.arange(LENGTH)[None]
    embed = "text_decoder.bert.embeddings.word_embeddings.weight"
    last = "text_decoder.cls.predictions."

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        bias = next(x for name, x in tensors.items() if name in (f"{last}bias", f"{last}decoder.bias"))
        tensors[f"{last}bias"], tensors[f"{last}decoder.bias"] = bias.clone(), bias.clone()
        tensors[f"{last}decoder.weight"] = tensors[embed].clone()
        tensors["text_decoder.bert.embeddings.position_ids"] = numbers

    change_weights(folder, as_on_the_hub)
    model = BLIP.from_pretrained(folder)
    assert same(model, ours(CAPTION)) and model.head is not None
    assert model.head.last.weight is model.text.embed.weight
    change_weights(folder, lambda tensors: tensors.pop(f"{last}bias"))
    assert same(BLIP.from_pretrained(folder), ours(CAPTION))
    change_weights(folder, lambda tensors: tensors.pop(f"{last}decoder.bias"))
    refused(folder, r"must hold text_decoder.cls.predictions.decoder.bias \[100\]")

    folder = copy(RETRIEVAL)
    more = {f"text_encoder.pooler.dense.{kind}": torch.zeros(48) for kind in ("weight", "bias")}
    change_weights(folder, lambda tensors: tensors.update(more | {"text_encoder.embeddings.position_ids": numbers}))
    assert same(BLIP.from_pretrained(folder), ours(RETRIEVAL))


def test_what_the_configuration_says(ours: Ours) -> None:
    config = ours(CAPTION).config
    assert (config.bos_token_id, config.sep_token_id, config.pad_token_id) == (1, SEP, 0)
    assert config.enc_token_id is None and config.label_smoothing == 0.2
    assert BLIP.sizes["base"].label_smoothing == 0.1  # the paper's
    assert (config.retrieval, config.generation) == (False, True) and not config.separate_attention
    config = ours(SHARDS).config
    assert (config.retrieval, config.generation) == (True, False) and config.embed_dim == 16
    assert ours(RETRIEVAL).logit_scale is not None
    assert float(ours(RETRIEVAL).logit_scale.detach().exp()) == pytest.approx(1 / 0.07)  # type: ignore[union-attr]


def test_separate_attention() -> None:
    """As the paper pre-trains, section 3.1: all but the self-attention is shared by both ways to read."""
    both = BLIP.from_size("tiny", vision_layers=1, text_layers=1)
    shared = BLIP.from_size("tiny", vision_layers=1, text_layers=1, decoder_attention=False)
    more = {name for name, _ in both.named_parameters()} - {name for name, _ in shared.named_parameters()}
    assert len(more) == 10 and all(name.startswith("text.blocks.0.causal_attention.") for name in more)


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        (CAPTION, {"architectures": ["BlipForQuestionAnswering"]}, r"\['BlipForConditionalGeneration'\] or "),
        (CAPTION, {"architectures": ["BlipModel"]}, r"architectures must be .* got \['BlipModel'\]"),
        (CAPTION, {"architectures": []}, r"architectures must name BlipForConditionalGeneration or Blip.*, got \[\]"),
        (CAPTION, {"architectures": ...}, "architectures must name BlipForConditionalGeneration or Blip.*, got None"),
        (CAPTION, {"model_type": "blip-2"}, "model_type must be one of blip, got 'blip-2'"),
        (CAPTION, {"model_type": "instructblip"}, "model_type must be one of blip, got 'instructblip'"),
    ],
)  # fmt: skip
def test_sister_classes(copy: Copy, variant: str, values: dict[str, Any], match: str) -> None:
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, f"config.json: .*{match}")


def test_weights_of_the_sister_class(copy: Copy) -> None:
    folder = copy(CAPTION)
    configure(folder, architectures=["BlipForImageTextRetrieval"])
    refused(folder, "model.safetensors: must hold only the model's tensors, got text_decoder")
    folder = copy(RETRIEVAL)
    configure(folder, architectures=["BlipForConditionalGeneration"])
    refused(folder, "model.safetensors: must hold only the model's tensors, got (itm_head|text_|vision_proj)")
    refused(copy(RETRIEVAL), "model_type must be one of clip, siglip, got 'blip'", model=CLIP)
    refused(copy("clip"), "model_type must be one of blip, got 'clip'", model=BLIP)


@pytest.mark.parametrize("variant", [UNTIED, SHARDS])
def test_corrupt_shards(copy: Copy, variant: str) -> None:
    folder = copy(variant)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for broken in (content[: len(content) // 2], content[:4], b"", b"\xff" * len(content)):
        shard.write_bytes(broken)
        refused(folder, f"{shard.name}: must be a whole safetensors file, got an error")
    shard.unlink()
    refused(folder, f"must hold {shard.name}, got no such file", FileNotFoundError)


def test_wrong_weights(copy: Copy) -> None:
    folder = copy(CAPTION)
    embed = "text_decoder.bert.embeddings.word_embeddings.weight"
    change_weights(folder, lambda tensors: tensors.update({embed: torch.zeros(VOCAB + 1, 48)}))
    refused(folder, r"word_embeddings.weight must be \[100, 48\] by config.json, got \[101, 48\]")
    folder = copy(CAPTION)
    qkv = "vision_model.encoder.layers.1.self_attn.qkv.weight"
    change_weights(folder, lambda tensors: tensors.update({qkv: tensors[qkv][:-1]}))
    refused(folder, r"must be \[32, 32\] by config.json, got \[31, 32\]")
    change_weights(folder, lambda tensors: tensors.pop(qkv))
    refused(folder, r"the weights must hold vision.* \[32, 32\] \(and 2 more\)")


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__hidden_size": 2**40}, f"vision_width {SIZE} 65536, got 1099511627776"),
        ({"vision_config__hidden_size": 33}, "vision_width must be a multiple of vision_heads = 4, got 33"),
        ({"vision_config__num_hidden_layers": 10**6}, "num_hidden_layers.* 512, got 1000000"),
        ({"vision_config__image_size": [32, 32]}, r"image_size"),
        ({"vision_config__image_size": 10**9}, f"image_size {SIZE} 8192, got 1000000000"),
        ({"vision_config__patch_size": 0}, f"patch_size {SIZE} 8192, got 0"),
        ({"vision_config__patch_size": 64}, "patch_size must be at most image_size = 32, got 64"),
        ({"vision_config__hidden_act": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"vision_config__layer_norm_eps": 0.0}, "vision_eps must be a number, positive and finite, got 0.0"),
        ({"vision_config__attention_dropout": 2.0}, "vision_dropout must be a number between 0 and 1, got 2.0"),
        ({"text_config__hidden_size": 50}, "text_width must be a multiple of text_heads = 3, got 50"),
        ({"text_config__hidden_size": "48"}, "'hidden_size' expected int, got str"),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers.*"),
        ({"text_config__num_attention_heads": 0}, f"text_heads {SIZE}"),
        ({"text_config__intermediate_size": -1}, f"text_mlp {SIZE}"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ({"text_config__max_position_embeddings": 0}, f"text_length {SIZE}"),
        ({"text_config__bos_token_id": VOCAB}, f"bos_token_id must be an integer below vocab_size = {VOCAB}, got 100"),
        ({"text_config__bos_token_id": None}, "bos_token_id must be an integer below vocab_size = 100, got None"),
        ({"text_config__sep_token_id": -1}, "sep_token_id must be an integer below vocab_size = 100, got -1"),
        ({"text_config__label_smoothing": 1.5}, "label_smoothing must be a number between 0 and 1, got 1.5"),
        ({"text_config__is_decoder": False}, "text_config: is_decoder must be true, got false"),
        ({"text_config__hidden_dropout_prob": -0.1}, "text_residual_dropout must be a number between 0 and 1"),
        ({"text_config": 3}, "text_config"),
        ({"image_text_hidden_size": 0}, f"image_text_hidden_size: embed_dim {SIZE}"),
    ],
)  # fmt: skip
def test_config_values(copy: Copy, values: dict[str, Any], match: str) -> None:
    folder = copy(CAPTION)
    configure(folder, **values)
    refused(folder, f"config.json.*{match}")


def test_sizes_that_the_weights_do_not_have(copy: Copy) -> None:
    """Found before anything of that size is made."""
    folder = copy(CAPTION)
    configure(
        folder, text_config__hidden_size=48 * 1024, text_config__vocab_size=2**24, text_config__intermediate_size=2**18
    )
    refused(folder, r"must be \[\d+(, \d+)?\] by config.json, got \[")  # 3 TB of embeddings alone


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"retrieval": False, "generation": False}, "retrieval or generation must be True, got False for both"),
        ({"enc_token_id": 128}, "enc_token_id must be an integer below vocab_size = 128, got 128"),
        ({"sep_token_id": None}, "sep_token_id must be an integer below vocab_size = 128, got None"),
        ({"pad_token_id": None}, "pad_token_id must be an integer below vocab_size = 128, got None"),
        ({"retrieval": 1}, "retrieval must be a bool, got 1"),
        ({"decoder_attention": "no"}, "decoder_attention must be a bool, got 'no'"),
        ({"text_length": 0}, f"text_length {SIZE}"),
        ({"embed_dim": 2.5}, f"embed_dim {SIZE} 65536, got 2.5"),
    ],
)
def test_configurations(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(BLIP.sizes["tiny"], **change)
    assert isinstance(BLIP.sizes["tiny"], BLIPConfig)
