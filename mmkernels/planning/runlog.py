"""Reads a run's own shapes: the log of open_clip's training script, or JSON lines."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkernels.options import BadInput

__all__ = ["RunShape", "read_log"]

_NUMBER = r"([0-9.]+(?:e[+-]?\d+)?)"
_STEP = re.compile(
    rf"Train Epoch: \d+ \[.*?\] Data \(t\): {_NUMBER} Batch \(t\): {_NUMBER}, {_NUMBER}/s, {_NUMBER}/s/gpu"
)
_PARAMETER = re.compile(r"(?:^|\|\s)\s*(batch_size|world_size|accum_freq|precision|model): (\S+)\s*$")
_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "torch.float32": "fp32",
    "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16", "amp_bf16": "bf16", "amp_bfloat16": "bf16",
    "pure_bf16": "bf16", "fp16": "fp16", "float16": "fp16", "torch.float16": "fp16", "amp": "fp16", "pure_fp16": "fp16",
}  # fmt: skip
_KEYS = {
    "batch": ("global_batch_size", "global_batch"),
    "per_rank": ("batch_size", "n"),
    "ranks": ("world_size", "ranks"),
    "dim": ("embed_dim", "dim", "d"),
    "dtype": ("precision", "dtype"),
    "seconds": ("batch_time",),
    "rate": ("samples_per_second",),
    "rate_per_rank": ("samples_per_second_per_gpu",),
}
"""What a JSON line may name, each also behind a prefix such as "train/"."""


@dataclass(frozen=True)
class RunShape:
    """What a log says about a run; None: it does not say so.

    Args:
        batch: pairs of one step, over all ranks.
        ranks: processes.
        dim: channels of the features.
        dtype: of the features, a name in `DTYPES`.
        step_seconds: the median time of a step.
        steps: the log's lines about steps.
    """

    batch: int | None
    ranks: int | None
    dim: int | None
    dtype: str | None
    step_seconds: float | None
    steps: int


def read_log(path: Path) -> RunShape:
    """Returns what a log says.

    Read are open_clip's lines "Train Epoch: ... Batch (t): 0.512, 8000.00/s, 1000.00/s/gpu ..." (ranks, pairs, time)
    and its parameters ("batch_size: 256", "world_size", "accum_freq", "precision", "model", the latter where open_clip
    is installed, which knows its channels); and lines that are JSON objects with "batch_size" (of a rank) or
    "global_batch_size", "world_size", "embed_dim", "precision" and "batch_time", "samples_per_second",
    "samples_per_second_per_gpu", each also behind "train/". The last value of a shape counts, and the median of times.

    Raises:
        BadInput: there is no such file, or nothing of this stands in it.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise BadInput(f"--from-log must be a file that can be read, got {path}: {error.strerror}") from None
    found: dict[str, Any] = {}
    seconds: list[float] = []
    for number, line in enumerate(text.splitlines(), 1):
        for name, value in _of_line(line.strip(), f"{path.name}, line {number}").items():
            if name == "seconds":
                seconds.append(value)
            else:
                found[name] = value
    if not found and not seconds:
        raise BadInput(
            f"--from-log must hold lines of open_clip's training log or JSON lines, got {path}, in which no line names "
            "a batch, ranks or times"
        )
    return _shape(found, seconds)


def _of_line(line: str, where: str) -> dict[str, Any]:
    """Returns what one line says, by the names of `_KEYS` and "accum", "model"."""
    if line.startswith("{"):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            return {}
        return _of_fields(fields, where)
    step = _STEP.search(line)
    if step is not None:
        _, seconds, rate, of_rank = map(float, step.groups())
        return {"seconds": seconds, "rate": rate, "rate_per_rank": of_rank}
    parameter = _PARAMETER.search(line)
    if parameter is None:
        return {}
    name, value = parameter.groups()
    if name == "model":
        return {"model": value}
    if name == "precision":
        return {"dtype": _dtype(value, where)}
    return {{"batch_size": "per_rank", "world_size": "ranks", "accum_freq": "accum"}[name]: _whole(name, value, where)}


def _of_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plain = {str(name).rpartition("/")[2]: value for name, value in fields.items()}
    for name, keys in _KEYS.items():
        for key in keys:
            if key not in plain:
                continue
            value = plain[key]
            if name == "dtype":
                found[name] = _dtype(value, where)
            elif name in ("seconds", "rate", "rate_per_rank"):
                found[name] = _positive(key, value, where)
            else:
                found[name] = _whole(key, value, where)
    return found


def _shape(found: Mapping[str, Any], seconds: list[float]) -> RunShape:
    step = statistics.median(seconds) if seconds else None
    ranks, batch = found.get("ranks"), found.get("batch")
    if ranks is None and "rate" in found and found.get("rate_per_rank"):
        ranks = max(1, round(found["rate"] / found["rate_per_rank"]))
    if batch is None and "per_rank" in found and ranks is not None:
        batch = found["per_rank"] * found.get("accum", 1) * ranks
    if batch is None and step is not None and "rate" in found:
        batch = round(found["rate"] * step)
    dim = found.get("dim")
    if dim is None and "model" in found:
        dim = _dim_of(found["model"])
    return RunShape(batch, ranks, dim, found.get("dtype"), step, len(seconds))


def _dim_of(model: str) -> int | None:
    """Returns the channels of open_clip's model, where open_clip is installed and knows it."""
    try:
        from open_clip import get_model_config
    except ImportError:
        return None
    config = get_model_config(model)
    return None if config is None else int(config["embed_dim"])


def _dtype(value: Any, where: str) -> str:
    name = _DTYPES.get(str(value))
    if name is None:
        raise BadInput(f"--from-log: the precision must be one of {', '.join(_DTYPES)}; got {value!r} in {where}")
    return name


def _whole(name: str, value: Any, where: str) -> int:
    number = _positive(name, value, where)
    if number != int(number):
        raise BadInput(f"--from-log: {name} must be an integer, got {value!r} in {where}")
    return int(number)


def _positive(name: str, value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise BadInput(f"--from-log: {name} must be a number above 0, got {value!r} in {where}")
    return number
