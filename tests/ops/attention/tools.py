"""What the tests of the attention ops share: which backends, and inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

from mmkernels import SpanMask, cross_attention

OP = "cross_attention"
EXACT = ("chunked", "reference")
"""The backends that compute in float64."""
BACKENDS = tuple(harness.backends(harness.SPECS[OP]))
NAN, INF = math.nan, math.inf

each_backend = harness.each_backend(OP)


def dtype_of(backend: str) -> torch.dtype:
    """Returns the widest dtype that a backend computes in."""
    return harness.dtype_of(OP, backend)


def qkv(
    *sizes: int, dtype: torch.dtype = torch.float64, grad: bool = False, k_len: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, dim = sizes or (2, 2, 5, 8)
    k_len = q_len + 2 if k_len is None else k_len
    shapes = ((batch, heads, q_len, dim), (batch, heads, k_len, dim), (batch, heads, k_len, dim))
    q, k, v = (torch.randn(s, dtype=dtype, requires_grad=grad) for s in shapes)
    return q, k, v


class Hidden(NamedTuple):
    """Which keys are hidden, and what is not finite.

    Args:
        blind, edge: the first `blind` queries see the keys below `edge`, the others all keys but the last.
        key, row: keys from `key` on, or queries from `row` on, are not finite.
    """

    q_len: int
    k_len: int
    blind: int
    edge: int
    key: int
    row: int

    def arguments(self, kind: str, dtype: torch.dtype) -> dict[str, Any]:
        """`mask` and `bias`, of a kind: spans, dense, key_valid or bias."""
        dense = torch.ones(1, 1, self.q_len, self.k_len, dtype=torch.bool)
        dense[:, :, : self.blind, self.edge :] = False
        dense[..., -1] = False
        if kind == "bias":
            return {"bias": torch.zeros(dense.shape, dtype=dtype).masked_fill(~dense, -INF)}
        if kind == "key_valid":
            end = torch.where(torch.arange(self.q_len) < self.blind, self.edge, self.k_len)[None].int()
            return {"mask": SpanMask(torch.zeros_like(end), end, dense[:, 0, -1])}
        return {"mask": SpanMask.from_dense(dense) if kind == "spans" else dense}


def check_hidden(
    backend: str, dtype: torch.dtype, hidden: Hidden, kind: str, where: str, bad: float, dim: int
) -> tuple[Tensor, ...]:
    """Assert that `bad` reaches nothing that does not see it; returns the gradients, which may hold it.

    Args:
        where: in "query", "key", "value", or in the output's gradient, "grad".
    """
    lengths = {"query": hidden.q_len, "key": hidden.k_len, "value": hidden.k_len, "grad": hidden.q_len}
    clean = {name: torch.randn(1, 2, n, dim, dtype=torch.float64).to(dtype) for name, n in lengths.items()}
    if where in ("query", "key"):  # what inf meets is positive, so that the score is inf too, which nothing can hide
        other = clean["key" if where == "query" else "query"]
        other[..., dim // 4].abs_()
    dirty = {name: x.clone() for name, x in clean.items()}
    dirty[where][:, :, hidden.row if where in ("query", "grad") else hidden.key :, dim // 4] = bad
    arguments = hidden.arguments(kind, dtype)

    def run(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = [x[name].detach().requires_grad_() for name in ("query", "key", "value")]
        out = cross_attention(*leaves, **arguments, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, x["grad"]))

    want, got = run(clean), run(dirty)
    rows = slice(0, hidden.blind if where in ("key", "value") else hidden.row)
    bounds: dict[str, Any] = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    torch.testing.assert_close(got[0][:, :, rows], want[0][:, :, rows], **bounds)
    if where == "value" or (where in ("key", "query") and bad != -INF):  # what sees it reports it
        assert not bool(got[0][:, :, hidden.row :].isfinite().all())
    if where == "grad" and backend == "reference":
        return got[1:]  # in plain PyTorch 0 * NaN is NaN: the naive model's own behaviour
    torch.testing.assert_close(got[1][:, :, rows], want[1][:, :, rows], **bounds)
    for grad in (*got[2:], *want[2:]):
        assert not bool(grad[:, :, -1].any())
    return got[1:]
