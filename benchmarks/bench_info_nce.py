"""`info_nce` beside the peers of contrastive_peers.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contrastive_parts
import contrastive_peers
import pytest

from mmkernels.bench.benchmark import Row, measure
from mmkernels.ops.contrastive.info_nce import spec

SPEC = replace(spec.SPEC, parts=contrastive_parts.INFO_NCE)


@pytest.mark.rows_of(SPEC)
def test_info_nce(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, contrastive_peers.INFO_NCE, counts_products=True)
