"""`merge_attention` beside the naive formula."""

from __future__ import annotations

from typing import Any

import pytest

from mmkernels.ops.merge_attention.spec import SPEC
from mmkernels.profiling.benchmark import Row, measure


@pytest.mark.rows_of(SPEC)
def test_merge_attention(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, ())
