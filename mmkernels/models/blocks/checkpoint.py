"""Hugging Face checkpoint folders: ``config.json`` and safetensors, read by one loader for every model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LARGEST_JSON = 64 * 2**20  # bytes; the index of the largest published checkpoints has some 10 MB
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A file of a checkpoint does not hold what it must; the message names the file, what was expected and found."""


class Names(NamedTuple):
    """How a checkpoint names the tensors of a model.

    Attributes:
        table: the start of a parameter's name in the model -> in the checkpoint. ``#`` stands for the first number in a
            name. The first start that matches counts.
        ignored: a pattern of names in the checkpoint that the model does not need.
        convert: changes the tensors, by the model's names, where more than names differ; None: nothing does.
    """

    table: Mapping[str, str]
    ignored: re.Pattern[str]
    convert: Callable[[dict[str, Tensor]], None] | None = None


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Returns `name` with its start replaced, by a table as that of `Names`; None if no start matches."""
    number = next(re.finditer(r"\.(\d+)\.", name), ["", "#"])[1]
    for start, new in table.items():
        start = start.replace("#", number)
        if name.startswith(start):
            return new.replace("#", number) + name[len(start) :]
    return None


def load_weights(model: nn.Module, folder: Path, names: Names) -> None:
    """Gives a model on the meta device the weights of a folder. Tensors that the model shares stay shared."""
    ours = {start: name for name, start in names.table.items()}
    theirs = lambda name: renamed(name, names.table) or name
    weights: dict[str, Tensor] = {}  # by the model's names
    files: dict[str, Path] = {}
    for path in _weight_files(folder):
        for stored, x in _read(path, names.ignored).items():
            name = renamed(stored, ours)
            if name is None:
                raise CheckpointError(f"{path}: must hold only the model's tensors, got {stored} {list(x.shape)}")
            if name in weights:
                raise CheckpointError(f"{path}: must not hold {stored}, which {files[name]} holds too")
            weights[name], files[name] = x, path
    if names.convert is not None:
        names.convert(weights)
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}  # identity of a tensor -> its first name
    tied = {name: first.setdefault(id(x), name) for name, x in state.items()}
    missing = [name for name in first.values() if name not in weights]
    if missing:
        must = f"{theirs(missing[0])} {list(state[missing[0]].shape)}{_and_more(missing)}"
        raise CheckpointError(f"{folder}: the weights must hold {must}, got {len(weights)} tensors without it")
    for name in sorted(weights.keys() - state.keys()):
        got = f"{theirs(name)} {list(weights[name].shape)}{_and_more(weights.keys() - state.keys())}"
        raise CheckpointError(f"{files.get(name, folder)}: must hold only the model's tensors, got {got}")
    for name in first.values():
        x, must = weights[name], state[name]
        if [size for size in x.shape if size != 1] != [size for size in must.shape if size != 1]:
            rule = f"{theirs(name)} must be {list(must.shape)} by config.json"
            raise CheckpointError(f"{files.get(name, folder)}: {rule}, got {list(x.shape)}")
        x = x.reshape(must.shape)
        weights[name] = nn.Parameter(x, must.requires_grad) if isinstance(must, nn.Parameter) else x
    model.load_state_dict({name: weights[tied[name]] for name in state}, assign=True)


def _and_more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: Path) -> list[Path]:
    """Returns ``model.safetensors``, or the shards that the index lists."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():  # as in transformers: an index beside it is what an earlier save left
        return [whole]
    if not index.exists():
        pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
        why = "pickled weights can run any code when read; save them as safetensors"
        got = f"{pickles[0]}: {why}" if pickles else "neither"
        raise FileNotFoundError(f"{folder} must hold {whole.name}, or {index.name} and its shards, got {got}")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names, got {type(shard_of).__name__}")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: a shard must be the name of a .safetensors file beside it, got {shard!r}")
    return [existing(folder / shard) for shard in shards]


def _read(path: Path, ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """Returns the tensors of a file, mapped from it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install mmkernels[models]") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not ignored.search(name)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: must be a whole safetensors file, got an error: {error}") from error
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise CheckpointError(f"{path}: {name} must be one of {allowed}, got {x.dtype}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds."""
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"{path}: must be at most {_LARGEST_JSON} bytes, got {path.stat().st_size}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be JSON, got an error: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def existing(path: Path) -> Path:
    """Returns the path of a file of a checkpoint after a check that there is one."""
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint's folder must hold {path.name}, got no such file: {path}")
    return path
