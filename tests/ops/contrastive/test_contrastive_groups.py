"""The contrastive ops over groups of ranks, real processes joined by gloo, against one process."""

from __future__ import annotations

import pytest
import ranks
import torch
from group_tools import Job, case_of, compute, together
from harness import SPECS, backends, compare, expected, inputs_in

OPS = ("info_nce", "sigmoid_contrastive", "retrieval_ranks")


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_as_one_process(world: int, dtype: torch.dtype) -> None:
    """Every case of the ops, its rows on ranks with uneven shares; a third of the backends on each number of ranks."""
    jobs = [
        Job(op, case.id, dtype, backend)
        for op in OPS
        for n, case in enumerate(SPECS[op].cases)
        for place, backend in enumerate(backends(SPECS[op], dtype))
        if backend != "reference" or (n + place + world) % 3 == 0
    ]
    parts = ranks.run(world, compute, world, jobs)
    for job, *some in zip(jobs, *parts, strict=True):
        spec, case = case_of(job)
        inputs = inputs_in(spec, case, dtype)
        ours = together(case, inputs, some)
        what = f"{job.backend} / {dtype} / {world} ranks"
        compare(spec, case, ours, *expected(spec, case, dtype), what)
        if dtype == torch.float64:
            truth = expected(spec, case, dtype)[1]
            for x, y in zip(ours.tensors, truth.tensors, strict=True):
                largest = y.double().abs().nan_to_num().amax() if y.numel() else 0.0
                torch.testing.assert_close(
                    x.double(), y.double(), rtol=1e-12, atol=1e-12 * float(largest), equal_nan=True
                )
