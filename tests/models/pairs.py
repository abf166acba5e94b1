"""Some rows of a product that show every pair of values together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def parametrize(names: str, rows: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """As `pytest.mark.parametrize`, with all rows slow but some among which every pair of two names' values occurs."""
    pairs = [{(i, j, row[i], row[j]) for i, j in itertools.combinations(range(len(row)), 2)} for row in rows]
    missing, fast = set().union(*pairs), set()
    while missing:
        best = max(range(len(rows)), key=lambda place: len(pairs[place] & missing))
        missing -= pairs[best]
        fast.add(best)
    marked = [pytest.param(*row, marks=() if i in fast else pytest.mark.slow) for i, row in enumerate(rows)]
    return pytest.mark.parametrize(names, marked)
