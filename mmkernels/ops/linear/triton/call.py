"""What every launcher of the Triton linear kernels prepares: packed rows, the head's operands, grids and budgets."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.constants import INFINITY
from mmkernels.ops.common.triton.launch import ceil_div, has_tma_layout, precision
from mmkernels.ops.linear.formula import IGNORED
from mmkernels.ops.linear.triton.arguments import Extent, Numbers, Strides, Tile, Vectors
from mmkernels.plan import SHARED_BYTES, Config
from mmkernels.runtime.triton import launch, multiprocessors
from mmkernels.runtime.tuning import architecture, config

WHOLE_TILE = 128 * 128  # the largest tile whose epilogue's values fit into registers beside its products
STEP_BYTES = 128  # of a row in one step of a product: what the copy engine swizzles
_TMA_TOKENS = 1024  # with fewer, the 5 us that a descriptor takes on the host are not small beside the kernel
_GROUP = 16  # tiles down that share the tiles across
_PACK = Config(16, 256, 4, 1)


@triton.jit
def pack_rows_kernel(
    hidden, target, order, count, packed, targets, picked, row_stride, channel_stride, rows, dim, tokens, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store the rows that take part one after the other, and 0 in what pads them. Grid: (blocks of rows, of channels).

    order: int64 [rows], which row comes n-th; those from `count` on take no part.
    packed: [padded rows, width].
    targets: int32 [padded rows], -1 where the token is elsewhere. picked: float32, becomes -inf.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = n < tl.load(count)
    i = tl.load(order + n, mask=n < rows, other=0)
    pointers = hidden + i[:, None] * row_stride + c.to(tl.int64)[None, :] * channel_stride
    x = tl.load(pointers, mask=live[:, None] & (c < dim)[None, :], other=0.0)
    tl.store(packed + n.to(tl.int64)[:, None] * width + c[None, :], x, mask=(c < width)[None, :])
    if tl.program_id(1) == 0:
        token = tl.load(target + i, mask=live, other=-1)
        token = tl.where((token >= 0) & (token < tokens), token, -1)
        tl.store(targets + n, token.to(tl.int32))
        tl.store(picked + n, tl.full([ROWS], -INFINITY, tl.float32))


class Rows:
    """The rows that take part, packed: the first `count` of `hidden`, in their order. Nothing waits for the device.

    Args:
        hidden: [T, d].
        target: int64 [T].
        tokens: how many there are.
        multiple: what the number of padded rows is divisible by, and of their channels.
    """

    def __init__(self, hidden: Tensor, target: Tensor, tokens: int, multiple: tuple[int, int]) -> None:
        self.total, dim = hidden.shape
        ignored = target == IGNORED
        self.order = torch.argsort(ignored.view(torch.uint8), stable=True)  # [T]
        self.count = (~ignored).sum()
        padded = max(ceil_div(self.total, multiple[0]) * multiple[0], _PACK.block_q)
        width = ceil_div(dim, multiple[1]) * multiple[1]
        self.hidden = hidden.new_empty(padded, width)
        self.targets = target.new_empty(padded, dtype=torch.int32)
        self.picked = hidden.new_empty(padded, dtype=torch.float32)
        launch(
            pack_rows_kernel, (padded // _PACK.block_q, ceil_div(width, _PACK.block_k)), _PACK,
            hidden, target.contiguous(), self.order, self.count, self.hidden, self.targets, self.picked,
            *hidden.stride(), self.total, dim, tokens, width, ROWS=_PACK.block_q, CHANNELS=_PACK.block_k,
        )  # fmt: skip

    @cached_property
    def places(self) -> Tensor:
        """int64 [T], where each row is among the packed ones."""
        numbers = torch.arange(self.total, device=self.order.device)
        return torch.empty_like(self.order).scatter_(0, self.order, numbers)

    def packed(self, x: Tensor) -> Tensor:
        """Returns x [..., T] in packed order."""
        return x.index_select(-1, self.order)

    def unpacked(self, x: Tensor) -> Tensor:
        """Returns x [..., T], which is in packed order, in the rows' order."""
        return x.index_select(-1, self.places)


def descriptor(x: Tensor, block: list[int]) -> Any:
    """Returns a matrix as the copy engine of Hopper and later takes it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def has_copy_engine(x: Tensor) -> bool:
    return architecture(x.device) in ("sm_90", "sm_100")


class Head:
    """Hidden and weight, as the kernels take them.

    Args:
        op: names the configurations "logits" and "gradients", of logits' tiles and of products with their gradients.
        hidden: [T, d]. target: int64 [T]. weight: [V, d].
        bias: [V]. softcap, temperature: see `formula.capped`.
    """

    def __init__(
        self, op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float,
        temperature: float,
    ) -> None:  # fmt: skip
        self.weight, (self.tokens, self.dim) = weight, weight.shape
        self.bias = None if bias is None else bias.contiguous()
        self.dtype = weight.dtype
        self.softcap = softcap != 0
        self.numbers = Numbers(1.0 / softcap if softcap else 1.0, (softcap or 1.0) / temperature)
        device = weight.device
        self.logits, self.products = (config(op, name, device, self.dtype, self.dim) for name in ("logits", "products"))
        most = STEP_BYTES // weight.element_size()
        self.step = min(most, max(16, triton.next_power_of_2(self.dim)))
        # A step of a product with gradients is part of a tile of logits, whose gradients past the end are 0.
        self.inner_step = min(most, self.logits.block_q, self.logits.block_k)
        self.row_multiple = max(self.logits.block_q, self.products.block_q)
        self.column_multiple = max(self.logits.block_k, self.products.block_q)
        self.rows = Rows(hidden, target, self.tokens, (self.row_multiple, self.step))
        self.strides = Strides(self.rows.hidden.stride(0), *weight.stride())

    def vectors(self, token_weight: Tensor | None) -> Vectors:
        return Vectors(self.bias, token_weight, self.rows.targets)

    def extent(self, rows: slice, tokens: slice) -> Extent:
        """Returns a part of the logits; `rows` of the packed ones."""
        return Extent(self.rows.count, rows.start, rows.stop - rows.start, tokens.start, tokens.stop)

    @property
    def all_rows(self) -> slice:
        return slice(0, self.rows.total)

    @property
    def all_tokens(self) -> slice:
        return slice(0, self.tokens)

    @cached_property
    def weight_layout(self) -> str:
        """How the copy engine can fetch the weight: "rows", "columns" (of ``weight.mT``), or "none"."""
        if self.tokens < _TMA_TOKENS or self.dim < STEP_BYTES // self.weight.element_size():
            return "none"
        for name, x in (("rows", self.weight), ("columns", self.weight.mT)):
            if has_tma_layout(x) and x.stride(0) >= x.shape[1]:
                return name
        return "none"

    def weight_operand(self, tokens: int, channels: int) -> Any:
        """Returns the weight for kernels that take tiles of so many tokens and channels."""
        if self.weight_layout == "rows":
            return descriptor(self.weight, [tokens, channels])
        return self.weight if self.weight_layout == "none" else descriptor(self.weight.mT, [channels, tokens])

    def tile(self, plan: Config, step: int, tma: bool) -> Tile:
        return Tile(
            PRECISION=precision(self.dtype),
            DIM=self.dim,
            TMA=tma,
            TRANSPOSED=self.weight_layout == "columns",
            BLOCK_Q=plan.block_q,
            BLOCK_K=plan.block_k,
            STEP=step,
            GROUP=_GROUP,
        )

    @cached_property
    def logits_tile(self) -> Tile:
        return self.tile(self.logits, self.step, self.weight_layout != "none")

    @cached_property
    def logits_operands(self) -> tuple[Any, Any]:
        """Hidden and weight for tiles of logits."""
        hidden: Any = self.rows.hidden
        if self.logits_tile.TMA:
            hidden = descriptor(hidden, [self.logits.block_q, self.step])
        return hidden, self.weight_operand(self.logits.block_k, self.step)

    @property
    def halved(self) -> bool:
        """Whether an epilogue takes the two halves of a tile of logits one after the other, for want of registers."""
        return self.logits.block_q * self.logits.block_k > WHOLE_TILE

    @property
    def flatten(self) -> bool:
        """Whether loads for a program's next tile of logits may begin before its current tile is finished."""
        return architecture(self.weight.device) != "gfx942"

    def height(self, rows: int) -> int:
        """Returns the rows of a `Buffer` for so many."""
        return max(1, ceil_div(rows, self.row_multiple)) * self.row_multiple

    def width(self, tokens: int) -> int:
        """Returns the columns of a `Buffer` for so many tokens."""
        return ceil_div(tokens, self.column_multiple) * self.column_multiple

    def columns_of(self, tokens: slice) -> int:
        """Returns how many tiles of logits, or halves of them, there are across."""
        return (1 + self.halved) * ceil_div(tokens.stop - tokens.start, self.logits.block_k)

    def grid(self, plan: Config, rows: int, columns: int, times: int = 1) -> tuple[int]:
        """Returns the number of programs that share the tiles of `times` matrices."""
        tiles = times * ceil_div(rows, plan.block_q) * ceil_div(columns, plan.block_k)
        return (min(tiles, self.programs(plan)),)

    def programs(self, plan: Config) -> int:
        """Returns how many programs run at once, as shared memory and registers have room, at most 2."""
        device = self.weight.device
        pipeline = plan.stages * (plan.block_q + plan.block_k) * STEP_BYTES
        fits = 2 * pipeline <= SHARED_BYTES[architecture(device)] and plan.block_q * plan.block_k <= WHOLE_TILE
        return (2 if fits else 1) * multiprocessors(device)

    def split_rows(self, row_bytes: int, budget: int) -> list[slice]:
        """Returns the packed rows in parts of equal size, whole tiles, as many as the budget allows."""
        multiple = self.row_multiple
        most = max(multiple, budget // max(row_bytes, 1) // multiple * multiple)
        parts = max(1, ceil_div(self.rows.total, most))
        step = ceil_div(ceil_div(self.rows.total, parts), multiple) * multiple
        return [slice(n, min(n + step, self.rows.total)) for n in range(0, self.rows.total, step)]

    def split_tokens(self, token_bytes: int, budget: int) -> list[slice]:
        """Returns the tokens in strips of equal size, as many at a time as the budget allows."""
        multiple = self.column_multiple
        most = max(multiple, budget // max(token_bytes, 1) // multiple * multiple)
        parts = ceil_div(self.tokens, most)
        step = ceil_div(ceil_div(self.tokens, parts), multiple) * multiple
        return [slice(n, min(n + step, self.tokens)) for n in range(0, self.tokens, step)]
