"""`max_sim`'s CPU kernels: each instruction set and dtype, runs and tiles, NaN's place, threads, direct calls."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from ops.cpu_tools import each_dtype, each_isa, needs_kernels
from torch import Tensor

from mmkernels import max_sim
from mmkernels.ops.contrastive.max_sim import OP, checked
from mmkernels.runtime import cpu

pytestmark = needs_kernels
# Queries that share panels and end in the next one; documents of several tiles; no multiples of any vector.
SHAPES = {
    "runs and tiles": ((5, 33, 50), (4, 130, 50)),
    "a query of several panels": ((2, 150, 17), (3, 49, 17)),
    "deep": ((3, 7, 300), (2, 20, 300)),
    "one token": ((2, 1, 1), (3, 1, 1)),
}


def draw(shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tokens, lengths among which is 0, and NaN behind them."""
    g = torch.Generator().manual_seed(1)
    inputs: dict[str, Tensor] = {}
    for name, shape in zip(("query", "document"), shapes, strict=True):
        x, lengths = torch.randn(shape, generator=g).to(dtype), torch.randint(shape[1] + 1, shape[:1], generator=g)
        lengths[0] = shape[1]
        lengths[-1] = 0 if shape[1] > 1 else 1
        inputs[name] = torch.where(torch.arange(shape[1])[None, :, None] < lengths[:, None, None], x, math.nan)
        inputs[f"{name}_lengths"] = lengths
    return inputs


def step(inputs: dict[str, Tensor], flow: Tensor, paired: bool, backend: str) -> list[Tensor]:
    """Returns the scores and both gradients."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("query", "document")}
    scores = max_sim(**(inputs | leaves), paired=paired, backend=backend)
    return [scores.detach(), *torch.autograd.grad(scores, list(leaves.values()), flow.to(scores))]


def problem(shape: str, dtype: torch.dtype, paired: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs, documents in another order of dims, and what flows back to the scores."""
    inputs = draw(SHAPES[shape], dtype)
    inputs["document"] = inputs["document"].transpose(0, 1).contiguous().transpose(0, 1)
    n = min(len(inputs["query"]), len(inputs["document"]))
    inputs = {name: x[:n] if paired else x for name, x in inputs.items()}
    of_scores = (n,) if paired else (len(inputs["query"]), len(inputs["document"]))
    return inputs, torch.randn(of_scores, generator=torch.Generator().manual_seed(2))


@cache
def truth(shape: str, dtype: torch.dtype, paired: bool) -> list[Tensor]:
    inputs, flow = problem(shape, dtype, paired)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return step(wide, flow, paired, "chunked")


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_beside_float64(isa: str, dtype: torch.dtype, shape: str) -> None:
    for paired in (False, True):
        with cpu.use_isa(isa):
            found = step(*problem(shape, dtype, paired), paired, "cpu")
        unit = 2 * torch.finfo(dtype).eps
        for x, y, places in zip(found, truth(shape, dtype, paired), (2e-6, unit, unit), strict=True):
            assert float((x - y).abs().max()) <= max(places, 2e-6) * (1.0 + float(y.abs().max()))


@each_isa
def test_the_first_nan_wins(isa: str) -> None:
    """And what is behind it, in its tile or the next, changes nothing."""
    query, document = torch.randn(2, 20, 8), torch.randn(2, 130, 8)
    document[1, 60, 3] = document[1, 62] = document[1, 129] = math.nan
    query[1, 5, 0] = math.nan
    with cpu.use_isa(isa):
        args = checked(query.requires_grad_(), document, None, None, False)
        scores, index = OP(args, "cpu")
    assert scores.isnan().tolist() == [[False, True], [True, True]]
    assert (index[0, 1] == 60).all() and index[1, 0, 5] == 0
    assert (index[1, 1] == torch.where(torch.arange(20) == 5, 0, 60)).all()


@pytest.mark.alone
def test_threads_change_no_bit() -> None:
    inputs = {"query": torch.randn(9, 90, 64), "document": torch.randn(7, 130, 64)}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(step(inputs, torch.ones(9, 7), False, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_direct_call_reads_no_token_that_is_not_there() -> None:
    query, document, flow = torch.randn(2, 3, 4), torch.randn(1, 5, 4), torch.ones(2, 1)
    index = torch.tensor([-1, 5, 2**31 - 1, -(2**31), 4, -1], dtype=torch.int32).view(2, 1, 3)
    backward = torch.ops.mmkernels.max_sim_backward_cpu
    of_query, of_document = backward(query, document, None, None, False, True, index, flow, True, True)
    want = torch.zeros_like(query)
    want[1, 1] = document[0, 4]
    assert torch.equal(of_query, want)
    assert torch.equal(of_document[0, 4], query[1, 1]) and not of_document[0, :4].any()
    with pytest.raises(ValueError, match="index must be"):
        backward(query, document, None, None, False, True, index[:1], flow, True, True)
    with pytest.raises(ValueError, match="as many documents as queries"):
        torch.ops.mmkernels.max_sim_cpu(query, document, None, None, True, False)
