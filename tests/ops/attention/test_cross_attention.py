"""Cross-attention beyond its spec's cases: against PyTorch, higher derivatives, dropout, hidden NaN, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, check, examples, peak_of, reseed
from hypothesis import given
from hypothesis import strategies as st
from ops.attention.tools import BACKENDS, EXACT, INF, dtype_of, each_backend, qkv
from torch import Tensor

from mmkernels import SpanMask, cross_attention, use_backend
from mmkernels.ops.attention import tiles
from mmkernels.ops.attention.philox import keep_mask

each_exact_backend = pytest.mark.parametrize("backend", EXACT)
# Against definitions that are not ours.


@each_backend
def test_equals_pytorch(backend: str) -> None:
    dtype = dtype_of(backend)
    q, k, v = qkv(dtype=dtype)
    dense = torch.rand(2, 1, 5, 7) < 0.7
    dense[..., 0] = True  # PyTorch leaves rows that see nothing undefined
    bias = torch.randn(2, 2, 5, 7, dtype=dtype)
    for mask, extra, theirs in (
        (None, None, None),
        (dense, None, dense),
        (None, bias, bias),
        (dense, bias, bias.masked_fill(~dense, -INF)),
    ):
        ours = cross_attention(q, k, v, mask, bias=extra, scale=0.2, backend=backend)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, theirs, scale=0.2))


@each_backend
def test_equals_a_loop_over_queries(backend: str) -> None:
    dtype = dtype_of(backend)
    q, k, v = qkv(2, 4, 5, 8, dtype=dtype)
    k, v = k[:, :2], v[:, :2]
    mask = SpanMask.media(torch.tensor([[0, 1, -1, 2, 2], [-1, 0, 0, 0, 1]]), media_offsets=[0, 2, 3, 7])
    gate = torch.randn(4, dtype=dtype)
    out, lse = cross_attention(q, k, v, mask, gate=gate, return_lse=True, backend=backend)
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        start, end = int(mask.start[b, i]), int(mask.end[b, i])
        if start == end:
            assert bool((out[b, h, i] == 0).all()) and lse[b, h, i] == -INF
            continue
        scores = k[b, h // 2, start:end] @ q[b, h, i] / math.sqrt(8)
        want = torch.tanh(gate[h]) * scores.softmax(0) @ v[b, h // 2, start:end]
        torch.testing.assert_close(out[b, h, i], want)
        torch.testing.assert_close(lse[b, h, i], scores.logsumexp(0))


@each_backend
@examples(100, interpreted=15)
@given(data=st.data())
def test_any_spans(backend: str, data: st.DataObject) -> None:
    """Whatever the spans, in or out of range, the result is that of the dense mask they stand for."""
    dtype = dtype_of(backend)
    batch, q_len, k_len = (data.draw(st.integers(1, 3)) for _ in range(3))
    k_len *= data.draw(st.sampled_from([1, 5]))
    bound = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, k_len + 2)

    def spans(b: int, i: int) -> Tensor:
        return torch.tensor([[data.draw(bound) for _ in range(i)] for _ in range(b)], dtype=torch.int32)

    shape = (data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, q_len])))
    valid = None
    if data.draw(st.booleans()):
        valid = torch.tensor([[data.draw(st.booleans()) for _ in range(k_len)]])
    mask = SpanMask(spans(*shape), spans(*shape), valid)
    q, k, v = qkv(batch, 2, q_len, 4, k_len=k_len, dtype=dtype)
    dense = mask.to_dense(k_len).expand(batch, 1, q_len, k_len)
    out, lse = cross_attention(q, k, v, mask, return_lse=True, backend=backend)
    want, want_lse = cross_attention(q, k, v, dense, return_lse=True, backend="reference")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    sees = dense.any(-1)
    torch.testing.assert_close(want_lse.isneginf(), ~sees.expand(batch, 2, q_len))
    theirs = F.scaled_dot_product_attention(q, k, v, dense)
    torch.testing.assert_close(torch.where(sees[..., None], out, 0), torch.where(sees[..., None], theirs, 0))


def test_span_and_dense_masks_and_a_bias_of_minus_infinity_agree() -> None:
    mask = SpanMask.causal(6, 8) & SpanMask.from_key_mask(torch.rand(2, 8) < 0.7)
    for backend in BACKENDS:
        q, k, v = qkv(2, 2, 6, 8, dtype=dtype_of(backend))
        bias = torch.zeros(2, 1, 6, 8, dtype=q.dtype).masked_fill(~mask.to_dense(8), -INF)
        want = cross_attention(q, k, v, mask, backend=backend)
        torch.testing.assert_close(cross_attention(q, k, v, mask.to_dense(8), backend=backend), want)
        torch.testing.assert_close(cross_attention(q, k, v, bias=bias, backend=backend), want)


# Derivatives.


def _differentiable(backend: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    q, k, v = qkv(2, 2, 2, 2, grad=True, k_len=3)
    bias = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = SpanMask.key_padding([3, 1])

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return cross_attention(q, k, v, mask, bias=bias, gate=gate, return_lse=True, backend=backend)

    return call, (q, k, v, bias, gate)


@each_exact_backend
def test_first_and_second_derivatives(backend: str) -> None:
    call, inputs = _differentiable(backend)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@each_exact_backend
def test_second_derivatives_of_the_output_alone(backend: str) -> None:
    call, inputs = _differentiable(backend)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x)[1], (*inputs[:4], inputs[4].detach()))


@each_exact_backend
def test_third_derivative(backend: str) -> None:
    def third(backend: str) -> Tensor:
        reseed()
        q, k, v = qkv(1, 1, 2, 2, grad=True)
        y = cross_attention(q, k, v, backend=backend).pow(2).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, q, create_graph=True)
            y = g.pow(2).sum()
        return g.detach()

    torch.testing.assert_close(third(backend), third("reference"))
    assert third(backend).abs().max() > 0


# Dropout.


def test_dropout_is_the_same_on_every_backend_and_follows_the_generator() -> None:
    q, k, v = qkv(2, 4, 33, 8, k_len=70, dtype=torch.float32)
    outs = []
    for backend in (*BACKENDS, *BACKENDS):
        reseed()
        outs.append(cross_attention(q, k, v, dropout_p=0.4, backend=backend))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    assert not torch.allclose(cross_attention(q, k, v, dropout_p=0.4), outs[0])


def test_dropout_keeps_the_mean() -> None:
    """Value 1 everywhere: the output is each row's kept mass, of mean 1."""
    q, k, _ = qkv(4, 4, 128, 4, k_len=64)
    out = cross_attention(q, k, torch.ones_like(k), dropout_p=0.3)
    standard_error = math.sqrt(0.3 / 0.7 / (4 * 4 * 128 * 10))  # at most: ten keys' worth of independent mass a row
    assert abs(float(out.mean()) - 1) < 5 * standard_error


def test_dropout_draws_independent_bits() -> None:
    """Each (b, h, i, j) has its own bit, whatever tile it is drawn for, and half of them are set."""
    seed = torch.tensor([0x123456789ABCDEF])
    b, h, i = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None], torch.arange(50)[:, None]
    whole = keep_mask(seed, 0.5, b, h, i, range(203))
    assert whole.shape == (2, 3, 50, 203)
    assert torch.equal(keep_mask(seed, 0.5, b, h, i[7:9], range(101, 190)), whole[:, :, 7:9, 101:190])
    n = whole.numel()
    assert abs(float(whole.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    x = whole.double() - 0.5
    for dim in range(4):  # neighbours along each axis are uncorrelated
        m = x.shape[dim] - 1
        corr = float((x.narrow(dim, 0, m) * x.narrow(dim, 1, m)).mean() * 4)
        assert abs(corr) < 5 / math.sqrt(n * m / (m + 1))
    other = keep_mask(seed + 1, 0.5, b, h, i, range(203))
    assert abs(float((other == whole).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_philox_known_answers() -> None:
    """The published test vectors of Philox-4x32-10 (Random123's kat_vectors): counter and key all 0, all ones."""
    from mmkernels.ops.attention.philox import _philox

    for word, key, want in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        counter = (torch.tensor(word),) * 4
        assert tuple(int(x) for x in _philox(counter, torch.tensor(key))) == want


# How a call travels.


def test_one_boundary_in_a_compiled_graph_with_a_backend_block_and_masks_made_inside() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=keep)
    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        mask = SpanMask.key_padding(lengths) & SpanMask.causal(q.shape[2], k.shape[2])
        with use_backend("chunked"):
            return cross_attention(q, k, v, mask)

    q, k, v = qkv()
    lengths = torch.tensor([7, 3])
    want = cross_attention(q, k, v, SpanMask.key_padding(lengths) & SpanMask.causal(5, 7))
    torch.testing.assert_close(call(q, k, v, lengths), want)
    ops = [n for n in graphs[0].graph.nodes if n.target == torch.ops.mmkernels.cross_attention.default]
    assert len(graphs) == 1 and len(ops) == 1 and ops[0].args[-1] == "chunked"


def test_graphs_are_made_after_one_with_a_backend_block() -> None:
    """The compiler writes the choice back; a later graph must read what it wrote."""
    q, k, v = qkv()

    def block() -> Tensor:
        with use_backend("chunked"):
            return cross_attention(q, k, v)

    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    for call in (block, lambda: cross_attention(q, k, v), block):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(call)(), cross_attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    q, k, v = qkv(dtype=torch.float32, grad=True)
    gate = torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = cross_attention(q, k.bfloat16(), v, gate=gate, return_lse=True, backend=backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    want = cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), gate=gate, backend=backend)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32 and gate.grad is not None
    if backend not in EXACT:
        return
    with torch.autocast("cpu", torch.bfloat16):  # float64 stays: it was chosen on purpose
        assert cross_attention(*qkv(), backend=backend).dtype == torch.float64


# Memory and layout.


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_memory_is_linear(backend: str) -> None:
    """The score matrix of this call is 128 MiB, an output 0.5 MiB."""
    q, k, v = (torch.randn(1, 2, 4096, 16) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = SpanMask.causal(4096, 4096)

    def step() -> None:
        cross_attention(*leaves, mask, backend=backend).sum().backward()

    for run in (lambda: cross_attention(q, k, v, backend=backend), step):
        assert peak_of(run) < 0.1 * 128 * 2**20


@pytest.mark.parametrize("id", ["bias of keys", "bias shared by the batch", "dropout, gate, bias", "holes"])
def test_gradients_are_summed_over_tiles(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TILE_QUERIES", 2), ("TILE_KEYS", 3), ("TILE_SCORES", 12)):
        monkeypatch.setattr(tiles, name, size)
    spec = SPECS["cross_attention"]
    (case,) = (case for case in spec.cases if case.id == id)
    check(spec, case, torch.float64, "chunked")
