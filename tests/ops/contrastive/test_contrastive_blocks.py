"""The block ops: a problem that is cut into blocks has the results of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import SPECS, backends, check, draw, each_backend, name_of
from ops.contrastive.block_tools import info_nce_by_blocks, ranks_by_blocks, sigmoid_by_blocks
from ops.contrastive.cpu_tools import case_of
from ops.contrastive.tools import features
from pairwise import parametrize, traits
from torch import Tensor

from mmkernels import info_nce
from mmkernels.ops.contrastive.formula import NO_PARTNERS
from mmkernels.ops.contrastive.info_nce import block as softmax
from mmkernels.ops.contrastive.info_nce.merging import losses, merge
from mmkernels.ops.contrastive.retrieval_ranks import block as retrieval
from mmkernels.ops.contrastive.sigmoid_contrastive import block as sigmoid
from mmkernels.spec import Case, Inputs, cast

BY_BLOCKS: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce_by_blocks,
    "sigmoid_contrastive": sigmoid_by_blocks,
    "retrieval_ranks": ranks_by_blocks,
}
CUTS = ((1, 9, 40), (4, 5, 17, 100))  # blocks of one row among them
NAN, INF = math.nan, math.inf

# What a backend computes: float64 where it can, else what its kernels take.
WAYS = [
    ("chunked", torch.float64),
    ("chunked", torch.bfloat16),
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("reference", torch.float32),
    ("triton", torch.float32),
]


def _rows() -> list[tuple[str, Case, str, torch.dtype]]:
    """The specs' cases without hard texts, which belong to no block."""
    return [
        (op, case, *way)
        for op in BY_BLOCKS
        for case in SPECS[op].cases
        if not draw(case).keys() & {"hard_texts", "hard_text_ids"}
        for way in WAYS
        if way[0] in backends(SPECS[op], way[1])
    ]


@pytest.mark.interpreted
@parametrize(
    "op, case, backend, dtype",
    _rows(),
    lambda row: {"op": row[0], "way": row[2:]} | traits(draw(row[1])),
    ids=lambda row: f"{row[0]}-{row[1].id}-{row[2]}-{name_of(row[3])}".replace(" ", "_"),
)
def test_blocks_are_the_whole(op: str, case: Case, backend: str, dtype: torch.dtype) -> None:
    """In float64 to 1e-13 and less, of the largest value."""
    check(SPECS[op], case, dtype, backend, function=BY_BLOCKS[op](CUTS))


MODES: dict[str, Inputs] = {
    "pairs": {},
    "positive": {"image_ids": torch.arange(23) // 3, "text_ids": torch.arange(23) // 4},
    "ignore": {"image_ids": torch.arange(23) % 4, "text_ids": torch.arange(23) % 5, "same_id": "ignore"},
}


@each_backend("info_nce")
@pytest.mark.parametrize(
    ("name", "mode", "bad"), [("image", "pairs", NAN), ("image", "positive", INF), ("text", "ignore", NAN)]
)
def test_a_bad_feature(backend: str, name: str, mode: str, bad: float) -> None:
    """Rows that see it are lost, and the others as good as ever; ranks know it too."""

    def problem(number: int) -> Inputs:
        inputs = {x: y.abs() for x, y in features(23, dim=9, seed=number).items()} | MODES[mode]
        inputs[name][11, -1] = bad
        return inputs

    rows = case_of(f"{bad} in {name} of {mode}", lambda number: problem(number) | {"reduction": "none"}, ())
    check(SPECS["info_nce"], rows, torch.float32, backend, function=info_nce_by_blocks(CUTS))
    narrow = cast(problem(0), torch.float32)
    _, stats = info_nce_by_blocks(CUTS)(**narrow, return_stats=True, backend=backend)
    _, want = info_nce(**narrow, return_stats=True, backend=backend)
    torch.testing.assert_close(stats, tuple(want), equal_nan=True)


@each_backend("info_nce")
@pytest.mark.parametrize("scale", [1e7, -1e30, 1e-30, -1e-45])
def test_any_scale(backend: str, scale: float) -> None:
    """As good as the whole: rounding in a product of d channels moves a logit by no more than d * eps * scale."""
    inputs = cast(features(33, dim=8, scale=scale), torch.float32)

    def step(function: Callable[..., Tensor], inputs: Inputs, backend: str) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs.values()]
        loss = function(*leaves, backend=backend)
        # Beyond 1e4 each softmax is all or nothing, and a gradient one difference of features, times the scale.
        grads = torch.autograd.grad(loss, leaves)
        unit = max(1.0, abs(scale))
        return [x.detach().double() / size for x, size in zip((loss, *grads), (unit, unit, unit, 1.0), strict=True)]

    found = step(info_nce_by_blocks(CUTS), inputs, backend)
    torch.testing.assert_close(found, step(info_nce, cast(inputs, torch.float64), "reference"), rtol=1e-4, atol=2e-6)


@each_backend("info_nce")
def test_equal_scores_in_several_blocks_rank_by_index(backend: str) -> None:
    """Copies of a few images and texts, whose scores tie with the best positives' wherever these are."""
    few = cast(features(5, dim=24, seed=3), torch.float32)
    if backend == "triton":  # in the interpreter a library's products are exact for whole numbers alone
        few = {name: (8 * x).round() for name, x in few.items()}
    order = torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))
    inputs = {"image": few["image"][order], "text": few["text"][order.flip(0)], "logit_scale": torch.tensor(0.125)}
    _, found = info_nce_by_blocks(CUTS)(**inputs, return_stats=True, backend=backend)
    if backend in ("cpu", "triton"):  # a library's product may round equal rows apart
        _, want = info_nce(**inputs, return_stats=True, backend=backend)
        torch.testing.assert_close(found, tuple(want), rtol=0, atol=0)
    assert float(found[2]) > 0


@each_backend("retrieval_ranks")
@pytest.mark.parametrize("dim", [7, 40, 1300])
def test_equal_items_in_several_pieces_rank_by_index(backend: str, dim: int) -> None:
    """Pieces of one item, of few and of many, whose products may be computed in other ways."""
    distinct, copies = 30, torch.randint(30, (120,), generator=torch.Generator().manual_seed(dim))
    inputs = cast(features(distinct, dim=dim, seed=dim), torch.float32)
    if backend == "triton":  # in the interpreter a library's products are exact for whole numbers alone
        inputs = {name: (2 * dim**0.5 * x).round() for name, x in inputs.items()}
    query, gallery = inputs["image"], inputs["text"][copies]
    target = torch.randint(120, (distinct,), generator=torch.Generator().manual_seed(2))
    scores = (query.double() @ inputs["text"].double().mT)[:, copies]
    best = scores.gather(1, target[:, None])
    same = scores == best
    want = torch.where(same, torch.arange(120) < target[:, None], scores > best).sum(1)
    cuts = (10,), (1, 4, 11, 60)
    found = ranks_by_blocks(cuts)(query, gallery, target, backend=backend)
    if backend not in ("cpu", "triton"):  # a library's product may round equal rows apart
        ties = same.sum(1)
        assert bool(((found - want).abs() < ties).all())
        return
    assert torch.equal(found, want)
    query[3, 2] = NAN
    assert torch.equal(ranks_by_blocks(cuts)(query, gallery, target, backend=backend)[3], torch.tensor(119))


# Blocks by themselves.


def _block(first_text: int, **change: Any) -> dict[str, Any]:
    inputs = cast(features(6, 9, dim=12), torch.float32)
    return {**inputs, "image_ids": None, "text_ids": None, "first_text": first_text} | change


def _best(first_text: int) -> softmax.BestArguments:
    return softmax.BestArguments(**_block(first_text), ignore=False)


def _sums(first_text: int) -> softmax.BlockArguments:
    n, m = torch.arange(6), torch.arange(9)
    best = {"image_best": n.float() / 9, "image_index": n - 2, "text_best": -m.float() / 9, "text_index": m + 2**33}
    return softmax.BlockArguments(**_block(first_text), ignore=False, smooth=True, **best)


def _backward(first_text: int, needed: bool = True) -> softmax.BackwardArguments:
    states = [
        torch.stack([torch.ones(n), torch.full((n,), 20.0), torch.ones(n), torch.full((n,), 9.0)]) for n in (6, 9)
    ]
    return softmax.BackwardArguments(
        **_block(first_text), ignore=False, ranked=False, label_smoothing=0.1, middle=0.0, image_state=states[0],
        text_state=states[1], grad_image_loss=torch.linspace(-1, 1, 6), grad_text_loss=None, need_image=needed,
        need_text=needed, need_logit_scale=needed,
    )  # fmt: skip


def _sigmoid(first_text: int, needed: bool = True) -> sigmoid.BlockArguments:
    return sigmoid.BlockArguments(
        **_block(first_text), logit_bias=torch.tensor(-1.0), divisor=7.0, keep_image=needed, keep_text=needed,
        keep_logit_scale=needed, keep_logit_bias=needed,
    )  # fmt: skip


OPS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "info_nce_best": (softmax.BEST, _best),
    "info_nce_block": (softmax.BLOCK, _sums),
    "info_nce_block_backward": (softmax.BACKWARD, _backward),
    "sigmoid_contrastive_block": (sigmoid.BLOCK, _sigmoid),
}


def _without_references(block: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns a block's results with the log-sum-exp in place of reference and sum."""
    sums = [torch.cat([(x[0] + x[1].log2())[None], x[2:]]) for x in block[:2]]
    return (*sums, *block[2:])


@each_backend("info_nce")
@pytest.mark.parametrize("name", OPS)
def test_where_the_partners_are(backend: str, name: str) -> None:
    """Any first text that leaves none is one; of those that leave some, each says another thing."""
    op, make = OPS[name]
    nobody = op(make(NO_PARTNERS), backend)
    for first in (6, -9, 7, -10, 2**31 - 1, -(2**31), 2**40):
        torch.testing.assert_close(op(make(first), backend), nobody, rtol=0, atol=0)
    found = [op(make(first), backend) for first in (-8, -4, 0, 3, 5)]
    for first, results in zip((-8, -4, 0, 3, 5), found, strict=True):
        want = op(make(first), "reference")
        if op is softmax.BLOCK:
            results, want = (_without_references(x) for x in (results, want))
        # What depends on scores, whose unit is the backend's own, is left out: of the best positives all.
        compared = {"info_nce_best": 0, "info_nce_block": 2}.get(name, 3) if backend == "triton" else None
        torch.testing.assert_close(results[:compared], want[:compared], rtol=1e-4, atol=1e-5)
        assert not all(torch.equal(x, y) for x, y in zip(results, nobody, strict=True))


@each_backend("info_nce")
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_outputs_are_as_a_graph_knows_them(backend: str, needed: bool, dtype: torch.dtype) -> None:
    """Wide and contiguous, whatever the features' dtype, and empty where none is wanted."""
    query = torch.randn(5, 8, dtype=dtype)
    ranks = retrieval.BlockArguments(query, query[:3], query, torch.arange(5))
    calls = [
        (softmax.BEST, _best(0)),
        (softmax.BLOCK, _sums(0) if needed else _sums(0)._replace(**dict.fromkeys(_sums(0)._fields[-4:]))),
        (softmax.BACKWARD, _backward(0, needed)),
        (sigmoid.BLOCK, _sigmoid(0, needed)),
        (retrieval.BLOCK, ranks),
    ]
    for op, args in calls:
        features_of = {"image", "text"} & set(args._fields)
        args = args._replace(**{name: getattr(args, name).to(dtype) for name in features_of})
        found, want = (x if isinstance(x, tuple) else (x,) for x in (op(args, backend), op.fake(args)))
        layout = lambda x: (x.shape, x.dtype, x.stride())
        assert [layout(x) for x in found] == [layout(x) for x in want], op.name


# Sums.


def _column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_sums_of_nothing_add_nothing() -> None:
    nothing, some = _column(-INF, 0, 0, 0, 0, 0), _column(-140.5, 3, 1, 2, -2, 5)
    for pair in ((nothing, some), (some, nothing)):
        assert torch.equal(merge(*pair), some)
    assert torch.equal(merge(nothing, nothing), nothing)
    merged = merge(some, _column(900, 2, 0, 1, 0, 1))
    torch.testing.assert_close(merged, _column(900, 2, 1, 3, -2, 6))


def test_nan_stays_in_sums() -> None:
    bad = _column(-INF, NAN, 1, 2, NAN, 0)
    for sums in (merge(bad, _column(3, 1, 0, 2, 0, 0)), merge(_column(NAN, NAN, 1, 2, 0, 0), bad)):
        assert bool(sums[1].isnan())
        assert bool(losses(sums, torch.tensor(2.0), 0.0).isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_sums(dtype: torch.dtype) -> None:
    """A row of two classes, one of three with a second positive, one without a positive, one class alone."""
    dots = torch.tensor([[0.5, -0.25, 0.0], [1.0, 0.75, -0.5], [0.1, 0.2, 0.3], [0.7, 0.0, 0.0]], dtype=torch.float64)
    rows = []
    for row, (positives, classes) in zip(dots, ((1, 2), (2, 3), (0, 3), (1, 1)), strict=True):
        logits = 30.0 * row[:classes] * math.log2(math.e)
        top = logits.max().round()
        rows.append([float(top), float(torch.exp2(logits - top).sum()), positives, classes])
        rows[-1] += [float(row[:positives].sum()), float(row[:classes].sum())]
    found = losses(torch.tensor(rows, dtype=dtype).mT, torch.tensor([30.0]), 0.25)
    assert found.dtype == torch.float64
    for n, (positives, classes) in enumerate(((1, 2), (2, 3))):
        target = torch.full((classes,), 0.25 / classes, dtype=torch.float64)
        target[:positives] += 0.75 / positives
        want = -(target * (30.0 * dots[n, :classes]).log_softmax(0)).sum()
        torch.testing.assert_close(found[n], want, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    assert found[2:].tolist() == [0.0, 0.0]
