"""Gradients in Triton from exponentials that the forward pass stored: three products in all.

A tile's exponentials, relative to the tile's reference, become gradients of logits in place once the rows' sums are
known. Rounding them to 16 bits costs a relative error of a probability; logits so rounded would cost an absolute one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.common.triton.launch import ceil_div
from mmkernels.ops.linear.triton.arguments import Buffer
from mmkernels.ops.linear.triton.call import Head
from mmkernels.ops.linear.triton.gradients import Wanted
from mmkernels.ops.linear.triton.products import HiddenSums, Unit, add_bias_gradient, add_weight_gradient
from mmkernels.ops.linear.triton.states import FLOAT16_OCTAVES, add_states
from mmkernels.ops.linear.triton.tiles import exponential, live_rows
from mmkernels.plan import Config
from mmkernels.runtime.triton import launch

CHUNK_BYTES = 2**29  # of one chunk's exponentials, unless the weight's gradient needs much more
_IN_PLACE = Config(32, 128, 8, 1)  # the most rows of one step

_LN2 = tl.constexpr(0.6931471805599453)


class Factors(NamedTuple):
    """What turns exponentials into gradients of logits, float32 [rows of a chunk] each.

    Args:
        reference, log_sum: `formula.REFERENCE` and `LOG_SUM`.
        probability, token: the factors of a probability, and of a token's weight.
        target: the gradient of the target's logit. It is not computed from an exponential of 16 bits, whose error may
            be larger than 1 - p.
    """

    reference: Any
    log_sum: Any
    probability: Any
    token: Any
    target: Any


@triton.jit
def exponentials_to_gradients_kernel(
    stored, references, token_weight, targets, factors, bias_partials, extent, inner,
    SOFTCAP: tl.constexpr, OCTAVES: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Replace exponentials by the gradients of products. Grid: (tiles down, tiles or halves across).

    They are 0 past the end: there exponentials or factors are 0.
    stored: `Buffer`, see `states_kernel`. references: float32 [tiles, rows]. token_weight: None: no weight.
    bias_partials: a `Buffer`, see `gradients_kernel`.
    """
    live_count = live_rows(extent)
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_Q
    j = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = j < extent.end_token
    of_bias = tl.zeros([COLUMNS], tl.float32)
    if row < live_count:
        for step in range(0, BLOCK_Q, ROWS):
            n = row + step + tl.arange(0, ROWS)
            live = n < live_count
            pointers = stored.data + n.to(tl.int64)[:, None] * stored.stride + j[None, :]
            reference = tl.load(references + tl.cast(tile, tl.int64) * extent.rows + n, mask=live, other=0.0)
            shift = reference - tl.load(factors.reference + n, mask=live, other=0.0)
            factor = exponential(shift - tl.load(factors.log_sum + n, mask=live, other=0.0))
            factor *= tl.load(factors.probability + n, mask=live, other=0.0)
            x = tl.load(pointers).to(tl.float32) * (0.5**OCTAVES)
            flow = x * factor[:, None]
            if SOFTCAP:
                ratio = (reference[:, None] + tl.log2(x) * _LN2) * inner
                flow *= tl.where(x > 0, tl.maximum(1 - ratio * ratio, 0.0), 0.0)
            if token_weight is not None:
                of_token = tl.load(token_weight + j, mask=inside, other=0.0)
                flow += tl.load(factors.token + n, mask=live, other=0.0)[:, None] * of_token[None, :]
            target = tl.load(targets + extent.first_row + n)
            of_target = tl.load(factors.target + n, mask=live, other=0.0)
            flow = tl.where(j[None, :] == target[:, None], of_target[:, None], flow)
            of_bias += tl.sum(flow, 0)
            tl.store(pointers, flow.to(stored.data.dtype.element_ty))
        if bias_partials.data is not None:
            partials = bias_partials.data + tl.cast(tl.program_id(0), tl.int64) * bias_partials.stride
            tl.store(partials + j, of_bias)


class StoredGradients:
    """The gradients of a loss of rows, chunk by chunk of packed rows.

    Args:
        wanted: the gradients' dtypes.
        token_weight: float32 [V].
    """

    def __init__(self, head: Head, token_weight: Tensor | None, wanted: Wanted) -> None:
        self.head, self.token_weight, self.wanted = head, token_weight, wanted
        like, tokens, dim = head.weight, head.tokens, head.dim
        self.octaves = FLOAT16_OCTAVES if head.dtype == torch.float16 else 0
        row_bytes = like.element_size() * tokens
        separate = wanted.weight is not None and wanted.weight != torch.float32
        sums_bytes = 4 * tokens * dim if separate else 0
        # One chunk takes no sums beside the result; several take them, and read and write them once a chunk.
        whole = head.rows.total * row_bytes <= CHUNK_BYTES + sums_bytes
        self.chunks = [head.all_rows] if whole else head.split_rows(row_bytes, max(CHUNK_BYTES, sums_bytes // 2))
        height = head.height(self.chunks[0].stop)
        width = head.width(tokens)
        self.buffer = Buffer(like.new_empty(height, width), width)
        self.of_hidden = like.new_empty(head.rows.total, dim, dtype=wanted.hidden) if wanted.hidden else None
        self.of_weight = like.new_empty(tokens, dim, dtype=wanted.weight) if wanted.weight else None
        self.of_bias = like.new_empty(tokens, dtype=torch.float32) if wanted.bias else None
        self.sums: Tensor | None = None
        if len(self.chunks) > 1:
            self.sums = like.new_empty(tokens, dim, dtype=torch.float32) if separate else self.of_weight
        self.bias_partials = like.new_empty(
            height // head.logits.block_q if wanted.bias else 0, width, dtype=torch.float32
        )

    def forward(self, rows: slice, states: Tensor, best_index: Tensor | None) -> Tensor:
        """Fill in the states of a chunk, and store its exponentials.

        Returns:
            float32 [fields, tiles, rows], the tiles' results.
        """
        return add_states(
            self.head, rows, states, best_index, self.token_weight, entropy=False, stored=self.buffer,
            octaves=self.octaves,
        )  # fmt: skip

    def backward(self, rows: slice, partials: Tensor, factors: Factors, unit: Unit) -> None:
        """Add the gradients of the chunk whose exponentials are stored."""
        head, tokens, first = self.head, self.head.all_tokens, rows.start == 0
        tiles, count = partials.shape[1:]
        bias_partials = self.bias_partials if self.wanted.bias else None
        columns = head.logits.block_k // (1 + head.halved)
        launch(
            exponentials_to_gradients_kernel, (ceil_div(count, head.logits.block_q), tiles), _IN_PLACE,
            self.buffer, partials[0], self.token_weight, head.rows.targets, factors,
            Buffer(bias_partials, self.buffer.stride), head.extent(rows, tokens), head.numbers.inner,
            SOFTCAP=head.softcap, OCTAVES=self.octaves, BLOCK_Q=head.logits.block_q,
            ROWS=min(_IN_PLACE.block_q, head.logits.block_q), COLUMNS=columns,
        )  # fmt: skip
        if self.of_hidden is not None:
            sums = HiddenSums(head, rows, head.tokens)
            sums.add(self.buffer, tokens, first=True)
            sums.store(self.of_hidden, unit)
        if self.of_weight is not None:
            add_weight_gradient(head, self.buffer, rows, tokens, self.of_weight, self.sums, unit, first=first)
        if self.of_bias is not None:
            add_bias_gradient(head, self.bias_partials, rows, tokens, self.of_bias, unit, first=first)

    def results(self) -> Wanted:
        of_bias = None if self.of_bias is None else self.of_bias.to(self.wanted.bias)
        return Wanted(self.of_hidden, self.of_weight, of_bias)
