"""Hugging Face checkpoint folders: ``config.json`` and safetensors, read by one loader for every model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LARGEST_JSON = 64 * 2**20  # bytes; the index of the largest published checkpoints has some 10 MB
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX = ".safetensors.index.json"
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
        also: the start of a name in checkpoints that other versions wrote -> in those that the table describes. The
            first start that matches counts.
    """

    table: Mapping[str, str]
    ignored: re.Pattern[str]
    convert: Callable[[dict[str, Tensor]], None] | None = None
    also: Mapping[str, str] = MappingProxyType({})


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Returns `name` with its start replaced, by a table as that of `Names`; None if no start matches."""
    number = next(re.finditer(r"\.(\d+)\.", name), ["", "#"])[1]
    for start, new in table.items():
        start = start.replace("#", number)
        if name.startswith(start):
            return new.replace("#", number) + name[len(start) :]
    return None


def load_weights(model: nn.Module, folder: Path, names: Names, file: object = None) -> None:
    """Gives a model on the meta device the weights of a folder.

    Tensors that the model shares stay shared, unless the folder holds different ones under their names: as in
    transformers, its weights then count, not its configuration.

    Args:
        file: what ``transformers_weights`` of ``config.json`` names; None: the folder's usual files.
    """
    ours = {start: name for name, start in names.table.items()}
    theirs = lambda name: renamed(name, names.table) or name
    weights: dict[str, Tensor] = {}  # by the model's names
    files: dict[str, Path] = {}
    for path in _weight_files(folder, file):
        for stored, x in _read(path, names.ignored).items():
            name = renamed(renamed(stored, names.also) or stored, ours)
            if name is None:
                raise CheckpointError(f"{path}: must hold only the model's tensors, got {stored} {list(x.shape)}")
            if name in weights:
                raise CheckpointError(f"{path}: must not hold {stored}, which {files[name]} holds too")
            weights[name], files[name] = x, path
    if names.convert is not None:
        names.convert(weights)
    state = model.state_dict(keep_vars=True)
    sources = _sources(state, weights)
    read = list(dict.fromkeys(sources.values()))
    missing = [name for name in read if name not in weights]
    if missing:
        must = f"{theirs(missing[0])} {list(state[missing[0]].shape)}{_and_more(missing)}"
        raise CheckpointError(f"{folder}: the weights must hold {must}, got {len(weights)} tensors without it")
    for name in sorted(weights.keys() - state.keys()):
        got = f"{theirs(name)} {list(weights[name].shape)}{_and_more(weights.keys() - state.keys())}"
        raise CheckpointError(f"{files.get(name, folder)}: must hold only the model's tensors, got {got}")
    for name in read:
        x, must = weights[name], state[name]
        if [size for size in x.shape if size != 1] != [size for size in must.shape if size != 1]:
            rule = f"{theirs(name)} must be {list(must.shape)} by config.json"
            raise CheckpointError(f"{files.get(name, folder)}: {rule}, got {list(x.shape)}")
        x = x.reshape(must.shape)
        weights[name] = nn.Parameter(x, must.requires_grad) if isinstance(must, nn.Parameter) else x
    model.load_state_dict({name: weights[source] for name, source in sources.items()}, assign=True)


def _sources(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns for each name of a model's tensors the name of the weights that it gets.

    The names of a shared tensor get those of the first name that the weights have, but for one whose weights differ.
    """
    names: dict[int, list[str]] = {}  # identity of a tensor -> its names
    for name, x in state.items():
        names.setdefault(id(x), []).append(name)
    first = {name: next((n for n in shared if n in weights), shared[0]) for shared in names.values() for name in shared}
    differs = lambda x, y: x.dtype != y.dtype or not torch.equal(x, y)
    return {
        name: name if name in weights and differs(weights[name], weights[source]) else source
        for name, source in first.items()
    }


def _and_more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(folder: Path, named: object) -> list[Path]:
    """Returns the safetensors files that transformers would read.

    That is the file (or index of shards) that ``config.json`` names, or else ``model.safetensors``, or else the shards
    that ``model.safetensors.index.json`` lists. Other files that an earlier save left are not looked at.
    """
    if (folder / "adapter_config.json").is_file():
        must = "must not hold an adapter, which is not applied here; merge it into the weights and save them again"
        raise CheckpointError(f"{folder}: {must}; got adapter_config.json")
    whole, index = folder / "model.safetensors", folder / f"model{_INDEX}"
    if named is not None:
        if not isinstance(named, str) or not _is_beside(named, (".safetensors", _INDEX)):
            must = "transformers_weights must be the name of a safetensors file or of its index beside it"
            raise CheckpointError(f"{folder / 'config.json'}: {must}, got {repr(named)[:200]}")
        whole = existing(folder / named)
        if named.endswith(_INDEX):
            return _shards(whole)
    if whole.is_file():
        return [whole]
    if index.is_file():
        return _shards(index)
    raise FileNotFoundError(f"{folder} must hold {whole.name}, or {index.name} and its shards, got {_instead(folder)}")


def _is_beside(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name that a file gives is that of a file in the same folder, with one of these endings."""
    return Path(name).name == name and "\\" not in name and name.endswith(endings)


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index lists."""
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names, got {type(shard_of).__name__}")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if not _is_beside(shard, (".safetensors",)):
            raise CheckpointError(f"{index}: a shard must be the name of a .safetensors file beside it, got {shard!r}")
    return [existing(index.parent / shard) for shard in shards]


def _instead(folder: Path) -> str:
    """Returns what a folder without weights holds that its user may take for them."""
    link = folder / "model.safetensors"
    if link.is_symlink():
        return f"a link to a missing file, {link} -> {link.readlink()}"
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if others:
        return f"{', '.join(others[:5])}: weights by another name are read if config.json's transformers_weights has it"
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    why = "pickled weights can run any code when read; save them as safetensors"
    return f"{pickles[0]}: {why}" if pickles else "neither"


def _read(path: Path, ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """Returns the tensors of a file, mapped from it."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('reading a checkpoint needs safetensors: pip install "mmkernels[models]"') from error
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not ignored.search(name)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        got = "a Git LFS pointer: run git lfs pull" if _is_lfs_pointer(path) else f"an error: {error}"
        raise CheckpointError(f"{path}: must be a whole safetensors file, got {got}") from error
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise CheckpointError(f"{path}: {name} must be one of {allowed}, got {x.dtype}")
    return tensors


def _is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS leaves in place of the content."""
    start = b"version https://git-lfs"
    with path.open("rb") as file:
        return file.read(len(start)) == start


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
        got = f"a link to a missing file: {path} -> {path.readlink()}" if path.is_symlink() else f"no such file: {path}"
        raise FileNotFoundError(f"the checkpoint's folder must hold {path.name}, got {got}")
    return path
