"""Decode steps over a latent cache: one key head for all query heads, values that are the keys' first channels."""

from __future__ import annotations

import pytest
import torch
from ops.cpu_tools import ISAS, needs_kernels
from torch import Tensor

from mmkernels import BackendError, SpanMask, cross_attention
from mmkernels.ops.attention import plans
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu

LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
MASK = SpanMask.key_padding([150, 61])


def _inputs(rows: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """query [2, rows, 1, dim] and cache [2, 1, 150, dim]."""
    g = torch.Generator().manual_seed(rows)
    query = torch.randn(2, rows, 1, dim, generator=g)
    return query.to(dtype), torch.randn(2, 1, 150, dim, generator=g).to(dtype)


def _error(out: Tensor, query: Tensor, cache: Tensor, value: Tensor) -> float:
    """Returns the relative error."""
    right = cross_attention(query.double(), cache.double(), value.double(), MASK, scale=0.05, backend="reference")
    return float((out.double() - right).norm() / right.norm())


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])
def test_every_number_of_rows(isa: str, dtype: torch.dtype) -> None:
    """Rows are dot products of 1 to 5 at once, or lanes of vectors; values in place, or copied beside the keys."""
    with cpu.use_isa(isa):
        for rows in (1, 2, 3, 5, 7, 8, 9, 17, 70):
            query, cache = _inputs(rows, 37 if rows % 2 else 200, 19, dtype)
            value = cache[..., :19]
            out = cross_attention(query, cache, value, MASK, scale=0.05, backend="cpu")
            assert _error(out, query, cache, value) < LIMITS[dtype]
            apart = cross_attention(query, cache, value.clone(), MASK, scale=0.05, backend="cpu")
            assert torch.equal(out, apart)


@needs_kernels
def test_published_widths_on_several_threads() -> None:
    query, cache = _inputs(16, 576, 512, torch.bfloat16)
    cache = cache.repeat(1, 1, 16, 1)
    torch.set_num_threads(2)  # conftest.py puts the number back
    for value in (cache[..., :512], cache[..., 64:]):  # the second begins elsewhere: it is no part of a key row's front
        out = cross_attention(query, cache, value, scale=0.05, backend="cpu")
        right = cross_attention(query.double(), cache.double(), value.double(), scale=0.05, backend="reference")
        assert float((out.double() - right).norm() / right.norm()) < 5e-3


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hidden_row_of_the_cache_reaches_no_output(bad: float) -> None:
    for dtype in LIMITS:
        query, cache = _inputs(16, 64, 48, dtype)
        clean = cross_attention(query, cache, cache[..., :48], MASK, backend="cpu")
        cache[1, :, 61:] = bad
        assert torch.equal(cross_attention(query, cache, cache[..., :48], MASK, backend="cpu"), clean)
        cache[0, :, 7] = bad
        out = cross_attention(query, cache, cache[..., :48], MASK, backend="cpu")
        assert bool(out[0].isnan().all()) and torch.equal(out[1], clean[1])


def test_what_the_gpu_kernels_take() -> None:
    """576 channels for at most 128 rows and without gradients; 256 for all else."""
    arguments = plans.latent("none")
    for heads, dim, taken in ((16, 576, True), (128, 576, True), (129, 576, False), (16, 592, False), (129, 256, True)):
        query, key = torch.empty(1, heads, 1, dim), torch.empty(1, 1, 4, dim)
        reason = plans.why_not_latent(_Record(query, key, key))
        assert (reason is None) == taken
        assert taken or (reason is not None and f"got {dim}" in reason)
    query, key = torch.empty(1, 16, 1, 576), torch.empty(1, 1, 4, 576)
    gradient = _Record(query, key, key)
    gradient.grad_out = query
    assert "above 256" in str(plans.why_not_latent(gradient))
    assert arguments["value"].data_ptr() == arguments["key"].data_ptr()


class _Record:
    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.query, self.key, self.value = query, key, value
        self.grad_out: Tensor


@pytest.mark.interpreted
@pytest.mark.skipif(not gpu.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or the interpreter")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_triton(shared: bool, masked: bool) -> None:
    """576 channels are two tiles, of which the first serves as the values where these are a view."""
    device = "cpu" if gpu.INTERPRETED else "cuda"
    query, cache = (x[:1].to(device) for x in _inputs(5, 576, 512, torch.float32))
    cache = cache[:, :, :40]
    mask = SpanMask.key_padding([33]) if masked else None
    if masked:
        cache[:, :, 35] = float("nan")
    value = cache[..., :512] if shared else cache[..., :512].clone()
    mask = mask if mask is None else mask.to(device)
    out, lse = cross_attention(query, cache, value, mask, scale=0.05, return_lse=True, backend="triton")
    query, cache, value = query.double(), cache.double(), value.double()
    right, right_lse = cross_attention(query, cache, value, mask, scale=0.05, return_lse=True, backend="reference")
    torch.testing.assert_close(out.double(), right, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), right_lse, rtol=2e-5, atol=2e-5)
    wider = torch.zeros(1, 1, 1, 592, device=device)
    with pytest.raises(BackendError, match="above 576"):
        cross_attention(wider, wider, wider, backend="triton")
