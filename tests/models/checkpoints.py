"""Small checkpoints of transformers' models with random weights, and what tests do with any checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clip_checkpoints
import idefics_checkpoints
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkernels.models import CLIP, Flamingo


@dataclass
class Saved:
    """A checkpoint on disk, and transformers' model of it."""

    variant: str
    folder: Path
    theirs: Any

    @property
    def siglip(self) -> bool:
        return self.theirs.config.model_type == "siglip"


def save(folder: Path, variant: str) -> Saved:
    """Writes the checkpoint of a variant of `clip_checkpoints` or `idefics_checkpoints`."""
    family = clip_checkpoints if variant in clip_checkpoints.VARIANTS else idefics_checkpoints
    theirs = family.build(variant)
    shard = family.VARIANTS[variant].get("shard", False)
    theirs.save_pretrained(folder, **({"max_shard_size": "60KB"} if shard else {}))
    assert (folder / "model.safetensors.index.json").exists() == shard
    if family is idefics_checkpoints:
        (folder / "added_tokens.json").write_text(json.dumps({"<image>": idefics_checkpoints.IMAGE}))
    return Saved(variant, folder, theirs)


def load(folder: Path) -> CLIP | Flamingo:
    """Loads the model that the folder's ``config.json`` had when it was written."""
    return (Flamingo if (folder / "added_tokens.json").exists() else CLIP).from_pretrained(folder)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


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
