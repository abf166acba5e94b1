"""A contrastive step over a ring of ranks, counted: blocks of logits, bytes on the wire, bytes of memory."""

from __future__ import annotations

from dataclasses import dataclass

from mmkernels.options import DTYPES

__all__ = ["Hop", "Step", "gathered_bytes", "hops", "memory_parts", "sent_bytes"]

_WIDE = 4  # bytes of float32: sums, states and gradients on their way
_SUMS, _STATE = 6, 4  # rows of a text's sums on their way in the forward pass; of its state in the backward pass
_GATHERED = {2: 16, 4: 24}  # bytes of open_clip's loss at its peak for each of n x N logits, by bytes of a feature


@dataclass(frozen=True)
class Step:
    """One training step of the loss.

    Args:
        batch: pairs, over all ranks.
        dim: channels of the features.
        ranks: processes that share the batch evenly.
        dtype: of the features, a name in `DTYPES`.
    """

    batch: int
    dim: int
    ranks: int
    dtype: str

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


@dataclass(frozen=True)
class Hop:
    """What a rank does over and over in one pass: compute a block while the next texts arrive.

    Args:
        count: how many times.
        rows, columns: images and texts of the block.
        sent: bytes that travel meanwhile.
        backward: the backward pass's block, of three products.
    """

    count: int
    rows: int
    columns: int
    sent: int
    backward: bool


def hops(step: Step) -> list[Hop]:
    """Returns what one rank does in a step."""
    n, d, size = step.rows, step.dim, step.itemsize
    forward = n * d * size + n * _SUMS * _WIDE
    backward = n * d * (size + _WIDE) + n * _STATE * _WIDE
    alone = step.ranks == 1
    return [
        Hop(step.ranks, n, n, 0 if alone else forward, False),
        Hop(step.ranks, n, n, 0 if alone else backward, True),
    ]


def sent_bytes(step: Step) -> int:
    """Returns the bytes that a rank sends in a step: texts go W - 1 hops, sums and gradients W, back home."""
    if step.ranks == 1:
        return 0
    n, d, size, w = step.rows, step.dim, step.itemsize, step.ranks
    texts = 2 * (w - 1) * n * d * size
    gradients = w * n * d * _WIDE
    return texts + gradients + n * _WIDE * (_SUMS * w + _STATE * (w - 1))


def memory_parts(step: Step) -> dict[str, int]:
    """Returns a rank's bytes at the peak of a step, by what they are for."""
    n, d, size = step.rows, step.dim, step.itemsize
    return {
        "features": 2 * n * d * size,
        "gradients": 2 * n * d * size,
        "in flight": 2 * n * d * (size + _WIDE) if step.ranks > 1 else 0,
        "accumulators": 2 * n * d * _WIDE,
        "states": n * 2 * _WIDE * (_SUMS + _STATE),
    }


def gathered_bytes(step: Step) -> int:
    """Returns the bytes above features and gradients that open_clip's gather takes on each rank, with its local loss.

    All features of both sides, their gradients, and the logits of both directions, with what cross-entropy and its
    gradient make of them. The memory of Inf-CL's table (arXiv 2410.17243, table 1: 2.27 GB at 32k, 33.6 GB at 128k on
    8 GPUs) is 16 bytes for each of the n x N logits.
    """
    features = 4 * step.batch * step.dim * step.itemsize
    return features + _GATHERED[step.itemsize] * step.rows * step.batch
