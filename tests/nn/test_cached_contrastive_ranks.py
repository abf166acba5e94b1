"""`CachedContrastive` on ranks: with DDP and FSDP2 its gradients are those of one process with the whole batch."""

from __future__ import annotations

import cached_on_ranks
import pytest
import ranks

SIZES = [
    pytest.param([11, 2], id="11,2"),
    pytest.param([9, 0, 3], id="9,0,3", marks=pytest.mark.slow),
    pytest.param([4, 0, 4, 4], id="4,0,4,4"),
]
"""Rows of each rank: chunks in different numbers, none, and as many on each. Four ranks try fewer wrappers."""


@pytest.mark.parametrize("sizes", SIZES)
def test_ddp(sizes: list[int]) -> None:
    ranks.run(len(sizes), cached_on_ranks.with_ddp, sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_fsdp2(sizes: list[int]) -> None:
    ranks.run(len(sizes), cached_on_ranks.with_fsdp, sizes)


def test_dropout() -> None:
    ranks.run(2, cached_on_ranks.with_dropout, [9, 6])


def test_a_rank_with_bad_input_makes_all_raise() -> None:
    own, told = reversed(ranks.run(2, cached_on_ranks.with_bad_input))
    rows = "inputs[0] must hold tensors of as many rows, got 4 and 3"
    assert own == [rows, "encoders[0] must return a row for each of 2 rows, got shape (1, 12)", rows]
    assert told == [f"CachedContrastive: rank 1 of the group has bad input: ValueError: {error}" for error in own]


def test_synchronised_norms_make_as_many_passes() -> None:
    ranks.run(2, cached_on_ranks.with_synchronised_norms)


def test_an_error_changes_nothing() -> None:
    ranks.run(1, cached_on_ranks.with_an_error)


def test_fsdp2_refuses_a_step_after_an_error() -> None:
    for error in ranks.run(2, cached_on_ranks.with_an_error_where_sharded):
        assert error.startswith("the model must be built and sharded anew: a step ended in an error, and FSDP2 keeps")


def test_sparse_gradients() -> None:
    ranks.run(2, cached_on_ranks.with_sparse_gradients)


def test_one_rank_alone_without_gradients() -> None:
    first, other = ranks.run(2, cached_on_ranks.without_gradients, timeout=5.0)
    assert first > 0 and other is None


def test_compiled_and_checkpointed_encoders() -> None:
    ranks.run(2, cached_on_ranks.with_compiled_and_checkpointed, [9, 6])


def test_wrappers_that_do_not_work() -> None:
    (errors,) = ranks.run(1, cached_on_ranks.with_what_does_not_work)
    static, fsdp = errors
    assert static.startswith("static_graph must be False, as PyTorch counts the passes of a step, which has many here")
    assert fsdp == "modules must use fully_shard (FSDP2), got a FullyShardedDataParallel (FSDP1)"
