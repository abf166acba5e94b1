"""Cross-attention of NaN, inf and very large numbers: hidden ones reach nothing, visible ones are reported."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ops.attention.tools import BACKENDS, INF, NAN, Hidden, check_hidden, dtype_of, each_backend, qkv
from pairwise import parametrize

from mmkernels import SpanMask, cross_attention


@pytest.mark.interpreted
@parametrize(
    "backend, bad, where, kind",
    list(
        itertools.product(
            BACKENDS, (NAN, INF, -INF), ("key", "value", "query", "grad"), ("spans", "dense", "key_valid", "bias")
        )
    ),
    ids=lambda row: "-".join(map(str, row)),
)
def test_non_finite_reaches_only_what_sees_it(backend: str, bad: float, where: str, kind: str) -> None:
    check_hidden(backend, dtype_of(backend), Hidden(4, 6, blind=2, edge=3, key=4, row=3), kind, where, bad, dim=4)


@each_backend
def test_a_visible_value_of_infinity_or_nan_is_reported_in_its_channel(backend: str) -> None:
    dtype = dtype_of(backend)
    q, k, v = qkv(1, 1, 3, 4, k_len=4, dtype=dtype)
    v[0, 0, 3] = torch.tensor([INF, -INF, NAN, 1.0])
    out = cross_attention(q, k, v, SpanMask.key_padding([4]) & SpanMask.causal(3, 4), backend=backend)
    assert bool(out[0, 0, :2].isfinite().all())
    assert out[0, 0, 2, 0] == INF and out[0, 0, 2, 1] == -INF and out[0, 0, 2, 2].isnan() and out[0, 0, 2, 3].isfinite()


@each_backend
@pytest.mark.parametrize("mask", [None, SpanMask.key_padding([3]), torch.tensor([True, True, True, False])])
@pytest.mark.parametrize("bad", [INF, -INF])
def test_a_row_of_infinite_scores_is_nan_not_nothing(backend: str, mask: Any, bad: float) -> None:
    q = torch.tensor([[[[bad, 1.0], [1.0, 1.0]]]])
    k = torch.tensor([[[[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]]])
    out = cross_attention(q, k, k, mask, backend=backend)
    assert bool(out[0, 0, 0].isnan().all()) and bool(out[0, 0, 1].isfinite().all())


@each_backend
@pytest.mark.parametrize("mask", [None, SpanMask.key_padding([2])])
def test_a_score_that_overflows_behind_a_hiding_bias_stays_hidden(backend: str, mask: Any) -> None:
    q, k = torch.tensor([[[[3e19]]]]), torch.tensor([[[[1e-19], [3e19]]]])
    v = torch.tensor([[[[1.0], [5.0]]]])
    out = cross_attention(q, k, v, mask, bias=torch.tensor([0.0, -INF]), backend=backend)
    assert out.item() == 1.0


@each_backend
def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = (1e4 * x for x in qkv(dtype=torch.float32))
    out, lse = cross_attention(q, k, v, return_lse=True, backend=backend)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


@each_backend
@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("low", [-1e20, -3e38, torch.finfo(torch.float32).min])
def test_a_row_whose_every_bias_is_very_low_is_still_a_mean(backend: str, low: float, q_len: int) -> None:
    """As a mask of numbers makes it; where nothing comes back to that row, no gradient is NaN either."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (q_len, 6, 6))
    bias = torch.zeros(q_len, 6)
    bias[0] = low
    out = cross_attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out[:, :, 0], v.mean(2))
    sent = torch.ones_like(out)
    sent[:, :, 0] = 0.0
    ours = torch.autograd.grad(out, (q, k, v), sent)
    wide = [x.double() for x in (q, k, v)]
    truth = torch.autograd.grad(cross_attention(*wide, bias=bias, backend="reference"), (q, k, v), sent.double())
    torch.testing.assert_close(ours, truth)
