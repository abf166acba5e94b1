"""Cross-attention of NaN, inf and very large numbers: hidden ones reach nothing, seen ones are reported."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ops.attention.tools import BACKENDS, INF, NAN, dtype_of, each_backend, qkv
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
def test_non_finite_reaches_only_who_sees_it(backend: str, bad: float, where: str, kind: str) -> None:
    dtype = dtype_of(backend)
    q, k, v = qkv(1, 2, 4, 4, k_len=6, dtype=dtype)
    dense = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    dense[..., :2, 3:] = False  # queries 0 and 1 don't see keys 3 to 5
    dense[..., 5] = False  # nobody sees key 5
    mask: Any = dense
    bias = None
    if kind == "spans":
        mask = SpanMask.from_dense(dense)
    elif kind == "key_valid":
        mask = SpanMask.from_key_mask(dense[:, 0, 3]) & SpanMask(
            torch.tensor([[0]]).int(), torch.tensor([[3, 3, 6, 6]]).int()
        )
    elif kind == "bias":
        mask, bias = None, torch.zeros(1, 1, 4, 6, dtype=dtype).masked_fill(~dense, -INF)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = [x.clone() for x in (q, k, v)]
    grad = torch.randn(1, 2, 4, 4, dtype=dtype)
    dirty_grad = grad.clone()
    spoiled = {
        "key": dirty[1][:, :, 4:],
        "value": dirty[2][:, :, 4:],
        "query": dirty[0][:, :, 3],
        "grad": dirty_grad[:, :, 3],
    }
    spoiled[where][..., 1] = bad
    dirty = [x.requires_grad_() for x in dirty]
    want, got = (cross_attention(*x, mask, bias=bias, backend=backend) for x in (clean, dirty))
    untouched = slice(0, 2) if where in ("key", "value") else slice(0, 3)
    torch.testing.assert_close(got[:, :, untouched], want[:, :, untouched])
    if where in ("key", "value", "query") and bad != -INF:
        assert not bool(got[:, :, 3].isfinite().all())  # who sees it is told
    if where == "grad" and backend == "reference":
        return  # in plain PyTorch 0 * NaN is NaN: the naive model's own behaviour
    gq, gk, gv = torch.autograd.grad(got, dirty, dirty_grad)
    wq, wk, wv = torch.autograd.grad(want, clean, grad)
    torch.testing.assert_close(gq[:, :, untouched], wq[:, :, untouched])
    assert bool((gk[:, :, 5] == 0).all()) and bool((gv[:, :, 5] == 0).all())
    if where in ("query", "grad"):
        return  # its row sees keys 0 to 4, so their gradients may be anything
    assert bool((wk[:, :, 5] == 0).all()) and bool((wv[:, :, 5] == 0).all())


@each_backend
def test_a_seen_value_of_infinity_or_nan_is_reported_in_its_channel(backend: str) -> None:
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
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator, requires_grad=True) for n in (q_len, 6, 6))
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
