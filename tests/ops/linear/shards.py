"""Calls of the linear ops whose vocabulary is spread over ranks, run in the ranks' processes."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from harness import generator
from torch import Tensor

import mmkernels

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "return_entropy": True, "return_correct": True, "softcap": 5.0, "temperature": 0.7, "bias": True,
    },
    "loss": {"loss": True},
    "weighted loss": {"loss": True, "weight": True, "label_smoothing": 0.2, "z_loss": 0.01, "linear_bias": True},
    "smoothed sum": {"loss": True, "label_smoothing": 0.2, "reduction": "sum", "softcap": 3.0},
    "no reduction": {"loss": True, "reduction": "none"},
}  # fmt: skip


def problem(name: str, rows: int = 11, tokens: int = 23, dim: int = 6) -> dict[str, Any]:
    """Returns the arguments of one process that has all tokens."""
    g = generator(7)
    options = dict(CALLS[name])
    loss = options.pop("loss", False)
    hidden, weight = (torch.randn(n, dim, generator=g, dtype=torch.float64) for n in (rows, tokens))
    target = torch.randint(tokens, (rows,), generator=g).masked_fill(torch.rand(rows, generator=g) < 0.3, -100)
    names = ("input", "linear_weight") if loss else ("hidden", "weight")
    arguments = {names[0]: hidden, names[1]: weight, "target": target, **options}
    for bias in ("bias", "linear_bias"):
        if bias in options:
            arguments[bias] = torch.randn(tokens, generator=g, dtype=torch.float64)
    if options.get("weight") is True:
        arguments["weight"] = torch.rand(tokens, generator=g, dtype=torch.float64)
    return arguments


def shard(arguments: dict[str, Any], sizes: list[int], rank: int) -> dict[str, Any]:
    """Returns a rank's arguments: its rows of the head, and everything else whole."""
    ends = [0, *accumulate(sizes)]
    at = slice(ends[rank], ends[rank + 1])
    head = ("linear_weight", "linear_bias") if "linear_weight" in arguments else ("weight", "bias")
    return {name: x[at] if name in head else x for name, x in arguments.items()}


def results(
    arguments: dict[str, Any], dtype: torch.dtype, backend: str | None = None, group: Any = None
) -> list[Tensor]:
    """Returns the outputs, and the gradients of hidden, weight and bias for fixed cotangents."""
    op: Any = mmkernels.linear_cross_entropy if "input" in arguments else mmkernels.linear_logprobs
    names = [
        name for name in ("input", "hidden", "linear_weight", "weight", "linear_bias", "bias") if name in arguments
    ]
    if "input" in arguments:
        names = [name for name in names if name != "weight"]
    given = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()
    }
    leaves = [given[name].detach().requires_grad_() for name in names]
    found = op(**given | dict(zip(names, leaves, strict=True)), group=group, backend=backend)
    outputs = list(found) if isinstance(found, tuple) else [found]
    g = torch.Generator().manual_seed(3)
    flow = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64)).sum() for x in outputs if x.requires_grad)
    grads = torch.autograd.grad(flow, leaves)
    return [x.detach() for x in (*outputs, *grads)]


def compute(
    rank: int, sizes: list[int], names: list[str], dtype: torch.dtype, backend: str | None
) -> list[list[Tensor]]:
    return [results(shard(problem(name), sizes, rank), dtype, backend, dist.group.WORLD) for name in names]


def disagree(rank: int, name: str) -> str:
    """Returns the message that this rank gets."""
    arguments = shard(problem("plain"), [10, 13], rank)
    op: Any = mmkernels.linear_logprobs
    if rank == 1:
        other = arguments["target"].clone()
        other[0] = (int(other[0]) + 1) % 23
        arguments |= {
            "channels": lambda: {"hidden": torch.randn(11, 4), "weight": torch.randn(13, 4)},
            "rows": lambda: {"hidden": arguments["hidden"][:5], "target": arguments["target"][:5]},
            "target": lambda: {"target": other},
            "temperature": lambda: {"temperature": 2.0},
            "entropy": lambda: {"return_entropy": True},
            "bad input": lambda: {"target": arguments["target"].float()},
            "a token that nobody has": lambda: {},
            "class weights of a shard": lambda: {},
            "hidden's gradient": lambda: {},
        }[name]()
    if name == "a token that nobody has":
        arguments["target"] = arguments["target"].clone().fill_(23)
    if name == "hidden's gradient" and rank == 0:
        arguments["hidden"] = arguments["hidden"].requires_grad_()
    if name == "class weights of a shard":
        op = partial(mmkernels.linear_cross_entropy, weight=torch.ones(10))
        arguments = {"input": arguments["hidden"], "linear_weight": arguments["weight"], "target": arguments["target"]}
    head = "linear_weight" if "input" in arguments else "weight"
    try:
        found = op(**arguments | {head: arguments[head].requires_grad_()}, group=dist.group.WORLD)
        found.sum().backward()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compiled(rank: int, sizes: list[int]) -> None:
    """One graph has the results of an eager call."""
    arguments = shard(problem("weighted loss"), sizes, rank)
    call = lambda x, w: mmkernels.linear_cross_entropy(
        **arguments | {"input": x, "linear_weight": w}, group=dist.group.WORLD
    )
    found = []
    for way in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [arguments[name].clone().requires_grad_() for name in ("input", "linear_weight")]
        loss = way(*leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
