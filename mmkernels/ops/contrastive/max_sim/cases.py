"""Correctness cases and benchmark configurations of the late-interaction score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.contrastive.cases import features
from mmkernels.ops.contrastive.max_sim.formula import formula
from mmkernels.spec import Benchmark, Case, Cost, Expected, Inputs, Parts
from mmkernels.targets import ExtraMemory, PeakShare

_GRADS = ("query", "document")
_GRID = 2.0**-8  # of the tokens' values: products of theirs are exact in float32, so that every backend has one winner
_PADDING = 8.0
_SHARED = 0.6  # of a query token, the share of a document token that it is like


def tokens(g: Generator, *shape: int) -> Tensor:
    """Returns random float64 tokens, about normalised, whose values are multiples of `_GRID`."""
    return (features(g, *shape) / _GRID).round() * _GRID


def alike(g: Generator, sizes: tuple[int, int, int, int], dim: int, *, exact: bool = True) -> Inputs:
    """Returns queries whose tokens are a little like some of the document with their number.

    Args:
        sizes: Nq, Nd, Lq, Ld.
        exact: values are multiples of `_GRID`.
    """
    queries, documents, query_tokens, document_tokens = sizes
    document = features(g, documents, document_tokens, dim)
    query = features(g, queries, query_tokens, dim)
    if documents:
        n, i = torch.arange(queries) % documents, torch.arange(query_tokens) * 7 % document_tokens
        query = torch.nn.functional.normalize(query + _SHARED * document[n][:, i], dim=-1)
    found = {"query": query, "document": document}
    return {name: (x / _GRID).round() * _GRID for name, x in found.items()} if exact else found


def _case(id: str, sizes: tuple[int, int, int, int], dim: int, *, grads: tuple[str, ...] = _GRADS, **more: Any) -> Case:
    """Tokens past a length are such that they would win. More arguments: lists become tensors."""

    def make(g: Generator) -> Inputs:
        inputs = alike(g, sizes, dim, exact=bool(grads))
        inputs |= {name: torch.tensor(x) if isinstance(x, list) else x for name, x in more.items()}
        for name in ("query", "document"):
            lengths = inputs.get(f"{name}_lengths")
            if lengths is not None:
                past = torch.arange(inputs[name].shape[1]) >= lengths[:, None]
                inputs[name] = inputs[name].masked_fill(past[..., None], _PADDING)
        return inputs

    return Case(id, make, grads)


_PAIR_LENGTHS: dict[str, Any] = {"query_lengths": [5, 0, 7, 1, 7], "document_lengths": [9, 4, 0, 11, 10]}
_LENGTHS: dict[str, Any] = {"query_lengths": [5, 0, 7, 1], "document_lengths": [11, 3, 0, 1, 8]}

CASES = (
    _case("a few", (3, 4, 6, 9), 16),
    _case("one query, many documents", (1, 20, 5, 12), 24),
    _case("many queries, one token each", (17, 1, 1, 1), 8),
    _case("odd sizes", (3, 2, 11, 21), 13),
    _case("more than a tile", (1, 2, 40, 70), 72),
    _case("lengths", (4, 5, 7, 11), 16, **_LENGTHS),
    _case("lengths of documents", (2, 3, 9, 24), 32, document_lengths=[24, 9, 17]),
    _case("pairs", (5, 5, 7, 11), 16, paired=True),
    _case("pairs with lengths", (5, 5, 7, 11), 16, paired=True, **_PAIR_LENGTHS),
    _case("wide tokens", (1, 2, 3, 5), 300),
    _case("values of any size", (2, 3, 9, 17), 40, grads=()),
)


def cost(inputs: Inputs, backward: bool) -> Cost:
    """Returns the least work: all products once; the gradients gather one row of either side a query token and pair."""
    query, document = inputs["query"], inputs["document"]
    paired = bool(inputs.get("paired"))
    pairs = query.shape[0] * (1 if paired else document.shape[0])
    taken = pairs * query.shape[1]  # query tokens, counted for each pair
    products = 2.0 * taken * document.shape[1] * query.shape[2]
    read = float((query.numel() + document.numel()) * query.element_size())
    if not backward:
        return Cost(products, read)
    return Cost(products + 2 * 2.0 * taken * query.shape[2], 3 * read)


# Benchmarks.


def _benchmark(sizes: tuple[int, int, int, int], dim: int, ragged: bool) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = alike(g, sizes, dim)
        if ragged:
            _, documents, _, most = sizes
            inputs["document_lengths"] = torch.randint(most // 4, most + 1, (documents,), generator=g)
        return inputs

    return make


def _config(
    id: str, sizes: tuple[int, int, int, int], *targets: Any, dim: int = 128, ragged: bool = False, **more: Any
) -> Benchmark:
    shape = dict(zip(("Nq", "Nd", "Lq", "Ld", "d"), (*sizes, dim), strict=True))
    return Benchmark(id, _benchmark(sizes, dim, ragged), shape, targets=targets, **more)


_EINSUM_MB = 4 * 32 * 32 * 1024 * 1024 / 1e6  # of the products of all tokens in float32
BENCHMARKS = (
    # ColPali's pages are 1,030 tokens of 128 channels; both sides are pages where documents are compared to each other.
    _config(
        "32 x 32, 1,024 tokens each",
        (32, 32, 1024, 1024),
        *(PeakShare("fp32", backward, 0.7) for backward in (False, True)),
        *(ExtraMemory("fp32", backward, _EINSUM_MB / 100) for backward in (False, True)),
        grads=_GRADS,
        headline=True,
    ),
    # A training step of ColPali: 32 questions, 32 pages.
    _config(
        "32 questions, 32 pages",
        (32, 32, 32, 1024),
        *(PeakShare("fp32", backward, 0.6) for backward in (False, True)),
        grads=_GRADS,
    ),
    _config("1 question, 500 pages, ragged", (1, 500, 32, 1024), PeakShare("fp32", False, 0.5), ragged=True),
)


# Large problems, of which some pairs are checked.


class _Part(NamedTuple):
    query: Tensor
    document: Tensor
    query_lengths: Tensor | None
    document_lengths: Tensor | None
    paired: bool


def _elements(inputs: Inputs) -> int:
    query, document = inputs["query"], inputs["document"]
    pairs = query.shape[0] * (1 if inputs.get("paired") else document.shape[0])
    return int(pairs * query.shape[1] * document.shape[1])


def _expected(inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> list[Expected]:
    """Returns what is right of the last query with all documents, and of the last document with all queries."""
    return [_of_last(name, inputs, grads, cotangents) for name in _GRADS]


def _of_last(side: str, inputs: Inputs, grads: Sequence[str], cotangents: Sequence[Tensor]) -> Expected:
    assert not inputs.get("paired")
    axis = _GRADS.index(side)

    def right(dtype: torch.dtype) -> list[Tensor]:
        given: dict[str, Any] = {name: inputs.get(name) for name in _Part._fields} | {"paired": False}
        for name in (side, f"{side}_lengths"):
            given[name] = None if given[name] is None else given[name][-1:]
        given |= {name: given[name].detach().to(dtype).requires_grad_(name == side) for name in _GRADS}
        with torch.enable_grad():
            scores = formula(_Part(**given))
        if not grads:
            return [scores.detach()]
        flow = cotangents[0].narrow(axis, -1, 1).to(scores)
        (of_side,) = torch.autograd.grad(scores, given[side], flow)
        return [scores.detach(), *(of_side if name == side else of_side.new_empty(0) for name in grads)]

    def share(index: int, result: Tensor) -> Tensor:
        if index == 0:
            return result.narrow(axis, -1, 1)
        return result[-1:] if grads[index - 1] == side else result.new_empty(0)

    return Expected(share, right(inputs["query"].dtype), right(torch.float64))


PARTS = Parts(_elements, expected=_expected)
