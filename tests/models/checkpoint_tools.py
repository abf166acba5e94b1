"""What tests do with any model's checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def configure(folder: Path, **values: Any) -> None:
    """Set keys of config.json; ``vision_config__x`` sets x in vision_config; ... removes."""
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


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
