"""Hugging Face checkpoint folders: ``config.json`` and safetensors, read by one loader for every model.

A model gives three things: the architectures that it is, how its configuration follows from transformers', and a table
of names (`Names`). `load_pretrained` does the rest, and checks everything before the first tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.weights import check_dtype

_LARGEST_JSON = 64 * 2**20  # bytes; the index of the largest published checkpoints has some 10 MB
_DTYPES = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config")


class CheckpointError(ValueError):
    """A file of a checkpoint does not hold what it must; the message names the file, what was expected and found."""


class Source(NamedTuple):
    """Where a parameter lies in a checkpoint: in the rows of one tensor, of several, or in a part of one's rows.

    Attributes:
        tensors: names of the tensors whose rows, one after the other, are the parameter. All but the first may be
            absent.
        part, parts: the parameter is part number `part` of `parts` equal parts of the rows.
    """

    tensors: tuple[str, ...]
    part: int = 0
    parts: int = 1

    def whole(self, shape: Sequence[int]) -> list[int]:
        """The shape of all rows together, for a parameter of this shape."""
        return [shape[0] * self.parts, *shape[1:]] if self.parts > 1 else list(shape)


class Names(NamedTuple):
    """How a checkpoint names the tensors of a model.

    Attributes:
        table: the start of a parameter's name in the model -> of its name in the checkpoint, or its `Source`. ``#``
            stands for the first number in a name. The first start that matches counts.
        ignored: a pattern of names in the checkpoint that the model does not need.
    """

    table: Mapping[str, str | Source]
    ignored: re.Pattern[str]

    def source(self, name: str) -> Source:
        """Where the parameter `name` lies.

        Raises:
            KeyError: the table has no start that matches.
        """
        number = next(re.finditer(r"\.(\d+)\.", name), ["", "#"])[1]
        for start, source in self.table.items():
            start = start.replace("#", number)
            if name.startswith(start):
                source = Source((source,)) if isinstance(source, str) else source
                rest = name[len(start) :]
                return source._replace(tensors=tuple(x.replace("#", number) + rest for x in source.tensors))
        raise KeyError(name)


def load_pretrained(
    make: Callable[[Config], Model],
    folder: str | Path,
    *,
    read_config: Callable[[dict[str, Any], str], Config],
    names: Callable[[Config], Names],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Model:
    """A model with a checkpoint's weights, in evaluation mode.

    Only headers are read before everything is checked: a configuration that promises absurd sizes fails before anything
    of that size is allocated.

    Args:
        make: makes the model of its configuration.
        folder: with ``config.json``, and ``model.safetensors`` or its shards and their index.
        read_config: makes the model's configuration of what ``config.json`` holds; the file's path is for errors.
        names: how the checkpoint names the model's tensors.
        dtype: of the parameters, whatever the files hold.

    Raises:
        TypeError: `dtype` is not a floating dtype.
        FileNotFoundError: the folder or a file is missing. Pickled weights are not read; the message names them.
        CheckpointError: a file is corrupt, or does not fit the model or the configuration.
    """
    check_dtype(dtype)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a checkpoint's folder, got {folder}, which is no folder")
    path = _existing(folder / "config.json")
    config = read_config(read_json(path), str(path))
    with torch.device("meta"):
        model = make(config)
    _load_weights(model, _open_weights(folder), names(config), folder, dtype, device)
    return model.eval()


class _Stored(NamedTuple):
    """A tensor in an open file."""

    name: str
    path: Path
    file: Any

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def _load_weights(
    model: nn.Module,
    stored: Mapping[str, _Stored],
    names: Names,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    state = model.state_dict(keep_vars=True)
    sources = {name: names.source(name) for name in state}
    first: dict[int, str] = {}  # identity of a tensor -> its first name: a tied one is read once, and stays tied
    tied = {name: first.setdefault(id(x), name) for name, x in state.items()}
    _check(stored, {name: (sources[name], state[name].shape) for name in first.values()}, folder)
    known = {tensor for source in sources.values() for tensor in source.tensors}
    unexpected = sorted(name for name in stored.keys() - known if not names.ignored.search(name))
    if unexpected:
        name, more = unexpected[0], _and_more(unexpected)
        raise CheckpointError(
            f"{stored[name].path}: must hold only the model's tensors, got {name} {stored[name].shape}{more}"
        )
    weights: dict[str, Tensor] = {}
    for name, x in state.items():
        if tied[name] != name:
            weights[name] = weights[tied[name]]
            continue
        weight = _read(stored, sources[name]).reshape(x.shape).to(device=device, dtype=dtype)
        weights[name] = nn.Parameter(weight, x.requires_grad) if isinstance(x, nn.Parameter) else weight
    model.load_state_dict(weights, assign=True)


def _check(stored: Mapping[str, _Stored], expected: Mapping[str, tuple[Source, torch.Size]], folder: Path) -> None:
    """Raise unless the files hold these parameters, as floating tensors, in their shapes up to dims of 1."""
    shapes = {source.tensors[0]: source.whole(shape) for source, shape in expected.values()}
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: the weights must hold {missing[0]} {shapes[missing[0]]}{_and_more(missing)}, "
            f"got {len(stored)} tensors without it"
        )
    for source, _ in expected.values():
        parts = [stored[name] for name in source.tensors if name in stored]
        for part in parts:
            dtype = part.file.get_slice(part.name).get_dtype()
            if dtype not in _DTYPES:
                raise CheckpointError(f"{part.path}: {part.name} must be one of {', '.join(_DTYPES)}, got {dtype}")
        got, must = [part.shape for part in parts], shapes[parts[0].name]
        joined = got[0] if len(got) == 1 else [sum(sum(shape[:1]) for shape in got), *got[0][1:]]
        fits = _squeezed(joined) == _squeezed(must) and all(shape[1:] == got[0][1:] for shape in got)
        if not fits:
            raise CheckpointError(
                f"{parts[0].path}: {' and '.join(source.tensors)} must be {must} by config.json, "
                f"got {' and '.join(map(str, got))}"
            )


def _squeezed(shape: list[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(stored: Mapping[str, _Stored], source: Source) -> Tensor:
    tensors = [stored[name].read() for name in source.tensors if name in stored]
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    # A copy of the part: a view would keep the others in memory.
    return whole if source.parts == 1 else whole.chunk(source.parts)[source.part].clone()


def _open_weights(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a folder by name, of ``model.safetensors`` or of the shards that the index lists."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():  # as in transformers: an index beside it is what an earlier save left
        return _open(whole)
    if not index.exists():
        got = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
        why = f"{got[0]}: pickled weights can run any code when read; save them as safetensors" if got else "neither"
        raise FileNotFoundError(f"{folder} must hold {whole.name}, or {index.name} and its shards, got {why}")
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of file names, got {type(shard_of).__name__}")
    stored: dict[str, _Stored] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: a shard must be the name of a .safetensors file beside it, got {shard!r}")
    for shard in sorted(set(shard_of.values())):
        opened = _open(_existing(folder / shard))
        stray = sorted(name for name in opened if shard_of.get(name) != shard)
        if stray:
            raise CheckpointError(f"{folder / shard}: must hold what {index.name} lists, got {stray[0]} too")
        stored |= opened
    lost = sorted(shard_of.keys() - stored.keys())
    if lost:
        raise CheckpointError(f"{folder / shard_of[lost[0]]}: must hold {lost[0]} by {index.name}, got no such tensor")
    return stored


def _open(path: Path) -> dict[str, _Stored]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install mmkernels[models]") from error
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: must be a whole safetensors file, got an error: {error}") from error
    names = file.keys()
    return {name: _Stored(name, path, file) for name in names}


def check_architecture(config: dict[str, Any], architectures: Mapping[str, str], where: str) -> None:
    """Raise unless a ``config.json`` names one of these model types, with its architecture."""
    model_type, got = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in architectures:
        given = repr(model_type)[:200] if "model_type" in config else "nothing"
        raise CheckpointError(f"{where}: model_type must be one of {', '.join(architectures)}, got {given}")
    if got not in (None, [], [architectures[model_type]]):
        raise CheckpointError(f"{where}: architectures must be {[architectures[model_type]]}, got {repr(got)[:200]}")


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


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint's folder must hold {path.name}, got no such file: {path}")
    return path
