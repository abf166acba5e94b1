"""Cross-attention of NaN, inf and very large numbers: hidden ones reach nothing, visible ones are reported."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ops.attention.tools import BACKENDS, INF, NAN, Hidden, check_hidden, dtype_of, each_backend, qkv
from ops.cpu_tools import each_isa, needs_kernels
from pairwise import parametrize

from mmkernels import SpanMask, cross_attention
from mmkernels.runtime import cpu


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


@needs_kernels
def test_splits_of_decode_far_apart_in_score() -> None:
    """The first split's scores are far below the second's; the second query sees none of its keys."""
    torch.set_num_threads(2)
    q, value = torch.ones(1, 1, 2, 64), torch.randn(1, 1, 2100, 64)
    k = torch.linspace(-400, 400, 2100)[:, None].expand(1, 1, 2100, 64) / 8
    mask = SpanMask(torch.tensor([[0, 2000]]).int(), torch.tensor([[2100, 2100]]).int())
    got = cross_attention(q, k, value, mask, return_lse=True, backend="cpu")
    want = cross_attention(q.double(), k.double(), value.double(), mask, return_lse=True, backend="reference")
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


@needs_kernels
@each_isa
@pytest.mark.parametrize("q_len", [1, 20])  # decoding, and panels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_as_pytorch_rounds(dtype: torch.dtype, q_len: int, isa: str) -> None:
    """To the nearest, ties to even, also to numbers below the smallest normal one: one key, whose weight is 1."""
    exponents = torch.arange(-26.0, 4.0)[:, None]  # float16's smallest number is 2^-24
    value = ((1 + torch.arange(32) / 32) * exponents.exp2()).flatten().to(dtype)
    q, k, v = torch.zeros(1, 1, q_len, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype), value[None, None, None]
    gate = torch.tensor(0.7)
    with cpu.use_isa(isa):
        out = cross_attention(q, k, v, gate=gate, backend="cpu")
    assert torch.equal(out, (value.float() * gate.tanh()).to(dtype).expand_as(out))


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
