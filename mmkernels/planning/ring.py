"""A step of `info_nce` over a ring of ranks, counted: blocks of logits, bytes on the wire, bytes of memory.

The counts follow ``ops/contrastive/info_nce/ring.py`` and ``runtime/group.py``, without ids, hard texts and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkernels.ops.contrastive.ring import chunks, piece_rows
from mmkernels.options import DTYPES

__all__ = ["Pass", "Step", "gathered_bytes", "memory_parts", "passes", "sent_bytes"]

_WIDE = 4  # bytes of float32: sums, states and gradients on their way
_SUMS, _LINES = (
    6,
    5,
)  # numbers of a text that travel along: its sums forward; its state and its loss's gradient backward
_SAID = 2 * 2048 + 13 * 8  # bytes that a rank tells each other in the handshakes of a step, and what is summed
_OF_ROWS = 60  # bytes for each row in the backward pass: states of both sides, their losses' gradients, lines
_KERNELS = 10**6  # bytes that kernels take, beside half a piece of features, as measured on CPUs
_GATHERED = {2: 8, 4: 12}  # bytes of open_clip's loss at its peak for each of n x N logits, by bytes of a feature


@dataclass(frozen=True)
class Step:
    """One training step of the loss.

    Args:
        batch: pairs, over all ranks.
        dim: channels of the features.
        ranks: processes that share the batch evenly.
        dtype: of the features, a name in `DTYPES`.
        gpu: the features lie on GPUs, where pieces are larger.
    """

    batch: int
    dim: int
    ranks: int
    dtype: str
    gpu: bool = False

    @property
    def rows(self) -> int:
        """The pairs of one rank, of the fullest one."""
        return -(-self.batch // self.ranks)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> float:
        """Of one rank: one product forward, three backward."""
        return 8.0 * self.rows * self.batch * self.dim

    @property
    def piece(self) -> int:
        """The texts that travel together."""
        return min(self.rows, piece_rows(self._like()))

    @property
    def chunk(self) -> int:
        """The images of which a block of the backward pass gives the gradient."""
        at = next(chunks(self._like()))
        return at.stop - at.start

    def _like(self) -> torch.Tensor:
        """Returns this rank's features, without memory."""
        row = torch.empty(1, self.dim, dtype=DTYPES[self.dtype], device="meta" if self.gpu else "cpu")
        return row.expand(self.rows, -1)


@dataclass(frozen=True)
class Pass:
    """One piece of each rank visits every rank: forward or backward.

    Args:
        count: how many such pieces each rank has.
        blocks: what is computed at each visit: how many blocks, of how many images, with how many texts.
        passed: bytes of a piece that pass on while it is computed with.
        follows: bytes of its results, which follow, and at last return home.
        backward: each block is three products, not one.
    """

    count: int
    blocks: tuple[tuple[int, int, int], ...]
    passed: int
    follows: int
    backward: bool


def passes(step: Step) -> list[Pass]:
    """Returns what the ranks do in a step; one rank passes nothing."""
    made = []
    for count, columns in _cut(step.rows, step.piece):
        made.append(_pass(step, count, columns, backward=False))
        made.append(_pass(step, count, columns, backward=True))
    return made


def _pass(step: Step, count: int, columns: int, *, backward: bool) -> Pass:
    features, wide = columns * step.dim * step.itemsize, columns * _WIDE
    if backward:
        blocks = tuple((many, rows, columns) for many, rows in _cut(step.rows, step.chunk))
        passed, follows = features + _LINES * wide, step.dim * wide
    else:
        blocks, passed, follows = ((1, step.rows, columns),), features, _SUMS * wide
    alone = step.ranks == 1
    return Pass(count, blocks, 0 if alone else passed, 0 if alone else follows, backward)


def _cut(rows: int, size: int) -> list[tuple[int, int]]:
    """Returns how many parts of which size there are: whole ones, and a rest."""
    whole, rest = divmod(rows, size)
    return [part for part in ((whole, size), (1, rest)) if all(part)]


def sent_bytes(step: Step) -> int:
    """Returns the bytes that a rank sends in a step: texts W - 1 times, their sums and gradients W times, back home."""
    w = step.ranks
    pieces = sum(made.count * ((w - 1) * made.passed + w * made.follows) for made in passes(step))
    return pieces + (w - 1) * _SAID


def memory_parts(step: Step) -> dict[str, int]:
    """Returns a rank's bytes at the peak of a step, in the backward pass, by what they are for."""
    n, d, size = step.rows, step.dim, step.itemsize
    piece, several = step.piece * d, step.chunk < n
    parts = {
        "features": 2 * n * d * size,
        "gradients": 2 * n * d * size,
        "states": n * _OF_ROWS,
        "kernels": _KERNELS + piece * size // 2,
    }
    if step.ranks == 1:
        return parts
    # A piece and the next one; its gradient: what this rank adds, what goes, and with a third rank what comes.
    in_flight = 2 * size + min(step.ranks, 3) * _WIDE
    return parts | {
        "accumulators": n * d * (_WIDE - size),  # the images' gradient, which in float32 is the result
        "in flight": piece * in_flight,
        "blocks": step.chunk * d * _WIDE + (piece * _WIDE if several else 0),
    }


def gathered_bytes(step: Step) -> int:
    """Returns the bytes above features and gradients that open_clip's gather takes on each rank, with its local loss.

    All features of both sides, their gradients, and the logits of both directions, with what cross-entropy and its
    gradient make of them: 8 bytes for each of the n x N logits in 16 bits and 12 in float32, as measured on a CPU.
    Under autocast it is more: 16 in Inf-CL's table (arXiv 2410.17243, table 1: 2.27 GB at 32k and 33.6 GB at 128k on 8
    GPUs).
    """
    features = 4 * step.batch * step.dim * step.itemsize
    return features + _GATHERED[step.itemsize] * step.rows * step.batch
