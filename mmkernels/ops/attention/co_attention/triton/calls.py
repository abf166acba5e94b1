"""What the launchers of co-attention's Triton kernels prepare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.co_attention.record import pairs_of
from mmkernels.ops.attention.co_attention.triton.sides import SideStrides, ValidStrides
from mmkernels.ops.attention.triton.arguments import Dropout, HeadDim, Lists, Sizes
from mmkernels.ops.attention.triton.call import Call, dropout_of, head_dim, mask_strides, strides_of, unit_of
from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.runtime.triton import multiprocessors
from mmkernels.runtime.tuning import Config, config

OP = "co_attention"


@dataclass(frozen=True)
class Side:
    """One side of a call; in its sizes, the queries are its own positions and the keys those of the other side.

    Args:
        number: SIDE of the kernels.
        dropout: of the direction that gives this side's output.
    """

    number: int
    x: Tensor
    value: Tensor
    valid: Tensor | None
    dropout: Dropout | None
    sizes: Sizes
    strides: SideStrides
    value_dim: HeadDim

    def programs(self, config: Config) -> int:
        """Returns how many tiles of rows there are."""
        return self.sizes.batch * self.sizes.heads * ceil_div(self.sizes.q_len, config.block_q)


class CoCall(Call):
    """One co-attention call as the kernels take it.

    Args:
        args: the op's record, or that of its backward pass.
        more: further tensors that kernels read by strides in units.
    """

    def __init__(self, args: Any, more: tuple[Tensor, ...] = ()) -> None:
        super().__init__(pairs_of(args))
        self.unit = unit_of(args.a, args.b, args.value_a, args.value_b, *more)
        sizes = Sizes(self.batch, self.heads, self.heads, self.q_len, self.k_len)
        seeds = (None, None) if args.seed is None else (args.seed[:1], args.seed[1:])
        dropouts = [dropout_of(seed, args.dropout_p) for seed in seeds]
        self.sides = (
            self._side(0, args.a, args.value_a, args.valid_a, dropouts[0], sizes),
            self._side(
                1, args.b, args.value_b, args.valid_b, dropouts[1], sizes._replace(q_len=self.k_len, k_len=self.q_len)
            ),
        )
        self.widest = max(self.dim.size, *(side.value_dim.size for side in self.sides))
        one_sided = args.valid_a is not None or args.valid_b is not None
        del self.constants["LAYOUT"]
        self.constants |= {"HIDES": self.hides or one_sided, "UNIT": self.unit}
        self.constants["ALL_PARTIAL"] |= one_sided or bool(args.clamp)
        masked = self.constants["ALL_PARTIAL"] or args.start is not None
        self.forward_kernel = "forward_dropout" if args.seed is not None else "forward_masked" if masked else "forward"

    def _side(
        self, number: int, x: Tensor, value: Tensor, valid: Tensor | None, dropout: Dropout | None, sizes: Sizes
    ) -> Side:
        bits = None if valid is None else valid.view(torch.uint8)
        strides = SideStrides(
            strides_of(x, self.unit), strides_of(value, self.unit), ValidStrides(*mask_strides(valid, 2))
        )
        return Side(number, x, value, bits, dropout, sizes, strides, head_dim(value.shape[3]))

    def other(self, side: Side) -> Side:
        """Returns the side that a side looks at."""
        return self.sides[1 - side.number]

    def config(self, kernel: str) -> Config:
        """Returns the tile sizes of a kernel: of the own side's rows, and of the other side's."""
        return config(OP, kernel, self.query.device, self.query.dtype, self.widest)

    def lists_of(self, side: Side, plan: Config) -> Lists | None:
        """Returns for each of a side's tiles of rows the tiles that a mask leaves, or None."""
        swapped = Config(plan.block_k, plan.block_q, plan.warps, plan.stages)
        return self.lists(swapped if side.number else plan, of_rows=side.number == 0)

    def splits(self, side: Side, plan: Config) -> int:
        """Returns into how many parts to split the other side: about two programs for each multiprocessor."""
        wanted = ceil_div(2 * multiprocessors(side.x.device), max(1, side.programs(plan)))
        # A part of fewer than four tiles costs more to merge than it saves.
        return max(1, min(wanted, ceil_div(side.sizes.k_len, plan.block_k) // 4))
