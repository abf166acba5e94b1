"""VisualCache and TokenBuffer: append, drop, evict, share."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mmkernels import SpanMask, cross_attention
from mmkernels.nn import TokenBuffer, VisualCache

HEADS, DIM = 2, 4


def visual(lengths: list[int], batch: int = 1, layers: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Returns random keys and values for each layer."""
    shape = (batch, HEADS, sum(lengths), DIM)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]


def filled(lengths: list[int], **options: int) -> tuple[VisualCache, list[tuple[Tensor, Tensor]]]:
    tensors = visual(lengths)
    cache = VisualCache(2, **options)
    cache.append(tensors, lengths)
    return cache, tensors


def test_drop_forgets_one_image_and_keeps_ids() -> None:
    cache, tensors = filled([3, 5, 2])
    assert cache.mask(torch.tensor([[1]])).to_dense(10).sum() == 5  # a table made before the drop must not outlive it
    cache.drop([1])
    assert (cache.image_ids, cache.lengths, cache.num_tokens) == ([0, 2], [3, 2], 5)
    kept = [0, 1, 2, 8, 9]
    for layer in range(2):
        assert torch.equal(cache[layer][0], tensors[layer][0][:, :, kept])
        assert torch.equal(cache[layer][1], tensors[layer][1][:, :, kept])
    mask = cache.mask(torch.tensor([[-1, 0, 1, 2]])).to_dense(5)[0, 0].int()
    assert mask.tolist() == [[0] * 5, [1, 1, 1, 0, 0], [0] * 5, [0, 0, 0, 1, 1]]
    assert cache.append(visual([1]), [1]) == [3]
    cache.clear()
    assert (cache.image_ids, cache.num_tokens, cache[0][0].shape[2]) == ([], 0, 0)
    out = cross_attention(torch.randn(1, HEADS, 3, DIM), *cache[0], cache.mask(torch.tensor([[-1, 0, 3]])))
    assert not out.any()


def test_the_first_append_copies_nothing_and_later_ones_the_new_tokens_alone() -> None:
    cache, tensors = filled([4])
    assert cache[0][0].data_ptr() == tensors[0][0].data_ptr()
    cache.append(visual([1]), [1])
    assert tensors[0][0].shape[2] == 4, "the caller's tensor is not written to"

    cache, _ = filled([4], reserve=16)
    places = [x.data_ptr() for layer in cache for x in layer]
    for _ in range(6):
        cache.append(visual([2]), [2])
    assert [x.data_ptr() for layer in cache for x in layer] == places
    cache.append(visual([2]), [2])
    assert [x.data_ptr() for layer in cache for x in layer] != places
    assert cache.num_tokens == 18


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropping_does_not_write_into_the_callers_tensor(dropped: int) -> None:
    cache, tensors = filled([3, 5, 2])
    before = tensors[0][0].clone()
    cache.drop([dropped])
    cache.append(visual([2]), [2])
    assert torch.equal(tensors[0][0], before)


def test_the_oldest_are_evicted_under_a_budget() -> None:
    cache, tensors = filled([3, 5, 2], max_tokens=10)
    assert cache.image_ids == [0, 1, 2]
    new = visual([4])
    assert cache.append(new, [4]) == [3]
    assert (cache.image_ids, cache.num_tokens) == ([2, 3], 6)
    expected = torch.cat([tensors[1][0][:, :, 8:], new[1][0]], dim=2)
    assert torch.equal(cache[1][0], expected)
    # More new images than fit: the oldest of them are evicted too, and their ids are not used again.
    last = visual([4, 4, 4])
    assert cache.append(last, [4, 4, 4]) == [4, 5, 6]
    assert cache.image_ids == [5, 6]
    assert torch.equal(cache[0][1], last[0][1][:, :, 4:])
    assert not cache.mask(torch.tensor([[0, 3, 4]])).to_dense(8).any()


@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(5, 12)),
    st.integers(0, 20),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_any_history_equals_a_plain_list(
    appends: list[list[int]], max_tokens: int | None, reserve: int, drops: list[int]
) -> None:
    cache = VisualCache(2, max_tokens=max_tokens, reserve=reserve)
    held: dict[int, tuple[Tensor, Tensor]] = {}
    next_id = 0
    for step, lengths in enumerate(appends):
        key, value = visual(lengths, layers=1)[0]
        layers = [(key, value), (value, key)]
        for image in zip(key.split(lengths, 2), value.split(lengths, 2)):
            held[next_id] = image
            next_id += 1
        assert cache.append(layers, lengths) == list(range(next_id - len(lengths), next_id))
        while max_tokens is not None and sum(k.shape[2] for k, _ in held.values()) > max_tokens:
            del held[min(held)]
        if step < len(drops) and drops[step] in held:
            cache.drop([drops[step]])
            del held[drops[step]]
        assert (cache.image_ids, cache.next_id) == (list(held), next_id)
        assert cache.lengths == [k.shape[2] for k, _ in held.values()] and cache.num_tokens == sum(cache.lengths)
        if held:
            keys, values = (torch.cat(tokens, 2) for tokens in zip(*held.values()))
            assert all(map(torch.equal, [*cache[0], *cache[1]], [keys, values, values, keys]))
            assert len(list(cache)) == len(cache)
        visible = cache.mask(torch.arange(-1, next_id)[None]).to_dense(cache.num_tokens)[0, 0]
        owner = torch.tensor([i for i, (k, _) in held.items() for _ in range(k.shape[2])])
        assert torch.equal(visible, torch.arange(-1, next_id)[:, None] == owner)
        assert torch.equal(cache.token_mask(torch.eye(next_id, dtype=torch.bool)[None])[0], visible[1:])


def test_one_image_is_shared_by_many_questions() -> None:
    cache, tensors = filled([3, 4])
    query = torch.randn(5, HEADS, 2, DIM)
    sees = torch.tensor([[0, 0], [1, 1], [-1, 0], [1, 0], [0, -1]])
    key, value = cache[0]
    assert key.shape[0] == cache.batch_size == 1
    assert key.data_ptr() == tensors[0][0].data_ptr()
    out = cross_attention(query, key, value, cache.mask(sees))
    expected = cross_attention(query, *(x.expand(5, -1, -1, -1) for x in (key, value)), cache.mask(sees))
    torch.testing.assert_close(out, expected)


def test_a_batch_of_conversations() -> None:
    cache = VisualCache(1)
    assert cache.batch_size == 0
    tensors = visual([3], batch=2, layers=1)
    cache.append(tensors, [3])
    assert cache.batch_size == 2
    with pytest.raises(ValueError, match=r"key of layer 0 must be \[2, H, 3, D\], got shape \(1, 2, 3, 4\)"):
        cache.append(visual([3], layers=1), [3])


def test_gradients_pass_through() -> None:
    """Training: keys that need a gradient are kept, also those of a second append."""
    first = [(torch.randn(1, HEADS, 3, DIM, requires_grad=True), torch.randn(1, HEADS, 3, DIM, requires_grad=True))]
    second = [(torch.randn(1, HEADS, 2, DIM, requires_grad=True), torch.randn(1, HEADS, 2, DIM, requires_grad=True))]
    query = torch.randn(1, HEADS, 4, DIM)
    cache = VisualCache(1)
    cache.append(first, [3])
    earlier = cross_attention(query, *cache[0])
    cache.append(second, [2])
    later = cross_attention(query, *cache[0], SpanMask.causal(4, 5))
    (earlier.sum() + later.square().sum()).backward()
    joined = [torch.cat([a, b], 2).detach().requires_grad_() for a, b in zip(first[0], second[0])]
    whole = cross_attention(query, *(x[:, :, :3] for x in joined)).sum()
    (whole + cross_attention(query, *joined, SpanMask.causal(4, 5)).square().sum()).backward()
    for place in range(2):
        torch.testing.assert_close(first[0][place].grad, joined[place].grad[:, :, :3])
        torch.testing.assert_close(second[0][place].grad, joined[place].grad[:, :, 3:])


def test_what_is_refused() -> None:
    cache, _ = filled([3], max_tokens=6)
    two, wide = visual([2]), torch.randn(1, HEADS, 2, DIM + 1)
    in_double = [(key.double(), value.double()) for key, value in two]
    for call, match in (
        (lambda: cache.append(visual([2, 7]), [2, 7]), "max_tokens must hold the largest image, of 7 tokens, got 6"),
        (lambda: cache.append(two[:1], [2]), "key_values must be for 2 layers, got 1"),
        (lambda: cache.append(two, [3]), r"key of layer 0 must be \[1, H, 3, D\], got shape \(1, 2, 2, 4\)"),
        (lambda: cache.append(two, [2, 0]), r"lengths must be positive, got \[2, 0\]"),
        (lambda: cache.append([two[0], (two[0][0], wide)], [2]), "value of layer 1 must have .* heads, width, dtype"),
        (lambda: cache.append(in_double, [2]), r"key of layer 0 must have the earlier images'.*torch.float64"),
        (lambda: cache.drop([0, 4, 1]), r"image_ids must be among those held, \[0\], got \[1, 4\]"),
        (lambda: cache.mask(torch.tensor([[-1, 1]])), r"image_ids must be from -1 \(none\) to 0, got -1 to 1"),
        (lambda: cache.mask(torch.tensor([[-2, 0]])), r"got -2 to 0"),
        (lambda: cache.mask(torch.tensor([[0.7]])), r"image_ids must be integers, got torch\.float32"),
        (lambda: cache.token_mask(torch.zeros(1, 2, 3) > 0), r"images must be \[B, Lq, 1\], got shape \(1, 2, 3\)"),
        (lambda: cache.token_mask(torch.ones(1, 2, 1)), r"images must be bool, got torch\.float32"),
        (lambda: VisualCache(0), "num_layers must be a positive integer, got 0"),
        (lambda: VisualCache(1, max_tokens=0), "max_tokens must be a positive integer, got 0"),
        (lambda: VisualCache(1, reserve=-1), "reserve must be >= 0, got -1"),
        (lambda: VisualCache(1)[0], "nothing was appended yet"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
            call()
    assert (cache.image_ids, cache.num_tokens) == ([0], 3), "a refused change leaves the cache as it was"


def test_token_buffer_moves_each_token_a_bounded_number_of_times() -> None:
    buffer, moves, place = TokenBuffer(reserve=1), 0, None
    for _ in range(1000):
        buffer.append(torch.randn(1, 1, 1, 2))
        if buffer.view().data_ptr() != place:
            place, moves = buffer.view().data_ptr(), moves + 1
    assert moves <= 12
    assert len(buffer) == 1000
    with pytest.raises(ValueError, match="start and end must be a range within 0 to 1000, got 5 to 1001"):
        buffer.remove(5, 1001)
