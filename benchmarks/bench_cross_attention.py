"""`cross_attention` beside the peers of attention_peers.py."""

from __future__ import annotations

from typing import Any

import pytest
from attention_peers import peers

from mmkernels.bench.benchmark import measure
from mmkernels.bench.rows import Row
from mmkernels.ops.attention.cross_attention.spec import SPEC


@pytest.mark.rows_of(SPEC)
def test_cross_attention(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, peers(row.device))
