"""The C++ kernels of the contrastive ops beyond the specs' cases: shares of the work, threads, layouts, memory."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import draw, generator, name_of, peak_of, poison
from ops.contrastive.cpu_tools import WAYS, WIDE, Problem, case_of, check_kernel, each_way, of_sigmoid
from ops.contrastive.tools import features
from ops.cpu_tools import DTYPES, ISAS, each_dtype, each_isa, needs_kernels
from pairwise import cover, parametrize, traits
from torch import Generator, Tensor

from mmkernels import info_nce, retrieval_ranks, sigmoid_contrastive
from mmkernels.runtime import cpu
from mmkernels.spec import Case, Inputs, cast

pytestmark = needs_kernels

# Every cut: tasks of texts, blocks in a task, strips of images, panels in a strip, vectors in a panel.


def _problem(
    n: int, m: int, dim: int, *, queries: int = 0, hard: int = 0, ids: int = 0, scale: float = 4.0, **options: Any
) -> Problem:
    """Features of both sides; `ids`: of how many things they are, 0: of nothing known."""

    def problem(number: int) -> Inputs:
        g = generator(number)
        inputs = features(n, m, dim, queries, scale, seed=number)
        if hard:
            inputs["hard_texts"] = features(hard, dim=dim, seed=number + 1)["text"]
        if ids or n != m:
            sides = (("image", n), ("text", m))
            inputs |= {f"{side}_ids": torch.randint(ids or 9, (k,), generator=g) for side, k in sides}
        return inputs | {"reduction": "none"} | options

    return problem


_IMAGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 513)
_TEXTS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 255, 257)
_CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 130, 255, 257)
_QUERIES = [(n, m, dim, queries) for n, m, dim in ((1, 5, 6), (20, 20, 1), (65, 130, 17)) for queries in (2, 3, 7)]
CUTS = {
    "images": {f"{n} images": _problem(n, 70, 5) for n in _IMAGES},
    "texts": {f"{m} texts": _problem(20, m, 5) for m in _TEXTS},
    "channels": {f"{dim} channels": _problem(70, 40, dim) for dim in _CHANNELS},
    "hard texts": {f"{k} hard texts": _problem(70, 70, 9, hard=k) for k in _TEXTS},
    "queries": {f"{q} queries, {n} images": _problem(n, m, d, queries=q, hard=3) for n, m, d, q in _QUERIES},
}
TASKS = {
    **{f"tasks of {m} texts": _problem(300, m, 48, hard=20) for m in (1, 16, 17, 31, 64, 65, 129, 257)},
    "strips, tasks and blocks": _problem(300, 530, 40, ids=150),
    "pairs": _problem(530, 530, 33),
    "hard texts, smoothed": _problem(300, 300, 31, hard=600, label_smoothing=0.1),
    "a hard text, captions": _problem(100, 530, 24, hard=1, ids=80),
    "some hard texts, ignored": _problem(150, 150, 24, hard=40, ids=20, same_id="ignore", label_smoothing=0.1),
    "ignored in several strips": _problem(530, 530, 24, ids=90, same_id="ignore"),
    "many texts": _problem(3, 1500, 40),
    "several tasks for each thread": _problem(70, 2100, 24, ids=80, hard=50),
    "many images": _problem(1500, 3, 40),
    "many images, weighed": _problem(
        700, 11, 40, ids=14, label_smoothing=0.1, image_weight=0.3, return_stats=True, reduction="mean"
    ),
    "wide: shorter strips and blocks": _problem(300, 140, 1100, hard=20),
    "wide queries": _problem(40, 60, 300, queries=5),
    "deep: packed in steps": _problem(70, 140, 2103, hard=20, ids=30, label_smoothing=0.1, scale=20.0),
    "deep, ignored": _problem(20, 20, 2103, hard=140, ids=9, same_id="ignore", scale=20.0),
    "few images in steps": _problem(2, 300, 1101, hard=20, ids=3, scale=20.0),
    "few texts in steps": _problem(300, 2, 1101, hard=2, ids=3, scale=20.0),
    "queries in several strips": _problem(530, 150, 17, queries=2, ids=40, hard=20, label_smoothing=0.1),
    "one class": _problem(130, 140, 16, ids=1),
    "sharp": _problem(300, 300, 64, scale=100.0),
}


def _cases(problems: dict[str, Problem]) -> list[tuple[str, Case]]:
    found = [("info_nce", case_of(id, problem)) for id, problem in problems.items()]
    kept = {id: problem for id, problem in problems.items() if problem(0).get("same_id") != "ignore"}
    return found + [("sigmoid_contrastive", case_of(id, of_sigmoid(problem))) for id, problem in kept.items()]


CASES = {group: _cases(problems) for group, problems in CUTS.items()}
TASK_CASES = _cases(TASKS)


def _cut_axes(row: tuple[Any, ...]) -> dict[str, Any]:
    """Each size on each instruction set, in one of the two ops."""
    op, case, *way = row
    return {"op": op, "size": case.id, "way": tuple(way)}


_EACH_CUT = [(op, case, isa, dtype) for cases in CASES.values() for op, case in cases for isa, dtype in WAYS]
_PAIRS = {(op, case.id, isa, dtype) for op, case, isa, dtype in cover(_EACH_CUT, _cut_axes)}


@each_way
@pytest.mark.parametrize("group", CASES)
@pytest.mark.parametrize(
    "rest", [pytest.param(False, id="pairs"), pytest.param(True, id="rest", marks=pytest.mark.slow)]
)
def test_every_cut(group: str, isa: str, dtype: torch.dtype, rest: bool) -> None:
    with cpu.use_isa(isa):
        for op, case in CASES[group]:
            if ((op, case.id, isa, dtype) in _PAIRS) != rest:
                check_kernel(case, dtype, op=op)


@parametrize(
    "op, case, isa, dtype, threads",
    [(op, case, *way, threads) for op, case in TASK_CASES for way in WAYS for threads in (2, 5)],
    lambda row: traits(draw(row[1])) | {"op": row[0], "way": row[2:4], "threads": row[4], "case": row[1].id},
    ids=lambda row: f"{row[0]}-{row[1].id}-{row[2]}-{name_of(row[3])}-{row[4]}",
    once="case",
)
def test_tasks_strips_and_blocks(op: str, case: Case, isa: str, dtype: torch.dtype, threads: int) -> None:
    """Tasks of other sizes for each number of threads, and the same budget."""
    with cpu.use_isa(isa):
        check_kernel(case, dtype, op=op, threads=threads)


def _whole(g: Generator, *shape: int) -> Tensor:
    """Small whole numbers: scores are exact in every dtype and order of summation, and many are equal."""
    return torch.randint(-2, 3, shape, generator=g).double()


@cache
def _ranked(seed: int = 0) -> tuple[list[tuple[Inputs, Any]], list[tuple[Inputs, Tensor]]]:
    """Problems of `info_nce` and of `retrieval_ranks`, and what statistics and ranks they have."""
    g = generator(seed)
    losses, retrievals = [], []
    sizes = ((300, 530, 11, 0, 40), (530, 140, 6, 3, 0), (7, 1500, 40, 0, 1), (1, 1, 2, 0, 3))
    for n, m, dim, queries, hard in sizes:
        image = _whole(g, n, queries, dim) if queries else _whole(g, n, dim)
        inputs: Inputs = {"image": image, "text": _whole(g, m, dim), "logit_scale": torch.tensor(2.0).double()}
        inputs |= {f"{side}_ids": torch.randint(60, (k,), generator=g) for side, k in (("image", n), ("text", m))}
        if hard:
            inputs["hard_texts"] = _whole(g, hard, dim)
        losses.append((inputs, info_nce(**inputs, return_stats=True, backend="reference")[1]))
    shapes = ((300, 530, 11), (1, 1500, 3), (1500, 1, 3), (65, 129, 1), (257, 127, 1100))
    for n, m, dim in (*shapes, (70, 130, 2103), (2, 300, 701), (300, 2, 701), (1, 1, 33)):
        query, gallery, target = _whole(g, n, dim), _whole(g, m, dim), torch.randint(m, (n,), generator=g)
        inputs = {"query": query, "gallery": gallery, "target": target}
        retrievals.append((inputs, retrieval_ranks(**inputs, backend="reference")))
    return losses, retrievals


@each_isa
@each_dtype
def test_ranks_are_exact_in_every_tile(isa: str, dtype: torch.dtype) -> None:
    """With as many equal scores on both sides of each cut as there can be."""
    losses, retrievals = _ranked()
    torch.set_num_threads(2)
    with cpu.use_isa(isa):
        for inputs, want in losses:
            _, found = info_nce(**cast(inputs, dtype, always_wide=WIDE), return_stats=True, backend="cpu")
            torch.testing.assert_close(found, want, rtol=1e-6, atol=0.0, equal_nan=True, check_dtype=False)
        for inputs, want in retrievals:
            assert torch.equal(retrieval_ranks(**cast(inputs, dtype), backend="cpu"), want)


# Threads and processes.


def _step(inputs: Inputs, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Both losses of a problem, and all their gradients."""
    inputs = cast(inputs, dtype, always_wide=WIDE)
    names = [name for name in inputs if name in ("image", "text", "logit_scale", "hard_texts")]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    losses = info_nce(**inputs | leaves, backend="cpu")
    found = [*losses, *torch.autograd.grad(sum(x.sum() for x in losses), list(leaves.values()))]
    leaves.pop("hard_texts", None)
    ids = {name: x for name, x in inputs.items() if name.endswith("ids")}
    loss = sigmoid_contrastive(**leaves, logit_bias=-4.0, **ids, backend="cpu")
    return [x.detach() for x in (*found, loss, *torch.autograd.grad(loss, list(leaves.values())))]


@each_way
@pytest.mark.parametrize("id", ["strips, tasks and blocks", "hard texts, smoothed", "queries in several strips"])
def test_again_the_same_bits(id: str, isa: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    with cpu.use_isa(isa):
        first = _step(TASKS[id](0), dtype)
        for _ in range(3):
            poison()
            assert all(torch.equal(a, b) for a, b in zip(_step(TASKS[id](0), dtype), first, strict=True))


# Layouts.


@parametrize(
    "isa, dtype, sizes",
    list(itertools.product(ISAS, DTYPES, [(20, 35, 2103), (2, 35, 601)])),
    lambda row: dict(zip(("isa", "dtype", "sizes"), row, strict=True)),
    ids=lambda row: f"{row[0]}-{name_of(row[1])}-{row[2][2]}",
)
def test_steps_of_rows_in_any_layout(isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Products in steps of channels copy what they can't read in place: the same bits as of whole rows."""
    inputs = cast(_problem(*sizes, hard=5, ids=3)(0), dtype, always_wide=WIDE)
    with cpu.use_isa(isa):
        want = _step(inputs, dtype)
        for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[:, 1::2]):
            views = {name: view(x) if x.dim() == 2 else x for name, x in inputs.items() if isinstance(x, Tensor)}
            assert not views["image"].is_contiguous()
            for found, true in zip(_step(inputs | views, dtype), want, strict=True):
                assert torch.equal(found, true)


# How much is multiplied, and what it takes of memory.


def _multiplied(run: Any) -> int:
    before = cpu.multiplied()
    run()
    return cpu.multiplied() - before


@each_way
def test_products(isa: str, dtype: torch.dtype) -> None:
    """One to learn the loss, one more for gradients, one for each side's: 4 and 3 a step where both are wanted."""
    n, m, k, dim = 320, 320, 64, 48
    inputs = cast(_problem(n, m, dim, hard=k)(0), dtype, always_wide=WIDE)
    inputs["logit_bias"] = torch.tensor(-3.0)

    def products(f: Any, names: tuple[str, ...], wanted: set[str]) -> float:
        leaves = {name: inputs[name].detach().requires_grad_(name in wanted) for name in names}

        def run() -> None:
            loss = f(**leaves, backend="cpu")
            if wanted:
                torch.autograd.grad(loss, [leaves[name] for name in names if name in wanted])

        return _multiplied(run) / (2 * n * m * dim)

    pair, hard = ("image", "text", "logit_scale"), ("image", "text", "logit_scale", "hard_texts")
    more = 1 + k / m  # the texts, and the hard ones
    with cpu.use_isa(isa):
        for wanted, want in (((), 1), (pair[2:], 2), (pair[1:], 3), (pair[:1], 3), (pair[:2], 4), (pair, 4)):
            assert products(info_nce, pair, set(wanted)) == want
        for wanted, want in (((), more), (pair[:1], 3 * more), (pair[1:2], 2 * more + 1), (hard[3:], 2 * more + k / m)):
            assert products(info_nce, hard, set(wanted)) == pytest.approx(want, rel=1e-12)
        assert products(info_nce, hard, set(hard)) == pytest.approx(4 * more, rel=1e-12)
        with_bias = (*pair, "logit_bias")
        for wanted, want in (((), 1), (with_bias[2:], 1), (pair[1:], 2), (pair[:1], 2), (with_bias, 3)):
            assert products(sigmoid_contrastive, with_bias, set(wanted)) == want
        x, y = inputs["image"], inputs["text"]
        ranks = _multiplied(lambda: retrieval_ranks(x, y, torch.arange(n), backend="cpu"))
        assert 2 * n * (m + 1) * dim <= ranks <= 2 * n * (m + 16) * dim  # the targets' own scores come first
        few = _multiplied(lambda: retrieval_ranks(x[:2], y, torch.arange(2), backend="cpu"))
        assert few == 2 * 2 * (m + 1) * dim
        ragged = _multiplied(lambda: info_nce(x[:70, :17], y[:70, :17], 3.0, backend="cpu"))
        assert 2 * 70 * 70 * 17 <= ragged <= 2 * 128 * 70 * 18


def test_memory_of_few_deep_rows() -> None:
    """Nothing is padded to the images of a panel, which for 4 rows would take 16 times the features."""
    x, y = (F.normalize(torch.randn(4, 65_536), dim=1).requires_grad_() for _ in range(2))
    torch.set_num_threads(1)
    first = lambda: torch.autograd.grad(info_nce(x[:, :600], y[:, :600], 20.0, backend="cpu"), (x, y))
    train = lambda: torch.autograd.grad(info_nce(x, y, 20.0, backend="cpu"), (x, y))
    assert peak_of(train, first) < 2 * x.numel() * 4 + 4e6


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dim"), [(8192, 64), (8192, 500), (20_000, 16)])
def test_memory(n: int, dim: int) -> None:
    """The logits alone would take 268 MB, and 1.6 GB."""
    torch.set_num_threads(2)
    x, y = (F.normalize(torch.randn(n, dim), dim=1).requires_grad_() for _ in range(2))

    def train(loss: Any, *numbers: float) -> None:
        torch.autograd.grad(loss(x, y, *numbers, backend="cpu"), (x, y))

    # Threads, and their scratch.
    first = lambda: torch.autograd.grad(info_nce(x[:600], y[:600], 20.0, backend="cpu"), (x, y))
    gradients = 2 * x.numel() * 4
    assert peak_of(lambda: train(info_nce, 20.0), first) - gradients < 12e6
    if n < 10_000:
        # Two pairs of gradients: from the forward pass, then scaled.
        assert peak_of(lambda: train(sigmoid_contrastive, 20.0, -10.0), first) - 2 * gradients < 12e6
        assert peak_of(lambda: retrieval_ranks(x, y, torch.arange(n), backend="cpu"), first) < 12e6
