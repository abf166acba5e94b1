"""`attention_weights` beside the naive formula."""

from __future__ import annotations

from typing import Any

import pytest

from mmkernels.bench.benchmark import measure
from mmkernels.bench.rows import Row
from mmkernels.ops.attention.attention_weights.spec import SPEC


@pytest.mark.rows_of(SPEC)
def test_attention_weights(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, ())
