"""Reading a Hugging Face checkpoint folder: ``config.json`` and safetensors, with every doubt an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST_JSON = 64 * 2**20  # bytes; the index of the largest published checkpoints is some 10 MB
LARGEST_INTEGER = 2**24
"""In a JSON object that is read; above any published vocabulary."""

_DTYPES = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A checkpoint's file doesn't hold what it must; the message names it, what was expected and what was found."""


class Section:
    """A JSON object in a configuration, read key by key; each error names file and key.

    Args:
        values: the object.
        where: the file, and the path to the object in it.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def section(self, key: str) -> Section:
        """An object in this one; an absent one is empty."""
        values = self.values.get(key)
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise self.error(key, "an object")
        return Section(values, f"{self.where}, {key}")

    def integer(self, key: str, default: int, least: int = 1) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= LARGEST_INTEGER:
            raise self.error(key, f"an integer from {least} to {LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        try:
            if type(value) in (int, float) and math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer past the largest float
            pass
        raise self.error(key, "a finite number")

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, default: str, choices: Iterable[str]) -> str:
        value = self.values.get(key, default)
        if value not in list(choices):
            raise self.error(key, f"one of {', '.join(choices)}")
        return value

    def error(self, key: str, expected: str) -> CheckpointError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        return CheckpointError(f"{self.where}: {key} must be {expected}, got {found[:200]}")


class Checkpoint:
    """An open checkpoint: its configuration, and its tensors by name, read when asked for."""

    def __init__(self, folder: Path, config: Section, files: dict[str, Any], paths: dict[str, Path]) -> None:
        self.folder, self.config = folder, config
        self._files = files  # tensor -> open file
        self._paths = paths  # tensor -> that file's path

    def check(self, expected: dict[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raise unless the checkpoint holds exactly these tensors, of these shapes, but for `ignored` ones.

        Reads headers alone: a configuration that promises absurd sizes fails here, before anything is allocated.
        """
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise CheckpointError(
                f"{self.folder}: the weights must hold {missing[0]} {list(expected[missing[0]])}"
                f"{_and_more(missing)}, got {len(self._files)} tensors without it"
            )
        for name, shape in expected.items():
            view = self._files[name].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise CheckpointError(
                    f"{self._paths[name]}: {name} must be {list(shape)} by config.json, got {view.get_shape()}"
                )
            if view.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{self._paths[name]}: {name} must be one of {', '.join(_DTYPES)}, got {view.get_dtype()}"
                )
        unexpected = sorted(self._files.keys() - expected.keys() - set(ignored))
        if unexpected:
            raise CheckpointError(
                f"{self._paths[unexpected[0]]}: must hold only the model's tensors, got {unexpected[0]} "
                f"{self._files[unexpected[0]].get_slice(unexpected[0]).get_shape()}{_and_more(unexpected)}"
            )

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        return self._files[name].get_tensor(name)


def load_checkpoint(folder: str | Path, *, model_type: str, architecture: str) -> Checkpoint:
    """`load_checkpoint_of` one architecture: what ``config.json`` must say."""
    return load_checkpoint_of(folder, {model_type: architecture})


def load_checkpoint_of(folder: str | Path, architectures: Mapping[str, str]) -> Checkpoint:
    """Open a checkpoint folder: ``config.json``, and ``model.safetensors`` or its shards and their index.

    Args:
        folder: the folder.
        architectures: by model type, those that are taken: ``config.json`` must name one.

    Raises:
        FileNotFoundError: the folder or a file is missing; pickled weights aren't read, and are named.
        CheckpointError: a file is corrupt, or is another architecture's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a checkpoint's folder, got {folder}, which is no folder")
    path = _existing(folder / "config.json")
    config = Section(read_json(path), str(path))
    architecture = architectures[config.choice("model_type", "", architectures)]
    if (config.values.get("architectures") or [architecture]) != [architecture]:
        raise config.error("architectures", f"[{architecture!r}]")

    index = folder / "model.safetensors.index.json"
    if index.exists():
        files, paths = _open_shards(index)
    else:
        weights = folder / "model.safetensors"
        if not weights.exists():
            raise FileNotFoundError(_no_weights(folder))
        opened = _open(weights)
        files = dict.fromkeys(opened.keys(), opened)
        paths = dict.fromkeys(files, weights)
    return Checkpoint(folder, config, files, paths)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object."""
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"{path}: must be at most {_LARGEST_JSON} bytes, got {path.stat().st_size}")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: must be JSON, got an error: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def _open_shards(index: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names, got {type(shard_of).__name__}")
    opened: dict[str, Any] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: a shard must be the name of a .safetensors file beside it, got {shard!r}")
        opened[shard] = _open(_existing(index.parent / shard))
    held = {shard: set(file.keys()) for shard, file in opened.items()}
    for name, shard in shard_of.items():
        if name not in held[shard]:
            raise CheckpointError(f"{index.parent / shard}: must hold {name} by {index.name}, got no such tensor")
    for shard, names in held.items():
        stray = sorted(name for name in names if shard_of.get(name) != shard)
        if stray:
            raise CheckpointError(f"{index.parent / shard}: must hold what {index.name} says, got {stray[0]} too")
    return {n: opened[s] for n, s in shard_of.items()}, {n: index.parent / s for n, s in shard_of.items()}


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install mmkernels[models]") from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: must be a whole safetensors file, got an error: {error}") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint's folder must hold {path.name}, got no such file: {path}")
    return path


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    message = f"{folder} must hold model.safetensors, or model.safetensors.index.json and its shards"
    if pickles:
        return f"{message}, got {pickles[0]}: pickled weights can run any code when read; save them as safetensors"
    return f"{message}, got neither"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def joined(parts: list[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A parameter of `shape` from the tensors that hold its rows."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.reshape(shape).to(device=device, dtype=dtype)


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """A parameter's name in the checkpoint.

    Args:
        name: the model's name of it.
        prefixes: how names start in the model and, for the same tensors, in the checkpoint. # stands for the first
            number in a name; the first start that matches counts.

    Raises:
        KeyError: no start matches: a parameter that the table forgot.
    """
    found = re.search(r"\.(\d+)\.", name)
    number = found[1] if found else "#"
    for ours, theirs in prefixes.items():
        start = ours.replace("#", number)
        if name.startswith(start):
            return theirs.replace("#", number) + name[len(start) :]
    raise KeyError(name)
