"""`attention_weights` beside the naive formula."""

from __future__ import annotations

from typing import Any

import pytest

from mmkernels.ops.attention_weights.spec import SPEC
from mmkernels.profiling.benchmark import Row, measure


@pytest.mark.rows_of(SPEC)
def test_attention_weights(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, ())
