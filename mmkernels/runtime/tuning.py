"""Tile sizes of the Triton kernels: a measured row where there is one, else the default of the architecture.

The defaults are in each op's ``plan.py``. Nothing is ever searched at run time: ``python benchmarks/tune.py OP``
searches on the GPU at hand, and writes the rows of the op's ``tuned.json``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from mmkernels.plan import TARGETS, Config, Plan

__all__ = ["TARGETS", "Config", "architecture", "bucket", "config", "default", "plan", "plans", "pretend", "rows",
           "use_config"]  # fmt: skip

_BUCKETS = (64, 128, 256)


def plans() -> dict[str, Plan]:
    """Returns the plan of each op that has one, by the op's name."""
    found = {name: plan(name) for name in importlib.import_module("mmkernels.ops").NAMES}
    return {name: entry for name, entry in found.items() if entry is not None}


@cache
def plan(op: str) -> Plan | None:
    """Returns an op's plan; None: the op has no GPU kernels."""
    module = f"{importlib.import_module('mmkernels.ops').MODULES[op]}.plan"
    if importlib.util.find_spec(module) is None:
        return None
    found: Plan = importlib.import_module(module).PLAN
    return found


def config(op: str, kernel: str, device: torch.device, dtype: torch.dtype, dim: int) -> Config:
    """Returns the configuration of one launch.

    Args:
        kernel: one of the plan's `kernels`.
        dim: the wider of the head dims of key and value, or the features'.
    """
    forced = _forced.get((op, kernel))
    return forced or _config(op, kernel, _pretended or device, dtype, dim)


@contextmanager
def use_config(op: str, kernel: str, config: Config) -> Iterator[None]:
    """Force a configuration, in every thread: for tests and for the search."""
    before = _forced.get((op, kernel))
    _forced[op, kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[op, kernel]
        else:
            _forced[op, kernel] = before


@contextmanager
def pretend(architecture: str) -> Iterator[None]:
    """Choose as on an untuned GPU of this architecture: for compiling without one."""
    global _pretended
    _pretended = architecture
    try:
        yield
    finally:
        _pretended = ""


_forced: dict[tuple[str, str], Config] = {}
_pretended = ""


@cache
def _config(op: str, kernel: str, device: torch.device | str, dtype: torch.dtype, dim: int) -> Config:
    if isinstance(device, str):
        return default(op, kernel, device, dtype, dim)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for row in rows(op):
        key = (row["device"], row["kernel"], row["dtype"], row["dim"])
        if key == (name, kernel, str(dtype).removeprefix("torch."), bucket(dim)):
            return Config(row["block_q"], row["block_k"], row["warps"], row["stages"])
    return default(op, kernel, _architecture(device), dtype, dim)


def rows(op: str) -> list[dict[str, Any]]:
    """Returns the measured rows of an op; ``benchmarks/tune.py`` says what each holds."""
    path = importlib.import_module("mmkernels.ops").folder(op) / "tuned.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def default(op: str, kernel: str, architecture: str, dtype: torch.dtype, dim: int) -> Config:
    """Returns the untuned configuration of an op's kernel."""
    found = plan(op)
    assert found is not None, f"{op} launches Triton kernels and has no plan.py"
    place = _BUCKETS.index(bucket(dim))
    entries = found.tiles[architecture][kernel]
    block_q, block_k, warps, stages = entries[place] if len(entries) > 1 else entries[0]
    if dtype == torch.float32:
        most = found.float32[place]
        return Config(min(block_q, most), min(block_k, most), 8, 1)
    return Config(block_q, block_k, warps, stages)


def bucket(dim: int) -> int:
    """Returns the dim whose configuration serves `dim`: 64, 128 or 256."""
    return next((size for size in _BUCKETS if dim <= size), _BUCKETS[-1])


def architecture(device: torch.device) -> str:
    """Returns the name in `TARGETS` whose defaults serve a device; for the interpreter that with the most paths."""
    return _pretended or _architecture(device)


@cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # Consumer GPUs of every generation (sm_86, sm_89, sm_120) have Ada's shared memory.
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get((major, minor), "sm_100" if major in (10, 11) else "sm_89")
