"""TokenReducer, each kind on packed and batched images, beside formulas of one image in plain PyTorch."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reducer_formulas import (
    Formula,
    Size,
    diverse,
    image_by_image,
    perceive,
    pool,
    pooled_to,
    select,
    shuffle,
    tome,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import mmkernels
from mmkernels.nn import PixelShuffleProjector, Reduced, TokenReducer

F64 = torch.float64
C = 16
PACKED: list[Size] = [(1, 4, 7), (2, 3, 4), (1, 1, 26)]
BATCHED: Size = (1, 4, 7)


def _fitted(reducer: TokenReducer, x: Tensor, size: Size, more: Tensor | None) -> Tensor:
    """A budget of 12 tokens beside the protected ones, of the images above."""
    out = {(1, 4, 7): (1, 3, 4), (2, 3, 4): (2, 2, 3), (1, 1, 26): (1, 1, 12)}[size]
    return pooled_to(*out)(reducer, x, size, more)


def _fitted_and_shuffled(reducer: TokenReducer, x: Tensor, size: Size, more: Tensor | None) -> Tensor:
    """Windows of 2 x 2 within 6 tokens: the image that would have 8 is pooled first, the third has 13."""
    out = {(1, 4, 7): (1, 4, 6), (2, 3, 4): (2, 2, 4), (1, 1, 26): (1, 1, 12)}[size]
    return shuffle(reducer, pooled_to(*out)(reducer, x, size, more), out, more)


FORMULAS: dict[str, Formula] = {
    "none": lambda reducer, x, size, _: x,
    "pool:2": pool,
    "pool:<={12}": _fitted,
    "shuffle:2": shuffle,
    "shuffle:3": shuffle,
    "shuffle:<={6}": _fitted_and_shuffled,
    "perceiver:4": perceive,
    "perceiver:<={4}": perceive,
    "tome:0.6": tome,
    "tome:20": tome,
    "tome:<={25}": tome,
    "select:0.3": select,
    "select:7": select,
    "select:<={25}": select,
    "diverse:0.2": diverse,
    "diverse:<={5}": diverse,
}
"""What a reducer is named, with a budget that protected tokens are added to -> what it does with an image."""


def _reducer(text: str, protect: int) -> TokenReducer:
    name, _, budget = text.partition("{")
    text = f"{name}{int(budget[:-1]) + protect}" if budget else text
    torch.manual_seed(3)
    reducer = TokenReducer.parse(text, C, protect=protect)
    if reducer.kind == "perceiver":  # a block does what six do
        reducer.module.blocks = reducer.module.blocks[:1]
    return reducer


def _inputs(reducer: TokenReducer, grid: list[Size]) -> tuple[Tensor, Tensor | None]:
    """Returns packed x and scores, float64. Protected tokens have the worst scores: they stay all the same."""
    x = torch.randn(sum(map(prod, grid)) + len(grid) * reducer.protect, C, dtype=F64)
    if not reducer.uses_scores:
        return x, None
    scores = torch.rand(len(x), dtype=F64) + 0.5
    for at in range(reducer.protect):
        scores[torch.tensor([0, *map(prod, grid)])[:-1].cumsum(0) + reducer.protect * torch.arange(len(grid)) + at] = (
            torch.nan if at else -torch.inf
        )
    return x, scores


def _gradients(y: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    flow = torch.cos(torch.arange(y.numel(), dtype=F64)).view(y.shape).to(y.dtype)
    return torch.autograd.grad(y, leaves, flow)


@pytest.mark.parametrize("protect", [0, 2])
@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
@pytest.mark.parametrize("text", FORMULAS)
def test_equals_the_formula(text: str, batched: bool, protect: int) -> None:
    """In float64, and in float32 on the default and the reference backend; gradients of x and the weights too."""
    reducer = _reducer(text, protect)
    grid = [BATCHED] * 3 if batched else PACKED
    x, scores = _inputs(reducer, grid)
    leaves = [x.requires_grad_(), *reducer.double().parameters()]
    images = image_by_image(reducer, FORMULAS[text], x, grid, scores)
    want = torch.cat(images)
    truth = _gradients(want, leaves)

    def check(dtype: torch.dtype, **tolerance: float) -> None:
        reducer.to(dtype)
        given = x.detach().to(dtype).requires_grad_()
        form = (3, -1) if batched else (len(given),)
        rows = None if scores is None else scores.to(dtype).view(form)
        y = reducer(given.view(3, -1, C) if batched else given, BATCHED if batched else grid, scores=rows)
        counts = tuple(map(len, images))
        assert reducer.tokens(BATCHED if batched else grid) == (counts[:1] if batched else counts)
        assert y.lengths == (counts[0] if batched else counts)
        assert y.x.shape == ((3, counts[0], C) if batched else (sum(counts), C))
        torch.testing.assert_close(y.x.double().view(want.shape), want, **tolerance)
        found = [z.double() for z in _gradients(y.x.view(want.shape), [given, *reducer.parameters()])]
        for z, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(z, expected, **tolerance)

    check(F64, rtol=1e-9, atol=1e-9)
    check(torch.float32, rtol=1e-4, atol=2e-5)
    with mmkernels.use_backend("reference"):
        check(torch.float32, rtol=1e-4, atol=2e-5)


GRIDS: dict[bool, list[Any]] = {
    False: [[(2, 4, 6), (3, 3, 4)], [(3, 7, 9), (2, 4, 5)], [(4, 11, 5), (5, 5, 3)]],
    True: [(2, 4, 6), (3, 7, 9), (4, 11, 5)],
}


REPEATED = ("shuffle:3", "perceiver:<={4}", "tome:20", "select:7", "select:<={25}", "diverse:<={5}")
"""For a compiler the same code as the kind before it."""


@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=pytest.mark.slow) if text.startswith("shuffle:<=") else text
        for text in FORMULAS
        if text not in REPEATED
    ],
)
def test_compiles_whole(text: str, batched: bool) -> None:
    """Sizes that change become symbols: the third grid takes the graph of the second."""
    torch._dynamo.reset()
    reducer, graphs = _reducer(text, 1), CompileCounter()
    compiled = torch.compile(reducer, backend=graphs, fullgraph=True)
    for grid in GRIDS[batched]:
        tokens = sum(prod(size) + 1 for size in ([grid] if batched else grid))
        x = torch.randn(*([2] * batched), tokens, C, requires_grad=True)
        scores = torch.randn(x.shape[:-1]) if reducer.uses_scores else None
        y, z = reducer(x, grid, scores=scores), compiled(x, grid, scores=scores)
        torch.testing.assert_close(y, z)
        leaves = [x, *reducer.parameters()]
        torch.testing.assert_close(_gradients(z.x, leaves), _gradients(y.x, leaves))
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["pool:2", "shuffle:2", "perceiver:4", "tome:0.6", "select:0.3", "diverse:0.2"])
def test_sixteen_bit_and_autocast(text: str, dtype: torch.dtype) -> None:
    reducer = _reducer(text, 1)
    x, scores = _inputs(reducer, PACKED)
    x = x.to(dtype).float()  # so that the same tokens are alike
    want = reducer(x, PACKED, scores=scores).x
    with torch.autocast("cpu", dtype):
        mixed = reducer(x, PACKED, scores=scores).x
    y = reducer.to(dtype)(x.to(dtype), PACKED, scores=scores).x
    assert y.dtype == dtype
    for found in (mixed, y):
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)


# What is returned beside the tokens.


@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
def test_the_grid(batched: bool) -> None:
    """Of kinds that keep one, in the form in which it was given."""
    x = torch.randn(2, 24, C) if batched else torch.randn(30, C)
    grid: Any = (1, 4, 6) if batched else [(1, 4, 6), (2, 1, 3)]
    for text, want in {
        "none": grid,
        "pool:2": (1, 2, 3) if batched else ((1, 2, 3), (2, 1, 2)),
        "pool:<=4": (1, 2, 2) if batched else ((1, 2, 2), (2, 1, 2)),
        "pool:<=24": grid,
        "shuffle:<=3": (1, 1, 3) if batched else ((1, 1, 3), (2, 1, 1)),
        "perceiver:3": None,
        "tome:3": None,
        "diverse:3": None,
    }.items():
        assert TokenReducer.parse(text, C)(x, grid).grid == want, text
    tensor = TokenReducer("pool", window=2)(x, torch.tensor(grid)).grid
    assert torch.equal(tensor, torch.tensor((1, 2, 3) if batched else ((1, 2, 3), (2, 1, 2))))


@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
def test_sizes_and_assignment_of_tome(batched: bool) -> None:
    reducer = TokenReducer("tome", keep=9, protect=1)
    x, grid = torch.randn(*([3] * batched), 25, C), (1, 4, 6)
    out = reducer(x, grid if batched else [grid])
    assert out.positions is None
    assert out.sizes is not None
    assert out.assignment is not None
    assert out.sizes.shape == out.x.shape[:-1]
    assert torch.equal(out.sizes.sum(-1), torch.full(x.shape[:-2], 25.0))
    back = mmkernels.unmerge_tokens(out.x, out.assignment)
    alone = mmkernels.unmerge_tokens(out.sizes[..., None], out.assignment)[..., 0] == 1
    assert torch.equal(back[alone], x[alone])
    assert bool(alone[..., 0].all())


@pytest.mark.parametrize("text", ["select:5", "diverse:5"])
@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
def test_positions_of_select(text: str, batched: bool) -> None:
    reducer = TokenReducer.parse(text, C, protect=2)
    x = torch.randn(*([3] * batched), 26, C)
    out = reducer(x, (1, 4, 6) if batched else [(1, 4, 6)], scores=torch.rand(x.shape[:-1]))
    assert out.sizes is out.assignment is None
    assert out.positions is not None
    assert torch.equal(x.flatten(0, -2)[out.positions], out.x)
    first = out.positions[..., :2] - 26 * torch.arange(3)[:, None] if batched else out.positions[:2]
    assert first.tolist() == ([[0, 1]] * 3 if batched else [0, 1])


def test_a_metric_says_what_is_alike() -> None:
    grid = [(1, 3, 4), (1, 2, 5)]
    x, metric = torch.randn(26, C, dtype=F64), torch.randn(26, 3, dtype=F64)
    reducer = TokenReducer("tome", keep=0.6, protect=2)
    want = torch.cat(image_by_image(reducer, tome, x, grid, metric))
    torch.testing.assert_close(reducer(x, grid, metric=metric).x, want)
    assert not torch.equal(reducer(x, grid).x, want)
    reducer = TokenReducer("select", keep=2, scorer="diverse", protect=2)
    places = image_by_image(reducer, lambda r, y, *_: diverse(r, y, (1, 1, 1), None), metric, grid)
    out = reducer(x, grid, metric=metric)
    torch.testing.assert_close(metric[out.positions], torch.cat(places))


@pytest.mark.parametrize("method", ["determinant", "distance"])
def test_the_method_of_diversity(method: str) -> None:
    reducer, x = TokenReducer("select", keep=6, scorer="diverse", method=method), torch.randn(24, C)
    index = mmkernels.select_diverse(x, [24], 6, method=method)
    assert torch.equal(reducer(x, [(1, 4, 6)]).x, x[index.sort().values])


@pytest.mark.parametrize("scorer", ["scores", "diverse"])
@pytest.mark.parametrize("batched", [False, True], ids=["packed", "batched"])
@pytest.mark.parametrize("merge_rest", [True, "visionzip"])
def test_merging_the_rest_leaves_protected_tokens_alone(merge_rest: Any, batched: bool, scorer: str) -> None:
    reducer = TokenReducer("select", budget=7, scorer=scorer, protect=2, merge_rest=merge_rest)
    x, scores, metric = torch.randn(3, 26, C), torch.rand(3, 26), torch.randn(3, 26, 4)
    keep_scores = scores[:, 2:]
    if scorer == "diverse":
        index = mmkernels.select_diverse(metric[:, 2:], 24, 5, quality=scores[:, 2:])
        keep_scores = torch.zeros(3, 24).scatter(1, index, 1.0)
    want = mmkernels.select_tokens(x[:, 2:], 24, 5, keep_scores, merge_rest=merge_rest, metric=metric[:, 2:])
    if not batched:
        x, scores, metric = (z.flatten(0, 1) for z in (x, scores, metric))
    out = reducer(x, (1, 4, 6) if batched else [(1, 4, 6)] * 3, scores=scores, metric=metric)
    y, positions = out.x.view(3, 7, C), out.positions
    assert positions is not None
    assert torch.equal(y[:, :2], x.view(3, 26, C)[:, :2])
    torch.testing.assert_close(y[:, 2:], want.x)
    rows = want.positions % 24 + 2 + 26 * torch.arange(3)[:, None]
    assert torch.equal(positions.view(3, 7)[:, 2:], rows)
    assert torch.equal(positions.view(3, 7)[:, :2], 26 * torch.arange(3)[:, None] + torch.arange(2))


@pytest.mark.parametrize("mode", ["max", "bilinear", "bicubic"])
def test_the_mode_of_pooling(mode: str) -> None:
    x, grid = torch.randn(24, C), [(1, 4, 6)]
    want = mmkernels.pool_tokens(x, grid, size=(1, 2, 3), mode=mode)[0]
    torch.testing.assert_close(TokenReducer("pool", budget=7, mode=mode)(x, grid).x, want)
    if mode == "max":
        torch.testing.assert_close(TokenReducer("pool", window=2, mode=mode)(x, grid).x, want)


def test_windows_over_frames() -> None:
    x, grid = torch.randn(24, C), [(3, 2, 4)]
    out = TokenReducer("pool", window=(2, 1, 2))(x, grid)
    volume = x.view(3, 2, 4, C).permute(3, 0, 1, 2)[None]
    want = F.avg_pool3d(volume, (2, 1, 2), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(out.x, want[0].flatten(1).T)
    assert TokenReducer("shuffle", C, window=(3, 2, 2))(x, grid).grid == ((1, 1, 2),)


def test_options_reach_the_modules() -> None:
    shuffled: Any = TokenReducer("shuffle", C, window=2, norm=None, layers=1, bias=False).module
    assert isinstance(shuffled, PixelShuffleProjector)
    assert [tuple(p.shape) for p in shuffled.parameters()] == [(C, 4 * C)]
    resampler: Any = TokenReducer("perceiver", C, budget=9, protect=1, depth=2, num_heads=2).module
    assert (len(resampler.blocks), len(resampler.latents)) == (2, 8)


def test_no_image() -> None:
    for text in FORMULAS:
        reducer = _reducer(text, 1)
        x = torch.randn(0, C)
        out: Reduced = reducer(x, [], scores=torch.randn(0) if reducer.uses_scores else None)
        assert out.x.shape == (0, C), text
        assert out.lengths == reducer.tokens([]) == (), text
