"""Checkpoint folders with errors: each raises an error that names the file, what was expected and what was found.

And the configurations that are read from them.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import Saved, change_weights, configure, load, refused
from clip_checkpoints import hf_config
from idefics_checkpoints import config as idefics_config

from mmkernels.models import CLIP, CLIPConfig, Flamingo, FlamingoConfig
from mmkernels.models.blocks.checkpoint import renamed
from mmkernels.models.clip import SIZES

Copy = Callable[[str], Path]
PICKLE = b"cos\nsystem\n(S'false'\ntR."


@pytest.mark.parametrize(("variant", "model"), [("clip", CLIP), ("resampler", Flamingo)])
def test_missing_files(copy: Copy, tmp_path: Path, variant: str, model: Any) -> None:
    folder = copy(variant)
    refused(tmp_path / "nowhere", "folder must be a checkpoint's folder, got .*nowhere", FileNotFoundError, model)
    refused(folder / "config.json", "which is no folder", FileNotFoundError, model)
    (folder / "model.safetensors").unlink()
    refused(folder, "must hold model.safetensors, or .*got neither", FileNotFoundError, model)
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    refused(folder, "got pytorch_model.bin: pickled weights can run any code", FileNotFoundError, model)
    (folder / "config.json").unlink()
    refused(folder, "must hold config.json, got no such file", FileNotFoundError, model)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"{}", "model_type must be one of idefics, got nothing"),
        (b'{"model_type": "llama"}', "model_type must be one of idefics, got 'llama'"),
        (b'{"model_type": ["idefics"]}', "model_type must be one of idefics, got"),
    ],
)
def test_files_that_are_no_configuration(copy: Copy, content: bytes, match: str) -> None:
    folder = copy("resampler")
    (folder / "config.json").write_bytes(content)
    refused(folder, f"config.json: {match}")


def test_other_architectures(copy: Copy) -> None:
    folder = copy("clip")
    for values, match in (
        ({"model_type": "siglip2"}, "model_type must be one of clip, siglip, got 'siglip2'"),
        ({"model_type": ...}, "model_type must be one of clip, siglip, got nothing"),
        ({"model_type": "siglip"}, r"architectures must be \['SiglipModel'\], got \['CLIPModel'\]"),
        ({"model_type": "clip", "architectures": ["CLIPVisionModel"]}, r"architectures must be \['CLIPModel'\], got"),
        ({"architectures": 5}, r"architectures must be \['CLIPModel'\], got 5"),
    ):
        configure(folder, **values)
        refused(folder, f"config.json: {match}")
    configure(folder, architectures=None)
    load(folder)


SIZE = "must be an integer from 1 to"


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        # Refused by transformers.
        ("resampler", {"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ("resampler", {"vision_config": 3}, "'vision_config' with value 3"),
        ("resampler", {"eos_token_id": "</s>"}, "'eos_token_id' with value '</s>'"),
        ("resampler", {"rms_norm_eps": 10**400}, "'rms_norm_eps' expected float"),
        ("resampler", {"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
        ("clip", {"text_config": 3}, "'text_config' with value 3"),
        ("clip", {"text_config_dict": [1]}, "CLIPTextConfig.* must be a mapping, not list"),
        ("siglip", {"vision_config__num_attention_heads": True}, "vision_config: .*'num_attention_heads' expected int"),
        ("clip", {"text_config__per_layer_config": {"0": {"hidden_act": "gelu"}}}, "hidden_act.* may vary"),
        # Accepted by transformers.
        ("resampler", {"hidden_size": -64}, f"hidden_size: text_width {SIZE} .*, got -64"),
        ("resampler", {"hidden_size": 66}, "hidden_size: text_width must be a multiple of text_heads = 4, got 66"),
        ("resampler", {"hidden_size": 4}, "text_width / text_heads must be even, got 1"),
        ("resampler", {"num_hidden_layers": 5}, "text_layers must be a multiple of cross_every = 2, got 5"),
        ("resampler", {"num_attention_heads": 0}, f"num_attention_heads: text_heads {SIZE}"),
        ("resampler", {"additional_vocab_size": -1}, "additional_vocab_size must be >= 0, got -1"),
        ("resampler", {"vocab_size": 2**40}, f"vocab_size {SIZE}"),
        ("resampler", {"vision_config__image_size": [32, 48]}, rf"image_size {SIZE} .*, got \[32, 48\]"),
        ("resampler", {"vision_config__patch_size": 64}, "patch_size must be at most image_size = 32, got 64"),
        ("resampler", {"perceiver_config__resampler_n_latents": 0}, f"num_latents {SIZE}"),
        ("resampler", {"alpha_type": "matrix"}, "alpha_type must be one of float, vector, got 'matrix'"),
        ("resampler", {"rope_parameters__rope_type": "linear", "rope_parameters__factor": 2.0}, "must be default, got"),
        ("resampler", {"rope_parameters__rope_theta": "x"}, "rope_theta must be a number"),
        ("resampler", {"image_token_id": 128}, "image_token_id must be an integer below vocab_size = 128, got 128"),
        ("resampler", {"eos_token_id": [2, -1]}, r"eos_token_ids must be integers >= 0, got \(2, -1\)"),
        ("clip", {"projection_dim": None}, f"projection_dim: embed_dim {SIZE} .*, got None"),
        ("clip", {"text_config__max_position_embeddings": 0}, f"max_position_embeddings: text_length {SIZE}"),
        ("clip", {"text_config__eos_token_id": None}, "text_config: eos_token_id must be an integer, got None"),
        ("clip", {"text_config__eos_token_id": [90]}, r"text_config: eos_token_id must be an integer, got \[90\]"),
        ("clip", {"text_config__eos_token_id": 100}, "eos_token_id must be an integer below vocab_size = 100, got 100"),
        ("clip", {"vision_config__image_size": [32, 32]}, rf"vision_config.image_size: image_size {SIZE} .*, got \[32"),
        ("clip", {"vision_config__num_channels": -3}, f"vision_config.num_channels: channels {SIZE} .*, got -3"),
        (
            "siglip",
            {"vision_config__vision_use_head": False},
            "vision_config: vision_use_head must be true, got False",
        ),
        ("siglip", {"text_config__projection_size": 48}, "embed_dim must be vision_width = 32 in a siglip, got 48"),
    ],
)
def test_config_values(copy: Copy, variant: str, values: dict[str, Any], match: str) -> None:
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, f"config.json.*{match}")


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        ("resampler", {"hidden_size": 65536}, r"must be \[128, 65536\] by config.json, got \[128, 64\]"),
        ("resampler", {"vocab_size": 2**24}, r"must be \[16777216, 64\] by config.json, got \[128, 64\]"),
        (
            "resampler",
            {"num_hidden_layers": 40},
            r"must hold model.gated_cross_attn_layers.2.alpha_cross_attn \[\] \(and \d+ more\)",
        ),
        ("resampler", {"num_hidden_layers": 2}, r"must hold only the model's tensors, got .* \(and \d+ more\)"),
        ("resampler", {"use_resampler": False}, "must hold only the model's tensors, got model.perceiver_resampler"),
        ("resampler", {"alpha_type": "vector"}, r"alpha_cross_attn must be \[64\] by config.json, got \[1\]"),
        ("resampler", {"additional_vocab_size": 2}, r"embed_tokens.weight must be \[130, 64\] .*, got \[128, 64"),
        ("decoupled", {"additional_vocab_size": 2}, r"embed_tokens.weight must be \[130, 64\] .*, got \[131, 64\]"),
        ("resampler", {"vision_config__image_size": 64}, r"position_embedding.weight must be \[65, 32\] .*, got \[17"),
        ("clip", {"text_config__vocab_size": 2**24}, r"must be \[16777216, 32\] by config.json, got \[100, 32\]"),
        ("siglip", {"vision_config__image_size": 40}, r"position_embedding.weight must be \[25, 32\] .*, got \[16"),
        ("siglip", {"text_config__num_hidden_layers": 40}, r"must hold text_model.encoder.layers.3.\S+ .*and \d+ more"),
    ],
)
def test_config_against_weights(copy: Copy, variant: str, values: dict[str, Any], match: str) -> None:
    """Sizes that the file does not hold are refused by its header: nothing of that size is allocated."""
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("clip", "text_projection.weight", (24, 32)),
        ("clip", "logit_scale", ()),
        ("clip", "vision_model.pre_layrnorm.bias", (32,)),
        ("siglip", "vision_model.head.probe", (1, 32)),
        ("siglip", "logit_bias", ()),
        ("resampler", "model.layers.1.self_attn.q_proj.weight", (64, 64)),
        ("decoupled", "lm_head.weight", (131, 64)),
    ],
)
def test_weights(copy: Copy, variant: str, name: str, shape: tuple[int, ...]) -> None:
    def damaged(tensors: dict[str, torch.Tensor | None]) -> Path:
        folder = copy(variant)

        def change(held: dict[str, torch.Tensor]) -> None:
            for key, value in tensors.items():
                held.pop(key, None)
                if value is not None:
                    held[key] = value

        change_weights(folder, change)
        return folder

    expected = re.escape(str(list(shape)))
    refused(
        damaged({name: torch.zeros(2, 5)}), rf"model.safetensors: {name}.* must be {expected} by config.json, got \[2"
    )
    refused(
        damaged({name: torch.zeros(shape, dtype=torch.int8)}),
        f"{name} must be one of torch.float64, .*, got torch.int8",
    )
    refused(damaged({name: None}), rf"the weights must hold {name} {expected}, got \d+ tensors without it")
    for unknown in ("model.extra", "text.embed.weight", "embed.weight"):  # two of them are names in our models
        refused(damaged({unknown: torch.zeros(3)}), rf"only the model's tensors, got {unknown} \[3\]")


def test_projections_in_one_tensor(copy: Copy) -> None:
    name = "vision_model.head.attention.in_proj_weight"
    for rows in (2, 95, 97):
        folder = copy("siglip")
        change_weights(folder, lambda tensors, rows=rows: tensors.update({name: torch.zeros(rows, 32)}))
        refused(folder, r"image_pool.attention.\w_proj.weight must be \[32, 32\] by config.json, got \[\d+, 32\]")
    folder = copy("siglip")
    change_weights(folder, lambda tensors: tensors.pop(name))
    refused(folder, r"must hold image_pool.attention.q_proj.weight \[32, 32\] \(and 2 more\)")


def test_constants_of_older_versions_are_ignored(copy: Copy) -> None:
    constants = {
        "resampler": {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            "model.vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.long),
        },
        "clip": {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")},
    }
    for variant, tensors in constants.items():
        folder = copy(variant)
        change_weights(folder, lambda held, tensors=tensors: held.update(tensors))
        load(folder)


def test_rotary_positions_of_older_versions(copy: Copy) -> None:
    folder = copy("resampler")
    configure(folder, rope_parameters=..., rope_theta=500.0)
    assert load(folder).config.rope_theta == 500.0
    configure(folder, rope_theta=...)
    assert load(folder).config.rope_theta == 10000.0


def test_labels_of_a_classifier_are_ignored(copy: Copy) -> None:
    """transformers would create a name for each of them."""
    folder = copy("clip")
    configure(folder, num_labels=10**12, text_config__num_labels=10**12)
    load(folder)


def header(values: Any) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + b"{}",
        header(b"{]"),
        header(b'{"a": 1}'),
        header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}}) + b"\0" * 4,
        header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}) + b"\0" * 4,
        b"PK\x03\x04 a zip, as torch.save writes",
    ],
)
def test_corrupt_headers(copy: Copy, content: bytes) -> None:
    folder = copy("resampler")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors: must be a whole safetensors file, got an error")


@pytest.mark.parametrize("variant", ["resampler", "siglip_shards"])
def test_truncated_weights(copy: Copy, variant: str) -> None:
    folder = copy(variant)
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    for keep in (0.1, 0.5, 0.999):
        path.write_bytes(content[: int(len(content) * keep)])
        refused(folder, f"{path.name}: must be a whole safetensors file")


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def redirect(shard: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["weight_map"].update({"model.norm.weight": shard})


def test_shards_outside_the_folder(copy: Copy) -> None:
    folder = copy("tied")
    names = ("../copy/model", "/etc/model", "sub/model", "..\\model")
    for shard in (*(f"{name}.safetensors" for name in names), "..", "", "x.bin"):
        change_index(folder, redirect(shard))
        refused(folder, "index.json: a shard must be the name of a .safetensors file beside it, got ")


def test_shards(copy: Copy) -> None:
    folder = copy("tied")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    holder = index["weight_map"]["model.norm.weight"]
    other = next(shard for shard in shards if shard != holder)

    change_index(folder, redirect(other))
    load(folder)  # as in transformers: the index lists the files
    (folder / "again.safetensors").write_bytes((folder / holder).read_bytes())
    change_index(folder, redirect("again.safetensors"))
    refused(folder, rf"{holder}: must not hold model.\S+, which .*again.safetensors holds too")
    change_index(folder, lambda index: index["weight_map"].update({"lost": "gone.safetensors"}))
    refused(folder, "must hold gone.safetensors, got no such file", FileNotFoundError)
    change_index(folder, redirect(7))
    refused(folder, "weight_map must be an object of file names")
    change_index(folder, lambda index: index.pop("weight_map"))
    refused(folder, "weight_map must be an object of file names")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "index.json: must be JSON")


def test_a_tied_tensor_may_be_on_disk(copy: Copy) -> None:
    """Older versions saved it twice. Different values are not tied, as in transformers, whatever config.json says."""
    folder = copy("tied")
    whole = load(folder)
    assert whole.head.weight is whole.embed.weight
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith("lm_head.") for name in index)
    for value in (whole.embed.weight.detach().clone(), torch.zeros(131, 64)):
        new = {"lm_head.weight": value[:128].clone(), "lm_head.additional_fc.weight": value[128:].clone()}
        shard = folder / index["model.norm.weight"]
        shard = shard.rename(folder / "model.safetensors")
        change_weights(folder, lambda tensors, new=new: tensors.update(new))
        (folder / "model.safetensors").rename(folder / index["model.norm.weight"])
        change_index(folder, lambda held: held["weight_map"].update({"lm_head.weight": index["model.norm.weight"]}))
        loaded = load(folder)
        assert torch.equal(loaded.head.weight, value) and torch.equal(loaded.embed.weight, whole.embed.weight)
        assert (loaded.head.weight is loaded.embed.weight) == bool(value.any())


def test_the_image_token_is_that_of_the_tokenizer(copy: Copy) -> None:
    folder = copy("resampler")
    token = lambda: Flamingo.from_pretrained(folder).config.image_token_id
    assert token() == 100
    tokens = {"added_tokens": [{"id": 3, "content": "<s>"}, {"id": 101, "content": "<image>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert token() == 101
    configure(folder, image_token_id=102)
    assert token() == 102
    configure(folder, image_token_id=...)
    for tokens, message in (
        ({"added_tokens": 5}, "tokenizer.json: added_tokens must be a list, got 5"),
        ({"added_tokens": [{"id": 5000, "content": "<image>"}]}, "tokenizer.json: the id of <image> must be .* 128"),
        ({"added_tokens": [{"id": "5", "content": "<image>"}]}, "the id of <image> must be an integer .*, got '5'"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        refused(folder, message)
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    assert token() is None


def test_missing_fields_have_transformers_defaults() -> None:
    for variant, size, changes in (
        ("siglip", "siglip_base", {}),
        ("clip", "base", {"patch_size": 32, "eos_token_id": 49407}),
    ):
        whole = (transformers.SiglipConfig if variant == "siglip" else transformers.CLIPConfig)().to_dict()
        config = CLIPConfig.from_transformers({"model_type": variant})
        assert config == CLIPConfig.from_transformers(json.loads(json.dumps(whole))) == replace(SIZES[size], **changes)
        config = CLIPConfig.from_transformers(hf_config(variant).to_dict())
        assert (config.vision_width, config.text_layers, config.text_length, config.vocab_size) == (32, 3, 12, 100)
    config = FlamingoConfig.from_idefics(transformers.IdeficsConfig(**idefics_config("resampler")).to_dict())
    assert (config.text_width, config.vision_width, config.num_latents, config.cross_every) == (64, 32, 8, 2)
    config = FlamingoConfig.from_idefics({"model_type": "idefics"})  # as in the published 9b checkpoint
    assert (config.text_width, config.vision_width, config.image_size, config.num_latents) == (4096, 768, 224, None)


@pytest.mark.parametrize(
    ("sizes", "values", "match"),
    [
        (CLIP, {"variant": "blip"}, "variant must be one of clip, siglip, got 'blip'"),
        (CLIP, {"vision_activation": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        (CLIP, {"text_activation": ["gelu"]}, r"text_activation must be one of gelu, .*got \['gelu'\]"),
        (CLIP, {"text_heads": 0}, "text_heads must be an integer from 1 to 4096, got 0"),
        (CLIP, {"variant": "siglip"}, "embed_dim must be vision_width = 32 in a siglip, got 24"),
        (CLIP, {"eos_token_id": -1}, "eos_token_id must be an integer below vocab_size = 128, got -1"),
        (CLIP, {"eos_token_id": True}, "eos_token_id must be an integer below vocab_size = 128, got True"),
        (CLIP, {"eos_token_id": 1.5}, "eos_token_id must be an integer below vocab_size = 128, got 1.5"),
        (CLIP, {"vision_eps": "x"}, "vision_eps must be a number, positive and finite, got 'x'"),
        (CLIP, {"text_eps": True}, "text_eps must be a number, positive and finite, got True"),
        (CLIP, {"vision_dropout": None}, "vision_dropout must be a number between 0 and 1, got None"),
        (CLIP, {"text_dropout": 2}, "text_dropout must be a number between 0 and 1, got 2"),
        (Flamingo, {"layer_norm_eps": float("inf")}, "layer_norm_eps must be a number, positive and finite, got inf"),
        (Flamingo, {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, positive and finite, got nan"),
        (Flamingo, {"dropout": 2.0}, "dropout must be a number between 0 and 1, got 2.0"),
        (Flamingo, {"pad_token_id": 10**6}, "pad_token_id must be an integer below vocab_size = 128, got 1000000"),
        (Flamingo, {"gate": "matrix"}, 'gate must be "scalar" or "vector", got \'matrix\''),
    ],
)
def test_fields_of_a_configuration(sizes: Any, values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(sizes.sizes["tiny"], **values)


@pytest.mark.parametrize("variant", ["clip", "siglip", "resampler"])
def test_dtype_and_storage(copy: Copy, variant: str) -> None:
    folder = copy(variant)
    change_weights(folder, lambda tensors: tensors.update({name: x.half() for name, x in tensors.items()}))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        loaded = load(folder, dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert not loaded.training
        for parameter in loaded.parameters():  # no parameter keeps another's memory
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            assert parameter.requires_grad
    for dtype in (torch.int32, torch.bool, "float32", None):
        with pytest.raises(TypeError, match=f"dtype must be a floating dtype, got {dtype!r}"):
            load(folder, dtype)


def test_it_says_what_to_install(saved: Callable[[str], Saved], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("clip").folder
    for package in ("safetensors", "transformers"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, package, None)
            refused(folder, rf'needs {package}: pip install "mmkernels\[models\]"', ImportError)


def test_names() -> None:
    table = {"a.#.b.": "x.#.y.", "a.#.": "z.#.", "c.0.": "w."}
    for ours, theirs in {"a.12.b.3.weight": "x.12.y.3.weight", "a.2.c": "z.2.c", "c.0.bias": "w.bias"}.items():
        assert renamed(ours, table) == theirs
        assert renamed(theirs, {start: name for name, start in table.items()}) == ours
    assert renamed("d.0.bias", table) is None
