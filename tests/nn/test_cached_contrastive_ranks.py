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
"""Rows of each rank: chunks in different numbers, none, and as many on each."""


@pytest.mark.parametrize("sizes", SIZES)
def test_ddp(sizes: list[int]) -> None:
    ranks.run(len(sizes), cached_on_ranks.with_ddp, sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_fsdp2(sizes: list[int]) -> None:
    ranks.run(len(sizes), cached_on_ranks.with_fsdp, sizes)


def test_dropout() -> None:
    ranks.run(2, cached_on_ranks.with_dropout, [9, 6])


def test_an_error_changes_nothing() -> None:
    ranks.run(1, cached_on_ranks.with_an_error)


def test_compiled_and_checkpointed_encoders() -> None:
    ranks.run(2, cached_on_ranks.with_compiled_and_checkpointed, [9, 6])


def test_wrappers_that_do_not_work() -> None:
    (errors,) = ranks.run(1, cached_on_ranks.with_what_does_not_work)
    static, fsdp = errors
    assert static.startswith("static_graph must be False, as PyTorch counts the passes of a step, which has many here")
    assert fsdp == "modules must use fully_shard (FSDP2), got a FullyShardedDataParallel (FSDP1)"
