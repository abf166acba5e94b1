"""How many items of a piece of a gallery stand before each query's right answer, which may be anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.retrieval_ranks import chunked
from mmkernels.ops.contrastive.retrieval_ranks.spec import before_of
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.dispatch import Backend, define


class BlockArguments(NamedTuple):
    """The record of `retrieval_ranks_block`."""

    query: Tensor  # [N, d]
    gallery: Tensor  # [M, d]
    right: Tensor  # [N, d], each query's right answer
    right_index: Tensor  # int64 [N], the right answer's place relative to the piece's first item, which may be outside


class Block(NamedTuple):
    """What `retrieval_ranks_block` returns."""

    before: Tensor  # int64 [N], -1 where the right answer's score is NaN


def reference(args: BlockArguments) -> Tensor:
    """Returns `Block` by the naive formula."""
    wide = wide_dtype(args.query)
    query = args.query.to(wide)
    best = (query * args.right.to(wide)).sum(1)
    return before_of(query @ args.gallery.to(wide).mT, best, args.right_index)


def _fake(args: BlockArguments) -> Tensor:
    return args.query.new_empty(args.query.shape[0], dtype=torch.int64)


BLOCK = define(
    "retrieval_ranks_block",
    BlockArguments,
    Block,
    fake=_fake,
    backends=[
        triton_kernel("mmkernels.ops.contrastive.retrieval_ranks.triton", "block"),
        cpu_kernel("retrieval_ranks_block_cpu"),
        Backend("chunked", chunked.block),
        Backend("reference", reference),
    ],
)
