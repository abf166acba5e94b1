"""Some rows of a product that still show every pair of its axes' values together, and what a case's axes are.

Most faults need one value or two together (an instruction set and a tail, a mask and a dtype), few need three. So
``make test`` takes rows that cover all pairs, ``make test-all`` the whole product; ``--seed`` draws other rows.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from harness import draw, settings
from torch import Tensor

from mmkernels import SpanMask
from mmkernels.spec import Case, Inputs

Row = TypeVar("Row")
Axes = Mapping[str, Hashable]


def cover(rows: Sequence[Row], axes: Callable[[Row], Axes], *, strength: int = 2, once: str | None = None) -> list[Row]:
    """Returns rows among which every combination of `strength` axes' values occurs that occurs among all `rows`.

    Greedy: the next row is one that adds the most combinations. Rows that add equally many are drawn with ``--seed``,
    and the same in every process.

    Args:
        axes: row -> its value on each axis; an axis may be absent.
        once: an axis whose every value must occur, in any combination.
    """
    combinations = []
    for row in rows:
        values = dict(axes(row))
        alone = {(once, values.pop(once))} if once is not None else set()
        combinations.append(alone.union(itertools.combinations(sorted(values.items(), key=lambda x: x[0]), strength)))
    order = list(range(len(rows)))
    random.Random(settings.seed).shuffle(order)
    queue = [(-len(combinations[place]), rank, place) for rank, place in enumerate(order)]
    heapq.heapify(queue)
    covered: set[Any] = set()
    chosen = []
    while queue:
        promised, rank, place = heapq.heappop(queue)
        added = len(combinations[place] - covered)
        if added == -promised and added:
            covered |= combinations[place]
            chosen.append(place)
        elif added:  # less than when it was queued
            heapq.heappush(queue, (-added, rank, place))
    return [rows[place] for place in sorted(chosen)]


def parametrize(
    names: str,
    rows: Sequence[tuple[Any, ...]],
    axes: Callable[[tuple[Any, ...]], Axes] | None = None,
    *,
    ids: Callable[[tuple[Any, ...]], str] | None = None,
    strength: int = 2,
    once: str | None = None,
) -> pytest.MarkDecorator:
    """As `pytest.mark.parametrize` of a whole product, of which all but the rows that `cover` chooses are slow.

    Args:
        axes: row -> its value on each axis; None: its arguments by name.
        ids: row -> its name.
    """
    words = [name.strip() for name in names.split(",")]
    by_name = lambda row: dict(zip(words, row, strict=True))
    fast = {id(row) for row in cover(rows, axes or by_name, strength=strength, once=once)}
    marked = [
        pytest.param(*row, marks=() if id(row) in fast else pytest.mark.slow, id=None if ids is None else ids(row))
        for row in rows
    ]
    return pytest.mark.parametrize(words, marked)


def traits(inputs: Inputs) -> dict[str, Hashable]:
    """Returns what kernels tell apart in a call: kinds of arguments, sizes that tiles do not divide, what is shared."""
    found = {name: _kind(x) for name, x in inputs.items() if x is not None}
    tensors = [x for x in inputs.values() if isinstance(x, Tensor) and x.dim() > 1]
    if tensors:
        first, *others = tensors
        found["width"] = (first.shape[-1] % 16 == 0, first.shape[-1] > 64)
        found["rows"] = first.shape[-2] if first.shape[-2] < 2 else first.shape[-2] > 32
        for dim in range(first.dim() - 2):
            found[f"shared {dim}"] = any(x.dim() == first.dim() and x.shape[dim] != first.shape[dim] for x in others)
    return found


def _kind(x: Any) -> Hashable:
    if isinstance(x, SpanMask):
        sees_none = bool((x.start >= x.end).any())
        by_query = tuple(bool((bound != bound[:, :1]).any()) for bound in (x.start, x.end))
        return "spans", x.key_valid is not None, x.shape[0] == 1, by_query, sees_none
    if isinstance(x, Tensor):
        ones = tuple(n if n < 2 else 2 for n in x.shape)
        return str(x.dtype), ones, x.is_contiguous()
    return (x > 0, x < 0, x >= 1) if isinstance(x, float) else repr(x)


def kinds(case: Case) -> dict[str, str]:
    """Returns what tracing depends on: the kind of each argument, not its sizes or values."""
    return {name: _kind_of_argument(x) for name, x in draw(case).items()}


def _kind_of_argument(x: Any) -> str:
    if isinstance(x, SpanMask):
        return "spans" if x.key_valid is None else "spans and key_valid"
    return f"{x.dim()}-D {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
