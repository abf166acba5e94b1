"""Solves the conditions of a mask function for the span of each query, in O(L log L)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 2**30  # greater than any key's index; two numbers below it fit in one int64


class UnreadableError(Exception):
    """The mask function has no reading, or its mask has a query without a span; the message names the part."""


class Spans(NamedTuple):
    """Query i sees key j if ``start <= j < end`` and ``key_valid[j]``. Only true if all of `exact` are."""

    start: Tensor  # int64 [B or 1, Lq or 1]
    end: Tensor  # int64 [B or 1, Lq or 1]
    key_valid: Tensor | None = None  # bool [B or 1, Lk]
    exact: tuple[Tensor, ...] = ()  # bool scalars


class Numbers(NamedTuple):
    """A number for each query or key: int64 ``[B or 1, L or 1]``. `ascending`: they never fall, by construction."""

    values: Tensor
    ascending: bool = False


class Relation(NamedTuple):
    """``key <compare> query`` for every pair."""

    key: Numbers
    compare: str  # "le", "lt", "ge", "gt" or "eq"
    query: Numbers


def solve(
    relations: tuple[Relation, ...], queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], solved: tuple[Spans, ...]
) -> Spans:
    """Returns the spans of the keys for which all conditions hold; see `mmkernels.integrations.transformers.symbols`.

    Args:
        queries: bool ``[B or 1, Lq or 1]`` each; where it is False, the query sees nothing.
        keys: bool ``[B or 1, Lk]`` each; where it is False, the key is hidden from all queries.
        solved: further spans.
    """
    parts = [*solved, *(Spans(torch.zeros_like(q, dtype=torch.int64), q * _FAR) for q in queries)]
    run = None  # an equality divides the keys into runs; in each of them other numbers (positions) may start again
    for relation in relations:
        if relation.compare == "eq":
            alive = [end > start for start, end, *_ in parts]
            parts.append(_equal(relation, run, alive))
            run = run or relation
    parts += [_ordered(relation, run) for relation in relations if relation.compare != "eq"]
    if not parts:
        everything = torch.zeros(1, 1, dtype=torch.int64)
        parts = [Spans(everything, everything + _FAR)]
    spans = parts[0]
    for other in parts[1:]:
        spans = _intersection(spans, other)
    for valid in keys:
        spans = hide_keys(spans, valid)
    return spans


def hide_keys(spans: Spans, valid: Tensor) -> Spans:
    return spans._replace(key_valid=valid if spans.key_valid is None else spans.key_valid & valid)


def _search(sorted_keys: Tensor, query: Tensor, right: bool) -> Tensor:
    """Returns, for each query's number, the first index of its row with a number >= it (`right`: > it)."""
    batch = max(sorted_keys.shape[0], query.shape[0])
    keys, numbers = (x.expand(batch, -1).contiguous() for x in (sorted_keys, query))
    return torch.searchsorted(keys, numbers, right=right)


def _equal(relation: Relation, run: Relation | None, alive: list[Tensor]) -> Spans:
    """Returns the keys with the query's number. They must be a run for each query that all of `alive` mark."""
    relation, exact = _within(relation, run)
    keys, query = relation.key.values, relation.query.values
    if relation.key.ascending:
        return Spans(_search(keys, query, right=False), _search(keys, query, right=True))
    ordered, place = keys.sort(dim=-1, stable=True)  # [B or 1, Lk]
    low, high = _search(ordered, query, right=False), _search(ordered, query, right=True)
    some = high > low
    place = place.expand(low.shape[0], -1)
    last = place.shape[1] - 1
    start = place.gather(1, low.clamp(max=last)) * some
    end = (place.gather(1, (high - 1).clamp(min=0)) + 1) * some
    no_gap = end - start == high - low
    for sees_a_key in alive:
        no_gap = no_gap | ~sees_a_key
    return Spans(start, end, exact=(*exact, no_gap.all()))


def _ordered(relation: Relation, run: Relation | None) -> Spans:
    """Returns the keys whose number is below or above the query's number."""
    relation, exact = _within(relation, run)
    keys = relation.key.values
    if not relation.key.ascending:
        exact = (*exact, (keys.diff(dim=-1) >= 0).all())
    place = _search(keys, relation.query.values, right=relation.compare in ("le", "gt"))
    if relation.compare in ("le", "lt"):
        return Spans(torch.zeros_like(place), place, exact=exact)
    return Spans(place, torch.full_like(place, keys.shape[1]), exact=exact)


def _within(relation: Relation, run: Relation | None) -> tuple[Relation, tuple[Tensor, ...]]:
    """Returns the relation within the query's run, and the conditions that make it exact.

    Each number becomes (number of the run) * 2^32 + number, so that it is ordered by run first.
    """
    if run is None or relation.key.ascending:
        return relation, ()
    pairs = (relation.key.values, run.key.values), (relation.query.values, run.query.values)
    key, query = (Numbers((of_run << 32) + number) for number, of_run in pairs)
    fits = tuple((x.abs() < _FAR).all() for pair in pairs for x in pair)
    return Relation(key, relation.compare, query), fits


def _intersection(a: Spans, b: Spans) -> Spans:
    both = Spans(torch.maximum(a.start, b.start), torch.minimum(a.end, b.end), a.key_valid, a.exact + b.exact)
    return both if b.key_valid is None else hide_keys(both, b.key_valid)


def union(a: Spans, b: Spans) -> Spans:
    if a.key_valid is not None or b.key_valid is not None:
        raise UnreadableError("the mask function joins masks of which one hides single keys")
    a_empty, b_empty = a.end <= a.start, b.end <= b.start
    start = torch.where(a_empty, b.start, torch.where(b_empty, a.start, torch.minimum(a.start, b.start)))
    end = torch.where(a_empty, b.end, torch.where(b_empty, a.end, torch.maximum(a.end, b.end)))
    touching = torch.maximum(a.start, b.start) <= torch.minimum(a.end, b.end)
    return Spans(start, end, exact=(*a.exact, *b.exact, (a_empty | b_empty | touching).all()))
