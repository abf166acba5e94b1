"""Co-attention beyond its spec's cases: what it equals, GroundingDINO's clamp, hidden NaN, sides that see nothing."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from harness import SPECS, backends, dtype_of, each_backend, examples
from hypothesis import given
from hypothesis import strategies as st
from pairwise import parametrize
from torch import Tensor

from mmkernels import SpanMask, co_attention, cross_attention
from mmkernels.ops.attention.co_attention import OP as BOUNDARY
from mmkernels.runtime.triton import INTERPRETED

OP = "co_attention"
NAN, INF = float("nan"), float("inf")
each_native = each_backend(OP, interpreted=False)


def _sides(
    backend: str, a_len: int = 4, b_len: int = 6, dim: int = 8, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Returns a, b, value_a, value_b in the widest dtype of a backend; the values have other dims."""
    dtype = dtype or dtype_of(OP, backend)
    shapes = ((a_len, dim), (b_len, dim), (a_len, dim + 1), (b_len, dim - 1))
    return tuple(torch.randn(2, 2, *shape, dtype=dtype, requires_grad=True) for shape in shapes)


def _run(sides: tuple[Tensor, ...], flows: tuple[Tensor, ...] | None = None, **more: Any) -> tuple[Tensor, ...]:
    """Returns both outputs and the gradients of the four inputs."""
    leaves = [x.detach().requires_grad_() for x in sides]
    outs = co_attention(*leaves, **more)
    flows = tuple(torch.ones_like(out) for out in outs) if flows is None else flows
    return (*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, flows))


# What it equals.


@each_native
def test_it_equals_two_calls_of_cross_attention(backend: str) -> None:
    sides = _sides(backend)
    a, b, value_a, value_b = (x.detach().double() for x in sides)
    dense = torch.rand(2, 1, 4, 6) < 0.7
    valid_a, valid_b = torch.rand(2, 4) < 0.7, torch.rand(1, 6) < 0.7
    got = co_attention(*sides, dense, valid_a=valid_a, valid_b=valid_b, scale=0.4, backend=backend)
    to_a = cross_attention(a, b, value_b, dense & valid_b[:, None, None], scale=0.4, backend="reference")
    to_b = cross_attention(b, a, value_a, dense.mT & valid_a[:, None, None], scale=0.4, backend="reference")
    torch.testing.assert_close([x.detach().double() for x in got], [to_a, to_b], rtol=1e-5, atol=1e-5)


@each_native
def test_the_sides_can_be_swapped(backend: str) -> None:
    a, b, value_a, value_b = _sides(backend)
    flows = torch.randn_like(value_b[..., :4, :]), torch.randn_like(value_a[..., :1, :].expand(-1, -1, 6, -1))
    bias, dense = torch.randn(2, 1, 4, 6), torch.rand(4, 6) < 0.7
    valid_a, valid_b = torch.tensor([[True, True, False, True]]), torch.rand(2, 6) < 0.7
    one = _run(
        (a, b, value_a, value_b), flows, mask=dense, bias=bias, valid_a=valid_a, valid_b=valid_b, clamp=1.0,
        backend=backend,
    )  # fmt: skip
    two = _run(
        (b, a, value_b, value_a), flows[::-1], mask=dense.mT, bias=bias.mT, valid_a=valid_b, valid_b=valid_a, clamp=1.0,
        backend=backend,
    )  # fmt: skip
    order = (1, 0, 3, 2, 5, 4)
    torch.testing.assert_close(one, tuple(two[n] for n in order))


@each_native
@pytest.mark.parametrize("clamp", [1.0, 50_000.0])
def test_grounding_dino_s_formula(backend: str, clamp: float) -> None:
    """As transformers' GroundingDinoBiMultiHeadAttention computes it; the largest score there counts as a constant."""
    sides = _sides(backend, a_len=7)
    valid_a, valid_b = torch.arange(7) < torch.tensor([[7], [4]]), torch.arange(6) < torch.tensor([[2], [6]])
    flows = torch.randn(2, 2, 7, 7).to(sides[0]), torch.randn(2, 2, 6, 9).to(sides[0])
    got = _run(sides, flows, valid_a=valid_a, valid_b=valid_b, clamp=clamp, backend=backend)

    a, b, value_a, value_b = leaves = [x.detach().double().requires_grad_() for x in sides]
    scores = a * 8**-0.5 @ b.mT
    scores = (scores - scores.detach().max()).clamp(-clamp, clamp)
    of_text = (scores.mT - scores.detach().mT.amax(-1, keepdim=True)).clamp(-clamp, clamp)
    of_text = of_text.masked_fill(~valid_a[:, None, None], -INF).softmax(-1)
    of_image = scores.masked_fill(~valid_b[:, None, None], -INF).softmax(-1)
    outs = of_image @ value_b, of_text @ value_a
    want = (*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, [x.double() for x in flows]))
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-5, atol=1e-5)
    if clamp == 1.0:  # it bites, or this would be no test
        plain = co_attention(*sides, valid_a=valid_a, valid_b=valid_b, backend=backend)
        assert not torch.allclose(plain[0].double(), want[0], atol=1e-3)


@each_native
def test_the_largest_score_is_taken_over_hidden_pairs_that_are_finite(backend: str) -> None:
    sides = [x.detach().clone() for x in _sides(backend, dtype=torch.float32)]
    sides[1][0, 0, 5] *= 40  # hidden, and the largest by far
    hidden = torch.arange(6) < 5
    got = co_attention(*sides, hidden, clamp=3.0, backend=backend)
    for out, value in zip(got, (sides[3], sides[2]), strict=True):  # all visible scores are raised to one number
        torch.testing.assert_close(out[0, 0, 0], value[0, 0, : 5 if value is sides[3] else 4].mean(0))
    sides[1][0, 0, 5] = NAN
    got = co_attention(*sides, hidden, clamp=3.0, backend=backend)
    assert bool(torch.cat([x.flatten() for x in got]).isfinite().all())


@each_native
def test_a_clamp_that_cannot_bite_changes_nothing(backend: str) -> None:
    sides = _sides(backend)
    torch.testing.assert_close(_run(sides, clamp=1e4, backend=backend), _run(sides, backend=backend))


def test_the_floor_is_looked_for_only_where_it_can_matter() -> None:
    """A bound from the vectors' lengths shows that no score can be 50,000 below the largest."""
    sides = [x.detach().float() for x in _sides("reference")]
    none = [None] * 8
    for name in backends(SPECS[OP]):
        if name == "reference":
            continue
        for clamp, floor_is in ((50_000.0, -INF), (0.5, None)):
            floor = BOUNDARY.boundary(*sides, *none, 0.3, 0.0, clamp, name)[-1]
            assert floor.dtype == torch.float32 and floor.shape == ()
            truth = (sides[0] @ sides[1].mT * 0.3).max() - clamp
            torch.testing.assert_close(floor, truth if floor_is is None else torch.tensor(floor_is))


# NaN and inf in what is hidden.

ROWS = list(
    itertools.product(
        backends(SPECS[OP]), (NAN, INF), ("vectors", "values", "gradients"), ("a", "b"),
        ("spans", "dense", "bias", "valid"),
    )
)  # fmt: skip


def _hidden(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns arguments that hide the last two positions of each side from the other one's first two."""
    dense = torch.ones(4, 6, dtype=torch.bool)
    dense[:2, 4:] = False
    dense[2:, :2] = False
    if kind == "bias":
        return {"bias": torch.zeros(4, 6, dtype=dtype).masked_fill(~dense, -INF)}
    if kind == "spans":
        return {"mask": SpanMask.from_dense(dense[None, None])}
    if kind == "valid":
        return {"valid_a": torch.tensor([[True, True, False, False]]), "valid_b": (torch.arange(6) < 4)[None]}
    return {"mask": dense}


@cache
def _clean(backend: str, kind: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Returns a, b, value_a, value_b and what flows back to both outputs, all finite; and the results."""
    torch.manual_seed(1)
    sides = [x.detach() for x in _sides(backend)]
    for x in sides[:2]:
        x[..., 1].abs_()  # so that the score of an inf there is inf too
    flows = [torch.randn(2, 2, 4, 7).to(sides[0]), torch.randn(2, 2, 6, 9).to(sides[0])]
    more = _hidden(kind, sides[0].dtype)
    return [*sides, *flows], _run(tuple(sides), tuple(flows), **more, backend=backend)


@pytest.mark.interpreted
@parametrize("backend, bad, where, of, kind", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_non_finite_reaches_only_what_sees_it(backend: str, bad: float, where: str, of: str, kind: str) -> None:
    """The last two positions of a side are not finite, or what flows back to them; the other's first two don't see."""
    if where == "gradients" and (backend == "reference" or kind == "valid"):
        return  # in plain PyTorch 0 * NaN is NaN; and what valid_a or valid_b hides sees all itself
    clean, want = _clean(backend, kind)
    own, other = (0, 1) if of == "a" else (1, 0)
    place = own + {"vectors": 0, "values": 2, "gradients": 4}[where]
    dirty = [x.clone() for x in clean]
    dirty[place][:, :, -2:, 1] = bad
    got = _run(tuple(dirty[:4]), tuple(dirty[4:]), **_hidden(kind, dirty[0].dtype), backend=backend)
    first = (slice(None), slice(None), slice(2))
    if where != "gradients":
        torch.testing.assert_close([x[first] for x in got[:2]], [x[first] for x in want[:2]])
    if where == "values":
        assert bool(got[own].isfinite().all())
        assert kind == "valid" or not bool(got[other][:, :, 2:].isfinite().all())  # what sees it reports it
    if kind != "valid":  # else what is hidden still sees the other side, and gives it a gradient
        gradients = (2 + other, 4 + other)  # of the other side's vectors and values
        torch.testing.assert_close([got[n][first] for n in gradients], [want[n][first] for n in gradients])


# Positions that see nothing.


@each_native
def test_a_side_of_length_0(backend: str) -> None:
    """b's; a case of the spec has a's."""
    lengths = (4, 0)
    sides = _sides(backend, *lengths)
    results = _run(sides, clamp=3.0, backend=backend)
    for x, length, dim in zip(results[:2], lengths, (7, 9), strict=True):
        assert x.shape == (2, 2, length, dim)
    assert all(not bool(x.any()) for x in results)


@each_native
@pytest.mark.parametrize("hidden", ["mask", "valid"])
def test_a_hidden_side_gives_0(backend: str, hidden: str) -> None:
    sides = _sides(backend)
    if hidden == "valid":  # both sides are hidden from each other
        more: dict[str, Any] = {"valid_a": torch.zeros(1, 4).bool(), "valid_b": torch.zeros(2, 6).bool()}
    else:
        more = {"mask": torch.zeros(4, 6).bool()}
    assert all(not bool(x.any()) for x in _run(sides, **more, backend=backend))


@each_native
def test_one_side_hidden_leaves_the_other_direction(backend: str) -> None:
    sides = _sides(backend)
    out_a, out_b, *_ = _run(sides, valid_b=torch.zeros(1, 6).bool(), backend=backend)
    assert not bool(out_a.any())
    torch.testing.assert_close(out_b, _run(sides, backend=backend)[1])


# Masks of every kind at once.


@st.composite
def _calls(draw: st.DrawFn) -> dict[str, Any]:
    a_len, b_len = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits = lambda *shape: torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.2, 0.8, 1.0]))
    more: dict[str, Any] = {"sizes": (a_len, b_len)}
    if draw(st.booleans()):
        start, end = (torch.randint(-2, b_len + 3, (1, a_len), generator=g).int() for _ in range(2))
        more["mask"] = SpanMask(start, end, bits(2, b_len) if draw(st.booleans()) else None)
    elif draw(st.booleans()):
        more["mask"] = bits(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), a_len, b_len)
    for name, length in (("valid_a", a_len), ("valid_b", b_len)):
        if draw(st.booleans()):
            more[name] = bits(draw(st.sampled_from([1, 2])), length)
    if draw(st.booleans()):
        more["bias"] = torch.randn(1, 2, a_len, b_len, generator=g).masked_fill(bits(1, 2, a_len, b_len), -INF)
    if draw(st.booleans()):
        more["clamp"] = draw(st.sampled_from([0.5, 3.0]))
    return more


@pytest.mark.parametrize("backend", [name for name in backends(SPECS[OP]) if name != "reference"])
@examples(6)
@given(call=_calls())
def test_masks_of_every_kind(backend: str, call: dict[str, Any]) -> None:
    call = dict(call)
    torch.manual_seed(0)
    sides = _sides(backend, *call.pop("sizes"), dtype=torch.float32)
    got = _run(sides, **call, backend=backend)
    wide = call | ({"bias": call["bias"].double()} if "bias" in call else {})
    want = _run(tuple(x.double() for x in sides), **wide, backend="reference")
    torch.testing.assert_close([x.double() for x in got], list(want), rtol=2e-5, atol=2e-5)


# Dropout.


@each_native
def test_dropout_draws_for_each_direction(backend: str) -> None:
    """Of values that are one-hot the outputs are the probabilities themselves."""
    a, b = torch.zeros(1, 2, 16, 4), torch.zeros(1, 2, 16, 4)
    eye = torch.eye(16).expand(1, 2, 16, 16)
    torch.manual_seed(3)
    of_a, of_b = co_attention(a, b, eye, eye, dropout_p=0.25, backend=backend)
    kept_a, kept_b = of_a > 0, of_b.mT > 0
    assert not torch.equal(kept_a, kept_b) and not torch.equal(kept_a[:, 0], kept_a[:, 1])
    for kept, out in ((kept_a, of_a), (kept_b, of_b.mT)):
        assert 0.6 < float(kept.float().mean()) < 0.9
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 16 / 0.75))


def test_it_works_within_vmap() -> None:
    sides = [torch.randn(3, *x.shape) for x in _sides("reference")]
    got = torch.vmap(co_attention)(*sides)
    want = [torch.stack(each) for each in zip(*(co_attention(*x) for x in zip(*sides, strict=True)), strict=True)]
    torch.testing.assert_close(list(got), want)


# Bad input.

A, B, VA, VB = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 7, 3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "a 3-D": ((A[0], B, VA, VB), {}, ValueError, r"a must be 4-D \[B, H, L, D\], got shape \(4, 5, 8\)"),
    "b a list": ((A, [1], VA, VB), {}, TypeError, "b must be a tensor, got list"),
    "integers": ((A.long(), B, VA, VB), {}, TypeError, "a must be float16.*got torch.int64"),
    "dtypes": ((A, B, VA.double(), VB), {}, TypeError, "value_a must have a's dtype torch.float32, got torch.float64"),
    "devices": ((A, B.to("meta"), VA, VB), {}, ValueError, "b must be on a's device cpu, got meta"),
    "batches": ((A, B[:1], VA, VB), {}, ValueError, r"b must have a's batch 2, got shape \(1, 4, 7, 8\)"),
    "heads": ((A, B[:, :2], VA, VB), {}, ValueError, "b must have a's 4 heads, got 2"),
    "heads of a value": ((A, B, VA, VB[:, :1]), {}, ValueError, "value_b must have a's 4 heads, got 1"),
    "head dims": ((A, B[..., :4], VA, VB), {}, ValueError, "b must have a's head dim 8, got shape"),
    "no channels": ((A[..., :0], B[..., :0], VA, VB), {}, ValueError, "a must have at least one head and one channel"),
    "no value": ((A, B, VA[..., :0], VB), {}, ValueError, "value_a must have at least one channel"),
    "lengths": ((A, B, VB, VA), {}, ValueError, r"value_a must have a's length 5, got shape \(2, 4, 7, 3\)"),
    "mask type": ((A, B, VA, VB, "causal"), {}, TypeError, "mask must be a SpanMask, a bool tensor or None, got str"),
    "mask shape": (
        (A, B, VA, VB, torch.ones(7, 5).bool()),
        {},
        ValueError,
        r"mask must broadcast to \[B, H, La, Lb\] = \[2, 4, 5, 7\], got shape \(7, 5\)",
    ),
    "mask queries": (
        (A, B, VA, VB, SpanMask.causal(7, 7)), {}, ValueError, "mask must be for 1 or 5 positions of a, got 7"
    ),
    "mask keys": (
        (A, B, VA, VB, SpanMask.from_key_mask(torch.ones(2, 5).bool())), {}, ValueError,
        "mask.key_valid must be for 7 positions of b, got 5",
    ),
    "valid dtype": ((A, B, VA, VB), {"valid_a": torch.ones(2, 5)}, TypeError, "valid_a must be bool"),
    "valid type": ((A, B, VA, VB), {"valid_b": [True] * 7}, TypeError, "valid_b must be a tensor, got list"),
    "valid of the other": (
        (A, B, VA, VB), {"valid_a": torch.ones(2, 7).bool()}, ValueError,
        r"valid_a must be \[2 or 1, 5\], got shape \(2, 7\)",
    ),
    "valid batch": ((A, B, VA, VB), {"valid_b": torch.ones(3, 7).bool()}, ValueError, r"valid_b must be \[2 or 1, 7\]"),
    "valid device": (
        (A, B, VA, VB), {"valid_b": torch.ones(2, 7, device="meta").bool()}, ValueError, "valid_b must be on a's device"
    ),
    "bias shape": ((A, B, VA, VB), {"bias": torch.zeros(7, 5)}, ValueError, r"bias must broadcast to \[B, H, La, Lb\]"),
    "bias dtype": ((A, B, VA, VB), {"bias": torch.zeros(5, 7).half()}, TypeError, "bias must be torch.float32"),
    "scale": ((A, B, VA, VB), {"scale": NAN}, ValueError, "scale must be a finite number, got nan"),
    "dropout": ((A, B, VA, VB), {"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    "clamp 0": ((A, B, VA, VB), {"clamp": 0.0}, ValueError, "clamp must be a finite number above 0, got 0.0"),
    "clamp inf": ((A, B, VA, VB), {"clamp": INF}, ValueError, "clamp must be a finite number above 0, got inf"),
    "clamp text": ((A, B, VA, VB), {"clamp": "50000"}, TypeError, "clamp must be a finite number above 0, got str"),
    "backend": ((A, B, VA, VB), {"backend": "gpu"}, ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    arguments, more, error, message = BAD[name]
    with pytest.raises(error, match=message):
        co_attention(*arguments, **more)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs Triton's kernels only")
def test_what_is_saved_for_backward_is_linear_in_the_inputs() -> None:
    sides = [torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(4)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        co_attention(*sides, clamp=50_000.0)
    assert max(x.numel() for x in saved) <= sides[0].numel()
