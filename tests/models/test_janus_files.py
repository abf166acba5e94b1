"""Janus: folders of checkpoints, those with errors too, configurations, transformers' processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import Saved, accepted_fields, change_weights, configure, distance, refused
from janus_checkpoints import BOS, MARKER, PAD, SIDE, START, TOKENS, VOCAB, drawing_prompt, inputs
from PIL import Image

from mmkernels.models import Janus, JanusConfig, janus_weights
from mmkernels.models.janus_config import SIZES

PLAIN, OTHER = "janus", "janus_pro"
Checkpoints = Callable[[str], Saved]
Copy = Callable[[str], Path]
Ours = Callable[..., Janus]


def test_hub_checkpoints_untie_the_head(copy: Copy, saved: Checkpoints) -> None:
    """The weights of a head that is apart count, whatever the configuration says."""
    folder = copy(PLAIN)
    head = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(0))
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    model = Janus.from_pretrained(folder)
    theirs = transformers.JanusForConditionalGeneration.from_pretrained(folder).eval()
    given = inputs(theirs)
    with torch.no_grad():
        assert distance(model(**given).logits[:, -1], theirs(**given).logits[:, -1]) < 5e-6
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    model = Janus.from_pretrained(folder)
    assert model.head.weight is model.decoder.embed.weight


def test_tokens_of_the_generation_configuration(copy: Copy) -> None:
    folder = copy(PLAIN)
    config = Janus.from_pretrained(folder).config
    assert (config.bos_token_id, config.image_start_token_id, config.pad_token_id) == (BOS, START, PAD)
    path = folder / "generation_config.json"
    values = {"eos_token_id": [7, 8], "pad_token_id": 3, "bos_token_id": 4, "generation_kwargs": {"boi_token_id": 5}}
    path.write_text(json.dumps(values))
    config = Janus.from_pretrained(folder).config
    assert (config.eos_token_ids, config.pad_token_id) == ((7, 8), 3)
    assert (config.bos_token_id, config.image_start_token_id) == (4, 5)
    for wrong in ({"bos_token_id": VOCAB}, {"generation_kwargs": {"boi_token_id": -1}}):
        path.write_text(json.dumps(wrong))
        refused(folder, r"generation_config.json: \w+_token_id must be an integer below vocab_size = 128")
    path.write_text(json.dumps({"generation_kwargs": 3}))
    assert Janus.from_pretrained(folder).config.image_start_token_id is None
    path.unlink()
    config = Janus.from_pretrained(folder).config
    assert (config.bos_token_id, config.image_start_token_id) == (BOS, None)


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vision_config__hidden_size": 2**40}, f"hidden_size: vision_width {SIZE} 65536, got 1099511627776"),
        ({"vision_config__hidden_size": 33}, "vision_width must be a multiple of vision_heads = 2, got 33"),
        ({"vision_config__num_hidden_layers": 10**6}, "num_hidden_layers.* 512, got 1000000"),
        ({"vision_config__num_attention_heads": 0}, f"vision_heads {SIZE}"),
        ({"vision_config__mlp_ratio": 1e300}, f"vision_mlp {SIZE}"),
        ({"vision_config__mlp_ratio": 0.0}, f"vision_mlp {SIZE}"),
        ({"vision_config__image_size": 36}, "num_image_tokens must be 16|multiple of patch_size = 8, got 36"),
        ({"vision_config__image_size": 10**9}, "image_size|num_image_tokens must be"),
        ({"vision_config__image_size": [32, 32]}, "image_size|unsupported operand"),
        ({"vision_config__patch_size": 0}, "patch_size|division|modulo"),
        ({"vision_config__num_image_tokens": 17}, "vision_config: num_image_tokens must be 16, got 17"),
        ({"vision_config__num_channels": 4}, "vq_config: in_channels must be 4, got 3"),
        ({"vision_config__hidden_act": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"vision_config__layer_norm_eps": 0.0}, "vision_eps must be a number, positive and finite, got 0.0"),
        ({"vision_config__hidden_dropout_rate": 0.1}, "hidden_dropout_rate must be 0, got 0.1"),
        ({"vision_config__projection_dropout": 0.1}, "projection_dropout must be 0, got 0.1"),
        ({"vision_config__attention_bias": False}, "vision_config: attention_bias must be True, got False"),
        ({"vision_config__use_qk_norm": True}, "vision_config: use_qk_norm must be False, got True"),
        ({"vision_config__projection_dim": 64}, "vision_config: projection_dim must be 48, got 64"),
        ({"vision_config__depth": 0}, f"aligner_layers {SIZE} 64, got 0"),
        ({"vision_config__depth": 100}, f"aligner_layers {SIZE} 64, got 100"),
        ({"vq_config__num_embeddings": 2**40}, f"vq_codes {SIZE} 1048576, got 1099511627776"),
        ({"vq_config__embed_dim": 0}, f"vq_code_width {SIZE}"),
        ({"vq_config__base_channels": 48}, "vq_width must be a multiple of 32, the groups of its norms, got 48"),
        ({"vq_config__channel_multiplier": []}, r"vq_multipliers must be 1 to 8 integers from 1 to 64, got \(\)"),
        ({"vq_config__channel_multiplier": [1, 0]}, r"vq_multipliers must be .*got \(1, 0\)"),
        ({"vq_config__channel_multiplier": [1] * 9}, "vq_multipliers must be"),
        ({"vq_config__channel_multiplier": [1, "a"]}, ", vq_config: .*channel_multiplier"),
        ({"vq_config__num_res_blocks": 10**6}, f"vq_blocks {SIZE} 64"),
        ({"vq_config__double_latent": True}, "vq_config: double_latent must be False, got True"),
        ({"vq_config__dropout": 0.1}, "vq_config: dropout must be 0, got 0.1"),
        ({"vq_config__projection_dim": 64}, "vq_config: projection_dim must be 48, got 64"),
        ({"vq_config__image_token_embed_dim": 64}, "vq_config: image_token_embed_dim must be 48, got 64"),
        ({"vq_config__hidden_act": "swish9"}, "image_activation must be one of gelu, .*got 'swish9'"),
        ({"vq_config__num_hidden_layers": 0}, f"image_aligner_layers {SIZE} 64, got 0"),
        ({"image_token_id": VOCAB}, f"image_token_id must be an integer below vocab_size = {VOCAB}, got {VOCAB}"),
        ({"text_config__model_type": "qwen2"}, "text_config: model_type must be 'llama', got 'qwen2'"),
        ({"text_config__hidden_size": 2**40}, "hidden_size|projection_dim must be"),
        ({"text_config__num_attention_heads": 3}, "text_heads must be a multiple of text_kv_heads = 2, got 3|divi"),
        ({"text_config__attention_bias": True}, "text_config: attention_bias must be False, got True"),
        ({"text_config__vocab_size": 2**40}, f"vocab_size {SIZE}"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be 'default', got 'linear'",
        ),
        ({"architectures": ["JanusModel"]}, "architectures must be .*JanusForConditionalGeneration"),
        ({"model_type": "multi_modality"}, "model_type must be one of janus, got 'multi_modality'"),
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
        (1.5, {"vision_config.layer_norm_eps", "text_config.rms_norm_eps"}),
        ([1], set()),
        ({"a": 1}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order in a set's text is not fixed
)
def test_every_field_with_a_wrong_value(saved: Checkpoints, value: Any, taken: set[str]) -> None:
    """It is refused by a `CheckpointError`, not by another."""
    assert accepted_fields(saved(PLAIN).folder, janus_weights.FIELDS.values(), value, JanusConfig) == taken


def test_sizes_that_the_weights_do_not_have(copy: Copy) -> None:
    for values, match in (
        ({"vq_config__num_embeddings": 64}, r"must be \[64(, 6|, 48)?\] by config.json"),
        ({"vq_config__channel_multiplier": [1, 3]}, "model.vqmodel.* must be .* by config.json"),
        ({"vq_config__num_res_blocks": 2}, r"must hold model.vqmodel.\S+"),
        ({"vq_config__num_hidden_layers": 3}, r"must hold model.generation_aligner.hidden_layers.1.weight \[48, 48\]"),
        ({"vision_config__depth": 1}, r"must hold only the model's tensors, got model.aligner.hidden_layers.0.\w+"),
        ({"text_config__num_hidden_layers": 400}, r"must hold model.language_model.layers.2.\S+ .*and \d+ more"),
        ({"vision_config__num_hidden_layers": 2}, r"must hold only the model's tensors, got model.vision_model.enc"),
    ):
        folder = copy(PLAIN)
        configure(folder, **values)
        refused(folder, match)


def test_a_truncated_shard(copy: Copy) -> None:
    folder = copy(OTHER)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, f"{path.name}: must be a whole safetensors file")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"text_head_dim": 7}, "text_head_dim must be even, got 7"),
        ({"patch_size": 7}, "image_size must be a multiple of patch_size = 7, got 32"),
        ({"image_token_id": None}, "image_token_id must be an integer below vocab_size = 128, got None"),
        ({"image_start_token_id": 128}, "image_start_token_id must be an integer below vocab_size = 128, got 128"),
        ({"vq_directions": 1}, "vq_directions must be a bool, got 1"),
        ({"vq_multipliers": [1, 2]}, r"vq_multipliers must be 1 to 8 integers from 1 to 64, got \[1, 2\]"),
        (
            {"vq_multipliers": (1,) * 8, "image_size": 4096},
            "vq_multipliers must be so few that a generated image has a side of at most 4096 pixels, got .*: 65536",
        ),
        ({"aligner_activation": None}, "aligner_activation must be one of gelu"),
    ],
)
def test_fields_of_a_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(SIZES["tiny"], **values)


def test_published_sizes() -> None:
    """transformers' defaults are those of its Janus-Pro-1B but for the language model's."""
    text = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 16, "intermediate_size": 5632, "vocab_size": 102400}
    text |= {"max_position_embeddings": 16384, "bos_token_id": 100000, "eos_token_id": 100001, "pad_token_id": 100002}
    config = JanusConfig.from_hf({"model_type": "janus", "text_config": text, "tie_word_embeddings": False})
    assert replace(config, image_start_token_id=100016) == SIZES["janus_pro_1b"]
    assert config.image_tokens == 576 and config.vq_sizes.image_side == 384


# transformers' processor.


@pytest.fixture(scope="module")
def processor() -> Any:
    """Of images of SIDE pixels; it knows the words w5 to w89."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": PAD, "<s>": BOS, "<eos>": 2, "<unk>": 3, "<img>": START, "</img>": 97, "<image>": MARKER}
    words = {f"w{number}": number for number in range(5, 90)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"boi_token": "<img>", "eoi_token": "</img>", "image_token": "<image>"}
    ends = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<eos>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=names, padding_side="left", **ends
    )
    size = {"height": SIDE, "width": SIDE}
    images = transformers.models.janus.image_processing_pil_janus.JanusImageProcessorPil(size=size)
    return transformers.JanusProcessor(images, fast, num_image_tokens=TOKENS)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (97, 20), (1, 40), (300, 200)])
def test_inputs_of_the_processor(ours: Ours, theirs: Any, processor: Any, width: int, height: int) -> None:
    """Of two texts, with photos of other sizes than the model's."""
    generator = np.random.default_rng(0)
    photo = lambda w, h: Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8))
    texts = ["<s> w5 <image> w6", "<s> w7 w8 <image> w9 <image> w10"]
    photos = [[photo(width, height)], [photo(32, 32), photo(height, width)]]
    given = processor(text=texts, images=photos, padding=True, return_tensors="pt")
    with torch.no_grad():
        out, expected = ours(PLAIN)(**given).logits, theirs(PLAIN)(**given).logits
    assert given["pixel_values"].shape == (3, 3, SIDE, SIDE)
    valid = given["attention_mask"].bool()
    assert distance(out[valid], expected[valid]) < 5e-6


def test_an_image_of_a_text(ours: Ours, theirs: Any, processor: Any) -> None:
    """From the processor's prompt to pixels that it takes back."""
    given = processor(text=["<s> w5 w6", "<s> w7"], generation_mode="image", padding=True, return_tensors="pt")
    assert given["input_ids"][:, -1].tolist() == [START] * 2
    model = ours(PLAIN)
    tokens = model.generate_image(given["input_ids"], attention_mask=given["attention_mask"], temperature=0.0)
    expected = theirs(PLAIN).generate(**given, generation_mode="image", do_sample=False, guidance_scale=5.0)
    assert torch.equal(tokens, expected)
    pixels = model.decode(tokens)
    photos = processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
    assert [photo.size for photo in photos] == [(8, 8)] * 2


def test_prompts_of_one_word(ours: Ours, theirs: Any) -> None:
    """And of none."""
    ids, mask = drawing_prompt([0, 1])
    expected = theirs(PLAIN).generate(
        ids, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=5.0
    )
    assert torch.equal(ours(PLAIN).generate_image(ids, attention_mask=mask, temperature=0.0), expected)
