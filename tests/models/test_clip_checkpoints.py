"""CLIP and SigLIP folders that aren't what they must be: each is a clear error that names file, expected and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_tools import configure, reweigh
from clip_checkpoints import Saved, hf_config, saver

from mmkernels.models import CLIP, CLIPConfig
from mmkernels.models.blocks.checkpoint import CheckpointError, renamed
from mmkernels.models.clip import SIZES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    return saver(tmp_path_factory.mktemp)


@pytest.fixture
def copy(saved: Callable[[str], Saved], tmp_path: Path) -> Callable[[str], Path]:
    """A copy to spoil of a variant's checkpoint, a new one each time."""
    copies: list[Path] = []

    def get(variant: str) -> Path:
        copies.append(tmp_path / f"copy{len(copies)}")
        return shutil.copytree(saved(variant).folder, copies[-1])

    return get


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=match):
        CLIP.from_pretrained(folder)


def test_other_architectures(copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    for values, match in (
        ({"model_type": "siglip2"}, "model_type must be one of clip, siglip, got 'siglip2'"),
        ({"model_type": ["clip"]}, "model_type must be one of clip, siglip, got"),
        ({"model_type": ...}, "model_type must be one of clip, siglip, got nothing"),
        ({"model_type": "siglip"}, r"architectures must be \['SiglipModel'\], got \['CLIPModel'\]"),
        ({"model_type": "clip", "architectures": ["CLIPVisionModel"]}, r"architectures must be \['CLIPModel'\], got"),
    ):
        configure(folder, **values)
        refused(folder, f"config.json: {match}")
    configure(folder, architectures=None)
    CLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        ("clip", {"projection_dim": None}, "projection_dim must be an integer from 1 to .*, got None"),
        ("clip", {"projection_dim": float("nan")}, "projection_dim must be an integer from 1 to .*, got nan"),
        ("clip", {"projection_dim": 2**20}, "embed_dim must be an integer from 1 to 65536, got 1048576"),
        ("clip", {"text_config": 3}, "text_config must be an object, got 3"),
        ("clip", {"text_config_dict": [1]}, r"text_config_dict must be an object, got \[1\]"),
        ("clip", {"text_config__hidden_size": float("nan")}, "text_config: hidden_size must be an integer .*, got nan"),
        ("clip", {"text_config__hidden_size": 33}, "text_width must be a multiple of text_heads = 2, got 33"),
        ("clip", {"text_config__num_hidden_layers": 10**6}, "text_layers must be an integer from 1 to 512, got"),
        ("clip", {"text_config__max_position_embeddings": 0}, "max_position_embeddings must be an integer from 1"),
        (
            "clip",
            {"text_config__eos_token_id": None},
            "text_config: eos_token_id must be an integer from 0 .*, got None",
        ),
        ("clip", {"text_config__eos_token_id": [90]}, r"text_config: eos_token_id must be an integer .*, got \[90\]"),
        ("clip", {"text_config__eos_token_id": 100}, "eos_token_id must be an integer below vocab_size = 100, got 100"),
        ("clip", {"text_config__hidden_act": "swish9"}, "text_config: hidden_act must be one of gelu, .*got 'swish9'"),
        ("clip", {"text_config__layer_norm_eps": float("nan")}, "layer_norm_eps must be a finite number, got nan"),
        ("clip", {"text_config__layer_norm_eps": 0}, "text_eps must be a number, positive and finite, got 0"),
        ("clip", {"vision_config__attention_dropout": 2}, "vision_dropout must be a number between 0 and 1, got 2"),
        ("clip", {"vision_config__image_size": [32, 32]}, r"vision_config: image_size must be an integer .*, got \[32"),
        ("clip", {"vision_config__patch_size": 64}, "patch_size must be at most image_size = 32, got 64"),
        ("clip", {"vision_config__num_channels": -3}, "num_channels must be an integer from 1 to .*, got -3"),
        ("siglip", {"vision_config__vision_use_head": False}, "vision_use_head must be true: .*, got False"),
        ("siglip", {"vision_config__vision_use_head": 1}, "vision_use_head must be true or false, got 1"),
        ("siglip", {"text_config__projection_size": 48}, "embed_dim must be vision_width = 32 in a siglip, got 48"),
        ("siglip", {"text_config__projection_size": "32"}, "projection_size must be an integer from 1 .*, got '32'"),
        ("siglip", {"vision_config__num_attention_heads": True}, "num_attention_heads must be an integer"),
    ],
)
def test_config_values(copy: Callable[[str], Path], variant: str, values: dict[str, Any], match: str) -> None:
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, f"config.json.*{match}")


@pytest.mark.parametrize(
    ("variant", "values", "match"),
    [
        ("clip", {"projection_dim": 65536}, r"visual_projection.weight must be \[65536, 32\] by config.json, got"),
        ("clip", {"text_config__vocab_size": 2**24}, r"must be \[16777216, 32\] by config.json, got \[100, 32\]"),
        ("clip", {"text_config__max_position_embeddings": 13}, r"position_embedding.weight must be \[13, 32\]"),
        ("clip", {"vision_config__image_size": 40}, r"position_embedding.weight must be \[26, 32\] .*, got \[17, 32\]"),
        (
            "siglip",
            {"vision_config__image_size": 40},
            r"position_embedding.weight must be \[25, 32\] .*, got \[16, 32\]",
        ),
        (
            "siglip",
            {"text_config__num_hidden_layers": 512},
            r"must hold text_model.encoder.layers.3.\S+ .*and \d+ more",
        ),
        ("siglip", {"text_config__num_hidden_layers": 2}, r"only the model's tensors, got text_model.encoder.layers.2"),
    ],
)
def test_config_against_weights(copy: Callable[[str], Path], variant: str, values: dict[str, Any], match: str) -> None:
    """Sizes that the file doesn't hold are refused from headers alone: nothing of that size is allocated."""
    folder = copy(variant)
    configure(folder, **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("clip", "text_projection.weight", (24, 32)),
        ("clip", "logit_scale", ()),
        ("clip", "vision_model.pre_layrnorm.bias", (32,)),
        ("siglip", "vision_model.head.attention.in_proj_weight", (96, 32)),
        ("siglip", "vision_model.head.probe", (1, 1, 32)),
        ("siglip", "logit_bias", (1,)),
    ],
)
def test_weights(copy: Callable[[str], Path], variant: str, name: str, shape: tuple[int, ...]) -> None:
    def spoilt(tensors: dict[str, torch.Tensor | None]) -> Path:
        folder = copy(variant)

        def change(held: dict[str, torch.Tensor]) -> None:
            for key, value in tensors.items():
                held.pop(key, None)
                if value is not None:
                    held[key] = value

        reweigh(folder, change)
        return folder

    expected = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
    refused(
        spoilt({name: torch.zeros(2, 5)}), rf"model.safetensors: {name} must be {expected} by config.json, got \[2, 5"
    )
    refused(spoilt({name: torch.zeros(shape, dtype=torch.int8)}), f"{name} must be one of F64, F32, F16, BF16, got I8")
    refused(spoilt({name: None}), rf"the weights must hold {name} {expected}, got \d+ tensors without it")
    refused(spoilt({"vision_model.extra": torch.zeros(3)}), r"only the model's tensors, got vision_model.extra \[3\]")


def test_constants_of_older_versions_are_passed_over(copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    places = [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]
    reweigh(folder, lambda tensors: tensors.update({place: torch.arange(9)[None] for place in places}))
    CLIP.from_pretrained(folder)


@pytest.mark.parametrize("variant", ["clip", "siglip_shards"])
def test_truncated_weights(copy: Callable[[str], Path], variant: str) -> None:
    for keep in (0.0, 0.1, 0.999):
        folder = copy(variant)
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        refused(folder, f"{path.name}: must be a whole safetensors file")
    path.unlink()
    refused(folder, f"must hold {path.name}", FileNotFoundError)


def test_missing_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "folder must be a checkpoint's folder, got .*nowhere", FileNotFoundError)
    folder = copy("siglip")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, "got pytorch_model.bin: pickled weights can run any code", FileNotFoundError)
    (folder / "config.json").write_bytes(b"{")
    refused(folder, "config.json: must be JSON")
    (folder / "config.json").unlink()
    refused(folder, "must hold config.json, got no such file", FileNotFoundError)


@pytest.mark.parametrize("variant", ["clip", "siglip"])
def test_what_a_file_leaves_out_has_transformers_defaults(variant: str) -> None:
    whole = (transformers.SiglipConfig if variant == "siglip" else transformers.CLIPConfig)().to_dict()
    config = CLIPConfig.from_transformers({"model_type": variant})
    assert config == CLIPConfig.from_transformers(json.loads(json.dumps(whole)))
    assert config == replace(
        SIZES["siglip_base" if variant == "siglip" else "base"],
        **({} if variant == "siglip" else {"patch_size": 32, "eos_token_id": 49407}),
    )
    changed = CLIPConfig.from_transformers(hf_config(variant).to_dict())
    assert (changed.vision_width, changed.text_layers, changed.text_length, changed.vocab_size) == (32, 3, 12, 100)


def test_config_itself() -> None:
    for values, match in (
        ({"variant": "blip"}, "variant must be one of clip, siglip, got 'blip'"),
        ({"vision_activation": "swish9"}, "vision_activation must be one of gelu, .*got 'swish9'"),
        ({"text_heads": 0}, "text_heads must be an integer from 1 to 4096, got 0"),
        ({"variant": "siglip"}, "embed_dim must be vision_width = 32 in a siglip, got 24"),
        ({"eos_token_id": -1}, "eos_token_id must be an integer below vocab_size = 128, got -1"),
        ({"eos_token_id": True}, "eos_token_id must be an integer below vocab_size = 128, got True"),
        ({"eos_token_id": 1.5}, "eos_token_id must be an integer below vocab_size = 128, got 1.5"),
        ({"eos_token_id": "2"}, "eos_token_id must be an integer below vocab_size = 128, got '2'"),
        ({"vision_eps": "x"}, "vision_eps must be a number, positive and finite, got 'x'"),
        ({"text_eps": True}, "text_eps must be a number, positive and finite, got True"),
        ({"text_eps": float("nan")}, "text_eps must be a number, positive and finite, got nan"),
        ({"vision_dropout": None}, "vision_dropout must be a number between 0 and 1, got None"),
        ({"vision_activation": ["gelu"]}, r"vision_activation must be one of gelu, .*got \['gelu'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(SIZES["tiny"], **values)


def test_dtype_and_storage(copy: Callable[[str], Path]) -> None:
    folder = copy("siglip")
    reweigh(folder, lambda tensors: tensors.update({name: x.half() for name, x in tensors.items()}))
    for dtype in (torch.float16, torch.float32):
        model = CLIP.from_pretrained(folder, dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not model.training
        for parameter in model.parameters():  # no parameter keeps another's memory
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
    for dtype in (torch.int32, torch.bool, "float32", None):
        with pytest.raises(TypeError, match=f"dtype must be a floating dtype, got {dtype!r}"):
            CLIP.from_pretrained(folder, dtype=dtype)  # type: ignore[arg-type]


def test_names() -> None:
    prefixes = {"a.#.b.": "x.#.y.", "a.#.": "z.#.", "c.0.": "w."}
    assert renamed("a.12.b.3.weight", prefixes) == "x.12.y.3.weight"
    assert renamed("a.2.c", prefixes) == "z.2.c"
    assert renamed("c.0.bias", prefixes) == "w.bias"
    with pytest.raises(KeyError):
        renamed("d.0.bias", prefixes)
