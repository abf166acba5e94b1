"""SpanMask: every constructor against a loop that says what it means, algebra, conversions, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import SpanMask

lengths = st.integers(0, 7)


def dense(batch: int, q_len: int, k_len: int, sees: Callable[[int, int, int], bool]) -> Tensor:
    """bool [B, 1, Lq, Lk] from a rule."""
    bits = [bool(sees(b, i, j)) for b in range(batch) for i in range(q_len) for j in range(k_len)]
    return torch.tensor(bits, dtype=torch.bool).view(batch, 1, q_len, k_len)


def same(mask: SpanMask, want: Tensor) -> None:
    batch, _, q_len, k_len = want.shape
    assert torch.equal(mask.to_dense(k_len).expand(batch, 1, q_len, k_len), want)


# Constructors.


@given(st.lists(lengths, min_size=1, max_size=3), lengths, lengths)
def test_padding(sizes: list[int], q_len: int, more: int) -> None:
    k_len = max(sizes) + more
    batch = len(sizes)
    same(SpanMask.key_padding(sizes), dense(batch, q_len, k_len, lambda b, i, j: j < sizes[b]))
    same(SpanMask.left_padding(sizes, k_len), dense(batch, q_len, k_len, lambda b, i, j: j >= k_len - sizes[b]))
    same(SpanMask.key_padding(torch.tensor(sizes)), SpanMask.key_padding(sizes).to_dense(k_len))


@given(lengths, lengths, st.none() | lengths, st.none() | lengths)
def test_window_and_causal(q_len: int, k_len: int, left: int | None, right: int | None) -> None:
    def sees(b: int, i: int, j: int) -> bool:
        place = i + k_len - q_len
        return (left is None or j >= place - left) and (right is None or j <= place + right)

    same(SpanMask.window(left, right, q_len, k_len), dense(1, q_len, k_len, sees))
    same(SpanMask.causal(q_len, k_len), dense(1, q_len, k_len, lambda b, i, j: j <= i + k_len - q_len))


@given(st.lists(lengths, min_size=1, max_size=3), lengths)
def test_prefix_lm(prefixes: list[int], q_len: int) -> None:
    k_len = max(*prefixes, q_len, 1)
    want = dense(len(prefixes), q_len, k_len, lambda b, i, j: j < prefixes[b] or j <= i + k_len - q_len)
    same(SpanMask.prefix_lm(prefixes, q_len, k_len), want)


@given(st.lists(st.lists(st.integers(-1, 2), min_size=4, max_size=4), min_size=1, max_size=3), lengths)
def test_media(index: list[list[int]], tokens: int) -> None:
    want = dense(len(index), 4, 3 * tokens, lambda b, i, j: index[b][i] == j // max(tokens, 1))
    same(SpanMask.media(torch.tensor(index), tokens), want)


@given(st.lists(st.lists(st.integers(-1, 2), min_size=4, max_size=4), min_size=1, max_size=2), st.data())
def test_media_of_several_sizes(index: list[list[int]], data: st.DataObject) -> None:
    sizes = [[data.draw(lengths) for _ in range(3)] for _ in index]
    offsets = [[sum(row[:m]) for m in range(4)] for row in sizes]
    k_len = max(row[-1] for row in offsets)

    def sees(b: int, i: int, j: int) -> bool:
        m = index[b][i]
        return m >= 0 and offsets[b][m] <= j < offsets[b][m + 1]

    same(SpanMask.media(torch.tensor(index), media_offsets=torch.tensor(offsets)), dense(len(index), 4, k_len, sees))


@given(st.lists(st.tuples(lengths, lengths), max_size=4), st.integers(0, 2))
def test_packed(pairs: list[tuple[int, int]], more: int) -> None:
    q_of = [n for n, (q, _) in enumerate(pairs) for _ in range(q)]
    k_of = [n for n, (_, k) in enumerate(pairs) for _ in range(k)]
    q_sizes, k_sizes = [q for q, _ in pairs], [k for _, k in pairs]
    want = dense(1, len(q_of), len(k_of), lambda b, i, j: q_of[i] == k_of[j])
    same(SpanMask.packed(q_sizes, k_sizes), want)
    longer = SpanMask.packed(q_sizes, k_sizes, q_len=len(q_of) + more).to_dense(len(k_of))
    assert torch.equal(longer[:, :, : len(q_of)], want) and not bool(longer[:, :, len(q_of) :].any())


def test_sizes_past_int32_do_not_wrap() -> None:
    huge = 2**31 - 1
    for size in (huge, 2**40):
        same(SpanMask.window(None, size, 4, 4), torch.ones(1, 1, 4, 4).bool())
        same(SpanMask.window(size, None, 9, 5), torch.ones(1, 1, 9, 5).bool())
        same(SpanMask.window(size, 0, 4, 4), SpanMask.causal(4, 4).to_dense(4))
    for index in (2**29, 2**32):
        same(SpanMask.media(torch.tensor([[index, 0]]), 8), torch.tensor([[False], [True]]).expand(1, 1, 2, 8))


# Conversions and algebra.


def _any_mask(data: st.DataObject, k_len: int) -> SpanMask:
    bound = st.integers(-3, k_len + 3)
    shape = (data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3])))
    spans = [torch.tensor([[data.draw(bound) for _ in range(shape[1])] for _ in range(shape[0])]).int() for _ in "se"]
    valid = None
    if data.draw(st.booleans()):
        valid = torch.tensor([[data.draw(st.booleans()) for _ in range(k_len)]], dtype=torch.bool)
    return SpanMask(*spans, valid)


@given(st.data(), lengths)
def test_and_is_the_intersection(data: st.DataObject, k_len: int) -> None:
    a, b = _any_mask(data, k_len), _any_mask(data, k_len)
    want = a.to_dense(k_len) & b.to_dense(k_len)
    same(a & b, want.expand(torch.broadcast_shapes(want.shape, (a & b).to_dense(k_len).shape)))
    same(b & a, (a & b).to_dense(k_len))
    same(a & a, a.to_dense(k_len))


@given(st.data(), lengths)
def test_there_and_back(data: st.DataObject, k_len: int) -> None:
    want = _any_mask(data, k_len).to_dense(k_len)
    same(SpanMask.from_dense(want), want)
    same(SpanMask.from_dense(want[:, 0]), want)
    same(SpanMask.from_key_mask(want[:, 0, 0]), want[:, :, :1])


@given(st.data(), st.integers(1, 3), st.integers(0, 4))
def test_from_dense_is_right_or_refuses(data: st.DataObject, q_len: int, k_len: int) -> None:
    """Refused exactly where some key inside a row's run is hidden from that row and seen by another."""
    bits = [[[data.draw(st.booleans()) for _ in range(k_len)] for _ in range(q_len)]]
    want = torch.tensor(bits, dtype=torch.bool).view(1, q_len, k_len)

    def holes(i: int) -> list[int]:
        seen = [j for j in range(k_len) if bits[0][i][j]]
        return [j for j in range(k_len) if seen and seen[0] < j < seen[-1] and not bits[0][i][j]]

    possible = not any(bits[0][other][j] for i in range(q_len) for j in holes(i) for other in range(q_len))
    mask = SpanMask.try_from_dense(want)
    assert (mask is not None) == possible
    if mask is not None:
        same(mask, want[:, None])
    else:
        with pytest.raises(ValueError, match=r"dense must be a run of keys per query; query \d+ of sequence 0"):
            SpanMask.from_dense(want)


def test_moves_and_shapes() -> None:
    mask = SpanMask.causal(3, 4) & SpanMask.from_key_mask(torch.ones(2, 4).bool())
    assert mask.shape == (2, 3) and mask.device.type == "cpu"
    moved = mask.to("meta")
    assert {t.device.type for t in (moved.start, moved.end, moved.key_valid)} == {"meta"}
    assert moved.shape == (2, 3) and SpanMask.causal(3, 4, "meta").device.type == "meta"


@pytest.mark.gpu
def test_moves_to_a_gpu() -> None:
    mask = SpanMask.causal(3, 4) & SpanMask.from_key_mask(torch.ones(2, 4).bool())
    assert torch.equal(mask.to("cuda").to_dense(4).cpu(), mask.to_dense(4))


def test_constructors_compile() -> None:
    index, sizes, valid = torch.tensor([[0, 1, 1], [-1, 0, 1]]), torch.tensor([4, 2]), torch.rand(2, 4) < 0.5

    def build(index: Tensor, sizes: Tensor, valid: Tensor, given: SpanMask) -> Tensor:
        masks = (
            given,
            SpanMask.key_padding(sizes),
            SpanMask.left_padding(sizes, 4),
            SpanMask.from_key_mask(valid),
            SpanMask.causal(3, 4),
            SpanMask.prefix_lm(sizes, 3, 4),
            SpanMask.media(index, 2),
            SpanMask.media(index, media_offsets=torch.tensor([0, 1, 4])),
            SpanMask.packed(torch.tensor([1, 2]), torch.tensor([2, 2]), q_len=3),
            SpanMask.window(1, 1, 3, 4),
        )
        first = masks[0]
        every = torch.stack([m.to_dense(4).expand(2, 1, 3, 4) for m in masks])
        for mask in masks[1:]:
            first = first & mask
        return torch.cat([every, first.to("cpu").to_dense(4).expand(1, 2, 1, 3, 4)])

    args = (index, sizes, valid, SpanMask.key_padding([3, 4]))
    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), build(*args))


def test_survives_export_as_an_input() -> None:
    class Dense(torch.nn.Module):
        def forward(self, mask: SpanMask) -> Tensor:
            return mask.to_dense(4)

    mask = SpanMask.causal(3, 4)
    assert torch.equal(torch.export.export(Dense(), (mask,)).module()(mask), mask.to_dense(4))


# Bad input.

S, E = torch.zeros(2, 3).int(), torch.ones(2, 3).int()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "start list": (lambda: SpanMask([[0]], E), TypeError, "start must be an int32 tensor, got list"),  # type: ignore[arg-type]
    "start int64": (lambda: SpanMask(S.long(), E), TypeError, "start must be an int32 tensor, got a torch.int64"),
    "end 1-D": (lambda: SpanMask(S, E[0]), ValueError, r"end must be \[B or 1, Lq or 1\], got shape \(3,\)"),
    "shapes": (lambda: SpanMask(S, E[:, :2]), ValueError, "start and end must broadcast"),
    "valid dtype": (lambda: SpanMask(S, E, E), TypeError, "key_valid must be a bool tensor, got a torch.int32"),
    "valid dims": (lambda: SpanMask(S, E, E[0].bool()), ValueError, r"key_valid must be \[B or 1, Lk\]"),
    "valid batch": (
        lambda: SpanMask(S, E, torch.ones(3, 4).bool()),
        ValueError,
        "key_valid and the spans must broadcast",
    ),
    "devices": (lambda: SpanMask(S, E.to("meta")), ValueError, "must be on one device, got cpu, meta"),
    "negative length": (
        lambda: SpanMask.key_padding([3, -1]),
        ValueError,
        "lengths must be from 0 to 2147483647, got -1",
    ),
    "float lengths": (
        lambda: SpanMask.key_padding(torch.ones(2)),
        TypeError,
        "lengths must be integers, got torch.float32",
    ),
    "2-D lengths": (lambda: SpanMask.key_padding(E), ValueError, r"lengths must be \[B\], got shape \(2, 3\)"),
    "too long": (lambda: SpanMask.left_padding([5], 4), ValueError, "lengths must be from 0 to 4, got 5"),
    "prefix": (lambda: SpanMask.prefix_lm([9], 3, 4), ValueError, "prefix_lengths must be from 0 to 4, got 9"),
    "window": (lambda: SpanMask.window(-1, 0, 3, 4), ValueError, "left must be >= 0 or None"),
    "a float for a size": (lambda: SpanMask.causal(3 / 2, 4), TypeError, "q_len must be an integer, got 1.5"),
    "a bool for a size": (
        lambda: SpanMask.window(True, 0, 3, 4),
        TypeError,
        r"left must be an integer or None \(unlimited\), got bool",
    ),
    "a float for tokens": (lambda: SpanMask.media(E, 2.0), TypeError, "tokens_per_media must be an integer, got 2.0"),
    "a float for keys": (lambda: SpanMask.left_padding([1], 2.0), TypeError, "k_len must be an integer, got 2.0"),
    "negative q_len": (lambda: SpanMask.causal(-1, 4), ValueError, "q_len must be >= 0, got -1"),
    "media index": (lambda: SpanMask.media(E.float(), 2), TypeError, "media_index must be an integer tensor"),
    "media below -1": (lambda: SpanMask.media(-2 * E, 2), IndexError, "media_index must be >= -1, got -2"),
    "media above": (lambda: SpanMask.media(E, media_offsets=[0, 4]), IndexError, "media_index must be <= 0, got 1"),
    "media both": (lambda: SpanMask.media(E, 2, media_offsets=[0, 4]), ValueError, "one of the two"),
    "media neither": (lambda: SpanMask.media(E), ValueError, "one of the two"),
    "media 1-D": (lambda: SpanMask.media(E[0], 2), ValueError, r"media_index must be \[B, Lq\]"),
    "media tokens": (lambda: SpanMask.media(E, -2), ValueError, "tokens_per_media must be >= 0, got -2"),
    "media offsets batch": (
        lambda: SpanMask.media(E, media_offsets=torch.zeros(3, 4).int()),
        ValueError,
        r"media_offsets must be \[M \+ 1\] or \[2, M \+ 1\]",
    ),
    "media offsets float": (
        lambda: SpanMask.media(E, media_offsets=torch.tensor([0.0, 3.7, 4.0])),
        TypeError,
        "media_offsets must be integers",
    ),
    "media offsets negative": (
        lambda: SpanMask.media(E, media_offsets=[-1, 3, 4]),
        ValueError,
        "media_offsets must be from 0",
    ),
    "media offsets falling": (
        lambda: SpanMask.media(E, media_offsets=[0, 4, 3]),
        ValueError,
        "the differences of media_offsets must be >= 0, got -1",
    ),
    "length past int32": (
        lambda: SpanMask.key_padding([2**32 + 3]),
        ValueError,
        "lengths must be from 0 to 2147483647",
    ),
    "packed q_len": (lambda: SpanMask.packed([1], [1], q_len=-1), ValueError, "q_len must be >= 0, got -1"),
    "packed": (lambda: SpanMask.packed([1], [1, 2]), ValueError, "must have one length, got 1 and 2"),
    "key mask": (lambda: SpanMask.from_key_mask(E), TypeError, "key_mask must be a bool tensor"),
    "dense": (lambda: SpanMask.from_dense(torch.ones(2, 2, 3, 4).bool()), ValueError, "dense must be"),
    "dense float": (lambda: SpanMask.from_dense(torch.ones(2, 3, 4)), TypeError, "dense must be a bool tensor"),
    "and shapes": (lambda: SpanMask(S, E) & SpanMask.causal(4, 4), ValueError, "the two masks must broadcast"),
    "and type": (lambda: SpanMask(S, E) & 3, TypeError, "unsupported operand"),  # type: ignore[operator]
    "k_len": (
        lambda: SpanMask.from_key_mask(torch.ones(1, 4).bool()).to_dense(5),
        ValueError,
        "k_len must be key_valid's 4, got 5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
