"""`info_nce` beside the peers of contrastive_peers.py."""

from __future__ import annotations

from typing import Any

import contrastive_peers
import pytest

from mmkernels.bench.benchmark import measure
from mmkernels.bench.rows import Row
from mmkernels.ops.contrastive.info_nce.spec import SPEC


@pytest.mark.rows_of(SPEC)
def test_info_nce(benchmark: Any, row: Row) -> None:
    measure(benchmark, row, contrastive_peers.INFO_NCE, counts_products=True)
