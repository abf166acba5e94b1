"""`SpanMask`: which keys each query sees, in O(Lq + Lk) memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from mmkernels.runtime.checks import broadcasts, check_range, check_tensor, is_known

Lengths = Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class SpanMask:
    """Query i sees key j when ``start[i] <= j < end[i]`` and ``key_valid[j]``.

    Any int32 is a legal bound: a span is the range from ``max(start, 0)`` to ``min(end, k_len)``. A query whose span is
    empty sees nothing; its output is 0 and its log-sum-exp is -inf.

    Args:
        start: first visible key, int32 ``[B or 1, Lq or 1]`` (a size of 1 is shared).
        end: one past the last visible key, int32, in a shape that broadcasts with `start`.
        key_valid: bool ``[B or 1, Lk]`` or None (all): False hides a key from every query.

    Raises:
        TypeError: `start` or `end` is not an int32 tensor, or `key_valid` is not a bool tensor.
        ValueError: a tensor is not 2-D, the devices differ, or the shapes do not broadcast.

    Constructors check values (such as negative lengths) only if that needs no device sync: on CPU tensors, and not
    inside ``torch.compile``.

    Example:
        >>> mask = SpanMask.causal(4, 4) & SpanMask.key_padding([3, 4])
        >>> mask.to_dense(4)[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 0]], dtype=torch.int32)
    """

    start: Tensor
    end: Tensor
    key_valid: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            span = getattr(self, name)
            if not isinstance(span, Tensor) or span.dtype != torch.int32:
                raise TypeError(f"{name} must be an int32 tensor, got {_describe(span)}")
            check_tensor(name, span)
            if span.dim() != 2:
                raise ValueError(f"{name} must be [B or 1, Lq or 1], got shape {tuple(span.shape)}")
        _check_broadcast("start and end", self.start.shape, self.end.shape)
        valid = self.key_valid
        if valid is not None:
            if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
                raise TypeError(f"key_valid must be a bool tensor, got {_describe(valid)}")
            check_tensor("key_valid", valid)
            if valid.dim() != 2:
                raise ValueError(f"key_valid must be [B or 1, Lk], got shape {tuple(valid.shape)}")
            _check_broadcast("key_valid and the spans", valid.shape[:1], (max(self.start.shape[0], self.end.shape[0]),))
        if self.end.device != self.start.device or (valid is not None and valid.device != self.start.device):
            devices = [str(t.device) for t in (self.start, self.end, valid) if t is not None]
            raise ValueError(f"start, end and key_valid must be on one device, got {', '.join(devices)}")

    # Constructors, named after what users mean.

    @classmethod
    def key_padding(cls, lengths: Lengths) -> SpanMask:
        """Padding on the right: each query of sequence b sees the first ``lengths[b]`` keys.

        Args:
            lengths: ``[B]`` integers, a tensor or a list; not negative.
        """
        lengths = _lengths("lengths", lengths)
        return cls(torch.zeros_like(lengths)[:, None], lengths[:, None])

    @classmethod
    def left_padding(cls, lengths: Lengths, k_len: int) -> SpanMask:
        """Padding on the left: each query of sequence b sees the last ``lengths[b]`` of `k_len` keys.

        Args:
            lengths: ``[B]`` integers, a tensor or a list; 0 to `k_len`.
            k_len: the number of keys, padding included.
        """
        _check_size("k_len", k_len)
        lengths = _lengths("lengths", lengths, most=k_len)
        return cls((k_len - lengths)[:, None], torch.full_like(lengths, k_len)[:, None])

    @classmethod
    def from_key_mask(cls, key_mask: Tensor) -> SpanMask:
        """All queries of a sequence see the same set of keys: bool ``[B, Lk]``, True = visible.

        The hidden keys may lie anywhere, as in a tokenizer's ``attention_mask.bool()``.
        """
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be a bool tensor, got {_describe(key_mask)}")
        check_tensor("key_mask", key_mask)
        if key_mask.dim() != 2:
            raise ValueError(f"key_mask must be [B, Lk], got shape {tuple(key_mask.shape)}")
        start, end = _bounds(key_mask[:, None, :])
        return cls(start, end, key_mask)

    @classmethod
    def causal(cls, q_len: int, k_len: int, device: torch.device | str | None = None) -> SpanMask:
        """Each query sees the keys up to its position, aligned at the bottom right: the last query sees all keys.

        This is the convention of FlashAttention, not that of ``is_causal`` in ``F.scaled_dot_product_attention``, which
        aligns at the top left. With a KV cache, each of the q_len new tokens sees the k_len - q_len cached ones, the
        new ones before it, and itself.
        """
        return cls.window(None, 0, q_len, k_len, device)

    @classmethod
    def prefix_lm(cls, prefix_lengths: Lengths, q_len: int, k_len: int) -> SpanMask:
        """Causal, and each query of sequence b also sees the first ``prefix_lengths[b]`` keys.

        Args:
            prefix_lengths: ``[B]`` integers, 0 to `k_len`.
        """
        prefix = _lengths("prefix_lengths", prefix_lengths, most=k_len)
        causal = cls.causal(q_len, k_len, prefix.device)
        return cls(causal.start, torch.maximum(causal.end, prefix[:, None]))

    @classmethod
    def window(
        cls, left: int | None, right: int | None, q_len: int, k_len: int, device: torch.device | str | None = None
    ) -> SpanMask:
        """Sliding window, aligned at the bottom right: query i sees the keys from p - left to p + right.

        p = i + k_len - q_len is the position of query i among the keys.

        Args:
            left: how many keys before its position a query sees; None: all.
            right: how many keys after it; None: all.
        """
        for name, size in (("left", left), ("right", right)):
            if size is not None:
                _check_size(name, size, " or None (unlimited)")
        for name, size in (("q_len", q_len), ("k_len", k_len)):
            _check_size(name, size)
        position = torch.arange(k_len - q_len, k_len, dtype=torch.int32, device=device)[None]  # [1, Lq]
        # A larger size shows no further key and could overflow.
        left, right = (size if size is None else min(size, q_len + k_len) for size in (left, right))
        zero = torch.zeros((1, 1), dtype=torch.int32, device=position.device)
        start = zero if left is None else (position - left).clamp(0, k_len)
        end = zero + k_len if right is None else (position + right + 1).clamp(0, k_len)
        return cls(start, end)

    @classmethod
    def media(
        cls, media_index: Tensor, tokens_per_media: int | None = None, *, media_offsets: Lengths | None = None
    ) -> SpanMask:
        """Each text token sees the visual tokens of one image (in Flamingo, of the last image before it).

        Args:
            media_index: the image that each query sees, integers ``[B, Lq]``; -1: none.
            tokens_per_media: the number of visual tokens of each image, if it is the same for all; or
            media_offsets: ``[M + 1]`` or ``[B, M + 1]`` integers: image m is the keys ``offsets[m]`` to
                ``offsets[m + 1]``.

        Raises:
            IndexError: an index is below -1 or, with `media_offsets`, at or above M. Only CPU tensors are checked; on
                other devices such a query sees nothing.
        """
        if not isinstance(media_index, Tensor) or media_index.dtype not in _INTEGERS:
            raise TypeError(f"media_index must be an integer tensor, got {_describe(media_index)}")
        check_tensor("media_index", media_index)
        if media_index.dim() != 2:
            raise ValueError(f"media_index must be [B, Lq], got shape {tuple(media_index.shape)}")
        if (tokens_per_media is None) == (media_offsets is None):
            raise ValueError("give tokens_per_media or media_offsets, one of the two")
        check_range("media_index", media_index, least=-1, error=IndexError)
        sees = media_index >= 0
        if media_offsets is None:
            assert tokens_per_media is not None
            _check_size("tokens_per_media", tokens_per_media)
            start = media_index.long().clamp(0, _LARGEST) * tokens_per_media  # an index past int32 shows no key
            end = (start + tokens_per_media).clamp(max=_LARGEST) * sees
            return cls((start.clamp(max=_LARGEST) * sees).to(torch.int32), end.to(torch.int32))
        offsets = torch.as_tensor(media_offsets, device=media_index.device)
        check_tensor("media_offsets", offsets)
        if offsets.dtype not in _INTEGERS:
            raise TypeError(f"media_offsets must be integers, got {offsets.dtype}")
        check_range("media_offsets", offsets, 0, _LARGEST)
        check_range("the differences of media_offsets", offsets.diff(dim=-1), least=0)
        offsets = offsets.to(torch.int32)
        if offsets.dim() not in (1, 2) or offsets.shape[-1] < 1:
            raise ValueError(f"media_offsets must be [M + 1] or [B, M + 1], got shape {tuple(offsets.shape)}")
        count = offsets.shape[-1] - 1
        check_range("media_index", media_index, most=count - 1, error=IndexError)
        offsets = offsets.expand(media_index.shape[0], -1) if offsets.dim() == 1 else offsets
        if offsets.shape[0] != media_index.shape[0]:
            raise ValueError(
                f"media_offsets must be [M + 1] or [{media_index.shape[0]}, M + 1], got {tuple(offsets.shape)}"
            )
        sees = sees & (media_index < count)
        index = media_index.long() * sees
        start = offsets.gather(1, index)
        end = offsets.gather(1, (index + 1).clamp(max=count))
        return cls(start * sees, end * sees)

    @classmethod
    def packed(cls, q_lengths: Lengths, k_lengths: Lengths, *, q_len: int | None = None) -> SpanMask:
        """Sequences packed into one row: the queries of sequence n see exactly the keys of sequence n. Batch 1.

        ``packed(lengths, lengths) & causal(total, total)`` is packed causal self-attention.

        Args:
            q_lengths, k_lengths: ``[N]`` integers, tensors or lists.
            q_len: the total number of queries. None: the sum of `q_lengths`, which syncs if they lie on a device.
                Queries past the last sequence see nothing.
        """
        q_lengths = _lengths("q_lengths", q_lengths)
        k_lengths = _lengths("k_lengths", k_lengths).to(q_lengths.device)
        if q_lengths.shape != k_lengths.shape:
            raise ValueError(f"q_lengths and k_lengths must have one length, got {len(q_lengths)} and {len(k_lengths)}")
        q_end, k_end = q_lengths.cumsum(0), k_lengths.cumsum(0)
        if q_len is not None:
            _check_size("q_len", q_len)
        if q_len is None:
            q_len = int(q_lengths.sum())
        position = torch.arange(q_len, device=q_lengths.device)
        sequence = torch.searchsorted(q_end, position, right=True)  # [Lq], N past the last sequence
        k_end = torch.cat([k_end.new_zeros(1), k_end, k_lengths.sum()[None]]).to(torch.int32)
        return cls(k_end[sequence][None], k_end[sequence + 1][None])

    @classmethod
    def from_dense(cls, dense: Tensor) -> SpanMask:
        """Returns the span mask equal to a bool mask, ``[B or 1, Lq, Lk]`` or ``[B or 1, 1, Lq, Lk]``, True = visible.

        This syncs with the device.

        Raises:
            ValueError: a row has a hole at a key that another row sees, so that no span mask equals `dense`.
        """
        mask, hole = cls._from_dense(dense)
        if hole is not None:
            b, i, j = hole
            raise ValueError(
                f"dense must be a run of keys per query; query {i} of sequence {b} does not see key {j} inside its "
                "run, and another query does. Pass the bool tensor itself as the mask, or use try_from_dense"
            )
        return mask

    @classmethod
    def try_from_dense(cls, dense: Tensor) -> SpanMask | None:
        """As `from_dense`, but returns None if no span mask equals `dense`."""
        mask, hole = cls._from_dense(dense)
        return mask if hole is None else None

    @classmethod
    def _from_dense(cls, dense: Tensor) -> tuple[SpanMask, tuple[int, int, int] | None]:
        if not isinstance(dense, Tensor) or dense.dtype != torch.bool:
            raise TypeError(f"dense must be a bool tensor (True = visible), got {_describe(dense)}")
        check_tensor("dense", dense)
        if dense.dim() == 4 and dense.shape[1] == 1:
            dense = dense[:, 0]
        if dense.dim() != 3:
            raise ValueError(f"dense must be [B or 1, Lq, Lk] or [B or 1, 1, Lq, Lk], got shape {tuple(dense.shape)}")
        start, end = _bounds(dense)
        mask = cls(start, end, dense.any(1))  # a key is invalid if no query sees it
        wrong = mask.to_dense(dense.shape[2])[:, 0] != dense
        if not wrong.any():
            return mask, None
        b, i, j = wrong.nonzero()[0].tolist()
        return mask, (b, i, j)

    # Operations.

    def __and__(self, other: SpanMask) -> SpanMask:
        """Returns the mask that shows the keys which both masks show."""
        if not isinstance(other, SpanMask):
            return NotImplemented
        _check_broadcast("the two masks", self.shape, other.shape)
        if self.key_valid is None or other.key_valid is None:
            valid = self.key_valid if other.key_valid is None else other.key_valid
        else:
            _check_broadcast("the two masks' key_valid", self.key_valid.shape, other.key_valid.shape)
            valid = self.key_valid & other.key_valid
        return SpanMask(torch.maximum(self.start, other.start), torch.minimum(self.end, other.end), valid)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (B or 1, Lq or 1) that the spans broadcast to."""
        (b, i), (batch, q_len) = self.start.shape, self.end.shape
        return (batch if is_known(b == 1) else b), (q_len if is_known(i == 1) else i)

    @property
    def device(self) -> torch.device:
        return self.start.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SpanMask:
        """Returns the mask on another device."""
        start, end = (t.to(device, non_blocking=non_blocking) for t in (self.start, self.end))
        valid = self.key_valid
        return SpanMask(start, end, valid if valid is None else valid.to(device, non_blocking=non_blocking))

    def to_dense(self, k_len: int) -> Tensor:
        """Returns the mask as bool ``[B or 1, 1, Lq or 1, Lk]``, True = visible, as SDPA takes it."""
        key = torch.arange(k_len, dtype=torch.int32, device=self.device)
        dense = (self.start[..., None] <= key) & (key < self.end[..., None])  # [B or 1, Lq or 1, Lk]
        if self.key_valid is not None:
            if self.key_valid.shape[1] != k_len:
                raise ValueError(f"k_len must be key_valid's {self.key_valid.shape[1]}, got {k_len}")
            dense = dense & self.key_valid[:, None]
        return dense[:, None]


_LARGEST = 2**31 - 1
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _describe(x: object) -> str:
    return f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__


def _check_broadcast(what: str, a: Iterable[int], b: Iterable[int]) -> None:
    a, b = tuple(a), tuple(b)
    if not all(broadcasts(m, n) or broadcasts(n, m) for m, n in zip(a, b, strict=True)):
        raise ValueError(f"{what} must broadcast, got shapes {a} and {b}")


def _check_size(name: str, size: object, note: str = "") -> None:
    """Raise unless a size is an integer that is not negative; in a trace sizes are tensors.

    Args:
        note: what else it may be.
    """
    whole = isinstance(size, int | np.integer | torch.SymInt) and not isinstance(size, bool)
    if not whole and not (isinstance(size, Tensor) and size.dim() == 0 and size.dtype in _INTEGERS):
        raise TypeError(f"{name} must be an integer{note}, got {size if isinstance(size, float) else _describe(size)}")
    if size < 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be >= 0{note}, got {size}")


def _lengths(name: str, lengths: Lengths, most: int | None = None) -> Tensor:
    lengths = torch.as_tensor(lengths)
    check_tensor(name, lengths)
    if is_known(lengths.numel() == 0):
        lengths = lengths.to(torch.int32)  # an empty list becomes a float tensor
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"{name} must be [B], got shape {tuple(lengths.shape)}")
    check_range(name, lengths, 0, _LARGEST if most is None else most)
    return lengths.to(torch.int32)


def _bounds(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first visible key and one past the last, int32 ``[B, Lq]``, of bool ``[B, Lq, Lk]``; (0, 0): none."""
    k_len = visible.shape[-1]
    if k_len == 0:
        nothing = visible.new_zeros(visible.shape[:2], dtype=torch.int32)
        return nothing, nothing
    any_visible = visible.any(-1)
    start = visible.to(torch.uint8).argmax(-1) * any_visible
    end = (k_len - visible.flip(-1).to(torch.uint8).argmax(-1)) * any_visible
    return start.to(torch.int32), end.to(torch.int32)


# A pytree node can be an input of torch.export and of functorch transforms.
_pytree.register_pytree_node(
    SpanMask,
    lambda mask: ([mask.start, mask.end, mask.key_valid], None),
    lambda tensors, _: _unchecked(*tensors),
    serialized_type_name="mmkernels.SpanMask",
    flatten_with_keys_fn=lambda mask: (
        [(_pytree.GetAttrKey(name), getattr(mask, name)) for name in ("start", "end", "key_valid")],
        None,
    ),
)


def _unchecked(start: Tensor, end: Tensor, key_valid: Tensor | None) -> SpanMask:
    """Returns a SpanMask without checks: transforms rebuild it from placeholders that are not tensors."""
    mask = object.__new__(SpanMask)
    for name, value in (("start", start), ("end", end), ("key_valid", key_valid)):
        object.__setattr__(mask, name, value)
    return mask
