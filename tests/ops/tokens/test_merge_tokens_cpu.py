"""The CPU kernels of the ops that merge tokens: edges of tiles, deep rows, threads, calls that bypass the checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import generator
from ops.cpu_tools import each_dtype, each_isa, needs_kernels

import mmkernels
from mmkernels.ops.tokens.match_tokens.spec import alike, packed
from mmkernels.runtime import cpu

pytestmark = needs_kernels


@each_isa
def test_images_that_end_anywhere_in_a_tile(isa: str) -> None:
    lengths = [*range(1, 40), *range(120, 145)]
    metric = packed(generator(), lengths, 9).float()
    kept = [max(1, 2 * n // 3) for n in lengths]
    want = mmkernels.match_tokens(metric, lengths, kept, backend="chunked")[0]
    with cpu.use_isa(isa):
        assert torch.equal(mmkernels.match_tokens(metric, lengths, kept, backend="cpu")[0], want)


@each_isa
@each_dtype
def test_deep_metrics(isa: str, dtype: torch.dtype) -> None:
    metric = alike(generator(), 90, 1003, 1).to(dtype)
    want = mmkernels.match_tokens(metric, (90,), 30, protect=1, backend="chunked")[0]
    with cpu.use_isa(isa):
        assert torch.equal(mmkernels.match_tokens(metric, (90,), 30, protect=1, backend="cpu")[0], want)


def test_threads_change_no_bit() -> None:
    g = generator()
    x = torch.randn(700, 300, generator=g, requires_grad=True)
    sizes = (0.5 + torch.rand(700, generator=g)).requires_grad_()
    found: list[Any] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        merged, _, total, assignment = mmkernels.merge_tokens(x, (400, 300), 0.4, sizes=sizes, backend="cpu")
        tokens = mmkernels.unmerge_tokens(merged, assignment, backend="cpu")
        found.append((tokens, total, *torch.autograd.grad((tokens.square().sum(), total.square().sum()), (x, sizes))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


MATCH: dict[str, Any] = {"metric": torch.zeros(9, 4), "sizes": None, "lengths": (5, 4), "kept": (3, 3), "protect": 0}
MERGE: dict[str, Any] = {"x": torch.zeros(9, 4), "sizes": None, "assignment": torch.arange(9) // 2, "kept": (3, 2)}


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": (5, 3)},
        {"lengths": (10, -1)},
        {"lengths": (9,)},
        {"kept": (6, 3)},
        {"kept": (0, 3)},
        {"kept": (-1, 3)},
        {"kept": (2, 2), "protect": 2},
        {"protect": -1},
        {"sizes": torch.ones(8)},
        {"metric": torch.zeros(9)},
    ],
    ids=str,
)
def test_a_direct_call_of_matching_is_refused(change: dict[str, Any]) -> None:
    args = MATCH | change
    with pytest.raises((ValueError, TypeError)):
        torch.ops.mmkernels.match_tokens_cpu(*args.values())


@pytest.mark.parametrize(
    "change",
    [
        {"assignment": torch.arange(9)},
        {"assignment": torch.arange(9) - 1},
        {"assignment": torch.arange(8)},
        {"assignment": torch.arange(9.0)},
        {"sizes": torch.ones(8)},
        {"sizes": torch.ones(9).double()},
        {"x": torch.zeros(9)},
        {"x": torch.zeros(9, 4).double()},
    ],
    ids=str,
)
def test_a_direct_call_of_merging_is_refused(change: dict[str, Any]) -> None:
    args = MERGE | change
    with pytest.raises((ValueError, TypeError)):
        torch.ops.mmkernels.merge_tokens_cpu(*args.values())
