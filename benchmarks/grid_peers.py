"""The peers of the ops on visual tokens: what the models' own code does, and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import merge_patches
from mmkernels.bench.peers import Call, CantRunError, Peer
from mmkernels.spec import Inputs


def internvl(inputs: Inputs) -> Call:
    """transformers' pixel shuffle of InternVL, which copies twice, and PyTorch's norm."""
    try:
        from transformers.models.internvl.modeling_internvl import InternVLModel
    except ImportError as error:
        raise CantRunError('is not installed: pip install "mmkernels[peers]"') from error
    x, grid = inputs["x"], inputs["grid"]
    size = grid if x.dim() == 3 else grid[0]
    tiles = x if x.dim() == 3 else x[None]
    weight, bias = inputs.get("weight"), inputs.get("bias")

    def call() -> Tensor:
        y: Tensor = InternVLModel.pixel_shuffle(None, tiles.view(len(tiles), *size[1:], -1), 0.5).flatten(1, 2)  # type: ignore[arg-type]
        y = y if weight is None else F.layer_norm(y, y.shape[-1:], weight, bias, 1e-6)
        return y if x.dim() == 3 else y[0]

    return call


def clone_of(op: Callable[..., tuple[Tensor, Any]]) -> Callable[[Inputs], Call]:
    """Returns a peer that copies the op's result, which moves the same bytes if it has x's size."""

    def prepare(inputs: Inputs) -> Call:
        if any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values()):
            raise CantRunError("a copy of the result has no gradient of x")
        y = op(**inputs, backend="reference")[0].clone()
        return lambda: y.clone()

    return prepare


def clone_of_x(inputs: Inputs) -> Call:
    """A copy of what is pooled: it moves 2 bytes where windows of 4 tokens move 1.25, a read and a quarter written."""
    x = inputs["x"]
    if x.requires_grad:
        raise CantRunError("a copy of x has another gradient")
    return lambda: x.clone()


def pooling_loop(inputs: Inputs, *, channels_last: bool) -> Call:
    """PyTorch's pooling or resizing of one image after the other.

    Args:
        channels_last: as PyTorch is fastest, of views that it takes as channels last; else of copies with channels
            first, as LLaVA-OneVision's and Gemma 3's code makes them.
    """
    x, grid, window, size = (inputs.get(name) for name in ("x", "grid", "window", "size"))
    if x.dim() != 2 or any(t != 1 for t, *_ in grid) or "scores" in inputs:
        raise CantRunError("only packed photos")
    mode = inputs.get("mode", "mean")
    one: Callable[[Tensor], Tensor]
    if mode == "mean" and window is not None:
        one = partial(F.avg_pool2d, kernel_size=window[1:])
    elif mode in ("bilinear", "bicubic"):
        one = partial(F.interpolate, size=size[1:], mode=mode)
    else:
        raise CantRunError(f"has no mode {mode}")
    tokens = [h * w for _, h, w in grid]

    def call() -> Tensor:
        images = (
            part.view(1, h, w, -1).permute(0, 3, 1, 2) for part, (_, h, w) in zip(x.split(tokens), grid, strict=True)
        )
        parts = [
            one(image if channels_last else image.contiguous())[0].permute(1, 2, 0).flatten(0, 1) for image in images
        ]
        return torch.cat(parts)

    return call


MERGE_PATCHES = (Peer("InternVL", internvl), Peer("clone", clone_of(merge_patches)))
POOL_TOKENS = (
    Peer("loop", partial(pooling_loop, channels_last=False)),
    Peer("channels last", partial(pooling_loop, channels_last=True)),
    Peer("clone", clone_of_x, checked=False),
)
