"""merge_attention, attention_received and attention_weights beyond their specs' cases."""

from __future__ import annotations

import math

import pytest
import torch
from harness import peak_of
from ops.attention.tools import EXACT, dtype_of, each_backend

from mmkernels import SpanMask, attention_received, attention_weights, cross_attention, merge_attention
from mmkernels.runtime import triton as gpu

each_exact_backend = pytest.mark.parametrize("backend", EXACT)


@each_exact_backend
def test_merging_parts_gives_the_whole_and_its_gradients(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 9, 9))
    valid = torch.rand(2, 9) < 0.5
    valid[0, :6] = False  # the first part of sequence 0 shows nothing

    def merged() -> tuple[torch.Tensor, torch.Tensor]:
        parts: list[torch.Tensor] = []
        for keys in (slice(0, 6), slice(6, 9)):
            mask = SpanMask.from_key_mask(valid[:, keys])
            parts += cross_attention(q, k[:, :, keys], v[:, :, keys], mask, return_lse=True)
        return merge_attention(*parts, backend=backend)

    def whole() -> tuple[torch.Tensor, torch.Tensor]:
        return cross_attention(q, k, v, SpanMask.from_key_mask(valid), return_lse=True)

    results = []
    for out, lse in (merged(), whole()):
        loss = out.pow(2).sum() + lse.masked_fill(lse == -math.inf, 0).sin().sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@each_exact_backend
def test_merge_has_second_derivatives(backend: str) -> None:
    shapes = ((1, 2, 2, 3), (1, 2, 2), (1, 2, 2, 3), (1, 2, 2))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    call = lambda *x: merge_attention(*x, backend=backend)
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


@each_backend
def test_received_is_the_column_sum_of_the_weights(backend: str) -> None:
    dtype = dtype_of(backend)
    k_len = 150 if gpu.INTERPRETED else 600
    q, k = torch.randn(2, 4, 40, 8, dtype=dtype), torch.randn(2, 2, k_len, 8, dtype=dtype)
    mask = SpanMask.key_padding([k_len, 77])
    weights = attention_weights(q, k, mask, backend=backend)
    received = attention_received(q, k, mask, backend=backend)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(received, weights.sum(2))
    assert not bool(received[1, :, 77:].any())
    one = torch.zeros(1, 1, 40, dtype=dtype)
    one[..., 7] = 1
    last = attention_received(q, k, mask, query_weights=one, backend=backend)
    torch.testing.assert_close(last, attention_weights(q, k, mask, rows=torch.tensor([7]), backend=backend)[:, :, 0])


@each_backend
def test_weights_times_values_is_cross_attention(backend: str) -> None:
    dtype = dtype_of(backend)
    q, k, v = (torch.randn(2, 2, n, 8, dtype=dtype) for n in (6, 9, 9))
    bias = torch.randn(1, 2, 6, 9, dtype=dtype)
    mask = torch.rand(2, 1, 6, 9) < 0.5
    weights = attention_weights(q, k, mask, bias=bias, scale=0.5, backend=backend)
    torch.testing.assert_close(weights @ v, cross_attention(q, k, v, mask, bias=bias, scale=0.5))
    rows = torch.tensor([[0, 5, 5], [2, 1, 0]])
    chosen = attention_weights(q, k, mask, bias=bias, scale=0.5, rows=rows, backend=backend)
    for b in range(2):
        torch.testing.assert_close(chosen[b], weights[b][:, rows[b]])
    single = attention_weights(q[:, :, :1], k, mask[:, :, :1], rows=torch.tensor([0, 0]), backend=backend)
    assert single.shape == (2, 2, 2, 9)


@each_backend
def test_a_nan_query_spoils_only_what_it_sees(backend: str) -> None:
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    q[0, 0, 1] = math.nan
    received = attention_received(
        q, k, SpanMask.media(torch.tensor([[0, 0, 1]]), media_offsets=[0, 3, 5]), backend=backend
    )
    assert bool(received[0, 0, :3].isnan().all()) and bool(received[0, 0, 3:].isfinite().all())


def test_no_gradient_and_autocast() -> None:
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for out in (attention_received(q, k), attention_weights(q, k)):
            assert not out.requires_grad and out.dtype == torch.float32
    torch.testing.assert_close(attention_received(q, k), attention_received(q.detach(), k.detach()))


def test_received_takes_linear_memory() -> None:
    q, k = torch.randn(1, 8, 2048, 16), torch.randn(1, 8, 2048, 16)
    assert peak_of(lambda: attention_received(q, k)) < 0.1 * 8 * 2048 * 2048 * 4
