"""What the ops on tokens keep for the backward pass: no tokens where their values are not needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import each_backend
from torch import Tensor

from mmkernels import merge_patches, merge_tokens, pool_tokens, scatter_tokens, select_tokens, unmerge_tokens

GRID = (1, 8, 8)
ROWS = torch.arange(128).view(2, 64)
OPS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "merge_patches": lambda x, backend: merge_patches(x, GRID, backend=backend)[0],
    "merge_patches by channel": lambda x, backend: merge_patches(x, GRID, order="channel", backend=backend)[0],
    "mean": lambda x, backend: pool_tokens(x, GRID, (1, 2, 2), backend=backend)[0],
    "bilinear": lambda x, backend: pool_tokens(x, GRID, size=(1, 3, 5), mode="bilinear", backend=backend)[0],
    "bicubic": lambda x, backend: pool_tokens(x, GRID, size=(1, 3, 5), mode="bicubic", backend=backend)[0],
    "merge_tokens": lambda x, backend: merge_tokens(x, 64, 20, backend=backend)[0],
    "unmerge_tokens": lambda x, backend: unmerge_tokens(x, ROWS // 2, backend=backend),
    "select_tokens": lambda x, backend: select_tokens(x, 64, 9, ROWS.float(), merge_rest=True, backend=backend).x,
    "scatter_tokens": lambda x, backend: scatter_tokens(x, x[0], ROWS[0], backend=backend),
}


@each_backend("merge_patches", interpreted=False)
@pytest.mark.parametrize("op", OPS)
def test_no_token_is_kept(op: str, backend: str) -> None:
    x = torch.randn(2, 64, 256, requires_grad=True)
    kept: list[int] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.untyped_storage().nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = OPS[op](x, backend)
    assert max(kept, default=0) <= 1024, kept  # a token, or a number for each
    want = OPS[op](x.double(), "reference")
    flow = torch.randn_like(want).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, flow.float(), create_graph=True)
    (grad_want,) = torch.autograd.grad(want, x, flow, create_graph=True)
    torch.testing.assert_close(grad, grad_want)
    back = [torch.autograd.grad(each.square().sum(), flow)[0] for each in (grad, grad_want)]
    torch.testing.assert_close(*back, rtol=1e-5, atol=1e-4)


def test_second_derivatives_of_maxima() -> None:
    x = torch.randn(2, 64, 256, requires_grad=True)
    y, _ = pool_tokens(x, GRID, (1, 2, 2), mode="max")
    flow = torch.randn_like(y, requires_grad=True)
    (grad,) = torch.autograd.grad(y, x, flow, create_graph=True)
    (back,) = torch.autograd.grad(grad.square().sum(), flow)
    torch.testing.assert_close(back, 2 * flow)
