"""`TokenBuffer`: a growing sequence of keys or values, with storage allocated in advance."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.runtime.checks import is_traced


class TokenBuffer:
    """Tokens ``[B, H, L, D]`` that are appended at the end and removed anywhere; in memory ``[B, capacity, H, D]``.

    An append copies only the new tokens: storage is doubled when it is full, so that each token is moved a bounded
    number of times on average. There are three exceptions. The first append keeps the given tensor if nothing was
    reserved. An append of tokens that need a gradient concatenates, because writing into the storage would change
    tensors that autograd has saved. (Tokens that need no gradient are written in place: run pending backward passes
    through earlier views first, or PyTorch raises an error.) An append within `torch.export`
    or `torch.jit.trace` concatenates, because the program must serve any number of tokens.

    Args:
        reserve: tokens to allocate with the first append.

    Example:
        >>> import torch
        >>> from mmkernels.nn import TokenBuffer
        >>> keys = TokenBuffer(reserve=100)
        >>> keys.append(torch.randn(1, 2, 5, 8))
        >>> keys.append(torch.randn(1, 2, 1, 8))
        >>> keys.view().shape
        torch.Size([1, 2, 6, 8])
    """

    def __init__(self, reserve: int = 0) -> None:
        if reserve < 0:
            raise ValueError(f"reserve must be >= 0, got {reserve}")
        self._reserve = reserve
        self._storage: Tensor | None = None  # [B, capacity, H, D]
        self._spare: Tensor | None = None  # where `take` puts rows next
        self._owned = False  # False: the storage is a tensor of the caller or of autograd
        self._start = self._end = 0

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def num_tokens(self) -> int:
        """The number of tokens; symbolic where a graph is traced, unlike ``len``."""
        return self._end - self._start

    @property
    def is_filled(self) -> bool:
        """Whether anything was appended."""
        return self._storage is not None

    def view(self) -> Tensor:
        """Returns all tokens ``[B, H, L, D]`` without a copy. The view is valid until the next change."""
        return self._live().transpose(1, 2)

    def append(self, tokens: Tensor) -> None:
        """Appends tokens ``[B, H, n, D]``."""
        new = tokens.transpose(1, 2)  # [B, n, H, D]
        count = new.shape[1]
        if self._storage is None and not self._reserve:
            self._adopt(new)
        elif self._must_copy(new):
            self._adopt(new if self._storage is None else torch.cat([self._live(), new], dim=1))
        else:
            self._make_room(new, count)
            assert self._storage is not None
            self._storage[:, self._end : self._end + count] = new
            self._end += count

    def remove(self, start: int, end: int) -> None:
        """Removes tokens `start` to `end`, counted from the first; only the tokens behind them are moved."""
        live = self.num_tokens
        if not 0 <= start <= end <= live:
            raise ValueError(f"start and end must be a range within 0 to {live}, got {start} to {end}")
        if start == 0:
            self._start += end
        elif end == live:
            self._end -= end - start
        elif self._owned:
            assert self._storage is not None
            target = self._start + start
            behind = self._live()[:, end:].clone()  # a copy: source and target overlap
            self._storage[:, target : target + live - end] = behind
            self._end -= end - start
        else:
            tokens = self._live()
            self._adopt(torch.cat([tokens[:, :start], tokens[:, end:]], dim=1))

    def select(self, columns: Tensor) -> None:
        """Keeps, in each row, the tokens at these places, int64 ``[B, n]``, in this order."""
        live = self._live()
        self._adopt(live.gather(1, columns[:, :, None, None].expand(-1, -1, *live.shape[2:])))

    def take(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, int64 ``[n]``, in this order; a row may be taken more than once.

        As many rows as before are copied to a second storage, which the next call uses again.
        """
        live = self._live()
        if not self._owned or self._must_copy(live):
            self._adopt(live[rows])
            return
        assert self._storage is not None
        shape = (rows.shape[0], *self._storage.shape[1:])
        fits = self._spare is not None and self._spare.shape == shape
        storage = self._spare if fits else live.new_empty(shape)
        assert storage is not None
        torch.index_select(live, 0, rows, out=storage[:, : live.shape[1]])
        self._spare, self._storage = self._storage, storage
        self._start, self._end = 0, live.shape[1]

    def _live(self) -> Tensor:
        if self._storage is None:
            raise RuntimeError("nothing was appended yet")
        return self._storage[:, self._start : self._end]

    def _must_copy(self, new: Tensor) -> bool:
        """Whether an append concatenates, instead of writing into the storage: `TokenBuffer` says where and why."""
        if is_traced():
            return True
        return torch.is_grad_enabled() and (
            new.requires_grad or (self._storage is not None and self._storage.requires_grad)
        )

    def _adopt(self, tokens: Tensor) -> None:
        self._storage, self._owned = tokens, False
        self._start, self._end = 0, tokens.shape[1]

    def _make_room(self, new: Tensor, count: int) -> None:
        live = self.num_tokens
        if self._storage is not None and self._owned and self._end + count <= self._storage.shape[1]:
            return
        capacity = max(self._reserve, 2 * live, live + count)
        storage = new.new_empty(new.shape[0], capacity, *new.shape[2:])
        if live:
            storage[:, :live] = self._live()
        self._storage, self._owned = storage, True
        self._start, self._end = 0, live
