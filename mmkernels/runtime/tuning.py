"""Tile sizes of the Triton kernels: a measured row where there is one, else the architecture's default.

Nothing is ever searched at run time: ``python benchmarks/tune.py OP`` searches, on the GPU at hand, and writes the rows
of ``ops/<op>/tuned.json``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
"""What defaults exist for."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut and launched.

    Args:
        block_q, block_k: rows of queries and keys of one tile.
        warps: of one program.
        stages: of the software pipeline over tiles.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int


def config(op: str, kernel: str, device: torch.device, dtype: torch.dtype, dim: int) -> Config:
    """The configuration of one launch.

    Args:
        kernel: a name in `KERNELS`.
        dim: the wider of the head dims of key and value.
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
    """Choose as on a GPU of this architecture that nobody has tuned: for compiling without one."""
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
        return default(kernel, device, dtype, dim)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for row in rows(op):
        key = (row["device"], row["kernel"], row["dtype"], row["dim"])
        if key == (name, kernel, str(dtype).removeprefix("torch."), bucket(dim)):
            return Config(row["block_q"], row["block_k"], row["warps"], row["stages"])
    return default(kernel, _architecture(device), dtype, dim)


def rows(op: str) -> list[dict[str, Any]]:
    """The measured rows of an op; see ``benchmarks/tune.py`` for what each holds."""
    path = importlib.import_module("mmkernels.ops").folder(op) / "tuned.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def bucket(dim: int) -> int:
    """The head dim whose configuration serves `dim`: 64, 128 or 256."""
    return next((size for size in (64, 128) if dim <= size), 256)


def architecture(device: torch.device) -> str:
    """The name in `ARCHITECTURES` whose defaults serve a device; for the interpreter that with the most paths."""
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


PRODUCTS = ("contrastive", "contrastive_grad", "sigmoid", "ranks")
"""The kernels on products of features: rows of images (queries) and of texts (keys). Tiles are cut into steps of 128
bytes of channels, so that no dim matters."""


def _products(*entry: int) -> dict[str, tuple[tuple[int, int, int, int], ...]]:
    block_q, block_k, warps, stages = entry
    return dict.fromkeys(PRODUCTS, ((block_q, block_k, warps, stages),) * 3)


# (rows, keys, warps, stages) for head dims up to 64, 128 and 256. Chosen by registers and shared memory, which
# `python -m mmkernels.aot` prints for each; none has been timed on a GPU yet, see benchmarks/tune.py.
_HOPPER = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    "decode": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
    "grad_query": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 2)),
    "grad_key_value": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 32, 8, 2)),
    "grad_key_value_masked": ((64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    "grad_query_dropout": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    "grad_key_value_dropout": ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    "grad_bias": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "received": ((64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2)),
    "weights": ((64, 128, 4, 1), (64, 128, 8, 1), (64, 64, 8, 1)),
    **_products(256, 128, 8, 4),
}
_BLACKWELL = _HOPPER | _products(128, 256, 8, 3)
_AMPERE = _HOPPER | {
    "grad_query_dropout": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    "grad_key_value_dropout": ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    "forward": ((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    "grad_query": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "grad_key_value": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "grad_key_value_masked": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "received": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
    **_products(256, 128, 8, 3),
}
_ADA = _AMPERE | {  # 100 KiB of shared memory a multiprocessor, against 164 and 228
    "grad_query_dropout": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    "grad_key_value_dropout": ((32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "grad_query": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 8, 1)),
    "grad_key_value": ((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    "grad_key_value_masked": ((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    **_products(128, 128, 8, 3),
}
_CDNA = _AMPERE | {  # 64 KiB
    "grad_query_dropout": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "grad_key_value_dropout": ((32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "forward": ((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    "grad_query": ((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    "grad_key_value": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "grad_key_value_masked": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "grad_bias": ((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    "received": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    "decode": ((16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1)),
    **_products(128, 128, 8, 2),
}
KERNELS = tuple(_HOPPER)
_DEFAULTS: Mapping[str, Mapping[str, tuple[tuple[int, int, int, int], ...]]] = {
    "sm_80": _AMPERE,
    "sm_89": _ADA,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": _CDNA,
}


def default(kernel: str, architecture: str, dtype: torch.dtype, dim: int) -> Config:
    """The untuned configuration; float32, multiplied without tensor cores, wants small tiles and many warps."""
    entry = _DEFAULTS[architecture][kernel][(64, 128, 256).index(bucket(dim))]
    block_q, block_k, warps, stages = entry
    if dtype == torch.float32:
        most = 64 if kernel in PRODUCTS else 32 if bucket(dim) < 256 else 16
        block_q, block_k, warps, stages = min(block_q, most), min(block_k, most), 8, 1
    return Config(block_q, block_k, warps, stages)
