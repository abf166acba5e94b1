"""`retrieval_ranks` beside the peers of contrastive_peers.py."""

from __future__ import annotations

from typing import Any

import contrastive_peers
import pytest

from mmkernels.bench.benchmark import measure
from mmkernels.bench.rows import Row
from mmkernels.ops.contrastive.retrieval_ranks.spec import SPEC


@pytest.mark.rows_of(SPEC)
def test_retrieval_ranks(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, contrastive_peers.RANKS, counts_products=True)
