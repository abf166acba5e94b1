"""What every launcher of the Triton contrastive kernels prepares: blocks of tiles, codes of ids, library products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div, precision
from mmkernels.ops.contrastive.formula import queries_of
from mmkernels.runtime.triton import multiprocessors
from mmkernels.runtime.tuning import architecture, config

PART_BYTES = 2**26  # of the tiles' parts of one launch
STRIP_BYTES = 192 * 2**20  # of one strip of gradients of logits
_CHANNEL_BYTES = 128  # of a tile's row in one step of its product: what the copy engine swizzles
WHOLE_TILE = 128 * 128  # the largest whose gradients lie in registers beside its products
_TMA_ROWS = 1024  # from which on a descriptor's 5 us on the host are little beside the kernel
_PROGRAMS = 2  # of a multiprocessor: what does not fit beside each other comes after


def dense_rows(x: Tensor) -> Tensor:
    """x with its channels side by side, copied only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Pairing(NamedTuple):
    """Which pairs belong together, as the kernels take it (tiles.py).

    Args:
        kind: PAIRS.
        codes: int32 [N], [M]; None, None without ids.
        positives, hidden: int64, how many an image and a text has; None: one, and none.
    """

    kind: str
    codes: tuple[Tensor | None, Tensor | None] = (None, None)
    positives: tuple[Tensor | None, Tensor | None] = (None, None)
    hidden: tuple[Tensor | None, Tensor | None] = (None, None)


def pairing(image_ids: Tensor | None, text_ids: Tensor | None, ignore: bool) -> Pairing:
    """Of int64 ids; see `info_nce`. No value is waited for."""
    if image_ids is None or text_ids is None:
        return Pairing("place")
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    images, texts = image_ids.sort().values, text_ids.sort().values
    first = torch.searchsorted(texts, image_ids)
    same = (
        torch.searchsorted(texts, image_ids, right=True) - first,
        torch.searchsorted(images, text_ids, right=True) - torch.searchsorted(images, text_ids),
    )
    codes = (first.where(same[0] > 0, -1).to(torch.int32), torch.searchsorted(texts, text_ids).to(torch.int32))
    if not ignore:
        return Pairing("code", codes, same)
    own = (image_ids == text_ids).to(torch.int64)
    return Pairing("hidden", codes, hidden=(same[0] - own, same[1] - own))


class Block:
    """Images against a block of texts, as the kernels take them.

    Args:
        op, kernel: whose configuration.
        image: [N, d] or [N, Q, d].
        text: [M, d].
        pairing: of them; None: nothing belongs together (hard texts).
        shift: the number of the image whose text, by place, is the first.
    """

    def __init__(
        self, op: str, kernel: str, image: Tensor, text: Tensor, pairing: Pairing | None, shift: int = 0
    ) -> None:
        self.image, self.text = queries_of(dense_rows(image)), dense_rows(text)
        self.rows, self.queries, dim = self.image.shape
        self.columns = self.text.shape[0]
        self.pairing = Pairing("none") if pairing is None else pairing
        self.shift = shift
        plan = config(op, kernel, image.device, image.dtype, dim)
        if self.queries > 1:  # whose largest products are held beside those of one query
            plan = replace(plan, block_k=max(16, plan.block_k // 2))
        self.config = plan
        step = min(max(16, triton.next_power_of_2(dim)), _CHANNEL_BYTES // image.element_size())
        strides = (self.image.stride(0), self.image.stride(1) if self.queries > 1 else 0, self.text.stride(0))
        unit = 8 if all(n % 8 == 0 for n in strides) else 1
        self.strides = tuple(n // unit for n in strides)
        self.operands: tuple[Any, Any] = (self.image, self.text)
        tma = self._descriptors(step)
        self.constants: dict[str, Any] = {
            "QUERIES": self.queries,
            "PRECISION": precision(image.dtype),
            "UNIT": unit,
            "DIM": dim,
            "TMA": tma,
            "BLOCK_Q": plan.block_q,
            "BLOCK_K": plan.block_k,
            "BLOCK_D": step,
        }

    def _descriptors(self, step: int) -> bool:
        """Operands as descriptors for the copy engine of Hopper and later, where that can be."""
        image = self.image[:, 0] if self.queries == 1 else self.image
        if architecture(image.device) not in ("sm_90", "sm_100"):
            return False
        for x in (image, self.text):
            *strides, last = x.stride()
            aligned = last == 1 and all(n * x.element_size() % 16 == 0 for n in strides) and x.data_ptr() % 16 == 0
            if not aligned or min(strides) < x.shape[-1] or x.shape[-1] < step or x.shape[0] < _TMA_ROWS:
                return False
        from triton.tools.tensor_descriptor import TensorDescriptor

        plan = self.config
        blocks = [plan.block_q, step] if self.queries == 1 else [plan.block_q, 1, step]
        self.operands = (
            TensorDescriptor(image, list(image.shape), list(image.stride()), blocks),
            TensorDescriptor(self.text, list(self.text.shape), list(self.text.stride()), [plan.block_k, step]),
        )
        return True

    @property
    def pairs(self) -> str:
        return self.pairing.kind

    @property
    def flat(self) -> bool:
        """Whether loads for a program's next tile may begin before the last one is finished."""
        return self.queries == 1 and architecture(self.image.device) != "gfx942"

    @property
    def parts(self) -> int:
        """In how many parts an epilogue takes a tile that leaves it few registers."""
        return 2 if self.config.block_q * self.config.block_k > WHOLE_TILE else 1

    def sizes(self, at: slice) -> tuple[int, int, int, int]:
        return at.start, at.stop, self.columns, self.shift

    def tiles(self, at: slice) -> tuple[int, int]:
        """Of the rows `at`: tiles down and across."""
        return ceil_div(at.stop - at.start, self.config.block_q), ceil_div(self.columns, self.config.block_k)

    def grid(self, at: slice) -> tuple[int]:
        """Programs that walk over the tiles of the rows `at`."""
        down, across = self.tiles(at)
        return (min(down * across, _PROGRAMS * multiprocessors(self.image.device)),)

    def groups(self, tile_bytes: int, budget: int) -> Iterator[slice]:
        """Rows in whole tiles, as many at a time as the budget allows.

        Args:
            tile_bytes: what one tile of rows takes, with all columns.
        """
        step = self.config.block_q * max(1, budget // max(tile_bytes, 1))
        return (slice(first, min(first + step, self.rows)) for first in range(0, self.rows, step))


# Gradients: strips of rows by all columns of the logits' gradients, and products of these by a library.


def add_product(into: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """Add ``x @ y`` to a float32 matrix; `first`: there is nothing in it yet."""
    if x.dtype == torch.float32 or not x.is_cuda:
        torch.addmm(into, x.float(), y.float(), beta=0.0 if first else 1.0, out=into)
    elif first:
        torch.mm(x, y, out_dtype=torch.float32, out=into)
    else:
        torch.addmm(into, x, y, out_dtype=torch.float32, out=into)


def boost_of(dtype: torch.dtype) -> float:
    """The largest upstream gradient in strips of `dtype`, of which float16 has room above and needs it below."""
    return 1024.0 if dtype == torch.float16 else 1.0


class Strips:
    """Gradients of images and texts from strips of gradients of logits.

    Args:
        blocks: which share their images, and whether their texts need a gradient.
        need_image: whether images do.
        dtype: of images' gradients; None: theirs.
        fill: called with a block, rows, a strip [rows, columns] to fill (None: nobody wants it), and winners (int,
            [rows, columns]) or None; answers sums of parts, [..., parts].
    """

    def __init__(
        self,
        blocks: list[tuple[Block, bool]],
        need_image: bool,
        fill: Callable[[Block, slice, Tensor | None, Tensor | None], Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.blocks, self.fill = blocks, fill
        self.image = blocks[0][0].image
        self.queries = self.image.shape[1]
        self.of_image = self.image.new_empty(self.image.shape, dtype=dtype) if need_image else None
        self.of_texts = [
            x.text.new_empty(x.text.shape, dtype=torch.float32) if needed else None for x, needed in blocks
        ]

    def run(self, factor: Tensor) -> Tensor:
        """Fill everything.

        Args:
            factor: 0-D, what images' gradients are multiplied by; texts' are not yet.

        Returns:
            float32, the parts' sums, summed up.
        """
        image, block, need_rows = self.image, self.blocks[0][0], self.of_image is not None
        if not need_rows and all(x is None for x in self.of_texts):
            every = slice(0, block.rows)
            return torch.stack([self.fill(part, every, None, None).sum(-1) for part, _ in self.blocks]).sum(0)
        size, winner_dtype = image.element_size(), torch.int16 if self.queries < 2**15 else torch.int32
        if self.queries > 1:  # a strip, its winners, which of these are one query's, that query's part of the strip
            size += winner_dtype.itemsize + 1 + size
        width = max(ceil_div(x.columns, 16) * 16 for x, _ in self.blocks)  # rows that vectors can be stored at
        totals: list[Tensor] = []
        groups = list(block.groups(block.config.block_q * width * size, STRIP_BYTES))
        height = groups[0].stop
        strip = image.new_empty(height, width)
        winners = image.new_empty(height, width, dtype=winner_dtype) if self.queries > 1 else None
        of_rows = [factor.new_empty(height if need_rows else 0, image.shape[2]) for _ in range(self.queries)]
        for at in groups:
            rows = at.stop - at.start
            of_own = [x[:rows] for x in of_rows]
            for n, (part, _) in enumerate(self.blocks):
                own = strip[:rows, : part.columns]
                won = None if winners is None else winners[:rows, : part.columns]
                totals.append(self.fill(part, at, own, won).sum(-1))
                self._multiply(part, at, own, won, of_own if need_rows else None, self.of_texts[n], first=n == 0)
            for q in range(self.queries):
                if self.of_image is not None:
                    torch.mul(of_own[q], factor, out=self.of_image[at, q])
        return torch.stack(totals).sum(0)

    def _multiply(
        self,
        block: Block,
        at: slice,
        strip: Tensor,
        winners: Tensor | None,
        of_rows: list[Tensor] | None,
        of_text: Tensor | None,
        *,
        first: bool,
    ) -> None:
        for q in range(self.queries):
            own = strip if winners is None else strip.masked_fill(winners != q, 0.0)
            if of_rows is not None:
                add_product(of_rows[q], own, block.text, first=first)
            if of_text is not None:
                add_product(of_text, own.mT, block.image[at, q], first=at.start == 0 and q == 0)
