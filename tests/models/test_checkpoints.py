"""Checkpoint folders that aren't what they must be: each is a clear error that names file, expected and found."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import configure, reweigh
from idefics_checkpoints import Saved, idefics_config

from mmkernels.models import Flamingo, FlamingoConfig
from mmkernels.models.blocks.checkpoint import CheckpointError


@pytest.fixture
def folder(saved: Callable[[str], Saved], tmp_path: Path) -> Path:
    """A copy to spoil of a checkpoint in one file."""
    return shutil.copytree(saved("resampler").folder, tmp_path / "copy")


@pytest.fixture
def shards(saved: Callable[[str], Saved], tmp_path: Path) -> Path:
    """A copy to spoil of a checkpoint in several."""
    return shutil.copytree(saved("tied").folder, tmp_path / "copy")


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=match):
        Flamingo.from_pretrained(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "folder must be a checkpoint's folder, got .*nowhere", FileNotFoundError)
    refused(folder / "config.json", "which is no folder", FileNotFoundError)
    (folder / "model.safetensors").unlink()
    refused(folder, "must hold model.safetensors, or .*got neither", FileNotFoundError)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, "got pytorch_model.bin: pickled weights can run any code", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "must hold config.json, got no such file", FileNotFoundError)


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
def test_config_that_is_none(folder: Path, content: bytes, match: str) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, f"config.json: {match}")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"architectures": ["IdeficsModel"]}, r"architectures must be \['IdeficsForVisionText2Text'\], got"),
        ({"hidden_size": 10**9}, "hidden_size must be an integer from 1 to .*, got 1000000000"),
        ({"hidden_size": 2**17}, "text_width must be an integer from 1 to 65536, got 131072"),
        ({"hidden_size": -64}, "hidden_size must be an integer from 1 to .*, got -64"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": 66}, "text_width must be a multiple of text_heads = 4, got 66"),
        ({"hidden_size": 4}, "text_width / text_heads must be even, got 1"),
        ({"num_hidden_layers": 10**7}, "text_layers must be an integer from 1 to 512, got 10000000"),
        ({"num_hidden_layers": 5}, "text_layers must be a multiple of cross_every = 2, got 5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
        ({"additional_vocab_size": -1}, "additional_vocab_size must be an integer from 0"),
        ({"vision_config": 3}, "vision_config must be an object, got 3"),
        ({"vision_config__embed_dim": 10**8}, "vision_config: embed_dim must be an integer"),
        ({"vision_config__image_size": [32, 48]}, "vision_config: image_size must be an integer"),
        ({"vision_config__patch_size": 64}, "patch_size must be at most image_size = 32, got 64"),
        ({"vision_config__hidden_act": "swish9"}, "vision_config: hidden_act must be one of gelu, .*got 'swish9'"),
        (
            {"perceiver_config__resampler_n_latents": 0},
            "perceiver_config: resampler_n_latents must be an integer from 1",
        ),
        ({"hidden_act": None}, "hidden_act must be one of gelu, .*got None"),
        ({"alpha_type": "matrix"}, "alpha_type must be one of float, vector, got 'matrix'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, got nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number, positive and finite, got 0.0"),
        ({"use_resampler": 1}, "use_resampler must be true or false, got 1"),
        ({"rope_parameters__rope_type": "yarn"}, "rope_parameters: rope_type must be one of default, got 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling must be null, got"),
        ({"dropout": 2.0}, "dropout must be a number between 0 and 1, got 2.0"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer"),
        ({"image_token_id": 128}, "image_token_id must be an integer below vocab_size = 128, got 128"),
    ],
)
def test_config_values(folder: Path, values: dict[str, Any], match: str) -> None:
    configure(folder, **values)
    refused(folder, f"config.json.*{match}")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"hidden_size": 65536}, r"must be \[128, 65536\] by config.json, got \[128, 64\]"),
        ({"vocab_size": 2**24}, r"must be \[16777216, 64\] by config.json, got \[128, 64\]"),
        (
            {"num_hidden_layers": 512},
            r"must hold model.gated_cross_attn_layers.2.alpha_cross_attn \[1\] \(and \d+ more\)",
        ),
        ({"num_hidden_layers": 2}, r"must hold only the model's tensors, got .* \(and \d+ more\)"),
        ({"use_resampler": False}, "must hold only the model's tensors, got model.perceiver_resampler"),
        ({"alpha_type": "vector"}, r"alpha_cross_attn must be \[1, 1, 64\] by config.json, got \[1\]"),
        ({"additional_vocab_size": 2}, "must hold model.embed_tokens.additional_embedding.weight"),
        ({"vision_config__image_size": 64}, r"position_embedding.weight must be \[65, 32\] .*, got \[17, 32\]"),
    ],
)
def test_config_against_weights(folder: Path, values: dict[str, Any], match: str) -> None:
    """Sizes that the file doesn't hold are refused from headers alone: nothing of that size is allocated."""
    configure(folder, **values)
    refused(folder, match)


def test_weights(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    reweigh(folder, lambda tensors: tensors.update({name: torch.zeros(64, 32)}))
    refused(folder, rf"model.safetensors: {name} must be \[64, 64\] by config.json, got \[64, 32\]")
    reweigh(folder, lambda tensors: tensors.update({name: torch.zeros(64, 64, dtype=torch.int8)}))
    refused(folder, f"{name} must be one of F64, F32, F16, BF16, got I8")
    reweigh(folder, lambda tensors: tensors.pop(name))
    refused(folder, rf"the weights must hold {name} \[64, 64\], got \d+ tensors without it")
    reweigh(folder, lambda tensors: tensors.update({name: torch.zeros(64, 64), "model.extra": torch.zeros(3)}))
    refused(folder, r"must hold only the model's tensors, got model.extra \[3\]")


def test_constants_of_older_versions_are_passed_over(folder: Path, saved: Callable[[str], Saved]) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.long),
    }
    reweigh(folder, lambda tensors: tensors.update(old))
    configure(folder, rope_parameters=...)
    Flamingo.from_pretrained(folder)


def header(values: Any) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
OUTSIDE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}}
OVERLAP = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**40) + b"{}",
        header(b"{]"),
        header(b'{"a": 1}'),
        header(HUGE) + b"\0" * 4,
        header(OUTSIDE) + b"\0" * 4,
        header(OVERLAP) + b"\0" * 4,
        b"PK\x03\x04 a zip, as torch.save writes",
    ],
)
def test_hostile_headers(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors: must be a whole safetensors file, got an error")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(folder, "must be a whole safetensors file")


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def redirect(shard: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["weight_map"].update({"model.norm.weight": shard})


@pytest.mark.parametrize(
    "shard",
    [
        "../copy/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\m.safetensors",
        "..",
        "",
        "x.bin",
    ],
)
def test_shards_outside_the_folder(shards: Path, shard: str) -> None:
    reindex(shards, redirect(shard))
    refused(shards, "index.json: a shard must be the name of a .safetensors file beside it, got ")


def test_shards(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    other = next(shard for shard in names if shard != index["weight_map"]["model.norm.weight"])
    Flamingo.from_pretrained(shards)

    reindex(shards, redirect(other))
    refused(shards, f"{other}: must hold model.norm.weight by model.safetensors.index.json, got no such tensor")
    reindex(shards, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(shards, "must hold what model.safetensors.index.json says, got model.norm.weight too")
    reindex(shards, redirect("gone.safetensors"))
    refused(shards, "must hold gone.safetensors, got no such file", FileNotFoundError)
    reindex(shards, redirect(7))
    refused(shards, "weight_map must be an object of file names")
    reindex(shards, lambda index: index.pop("weight_map"))
    refused(shards, "weight_map must be an object of file names")
    (shards / "model.safetensors.index.json").write_text("{")
    refused(shards, "index.json: must be JSON")


def test_the_image_token_is_that_of_the_tokenizer(folder: Path) -> None:
    assert Flamingo.from_pretrained(folder).config.image_token_id == 100
    tokens = {"added_tokens": [{"id": 3, "content": "<s>"}, {"id": 101, "content": "<image>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert Flamingo.from_pretrained(folder).config.image_token_id == 101
    configure(folder, image_token_id=102)
    assert Flamingo.from_pretrained(folder).config.image_token_id == 102
    configure(folder, image_token_id=...)
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    assert Flamingo.from_pretrained(folder).config.image_token_id is None


def test_tokens_outside_the_vocabulary(folder: Path) -> None:
    for tokens, message in (
        ({"added_tokens": 5}, "tokenizer.json: added_tokens must be a list, got 5"),
        ({"added_tokens": [{"id": 5000, "content": "<image>"}]}, r"the id of <image> must be below"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        refused(folder, message)
    (folder / "tokenizer.json").unlink()
    configure(folder, pad_token_id=10**6)
    refused(folder, "pad_token_id must be an integer below vocab_size")


def test_a_number_past_every_float(folder: Path) -> None:
    configure(folder, rms_norm_eps=10**400)
    refused(folder, "rms_norm_eps must be a finite number")


def test_config_of_a_dict() -> None:
    config = FlamingoConfig.from_idefics(idefics_config().to_dict())
    assert (config.text_width, config.vision_width, config.num_latents, config.cross_every) == (64, 32, 8, 2)
    # What a file leaves out has transformers' defaults, as in the published 9b checkpoint.
    config = FlamingoConfig.from_idefics({"model_type": "idefics"})
    assert (config.text_width, config.vision_width, config.image_size, config.num_latents) == (4096, 768, 224, None)


def test_dtype_and_device(folder: Path) -> None:
    model = Flamingo.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match=r"dtype must be a floating dtype, got torch.int32"):
        Flamingo.from_pretrained(folder, dtype=torch.int32)
    assert not model.training
    assert all(not p.is_meta for p in model.parameters())
