"""The linear ops over ranks that share the vocabulary: the results of one process that has all tokens."""

from __future__ import annotations

import pytest
import ranks
import shards
import torch
from harness import SPECS, backends

NAMES = list(shards.CALLS)


@pytest.mark.parametrize("sizes", [[11, 12], [20, 2, 1], [0, 22, 1]], ids=str)
def test_as_one_process(sizes: list[int]) -> None:
    """Uneven shards, one of them empty; hidden's gradient is complete on every rank, and the loss counts once."""
    parts = ranks.run(len(sizes), shards.compute, sizes, NAMES, torch.float64, None)
    for number, name in enumerate(NAMES):
        whole = shards.results(shards.problem(name), torch.float64)
        heads = 2 if "bias" in shards.problem(name) or "linear_bias" in shards.problem(name) else 1
        for part in parts:
            torch.testing.assert_close(part[number][:-heads], whole[:-heads], rtol=1e-12, atol=1e-12, msg=name)
        for place in range(-heads, 0):
            together = torch.cat([part[number][place] for part in parts])
            torch.testing.assert_close(together, whole[place], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_shards(dtype: torch.dtype) -> None:
    """By the fastest backend, to what it computes alone."""
    (backend, *_) = backends(SPECS["linear_logprobs"], dtype)
    parts = ranks.run(2, shards.compute, [9, 14], ["everything"], dtype, backend)
    whole = shards.results(shards.problem("everything"), dtype, backend)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for part in parts:
        torch.testing.assert_close(part[0][:-2], whole[:-2], **close)
    torch.testing.assert_close(torch.cat([part[0][-2] for part in parts]), whole[-2], **close)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("channels", "the number of channels must be the same on every rank of the group, got 6 on rank 0 and 4"),
        ("rows", "the number of rows must be the same on every rank"),
        ("target", "target must be the same on every rank of the group"),
        ("temperature", "temperature must be the same on every rank of the group, got 1.0 on rank 0 and 2.0 on rank 1"),
        ("entropy", "entropy must be the same on every rank"),
        ("class weights of a shard", "weight must be [23], one for each token of all ranks, got [10]"),
        ("a token that nobody has", "target must be below 23, as many tokens as all ranks have"),
        ("hidden's gradient", "whether hidden needs a gradient must be the same on every rank"),
    ],
)
def test_ranks_that_disagree(name: str, message: str) -> None:
    found = ranks.run(2, shards.disagree, name)
    assert all(x.startswith("ValueError: ") and message in x for x in found), found


def test_bad_input_of_one_rank() -> None:
    first, second = ranks.run(2, shards.disagree, "bad input")
    assert first == "ValueError: linear_logprobs: rank 1 of the group has bad input: " + second
    assert second == "TypeError: target must be int64, got torch.float32"


def test_compiled() -> None:
    ranks.run(2, shards.compiled, [10, 13])
