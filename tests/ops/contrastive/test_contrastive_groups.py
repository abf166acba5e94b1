"""The contrastive ops over groups of ranks, real processes joined by gloo, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from group_tools import Job, case_of, compute, compute_in_pieces, small_pieces, together
from harness import SPECS, backends, compare, expected, inputs_in, name_of
from torch import Tensor

import mmkernels
from mmkernels.runtime import triton as gpu

OPS = ("info_nce", "sigmoid_contrastive", "retrieval_ranks")
_SMALL = 1e-3  # what is less, beside its terms, is 0 but for rounding: they cancel


def _worlds() -> list[Any]:
    """Returns numbers of ranks with dtypes: every pair, of which ``make test`` has float64 and one other for each."""
    quick = {1: None, 2: torch.bfloat16, 3: torch.float32, 4: torch.bfloat16}
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return [
        pytest.param(
            world,
            dtype,
            marks=() if dtype in (torch.float64, quick[world]) else pytest.mark.slow,
            id=f"{world}-{name_of(dtype)}",
        )
        for world in quick
        for dtype in dtypes
    ]


@pytest.mark.parametrize(("world", "dtype"), _worlds())
def test_as_one_process(world: int, dtype: torch.dtype) -> None:
    """Every case of the ops, its rows on ranks with uneven shares; a third of them with the naive blocks."""
    jobs = [
        Job(op, case.id, dtype, backend)
        for op in OPS
        for n, case in enumerate(SPECS[op].cases)
        for backend in backends(SPECS[op], dtype)
        if backend != "reference" or (n + world) % 3 == 0
    ]
    _check(world, jobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_in_pieces(dtype: torch.dtype) -> None:
    """A batch of which each rank's texts are more than one piece, and its images more than one chunk."""
    # Gradients that are 0 but for rounding, which depends on the size of a matrix product.
    without = {"aligned at scale 100"}
    jobs = [
        Job(op, case.id, dtype, next(x for x in backends(SPECS[op], dtype) if x in ("cpu", "chunked")))
        for op in OPS
        for case in SPECS[op].cases
        if case.id not in without
    ]
    _check(3, jobs, compute_in_pieces)


@pytest.mark.interpreted
@pytest.mark.skipif(not gpu.INTERPRETED, reason="Triton's kernels run here in their interpreter alone")
def test_blocks_in_triton() -> None:
    """One case of each kind: by index, by ids, false negatives left out, ties."""
    cases = {
        "info_nce": ("a square batch", "several captions an image, some without", "false negatives left out"),
        "sigmoid_contrastive": ("several captions an image",),
        "retrieval_ranks": ("ties",),
    }
    _check(2, [Job(op, case, torch.float32, "triton") for op, names in cases.items() for case in names])


_TIED = 60


def _tied(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a batch of few different rows, whose scores are whole numbers: many are equal to the last bit."""
    generator = torch.Generator().manual_seed(3)
    image, text, hard = torch.randint(-1, 2, (3, _TIED, 2), generator=generator).to(dtype)
    ids = torch.randint(30, (3, _TIED), generator=generator)
    more = {"hard_texts": hard, "hard_text_ids": ids[2]}  # the same on all ranks
    return {"image": image, "text": text, "image_ids": ids[0], "text_ids": ids[1], **more}


def _tied_statistics(rank: int, dtype: torch.dtype) -> list[list[float]]:
    rows = slice(*[(0, 7), (7, 40), (40, _TIED)][rank])
    mine = {name: x if name.startswith("hard") else x[rows] for name, x in _tied(dtype).items()}
    with small_pieces(5, 10):
        return [
            [
                float(x)
                for x in mmkernels.info_nce(**mine, logit_scale=scale, group=dist.group.WORLD, return_stats=True)[1]
            ]
            for scale in (2.0, -2.0)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_statistics_of_ties(dtype: torch.dtype) -> None:
    """Of equal scores the one with the lower index among all ranks' comes first, positives and negatives."""
    whole = [mmkernels.info_nce(**_tied(dtype), logit_scale=scale, return_stats=True)[1] for scale in (2.0, -2.0)]
    right = [[float(x) for x in stats] for stats in whole]
    assert ranks.run(3, _tied_statistics, dtype) == [right] * 3


def _far_from_zero(dtype: torch.dtype) -> list[Tensor]:
    """Returns features whose dots are exact: near 2**22, and little apart."""
    generator = torch.Generator().manual_seed(0)
    return [(256 + torch.randint(-1, 2, (40, 64), generator=generator)).to(dtype) for _ in range(2)]


def _scale_gradient(features: list[Tensor], group: Any = None, backend: str | None = None) -> float:
    scale = torch.tensor(2.0**-8, requires_grad=True)
    return float(torch.autograd.grad(mmkernels.info_nce(*features, scale, group=group, backend=backend), scale)[0])


def _scale_gradients(rank: int) -> list[float]:
    rows = slice(30 * rank, 30 + 10 * rank)
    mine = [x[rows] for x in _far_from_zero(torch.float32)]
    return [_scale_gradient(mine, dist.group.WORLD, backend) for backend in ("cpu", "chunked", "reference")]


def test_scale_gradient_of_dots_far_from_zero() -> None:
    """A constant that all dots share cancels only over the blocks of all ranks, so that none may round it."""
    right = _scale_gradient(_far_from_zero(torch.float64))
    for found in ranks.run(2, _scale_gradients):
        assert found == pytest.approx([right] * 3, rel=1e-6)


def _check(world: int, jobs: list[Job], run: Callable[..., Any] = compute) -> None:
    """Assert the ops' error budgets, and in float64 1e-12."""
    parts = ranks.run(world, run, world, jobs)
    for job, *some in zip(jobs, *parts, strict=True):
        spec, case = case_of(job)
        ours, right = together(case, inputs_in(spec, case, job.dtype), some), expected(spec, case, job.dtype)
        what = f"{job.backend} / {job.dtype} / {world} ranks"
        compare(spec, case, ours, *right, what)
        if job.dtype == torch.float64:
            scale = abs(
                float(inputs_in(spec, case).get("logit_scale", 1.0))
            )  # the size of logits, and of gradients' terms
            for x, y in zip(ours.tensors, right[1].tensors, strict=True):
                assert_equal(x.double(), y.double(), 1e-12, f"{job.op} / {case.id} / {what}", terms=max(scale, 1.0))


def assert_equal(x: Tensor, y: Tensor, tolerance: float, what: str, terms: float = 1.0) -> None:
    """Assert that the largest difference is at most the tolerance times y's largest magnitude.

    Args:
        terms: the size of the terms of which y may be a small difference.
    """
    assert torch.equal(x.isnan(), y.isnan()), what
    error, size = (float(z.nan_to_num().abs().max()) if z.numel() else 0.0 for z in (x - y, y))
    assert error <= tolerance * max(size, _SMALL * terms), f"{what}: {error} of {size}"
