"""Small checkpoints of transformers' models with random weights, and what tests do with any checkpoint's folder."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blip2_checkpoints
import blip2_retrieval_checkpoints
import blip_checkpoints
import clip_checkpoints
import deepseek_vl2_checkpoints
import deepseek_vl_checkpoints
import idefics_checkpoints
import internvl_checkpoints
import janus_checkpoints
import lxmert_checkpoints
import pytest
import qwen_audio_checkpoints
import qwen_checkpoints
import torch
import transformers
import whisper_checkpoints
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkernels.models import (
    BLIP,
    BLIP2,
    CLIP,
    LXMERT,
    BLIP2Retrieval,
    DeepSeekVL,
    DeepSeekVL2,
    Flamingo,
    InternVL,
    Janus,
    QwenAudio,
    QwenVL,
    Whisper,
)
from mmkernels.models.blocks.checkpoint import CheckpointError

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


MODELS: dict[Any, Any] = {
    blip_checkpoints: BLIP,
    blip2_checkpoints: BLIP2,
    blip2_retrieval_checkpoints: BLIP2Retrieval,
    clip_checkpoints: CLIP,
    deepseek_vl_checkpoints: DeepSeekVL,
    deepseek_vl2_checkpoints: DeepSeekVL2,
    idefics_checkpoints: Flamingo,
    internvl_checkpoints: InternVL,
    janus_checkpoints: Janus,
    qwen_audio_checkpoints: QwenAudio,
    lxmert_checkpoints: LXMERT,
    qwen_checkpoints: QwenVL,
    whisper_checkpoints: Whisper,
}
"""Module with the variants of a family -> our class."""

FAMILY = "family.txt"  # the file of a checkpoint that names its module


@dataclass
class Saved:
    """A checkpoint on disk, and transformers' model of it."""

    variant: str
    folder: Path
    theirs: Any


def save(folder: Path, variant: str) -> Saved:
    """Writes the checkpoint of a variant of one of `MODELS`."""
    family = next(module for module in MODELS if variant in module.VARIANTS)
    theirs = family.build(variant)
    shard = family.VARIANTS[variant].get("shard", False)
    theirs.save_pretrained(folder, **({"max_shard_size": "60KB"} if shard else {}))
    assert (folder / "model.safetensors.index.json").exists() == shard
    (folder / FAMILY).write_text(family.__name__)
    if family is idefics_checkpoints:
        (folder / "added_tokens.json").write_text(json.dumps({"<image>": idefics_checkpoints.IMAGE}))
    return Saved(variant, folder, theirs)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loads the model that the folder's ``config.json`` had when `save` wrote it; a `CLIP` if another wrote it."""
    family = folder / FAMILY
    name = family.read_text() if family.exists() else clip_checkpoints.__name__
    model = next(model for module, model in MODELS.items() if module.__name__ == name)
    return model.from_pretrained(folder, dtype=dtype)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Returns the relative distance in the Euclidean norm."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def their_gradients(checkpoint: Saved, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns the gradients of transformers' model by the names of ours.

    They are saved as a checkpoint in the empty folder, which our model reads as its weights.
    """
    shutil.copytree(checkpoint.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    gradients = {name: p.grad for name, p in checkpoint.theirs.named_parameters() if p.grad is not None}
    save_file({name: x.contiguous() for name, x in gradients.items()}, folder / "model.safetensors")
    return load(folder, dtype).state_dict()


def check_gradients(model: Any, expected: dict[str, Tensor], tolerance: float, rotated: bool = False) -> None:
    """Compares the gradient of every parameter.

    Args:
        rotated: whether keys are rotated behind their bias, which then has a gradient.
    """
    largest = max(float(x.norm()) for x in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith(("attention.k_proj.bias", "attention.k_norm.bias")) and not rotated:
            assert float(parameter.grad.norm()) < tolerance * largest  # no gradient: scores shift alike
            assert float(expected[name].norm()) < tolerance * largest
        else:
            assert distance(parameter.grad, expected[name]) < tolerance, name


def refused(folder: Path, match: str, error: type[Exception] = CheckpointError, model: Any = None) -> None:
    """Checks that the folder can't be loaded."""
    with pytest.raises(error, match=match):
        load(folder) if model is None else model.from_pretrained(folder)


def configure(folder: Path, **values: Any) -> None:
    """Sets keys of config.json; ``vision_config__x`` sets x in vision_config; ... removes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        target = config
        for name in outer:
            target = target[name]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def accepted_fields(folder: Path, fields: Iterable[str], value: Any, config_class: Any) -> set[str]:
    """Returns the fields of a folder's ``config.json`` that may have a value; the others raise a `CheckpointError`.

    Args:
        fields: such as ``text_config.hidden_size``.
        config_class: of our configuration.
    """
    whole = json.loads((folder / "config.json").read_text())
    found = set()
    for field in fields:
        config = copy.deepcopy(whole)
        *outer, last = field.split(".")
        (config[outer[0]] if outer else config)[last] = value
        with suppress(CheckpointError):
            config_class.from_hf(config)
            found.add(field)
    return found
