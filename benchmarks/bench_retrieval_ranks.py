"""`retrieval_ranks` beside the peers of contrastive_peers.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contrastive_parts
import contrastive_peers
import pytest

from mmkernels.bench.benchmark import Row, measure
from mmkernels.ops.contrastive.retrieval_ranks import spec

SPEC = replace(spec.SPEC, parts=contrastive_parts.RANKS)


@pytest.mark.rows_of(SPEC)
def test_retrieval_ranks(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, contrastive_peers.RANKS, counts_products=True)
