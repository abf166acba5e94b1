"""CoAttention, BiAttention and SelfAttention against formulas written out in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_checks import refused
from torch import Tensor, nn

import mmkernels
from mmkernels import SpanMask
from mmkernels.nn import BiAttention, CoAttention, CrossAttention, SelfAttention, co_attention_mask

BACKENDS = ("chunked", "reference")
F64 = torch.float64


def randomised(module: nn.Module) -> nn.Module:
    """Returns the module in float64 with every parameter drawn, so that biases do something."""
    module = module.to(F64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64) * 0.5)
    return module


def attends(mine: SelfAttention, other: SelfAttention, x: Tensor, y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Returns what x gets from y: the query of x, key and value of y, each with the weights of its own side."""
    q = mine.qkv_proj(x).chunk(3, -1)[0].unflatten(-1, (mine.num_heads, -1))
    k, v = (part.unflatten(-1, (mine.num_heads, -1)) for part in other.qkv_proj(y).chunk(3, -1)[1:])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / mine.head_dim**0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    return mine.out_proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), v).flatten(2))


MODULES: dict[str, Callable[[], CoAttention]] = {
    "own": lambda: CoAttention(12, 10, 4, head_dim=5),
    "own, one width": lambda: CoAttention(12, num_heads=3, bias=False),
    "shared": lambda: CoAttention(12, num_heads=4, shared=True),
}


def valid(length: int, *lengths: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_co_attention(name: str, backend: str) -> None:
    """With padding on both sides, on one and on none; results and all gradients. One row hides a whole side."""
    module = randomised(MODULES[name]())
    other = module.b or module.a
    a = torch.randn(3, 5, module.dim_a, dtype=F64, requires_grad=True)
    b = torch.randn(3, 7, module.dim_b, dtype=F64, requires_grad=True)
    inputs = [a, b, *module.parameters()]
    for valid_a, valid_b in (
        (None, None), (valid(5, 5, 2, 0), None), (None, valid(7, 4)), (valid(5, 3, 5, 1), valid(7, 0, 7, 2)),
    ):  # fmt: skip
        expected = attends(module.a, other, a, b, valid_b), attends(other, module.a, b, a, valid_a)
        with mmkernels.use_backend(backend):
            found = module(a, b, valid_a=valid_a, valid_b=valid_b)
            mask = co_attention_mask(5, 7, valid_a, valid_b)
            assert all(map(torch.equal, found, module(a, b, mask=mask)))
            gradients = torch.autograd.grad([x.cos().sum() for x in found], inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad([x.cos().sum() for x in expected], inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bi_attention(backend: str) -> None:
    """One matrix of scores: softmax over its rows for one side, over its columns for the other one."""
    module = randomised(BiAttention(12, 10, 4, head_dim=5))
    a = torch.randn(3, 5, 12, dtype=F64, requires_grad=True)
    b = torch.randn(3, 7, 10, dtype=F64, requires_grad=True)
    inputs = [a, b, *module.parameters()]
    for valid_a, valid_b in ((None, None), (valid(5, 5, 2, 1), valid(7, 4))):
        (key_a, value_a), (key_b, value_b) = (
            [x.unflatten(-1, (4, 5)) for x in projected.chunk(2, -1)]
            for projected in (module.a_proj(a), module.b_proj(b))
        )
        scores = torch.einsum("bihd,bjhd->bhij", key_a, key_b) / 5**0.5
        rows = scores if valid_b is None else scores.masked_fill(~valid_b[:, None, None], -torch.inf)
        columns = scores if valid_a is None else scores.masked_fill(~valid_a[:, None, :, None], -torch.inf)
        expected = (
            module.a_out_proj(torch.einsum("bhij,bjhd->bihd", rows.softmax(3), value_b).flatten(2)),
            module.b_out_proj(torch.einsum("bhij,bihd->bjhd", columns.softmax(2), value_a).flatten(2)),
        )
        with mmkernels.use_backend(backend):
            found = module(a, b, valid_a=valid_a, valid_b=valid_b)
            gradients = torch.autograd.grad([x.cos().sum() for x in found], inputs)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad([x.cos().sum() for x in expected], inputs))


def test_bad_bi_attention() -> None:
    make = lambda **changes: lambda: BiAttention(**SIZES | changes)
    module, a, b = BiAttention(**SIZES), torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    refused(
        (call, ValueError, match)
        for call, match in (
            (make(dim_a=10), "dim_a must be a multiple of num_heads = 4 where head_dim is None, got 10"),
            (make(dim_b=0), "dim_b must be a positive integer, got 0"),
            (make(dropout=-0.5), r"dropout must be between 0 and 1, got -0\.5"),
            (lambda: module(b, b), r"a must be \[B, L, 12\], got shape \(2, 7, 10\)"),
            (lambda: module(a, b[:, :, :9]), r"b must be \[B, L, 10\], got shape \(2, 7, 9\)"),
            (lambda: module(a, b[:1]), "b must"),
            (lambda: module(a, b, valid_a=valid(7, 3)), "valid_a must be"),
            (lambda: BiAttention(**SIZES, clamp=-1.0)(a, b), "clamp must be a finite number above 0"),
        )
    )


@pytest.mark.parametrize("name", MODULES)
def test_nothing_to_see(name: str) -> None:
    """A side that is hidden or of length 0 gives the bias of the last projection; what is hidden may be NaN."""
    module = randomised(MODULES[name]())
    other = module.b or module.a
    a, b = torch.randn(2, 5, module.dim_a, dtype=F64), torch.randn(2, 7, module.dim_b, dtype=F64)
    none = module(a[:, :0], b)
    hidden = module(torch.full_like(a, torch.nan), b, valid_a=valid(5, 0))
    bias = torch.zeros(module.dim_b, dtype=F64) if other.out_proj.bias is None else other.out_proj.bias
    assert none[0].shape == (2, 0, module.dim_a)
    for x in (none[1], hidden[1]):
        torch.testing.assert_close(x, bias.expand_as(x))
    assert [x.shape for x in module(a[:, :0], b[:, :0])] == [(2, 0, module.dim_a), (2, 0, module.dim_b)]
    assert [x.shape for x in module(a[:0], b[:0])] == [(0, 5, module.dim_a), (0, 7, module.dim_b)]


def test_shared_weights_are_there_once() -> None:
    assert len(list(MODULES["shared"]().parameters())) == 4 and len(list(MODULES["own"]().parameters())) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_self_attention(backend: str) -> None:
    """It is CrossAttention without a context, with three weights in one."""
    ours, theirs = randomised(SelfAttention(12, 3)), randomised(CrossAttention(12, num_heads=3, bias=True))
    projections = theirs.q_proj, theirs.k_proj, theirs.v_proj
    with torch.no_grad():
        ours.qkv_proj.weight.copy_(torch.cat([x.weight for x in projections]))
        ours.qkv_proj.bias.copy_(torch.cat([x.bias for x in projections]))
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 5, 12, dtype=F64, requires_grad=True)
    with mmkernels.use_backend(backend):
        for mask in (None, SpanMask.causal(5, 5), valid(5, 3, 5)[:, None, None].expand(2, 1, 5, 5)):
            found, expected = ours(x, mask), theirs(x, mask=mask)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*(torch.autograd.grad(y.cos().sum(), x) for y in (found, expected)))


def test_dropout() -> None:
    """In training mode alone, on both directions."""
    module = CoAttention(12, 10, 4, head_dim=5, dropout=0.5)
    a, b = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    assert all(not torch.equal(*pair) for pair in zip(module(a, b), module(a, b), strict=True))
    module.eval()
    assert all(map(torch.equal, module(a, b), module(a, b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_and_autocast(dtype: torch.dtype) -> None:
    module = CoAttention(12, 10, 4, head_dim=5)
    a, b = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    expected = module(a, b)
    with torch.autocast("cpu", dtype):
        mixed = module(a, b)
    narrow = module.to(dtype)(a.to(dtype), b.to(dtype))
    for x, y, z in zip(mixed, narrow, expected, strict=True):
        assert x.dtype == y.dtype == dtype
        torch.testing.assert_close(x.float(), z, rtol=0.05, atol=0.05)
        torch.testing.assert_close(y.float(), z, rtol=0.05, atol=0.05)


def test_compiles_whole() -> None:
    module = CoAttention(12, 10, 4, head_dim=5)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for length in (4, 6):
        a, b, seen = torch.randn(2, length, 12), torch.randn(2, 7, 10), valid(length, length, 2)
        torch.testing.assert_close(compiled(a, b, valid_a=seen), module(a, b, valid_a=seen))


SIZES: dict[str, Any] = {"dim_a": 12, "dim_b": 10, "num_heads": 4}


def test_bad_sizes() -> None:
    make = lambda **changes: lambda: CoAttention(**SIZES | changes)
    refused(
        [
            (make(dim_a=10), ValueError, "dim_a must be a multiple of num_heads = 4 where head_dim is None, got 10"),
            (make(dim_a=0), ValueError, "dim_a must be a positive integer, got 0"),
            (make(dim_b=-1), ValueError, "dim_b must be a positive integer, got -1"),
            (make(num_heads=0), ValueError, "num_heads must be a positive integer, got 0"),
            (make(head_dim=0), ValueError, "head_dim must be a positive integer, got 0"),
            (make(dropout=2.0), ValueError, "dropout must be between 0 and 1, got 2.0"),
            (make(shared=True), ValueError, "dim_b must be dim_a = 12 where weights are shared, got 10"),
        ]
    )


def test_bad_inputs() -> None:
    module, a, b = CoAttention(**SIZES), torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    mask = co_attention_mask(5, 7)
    refused(
        (call, TypeError if "bool" in match or "list" in match else ValueError, match)
        for call, match in (
            (lambda: module(b, b), r"a must be \[B, L, 12\], got shape \(2, 7, 10\)"),
            (lambda: module(a, a), r"b must be \[B, L, 10\], got shape \(2, 5, 12\)"),
            (lambda: module(a[0], b), r"a must be \[B, L, 12\], got shape \(5, 12\)"),
            (lambda: module(a, b[:1]), "b must be of a's batch 2, got 1"),
            (lambda: module(a, [b]), "b must be a tensor, got list"),
            (lambda: module(a, b, valid_a=torch.ones(2, 5)), "valid_a must be bool, got torch.float32"),
            (lambda: module(a, b, valid_b=valid(5, 1)), r"valid_b must be \[B or 1, 7\], got shape \(1, 5\)"),
            (lambda: module(a, b, valid_a=valid(5, 1)[0]), r"valid_a must be \[B or 1, 5\], got shape \(5,\)"),
            (lambda: module(a, b, valid_a=valid(5, 1, 2, 3)), "valid_a and valid_b must be of batch 1 or a's 2, got 3"),
            (lambda: module(a, b, valid_a=valid(5, 1), mask=mask), "give valid_a and valid_b, or mask, not both"),
            (lambda: module(a, b[:, :5], mask=mask), "mask must"),
            (
                lambda: module(a, b, mask=co_attention_mask(7, 5)),
                r"mask must be co_attention_mask\(5, 7\), got one for 7 and 5 tokens",
            ),
            (
                lambda: module(torch.randn(2, 7, 12), b[:, :5], mask=mask),
                r"mask must be co_attention_mask\(7, 5\), got one for 5 and 7 tokens",
            ),
            (lambda: co_attention_mask(5, 7, valid(5, 1, 2), valid(7, 1, 2, 3)), "of one batch, or 1, got 2 and 3"),
        )
    )
