"""The block ops: a problem that is cut into blocks has the results of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, backends, check, draw
from ops.contrastive.block_tools import info_nce_by_blocks, ranks_by_blocks, sigmoid_by_blocks

from mmkernels.spec import Case

BY_BLOCKS: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce_by_blocks,
    "sigmoid_contrastive": sigmoid_by_blocks,
    "retrieval_ranks": ranks_by_blocks,
}
# Blocks of one row, and of all but one.
CUTS = ((1, 9, 40), (4, 5, 17, 100))


def _cases() -> list[tuple[str, Case]]:
    return [
        (op, case)
        for op in BY_BLOCKS
        for case in SPECS[op].cases
        if not draw(case).keys() & {"hard_texts", "hard_text_ids"}
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "case"), _cases(), ids=lambda x: x if isinstance(x, str) else x.id)
def test_blocks_are_the_whole(op: str, case: Case, dtype: torch.dtype) -> None:
    names = backends(SPECS[op], dtype)
    for backend in names:
        check(SPECS[op], case, dtype, backend, function=BY_BLOCKS[op](CUTS))
