"""What every launcher of the Triton contrastive kernels prepares: blocks of texts, codes of ids, gradient strips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div, has_tma_layout, precision, stride_unit
from mmkernels.ops.contrastive.formula import queries_of
from mmkernels.ops.contrastive.triton.arguments import NO_DIAGONAL, Codes, Sizes, Strides, Strip, Tile
from mmkernels.runtime.triton import multiprocessors
from mmkernels.runtime.tuning import architecture, config

PARTIAL_BYTES = 2**26  # of the partial results of one launch
STRIP_BYTES = 192 * 2**20  # of one strip
WHOLE_TILE = 128 * 128  # the largest tile whose gradients fit into registers beside its dot products
_CHANNEL_BYTES = 128  # of a row in one step of the product: what the copy engine swizzles
_TMA_ROWS = 1024  # with fewer rows, the 5 us that a descriptor takes on the host are not small beside the kernel
_PROGRAMS = 2  # programs of one multiprocessor; those that do not fit at once run afterwards


def dense_rows(x: Tensor) -> Tensor:
    """Returns x with contiguous channels, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Pairing(NamedTuple):
    """Which pairs belong together.

    Args:
        kind: the kernels' PAIRS, see pairs.py.
        codes: int32 [N] and [M]; None without ids.
        positives, hidden: of images and of texts, int64, how many pairs each row has; None: one, and none.
        diagonal: `Sizes.diagonal`.
    """

    kind: str
    codes: Codes | None = None
    positives: tuple[Tensor | None, Tensor | None] = (None, None)
    hidden: tuple[Tensor | None, Tensor | None] = (None, None)
    diagonal: int = 0


class Partners(NamedTuple):
    """The rows of a block that have a partner in it: text j's is image j + diagonal.

    Args:
        diagonal: `Sizes.diagonal`.
        images, texts: the first one's partner is the other's first.
    """

    diagonal: int = 0
    images: slice = slice(None)
    texts: slice = slice(None)

    @classmethod
    def of(cls, first_text: int, images: int, texts: int) -> Partners:
        """Text j's partner is image ``first_text + j``, if it is among so many images and texts."""
        first, last = max(0, first_text), min(images, texts + first_text)
        if first >= last:
            return cls(NO_DIAGONAL, slice(0), slice(0))
        return cls(first_text, slice(first, last), slice(first - first_text, last - first_text))


_ALL_PARTNERS = Partners()


def pairing(
    image_ids: Tensor | None, text_ids: Tensor | None, ignore: bool, partners: Partners = _ALL_PARTNERS
) -> Pairing:
    """Returns the pairing by int64 ids [N] and [M], see `info_nce`, without a host sync.

    Args:
        partners: of a block; else every row has one.
    """
    if image_ids is None or text_ids is None:
        return Pairing("diagonal", diagonal=partners.diagonal)
    image_ids, text_ids = image_ids.contiguous(), text_ids.contiguous()
    codes, same_texts = _codes(image_ids, text_ids)
    images = image_ids.sort().values
    same_images = torch.searchsorted(images, text_ids, right=True) - torch.searchsorted(images, text_ids)  # [M]
    if not ignore:
        return Pairing("code", codes, positives=(same_texts, same_images))
    same_partner = (image_ids[partners.images] == text_ids[partners.texts]).to(torch.int64)
    same_texts[partners.images] -= same_partner
    same_images[partners.texts] -= same_partner
    return Pairing("hidden", codes, hidden=(same_texts, same_images), diagonal=partners.diagonal)


def hard_pairing(pairs: Pairing, image_ids: Tensor | None, hard_text_ids: Tensor | None) -> tuple[Pairing, Pairing]:
    """Returns the batch's pairing with what the images have among the hard texts, and the pairing with hard texts.

    Args:
        pairs: of the batch.
        image_ids, hard_text_ids: int64 [N] and [K].
    """
    if image_ids is None or hard_text_ids is None:
        return pairs, Pairing("none")
    codes, same = _codes(image_ids.contiguous(), hard_text_ids.contiguous())
    (positives, of_texts), (hidden, hidden_of_texts) = pairs.positives, pairs.hidden
    if positives is not None:
        return pairs._replace(positives=(positives + same, of_texts)), Pairing("code", codes)
    assert hidden is not None
    return pairs._replace(hidden=(hidden + same, hidden_of_texts)), Pairing("hidden", codes, diagonal=NO_DIAGONAL)


def _codes(image_ids: Tensor, text_ids: Tensor) -> tuple[Codes, Tensor]:
    """Returns the codes, and int64 [N], how many texts have an image's id."""
    texts = text_ids.sort().values
    first = torch.searchsorted(texts, image_ids)
    same = torch.searchsorted(texts, image_ids, right=True) - first
    text = torch.searchsorted(texts, text_ids)
    return Codes(image=first.where(same > 0, -1).to(torch.int32), text=text.to(torch.int32)), same


class Block:
    """Images and a block of texts, as the kernels take them.

    Args:
        op, kernel: name the configuration.
        image: [N, d] or [N, Q, d].
        text: [M, d].
        pairing: None: no pair is positive.
        hard: the texts are hard texts, which have no direction of their own.
    """

    def __init__(
        self, op: str, kernel: str, image: Tensor, text: Tensor, pairing: Pairing | None, hard: bool = False
    ) -> None:
        self.image, self.text = queries_of(dense_rows(image)), dense_rows(text)
        self.rows, self.queries, dim = self.image.shape
        self.columns = self.text.shape[0]
        self.pairing = Pairing("none") if pairing is None else pairing
        self.hard = hard
        plan = config(op, kernel, image.device, image.dtype, dim)
        if self.queries > 1:  # the largest dot products are held beside those of one query
            plan = replace(plan, block_k=max(16, plan.block_k // 2))
        self.config = plan
        step = min(max(16, triton.next_power_of_2(dim)), _CHANNEL_BYTES // image.element_size())
        query_stride = self.image.stride(1) if self.queries > 1 else 0
        strides = Strides(self.image.stride(0), query_stride, self.text.stride(0))
        unit = stride_unit(strides)
        self.strides = Strides(*(n // unit for n in strides))
        self.operands: tuple[Any, Any] = (self.image, self.text)
        tma = self._set_descriptors(step)
        self.tile = Tile(
            QUERIES=self.queries,
            PRECISION=precision(image.dtype),
            STRIDE_UNIT=unit,
            DIM=dim,
            TMA=tma,
            BLOCK_Q=plan.block_q,
            BLOCK_K=plan.block_k,
            BLOCK_D=step,
        )

    def _set_descriptors(self, step: int) -> bool:
        """Make the operands descriptors for the copy engine of Hopper and later; returns whether that is possible."""
        image = self.image[:, 0] if self.queries == 1 else self.image
        for x in (image, self.text):
            rows, dim = x.shape[0], x.shape[-1]
            if not has_tma_layout(x) or min(x.stride()[:-1]) < dim or dim < step or rows < _TMA_ROWS:
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
    def flatten_loop(self) -> bool:
        """Whether loads for a program's next tile may begin before its current tile is finished."""
        return self.queries == 1 and architecture(self.image.device) != "gfx942"

    @property
    def halved(self) -> bool:
        """Whether an epilogue takes the two halves of a tile one after the other, for want of registers."""
        return self.config.block_q * self.config.block_k > WHOLE_TILE

    def sizes(self, at: slice) -> Sizes:
        down, across = self.tiles(at)
        return Sizes(at.start, at.stop, self.columns, self.pairing.diagonal, down, across)

    def tiles(self, at: slice) -> tuple[int, int]:
        """Returns the number of tiles of the rows `at`, down and across."""
        return ceil_div(at.stop - at.start, self.config.block_q), ceil_div(self.columns, self.config.block_k)

    def grid(self, at: slice) -> tuple[int]:
        """Returns the number of programs that share the tiles of the rows `at`."""
        down, across = self.tiles(at)
        return (min(down * across, _PROGRAMS * multiprocessors(self.image.device)),)

    def groups(self, tile_bytes: int, budget: int) -> Iterator[slice]:
        """Yields the rows in whole tiles, as many at a time as the budget allows.

        Args:
            tile_bytes: what one tile of rows takes, with all columns.
        """
        step = self.config.block_q * max(1, budget // max(tile_bytes, 1))
        return (slice(first, min(first + step, self.rows)) for first in range(0, self.rows, step))


# Gradients: strips of the logits' gradients, multiplied by the features by a library.


def add_product(into: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """Add ``x @ y`` to a float32 matrix; `first`: write it instead."""
    if x.dtype == torch.float32 or not x.is_cuda:
        torch.addmm(into, x.float(), y.float(), beta=0.0 if first else 1.0, out=into)
    elif first:
        torch.mm(x, y, out_dtype=torch.float32, out=into)
    else:
        torch.addmm(into, x, y, out_dtype=torch.float32, out=into)


Fill = Callable[[Block, slice, Strip], Tensor]
"""Fills a strip [rows, columns] of a block's rows; returns partial sums, [..., partials]."""


class GradientStrips:
    """Gradients of images and texts from strips of the logits' gradients.

    Args:
        blocks: share their images.
        need_texts: whether the texts of each block need a gradient.
        need_image: whether the images do.
        fill: computes one strip.
        dtype: of the images' gradients; None: the images' dtype.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        need_texts: Sequence[bool],
        need_image: bool,
        fill: Fill,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.blocks, self.fill = blocks, fill
        self.image = blocks[0].image  # [N, Q, d]
        self.queries = self.image.shape[1]
        self.image_grad = self.image.new_empty(self.image.shape, dtype=dtype) if need_image else None
        self.text_grads = [  # float32
            x.text.new_empty(x.text.shape, dtype=torch.float32) if needed else None
            for x, needed in zip(blocks, need_texts, strict=True)
        ]

    def run(self, factor: Tensor) -> Tensor:
        """Fill everything.

        Args:
            factor: 0-D, multiplies the images' gradients; the caller multiplies the texts'.

        Returns:
            float32, the totals of `fill`'s partial sums.
        """
        block = self.blocks[0]
        if self.image_grad is None and all(x is None for x in self.text_grads):
            rows, nothing = slice(0, block.rows), Strip(None, None, 0)
            return torch.stack([self.fill(x, rows, nothing).sum(-1) for x in self.blocks]).sum(0)
        winner_dtype = torch.int16 if self.queries < 2**15 else torch.int32
        element_bytes = self.image.element_size()
        if self.queries > 1:  # also the winners, a mask of one query's, and that query's part of the strip
            element_bytes += winner_dtype.itemsize + 1 + self.image.element_size()
        width = max(ceil_div(x.columns, 16) * 16 for x in self.blocks)  # rows begin where vectors can be stored
        groups = list(block.groups(block.config.block_q * width * element_bytes, STRIP_BYTES))
        height = groups[0].stop
        gradient = self.image.new_empty(height, width)
        winner = self.image.new_empty(height, width, dtype=winner_dtype) if self.queries > 1 else None
        row_grads = []  # of each query, [height, d]
        if self.image_grad is not None:
            row_grads = [factor.new_empty(height, self.image.shape[2]) for _ in range(self.queries)]
        totals: list[Tensor] = []
        for at in groups:
            rows = at.stop - at.start
            for n, part in enumerate(self.blocks):
                shape = slice(rows), slice(part.columns)
                strip = Strip(gradient[shape], None if winner is None else winner[shape], width)
                totals.append(self.fill(part, at, strip).sum(-1))
                self._multiply(part, at, strip, [x[:rows] for x in row_grads], self.text_grads[n], first=n == 0)
            if self.image_grad is not None:
                for q, x in enumerate(row_grads):
                    torch.mul(x[:rows], factor, out=self.image_grad[at, q])
        return torch.stack(totals).sum(0)

    def _multiply(
        self, block: Block, at: slice, strip: Strip, row_grads: list[Tensor], text_grad: Tensor | None, *, first: bool
    ) -> None:
        """Multiply a strip by the features; `first`: nothing has been added to `row_grads` yet."""
        for q in range(self.queries):
            of_query = strip.gradient if strip.winner is None else strip.gradient.masked_fill(strip.winner != q, 0.0)
            if row_grads:
                add_product(row_grads[q], of_query, block.text, first=first)
            if text_grad is not None:
                add_product(text_grad, of_query.mT, block.image[at, q], first=at.start == 0 and q == 0)
