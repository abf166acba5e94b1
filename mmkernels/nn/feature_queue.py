"""`FeatureQueue`: features of earlier batches, as further negatives of a contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.nn.checks import check_positive
from mmkernels.ops.contrastive.inputs import check_more_features
from mmkernels.runtime.checks import check_floating, check_tensor


class FeatureQueue(nn.Module):
    """Features of the latest rows, ``[K, dim]``: those of a momentum encoder, for `info_nce` as `hard_texts`.

    A ring buffer: a push overwrites the oldest rows, and only rows that were pushed count. How many there are is a
    number of Python, so that nothing waits for a device; ``state_dict`` holds it. Rows have no order.

    A push changes rows in place, which autograd may still need: push after the backward pass, or PyTorch raises an
    error there.

    Args:
        size: the most rows.
        dim: channels of a row.
        ids: whether each row has an integer that says what it is about.
        dtype, device: of the rows; None: PyTorch's default.

    Raises:
        TypeError, ValueError: a size is not a positive integer; in `push`, features are not floating ``[n, dim]`` on
            the rows' device, or ids are not integers ``[n]``, or are given to a queue without ids, or missing.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (MoCo), 2020, section 3.2.

    Example:
        >>> import torch, mmkernels
        >>> from mmkernels.nn import FeatureQueue
        >>> queue = FeatureQueue(size=100, dim=64)
        >>> image, text, earlier = (torch.nn.functional.normalize(torch.randn(8, 64), dim=1) for _ in range(3))
        >>> queue.push(earlier)
        >>> queue.features.shape
        torch.Size([8, 64])
        >>> mmkernels.info_nce(image, text, 14.3, hard_texts=queue.features).shape
        torch.Size([])
    """

    rows: Tensor
    row_ids: Tensor | None

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        ids: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_positive("size", size)
        check_positive("dim", dim)
        self.size = size
        self.pushed = 0  # in all, overwritten rows too
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("row_ids", torch.zeros(size, dtype=torch.int64, device=device) if ids else None)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return min(self.pushed, self.size)

    @property
    def features(self) -> Tensor:
        """The rows ``[K, dim]``, a view that is valid until the next push."""
        return self.rows[: self.num_rows]

    @property
    def ids(self) -> Tensor | None:
        """What each row is about, int64 ``[K]``; None: the queue has no ids."""
        return None if self.row_ids is None else self.row_ids[: self.num_rows]

    @torch.no_grad()
    def push(self, features: Tensor, ids: Tensor | None = None) -> None:
        """Adds features ``[n, dim]``, of which the last `size` are kept, and their ids, integers ``[n]``."""
        check_floating("features", features)
        check_more_features("features", features.to(self.rows.dtype), self.rows, of="the queue", least=0)
        self._check_ids(ids, features.shape[0])
        new = min(features.shape[0], self.size)
        start = (self.pushed + features.shape[0] - new) % self.size
        head = min(new, self.size - start)  # rows up to the end of the buffer; the others go to its start
        _write(self.rows, features[features.shape[0] - new :], start, head)
        if self.row_ids is not None and ids is not None:
            _write(self.row_ids, ids[ids.shape[0] - new :], start, head)
        self.pushed += features.shape[0]

    def _check_ids(self, ids: Tensor | None, count: int) -> None:
        if (ids is None) != (self.row_ids is None):
            must, got = ("given", "None") if ids is None else ("None", "a tensor")
            raise ValueError(f"ids must be {must}, as the queue was made with ids={ids is None}; got {got}")
        if ids is None:
            return
        check_tensor("ids", ids)
        if ids.is_floating_point() or ids.dtype == torch.bool or tuple(ids.shape) != (count,):
            raise ValueError(f"ids must be integers [{count}], one for each row, got {ids.dtype} {tuple(ids.shape)}")

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = int(state)


def _write(rows: Tensor, new: Tensor, start: int, head: int) -> None:
    """Writes rows into a ring buffer, from `start` on; the first `head` of them are before its end."""
    rows[start : start + head] = new[:head]
    rows[: new.shape[0] - head] = new[head:]
