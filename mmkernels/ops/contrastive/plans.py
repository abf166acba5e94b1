"""What the plans of the contrastive ops share: tiles of products of features, inputs of variants and of tuning.

Rows are images (or queries), columns are texts (or the gallery). A product walks over its channels in steps of 128
bytes, so that no tile depends on the dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator

from mmkernels.ops.contrastive.cases import two_towers
from mmkernels.plan import Config, Problem, Search, Tiles
from mmkernels.spec import Inputs

FLOAT32 = (64, 64, 64)
TIMED_PAIRS, HEAVY_PAIRS = 8192, 2048
"""How many images and as many texts a kernel is timed on, and its heaviest call has."""

_STEP_BYTES = 128
_ROWS = 1024  # of a variant: from here on the copy engine is used
# Chosen by registers and shared memory; none has been timed on a GPU yet, see benchmarks/tune.py.
_PRODUCT = {
    "sm_80": (256, 128, 8, 3),
    "sm_89": (128, 128, 8, 3),
    "sm_90": (256, 128, 8, 4),
    "sm_100": (128, 256, 8, 3),
    "gfx942": (128, 128, 8, 2),
}


def product_tiles(*kernels: str) -> dict[str, Tiles]:
    """Returns the default tiles of kernels on products of features, by architecture."""
    return {target: dict.fromkeys(kernels, (entry,)) for target, entry in _PRODUCT.items()}


def features(dim: int, dtype: torch.dtype = torch.bfloat16, *, queries: int = 0) -> Inputs:
    """Returns uninitialised features of images and texts, and the scale."""
    shape = (_ROWS, queries, dim) if queries else (_ROWS, dim)
    image, text = torch.empty(shape, dtype=dtype), torch.empty(_ROWS, dim, dtype=dtype)
    return {"image": image, "text": text, "logit_scale": torch.ones(())}


def ids(rows: int = _ROWS) -> Inputs:
    """Returns ids of images and texts."""
    return {"image_ids": torch.arange(rows), "text_ids": torch.arange(rows)}


def product_search(
    make: Callable[[Generator, int], Inputs], heaviest: Problem, grads: tuple[str, ...] = (), *, whole: bool = False
) -> Search:
    """Returns the search of a kernel on products of features."""
    sizes = (64, 128, 256)
    return Search(sizes, sizes, (4, 8), (2, 3, 4), (Problem(make, grads, whole),), heaviest, _least_shared)


def timed_pairs(g: Generator, dim: int) -> Inputs:
    """Returns what kernels are timed on. A dim of 256 stands for all that are larger."""
    return two_towers(g, TIMED_PAIRS, TIMED_PAIRS, dim if dim < 256 else 768, scale=50.0)


def heavy_pairs(g: Generator, dim: int) -> Inputs:
    """Returns the inputs of a kernel's heaviest call, without ids."""
    return two_towers(g, HEAVY_PAIRS, HEAVY_PAIRS, dim)


def gallery(inputs: Inputs) -> Inputs:
    """Returns the arguments of `retrieval_ranks` that have these features."""
    return {"query": inputs["image"], "gallery": inputs["text"], "target": torch.arange(len(inputs["image"]))}


def _least_shared(config: Config, dim: int, size: int) -> int:
    """Of the pipeline over the channels of both operands."""
    return (config.stages - 1) * (config.block_q + config.block_k) * min(_STEP_BYTES, dim * size)
