"""Scattering in Triton: which visual token each row gets, then the rows, each read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.tokens.rows import home_of, source_of_mask
from mmkernels.ops.tokens.scatter_tokens.spec import Arguments
from mmkernels.ops.tokens.triton.rows import compose
from mmkernels.runtime.triton import launch
from mmkernels.runtime.tuning import Config

OP = "scatter_tokens"
_BLOCK = 256  # positions of a program, two for each thread; not timed yet
_SMALL = Config(0, 0, 4, 1)


@triton.jit
def source_kernel(positions, source, count, tokens, BLOCK: tl.constexpr):
    """Writes to each token which entry of `positions` names it, the last one of several. Grid: (blocks of positions,).

    A maximum of integers is the same in any order. source: int32 [tokens], -1 before.
    """
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(positions + v, mask=v < count, other=-1)
    tl.atomic_max(source + row, v, mask=(row >= 0) & (row < tokens))


def forward(args: Arguments) -> Tensor:
    """Returns the embeddings with the visual tokens in them."""
    out = args.embeddings.new_empty(args.embeddings.shape)
    compose(OP, out, args.embeddings, args.visual, _source(args), add=args.mode == "add")
    return out


def backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients, in mode "add" only that of visual: the other one is what flows back."""
    grad, source = args.grad_out, _source(args)
    of_embeddings, of_visual = grad.new_empty(0), grad.new_empty(0)
    if args.need_embeddings:
        of_embeddings = grad.new_empty(args.embeddings.shape)
        compose(OP, of_embeddings, grad, None, source)
    if args.need_visual:
        of_visual = grad.new_empty(args.visual.shape)
        compose(OP, of_visual, None, grad, home_of(source, len(of_visual)))
    return of_embeddings, of_visual


def _source(args: Any) -> Tensor:
    """Returns [tokens]: which visual token a row gets, or -1."""
    count = args.visual.shape[0]
    if args.positions.dtype == torch.bool:
        return source_of_mask(args.positions, count)
    tokens, positions = args.embeddings.shape[:-1].numel(), args.positions.contiguous()
    source = torch.full((tokens,), -1, dtype=torch.int32, device=positions.device)
    launch(source_kernel, (ceil_div(count, _BLOCK),), _SMALL, positions, source, count, tokens, BLOCK=_BLOCK)
    return source
