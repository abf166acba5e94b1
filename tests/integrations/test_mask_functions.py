"""transformers' mask functions read as spans, against their evaluation for every pair of a query and a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as theirs

from mmkernels.integrations.transformers import Calls, counting
from mmkernels.integrations.transformers.masks import make_mask
from mmkernels.integrations.transformers.model_mask import ModelMask
from mmkernels.masks import SpanMask

B, L = 3, 12
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1], [0] * 3 + [-1] * 9, [-1] * 6 + [0] * 6])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]).expand(B, -1)
SEQUENCES = theirs.find_packed_sequence_indices(POSITIONS)

IMAGE = BLOCKS >= 0
TIMES = 1_700_000_000_000 + POSITIONS * 1000 * torch.tensor([[1], [-1], [1]])  # milliseconds

causal = theirs.causal_mask_function


def pack(function: Callable[..., Any], positions: torch.Tensor, sequences: torch.Tensor) -> Callable[..., Any]:
    """`function` inside each of the sequences of a row, as transformers joins it with them."""
    inside = lambda b, h, q, k: function(b, h, positions[b, q], positions[b, k])
    return theirs.and_masks(theirs.packed_sequence_mask_function(sequences), inside)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "bidirectional": theirs.bidirectional_mask_function,
    "sliding": theirs.sliding_window_causal_mask_function(3),
    "sliding both ways": theirs.sliding_window_bidirectional_mask_function(2),
    "chunks": theirs.chunked_causal_mask_function(4, torch.tensor([4, 1, 0])),
    "image blocks": theirs.or_masks(causal, theirs.blockwise_overlay(BLOCKS)),
    "image blocks in a window": theirs.and_masks(
        theirs.or_masks(causal, theirs.blockwise_overlay(BLOCKS)), theirs.sliding_window_overlay(4)
    ),
    "prefix": theirs.or_masks(causal, theirs.blockwise_overlay(torch.tensor([[0] * 5 + [-1] * 7] * B))),
    "packed": pack(causal, POSITIONS, SEQUENCES),
    "packed sliding": pack(theirs.sliding_window_causal_mask_function(2), POSITIONS, SEQUENCES),
    "packed chunks": pack(
        theirs.chunked_causal_mask_function(2, torch.zeros(B, dtype=torch.int64)), POSITIONS, SEQUENCES
    ),
    "a constant": theirs.or_masks(causal, lambda *_: torch.tensor(True)),
    "blocks of three": lambda b, h, q, k: (k // 3 <= q // 3) & (k + 5 >= q),
    "a distance": lambda b, h, q, k: (q - k < 4) & (k - q <= 1),
    "written backwards": lambda b, h, q, k: (q > 2) & (q >= k) & (k - q > -5),
    "first queries see nothing": lambda b, h, q, k: (q >= 3) & (k <= q),
}
NO_SPANS: dict[str, tuple[Callable[..., Any], str]] = {
    "every other": (lambda b, h, q, k: (q + k) % 2 == 0, "combines a query's and a key's index by add"),
    "where": (lambda b, h, q, k: torch.where(q > k, True, False), "calls torch's where"),
    "by head": (lambda b, h, q, k: k <= q + h, "differs by head"),
    "split block": (
        theirs.or_masks(causal, theirs.blockwise_overlay(torch.tensor([[0, 0, -1, -1, 0, 0] * 2] * B))),
        "more than one run",
    ),
    "equal conditions": (lambda b, h, q, k: (q < 3) == (k < 3), "are equal"),
    "all but a distance": (lambda b, h, q, k: (k <= q) & ((q - k) != 2), "differ"),
    "one distance": (lambda b, h, q, k: (q - k) == 0, "are equal"),
    "tables of bools": (lambda b, h, q, k: (k <= q) | (IMAGE[b, q] == IMAGE[b, k]), "are equal"),
    "a condition against a number": (lambda b, h, q, k: (k <= q) | (IMAGE[b, k] == 1), "are equal"),
    "other dtypes": (
        lambda b, h, q, k: BLOCKS[b, q].to(torch.bool) == BLOCKS[b, k].to(torch.bool),
        "changes dtypes",
    ),
    "arguments by name": (lambda b, h, q, k: k <= torch.add(q, 1, alpha=2), "torch's add with alpha"),
    "times of day": (lambda b, h, q, k: (SEQUENCES[b, q] == SEQUENCES[b, k]) & (TIMES[b, k] <= TIMES[b, q]), "run"),
    "only far away": (lambda b, h, q, k: abs(q - k) > 3, "hides what is near"),
    "not": (lambda b, h, q, k: ~(k <= q), "TypeError"),
    "far or near": (lambda b, h, q, k: (k <= q - 6) | (k >= q), "more than one run"),
}


def padding(kind: str) -> torch.Tensor | None:
    """bool [B, L]."""
    if kind == "none":
        return None
    mask = torch.arange(L) >= torch.tensor([4, 1, 0])[:, None]
    if kind == "right":
        mask = mask.flip(1)
    if kind == "holes":
        mask[2, 5] = False
    return mask


def both(
    function: Callable[..., Any], keys: torch.Tensor | None, q_length: int = L, kv_length: int = L, **offsets: Any
) -> tuple[Any, torch.Tensor, Calls]:
    """Returns our mask, transformers' mask, and what ours counted."""
    sizes = {"batch_size": B, "q_length": q_length, "kv_length": kv_length, **offsets}
    given = {**sizes, "mask_function": function, "attention_mask": keys}
    with counting() as calls:
        ours = make_mask(**given)
    return ours, theirs.sdpa_mask(**given, allow_is_causal_skip=False), calls


def dense(mask: ModelMask, like: torch.Tensor) -> torch.Tensor:
    assert type(mask) is ModelMask and mask.shape == like.shape
    return mask.dense()


@pytest.mark.parametrize("padded", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_spans_equal_the_function(name: str, padded: str) -> None:
    ours, truth, calls = both(FUNCTIONS[name], padding(padded))
    assert torch.equal(dense(ours, truth), truth)
    assert (ours.visible.key_valid is not None) == (padded == "holes"), "padding at an end needs no mask of keys"
    assert calls.conversions == 1 and not calls.reasons


@pytest.mark.parametrize("padded", ["none", "left", "holes"])
@pytest.mark.parametrize("name", NO_SPANS)
def test_masks_without_spans_become_dense_with_a_reason(name: str, padded: str) -> None:
    function, reason = NO_SPANS[name]
    ours, truth, calls = both(function, padding(padded))
    assert isinstance(ours.visible, torch.Tensor) and torch.equal(dense(ours, truth), truth)
    assert len(calls.reasons) == 1 and reason in next(iter(calls.reasons))


@pytest.mark.parametrize("name", ["causal", "sliding"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("q_offset", "kv_offset", "q_length", "kv_length"),
    [(9, 0, 1, 10), (9, 0, 3, 12), (0, 0, 3, 12), (torch.tensor(4), 0, 2, 12), (10, 5, 1, 6), (10, 5, 3, 8)],
)
def test_caches(
    name: str, padded: bool, q_offset: int | torch.Tensor, kv_offset: int, q_length: int, kv_length: int
) -> None:
    """Dynamic caches; static ones, with unused keys and a tensor as offset; sliding ones, which drop keys."""
    mask = torch.ones(B, int(q_offset) + q_length, dtype=torch.bool)
    mask[0, :7] = False
    offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
    ours, truth, _ = both(FUNCTIONS[name], mask if padded else None, q_length, kv_length, **offsets)
    assert ours.visible is not None or q_length == 1
    assert torch.equal(dense(ours, truth), truth)


def test_the_newest_token_sees_everything() -> None:
    """One query and a growing cache: nothing is hidden. The mask is never None, which not every model ignores."""
    step = {"batch_size": B, "q_length": 1, "kv_length": L, "q_offset": L - 1}
    assert make_mask(**step).visible is None
    assert make_mask(**step, attention_mask=torch.ones(B, L, dtype=torch.bool)).visible is None
    assert make_mask(**step, attention_mask=padding("left")).visible is not None
    assert make_mask(**step, allow_is_causal_skip=False).visible is not None


def test_no_padding_both_ways_hides_nothing() -> None:
    both_ways = {"batch_size": B, "q_length": L, "kv_length": L, "mask_function": theirs.bidirectional_mask_function}
    assert make_mask(**both_ways, allow_is_bidirectional_skip=True).visible is None
    padded = make_mask(**both_ways, allow_is_bidirectional_skip=True, attention_mask=padding("right"))
    assert padded.visible is not None and make_mask(**both_ways).visible is not None


@st.composite
def functions(draw: st.DrawFn) -> Callable[..., Any]:
    """Compositions of what transformers offers, with random windows, chunks, blocks and sequences."""
    blocks = torch.tensor([draw(st.lists(st.integers(-1, 2), min_size=L, max_size=L)) for _ in range(B)])
    starts = torch.tensor([draw(st.lists(st.booleans(), min_size=L, max_size=L)) for _ in range(B)])
    starts[:, 0] = True
    place = torch.arange(L)
    positions = place - torch.where(starts, place, 0).cummax(1).values  # each sequence counts from 0
    parts = [
        causal,
        theirs.bidirectional_mask_function,
        theirs.sliding_window_overlay(draw(st.integers(1, L))),
        theirs.sliding_window_bidirectional_overlay(draw(st.integers(0, L))),
        theirs.chunked_overlay(draw(st.integers(1, 5)), torch.tensor([draw(st.integers(0, 4)) for _ in range(B)])),
        theirs.blockwise_overlay(blocks),
        theirs.padding_mask_function(padding(draw(st.sampled_from(["left", "right", "holes"])))),
    ]
    function = draw(st.sampled_from(parts))
    for _ in range(draw(st.integers(0, 3))):
        join = draw(st.sampled_from([theirs.and_masks, theirs.or_masks]))
        function = join(function, draw(st.sampled_from(parts)))
    if draw(st.booleans()):
        sequences = (~starts).logical_not().cumsum(1) - 1
        function = pack(function, positions, sequences)
    return function


@settings(deadline=None, max_examples=300)
@given(functions(), st.sampled_from(["none", "left", "right", "holes"]))
def test_any_composition_is_right(function: Callable[..., Any], padded: str) -> None:
    """As spans or dense, the mask equals the function."""
    ours, truth, calls = both(function, padding(padded))
    assert torch.equal(dense(ours, truth), truth)
    assert isinstance(ours.visible, torch.Tensor) == bool(calls.reasons)


def test_a_function_that_fails_fails_as_with_sdpa() -> None:
    def broken(batch: Any, head: Any, query: Any, key: Any) -> Any:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        make_mask(B, L, L, mask_function=broken)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_graph_keeps_its_padding() -> None:
    """What `torch.jit.trace` saw without padding serves sequences with padding."""

    def matrix(keys: torch.Tensor) -> torch.Tensor:
        mask = make_mask(B, L, L, attention_mask=keys)
        assert isinstance(mask.visible, SpanMask)
        return mask.visible.to_dense(L)

    traced = torch.jit.trace(matrix, torch.ones(B, L, dtype=torch.bool))
    for padded in ("left", "right"):
        truth = theirs.sdpa_mask(B, L, L, attention_mask=padding(padded), allow_is_causal_skip=False)
        assert torch.equal(traced(padding(padded)), truth)


def test_without_values_only_shapes_matter() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        mask = make_mask(B, L, L, attention_mask=torch.ones(B, L, dtype=torch.bool))
    assert isinstance(mask, ModelMask) and mask.shape == (B, 1, L, L)
    assert type(make_mask(B, L, L).visible.end) is torch.Tensor, "nothing of that is kept"


def test_a_mask_of_another_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, Lk\]"):
        make_mask(B, L, L, attention_mask=torch.ones(B, L, L, dtype=torch.bool))


def test_a_mask_that_is_requested_twice_is_made_once() -> None:
    mask = make_mask(2, 3, 4)
    assert make_mask(2, 3, 4, attention_mask=mask) is mask


def test_on_the_meta_device_only_shapes_matter() -> None:
    blocks = theirs.or_masks(causal, theirs.blockwise_overlay(BLOCKS.to("meta")))
    mask = make_mask(B, L, L, mask_function=blocks, attention_mask=padding("left").to("meta"), device="meta")
    assert isinstance(mask, ModelMask) and mask.shape == (B, 1, L, L) and mask.device.type == "meta"
