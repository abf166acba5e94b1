"""The peers of `grouped_linear`: a loop over groups, PyTorch's grouped product, what transformers' experts call.

"loop" multiplies the rows of each group that has some, into memory that is there already: the fastest loop there is,
which waits for the groups' sizes once. "grouped_mm" is ``F.grouped_mm``. "HF grouped" and "HF batched" are the products
of transformers' `grouped_mm` and `batched_mm` implementations of experts; the second copies a weight for each row.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer, check_room
from mmkernels.spec import Inputs


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = lengths.tolist()
        y = x.new_empty(x.shape[0], weight.shape[1])
        for g, rows, out in _parts(ctx.sizes, x, y):
            torch.mm(rows, weight[g].mT, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
        for of_none in (out for out, size in zip(of_weight, ctx.sizes, strict=True) if not size):
            of_none.zero_()
        for g, flows, rows, out in _parts(ctx.sizes, flow, x, of_x):
            torch.mm(flows, weight[g], out=out)
            torch.mm(flows.mT, rows, out=of_weight[g])
        return of_x, of_weight, None


def _parts(sizes: list[int], *tensors: Tensor) -> list[tuple[Any, ...]]:
    """Returns each group that has rows, and its rows of each tensor."""
    parts = zip(range(len(sizes)), *(x.split(sizes) for x in tensors), strict=True)
    return [part for part in parts if sizes[part[0]]]


def loop(inputs: Inputs) -> Call:
    x, weight, lengths = _tensors(inputs)
    if x.requires_grad or weight.requires_grad:
        return lambda: _Loop.apply(x, weight, lengths)

    def call() -> Tensor:
        sizes: list[int] = lengths.tolist()
        y = x.new_empty(x.shape[0], weight.shape[1])
        for g, rows, out in _parts(sizes, x, y):
            torch.mm(rows, weight[g].mT, out=out)
        return y

    return call


def grouped_mm(inputs: Inputs) -> Call:
    x, weight, lengths = _tensors(inputs)
    function: Any = getattr(F, "grouped_mm", None)
    if function is None:
        raise CantRunError("is not in this PyTorch")
    return _tried(lambda: function(x, weight.mT, offs=lengths.cumsum(0).int()))


def hf_grouped(inputs: Inputs) -> Call:
    x, weight, lengths = _tensors(inputs)
    function = _of_transformers("_grouped_linear")
    return _tried(lambda: function(x, weight, lengths.cumsum(0).int()))


def hf_batched(inputs: Inputs) -> Call:
    x, weight, lengths = _tensors(inputs)
    function = _of_transformers("_batched_linear")
    grads = 3 if weight.requires_grad else 1
    check_room(grads * float(x.shape[0] * weight[0].nbytes), x.device)
    return lambda: function(x, weight[torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)])


def _of_transformers(name: str) -> Any:
    try:
        return getattr(importlib.import_module("transformers.integrations.moe"), name)
    except (ImportError, AttributeError) as error:
        raise CantRunError(f"is not in this transformers: {error}") from error


def _tried(call: Callable[[], Tensor]) -> Call:
    """Returns a call that runs here, once."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        raise CantRunError(f"does not run here: {str(error).splitlines()[0]}") from error
    return call


def _tensors(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["x"], inputs["weight"], inputs["lengths"]


PEERS = (
    Peer("loop", loop),
    Peer("grouped_mm", grouped_mm),
    Peer("HF grouped", hf_grouped),
    Peer("HF batched", hf_batched, slow=True),
)
